"""Rewrites judged by the clock: each cluster, as it was and as it is now, timed in place on this machine.

A cluster is cut out of both graphs (`fxconv.clusters`), put into the model's own dtype, and both sides run turn about
on the same inputs at the example's sizes. A rewrite stays only where the 95 % interval of the ratio lies above 1. Equal
clusters (the blocks of a stage) are timed once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxconv.axes import shape_of
from fxconv.capture import Captured
from fxconv.clusters import Cutter, Pair
from fxconv.emit import Cluster, Emitted
from fxconv.expr import Value
from fxconv.probe import InputSpec, shapes_at
from fxconv.state import State
from fxconv.timing import paired

logger = logging.getLogger("fxconv")

Timing = dict[str, "float | int"]


@dataclass(frozen=True)
class Loser:
    """A rewrite that was taken back: the cluster, the original nodes, and the times (see `fxconv.timing.paired`)."""

    cluster: Cluster
    nodes: tuple[str, ...]
    timing: Timing

    @property
    def reason(self) -> str:
        """For the report."""
        t = self.timing
        low, high = t["low"], t["high"]
        return f"does not pay: measured original ÷ rewritten {t['ratio']:.2f} ({low:.2f} to {high:.2f}, 95 %)"


@dataclass
class Judge:
    """Times clusters and takes back those that do not win.

    Attributes:
        captured: the captured graph.
        state: the searched state; losers are restored in it.
        emit: writes the state's graph anew.
        symbols: an example value for each dynamic size.
        budget_s: seconds for each distinct cluster.
    """

    captured: fx.GraphModule
    state: State
    emit: Callable[[], Emitted]
    symbols: Mapping[sympy.Symbol, int]
    budget_s: float = 0.4
    losers: list[Loser] = field(default_factory=list)
    _known: dict[Hashable, Timing] = field(default_factory=dict)

    def run(self, emitted: Emitted) -> Emitted:
        """The graph with only the rewrites that win; ``losers`` then holds the others.

        Taking one back gives its neighbours other clusters, which are timed in turn; what was taken back stays so, and
        the rounds end.
        """
        while True:
            cutter = Cutter(self.state, self.captured, emitted)
            lost: list[Value] = []
            for cluster in emitted.clusters:
                pair = cutter.cut(cluster)
                if not self._may_return(pair):
                    continue
                timing = self.time(pair, cluster)
                if timing["low"] <= 1.0:
                    self.losers.append(Loser(cluster, pair.nodes, timing))
                    lost.append(cluster.value)
                    logger.info("%s is taken back: %s", cluster.node, self.losers[-1].reason)
            if not lost:
                return emitted
            for value in lost:
                self.state.restore(value)
            emitted = self.emit()

    def _may_return(self, pair: Pair) -> bool:
        """Whether the target allows the operators of the original."""
        names = set(pair.nodes)
        return all(o.allowed for o in self.state.originals.values() if o.node.name in names)

    def time(self, pair: Pair, cluster: Cluster) -> Timing:
        """Both sides of a cluster, timed; above 1 the rewrite is faster."""
        dtype = self.state.originals[cluster.value].node.meta["val"].dtype
        shapes = shapes_at(pair.inputs, self.symbols)
        args = [_input(spec, shape, dtype) for spec, shape in zip(pair.inputs, shapes, strict=True)]
        before, after = _narrowed(pair.original, dtype), _narrowed(pair.replacement, dtype)
        key = (_signature(before), _signature(after), tuple(_shape(a) for a in args))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = paired(before, after, args, budget_s=self.budget_s, min_pairs=15, max_pairs=2000)
        return found


def example_sizes(captured: Captured, hints: dict[sympy.Symbol, int]) -> dict[sympy.Symbol, int]:
    """A value for each symbol: that of the user's example, which export does not always keep (a batch of 1 becomes
    2)."""
    sizes = dict(hints)
    given = [a for a in pytree.tree_leaves((captured.args, captured.kwargs)) if isinstance(a, torch.Tensor)]
    vals = [n.meta.get("val") for n in captured.gm.graph.nodes if n.op == "placeholder"]
    tensors = [v for v in vals if isinstance(v, torch.Tensor)]
    if len(given) != len(tensors):
        return sizes
    for val, example in zip(tensors, given, strict=True):
        for size, value in zip(shape_of(val), example.shape, strict=False):
            if isinstance(size, sympy.Symbol) and size in sizes:
                sizes[size] = int(value)
    return sizes


def _input(spec: InputSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    if spec.kind != "tensor":
        return shape[0]
    return torch.randn(shape).to(dtype) if spec.dtype.is_floating_point else torch.zeros(shape, dtype=spec.dtype)


def _shape(x: Any) -> Hashable:
    return tuple(x.shape) if isinstance(x, torch.Tensor) else x


def _narrowed(gm: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A side of a cluster in the model's dtype; the cutter makes float64 ones, for proofs."""

    def narrow(x: object) -> object:
        return dtype if x is torch.float64 else x

    for node in gm.graph.nodes:
        node.args = tuple(narrow(a) for a in node.args)
        node.kwargs = {k: narrow(a) for k, a in node.kwargs.items()}
    return fx.GraphModule(gm, gm.graph).to(dtype).eval()


def _signature(gm: fx.GraphModule) -> Hashable:
    """What a side does, up to the values of its constants."""
    index = {node: i for i, node in enumerate(gm.graph.nodes)}

    def plain(x: object) -> Hashable:
        if isinstance(x, fx.Node):
            return ("node", index[x])
        if isinstance(x, (tuple, list)):
            return tuple(plain(y) for y in x)
        return str(x)

    rows: list[Hashable] = []
    for node in gm.graph.nodes:
        target: Hashable = str(node.target)
        if node.op == "get_attr":
            value = getattr(gm, str(node.target))
            target = (tuple(value.shape), tuple(value.stride()))
        elif node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            target = (repr(module), tuple(tuple(p.shape) for p in module.parameters()))
        kwargs = tuple(sorted((k, plain(v)) for k, v in node.kwargs.items()))
        rows.append((node.op, target, plain(node.args), kwargs))
    return tuple(rows)


def whole(before: Callable[..., Any], after: Callable[..., Any], captured: Captured, budget_s: float = 3.0) -> Timing:
    """The model against its rewriting, on the user's example; empty where there is none."""
    if not captured.args and not captured.kwargs:
        return {}
    return paired(before, after, captured.args, captured.kwargs, budget_s=budget_s, min_pairs=9)
