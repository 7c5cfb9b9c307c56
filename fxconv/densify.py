"""Dense prediction: a classifier as a fully convolutional network (Caffe's net surgery; OverFeat, Sermanet et al.,
2014).

`densify` is not a law, because it changes what comes out: on an image of the training size the result gives the same
scores, ``(N, K, 1, 1)``; on a larger one a map of scores, one per window of the training size, at the network's stride.

Per node of the graph: what slides (convolution, pooling, elementwise functions) stays; flatten → Linear becomes a
convolution over the whole window, a Linear behind it 1×1; a pooling to a fixed size becomes one of stride 1, with the
convolution behind it dilated. A window's scores are those of the original on that window where no layer pads: padding
shows zeros at a window's border where the larger image goes on, so interior windows differ. By how much is measured.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fxconv.capture import capture
from fxconv.cost import CostModel, Price
from fxconv.emit import module_path
from fxconv.errors import FxconvError, VerificationError
from fxconv.lift import Lifter
from fxconv.profiles import load_profile
from fxconv.report import Capture, Cost, Remark, Report, Rewrite, attach
from fxconv.resample import matrix
from fxconv.shapes import propagate
from fxconv.spelling import ELEMENTWISE, Barrier, Op, canonical
from fxconv.state import State
from fxconv.steps import TARGETS

aten = torch.ops.aten

_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_POOL = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}

_MAX_POOL = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}

_DOUBLE = 2**24
"""Weights up to which the check runs in float64."""


class DensifyError(FxconvError):
    """The model has a layer that does not slide; the message names it and says what to do."""


@dataclass(frozen=True)
class Grid:
    """What a tensor of the original is in the sliding one.

    Attributes:
        size: its spatial size for one window.
        stride: how far apart its entries are in the input.
        spread: how far apart a window's entries are in the sliding tensor (more than 1 behind a pooling to a fixed
            size).
        flat: whether the original has flattened it to (N, features).
        pool: a pooling still to be written, as one matrix per dim, merged into the Linear behind it; else ().
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    spread: tuple[int, ...]
    flat: bool = False
    pool: tuple[torch.Tensor, ...] = field(default=(), compare=False)

    @property
    def single(self) -> bool:
        return all(s == 1 for s in self.size)


def densify(model: nn.Module, x: torch.Tensor, *, verify: bool = True) -> fx.GraphModule:
    """The model as a fully convolutional network.

    Args:
        model: a classifier in eval mode: ``(N, C, *size)`` to ``(N, K)``.
        x: an example of the training size.
        verify: whether to run both on ``x`` and on a larger image, window by window.

    Returns:
        A GraphModule from ``(N, C, *larger)`` to ``(N, K, *map)``, one score per window of size ``result.window`` (the
        training size) at ``result.window_stride``, and one more where a window hangs over the edge by pixels that the
        original does not read; weights are shared with the model. `fxconv.report` reads from it what was converted,
        and how far windows of a larger image differ where the network pads.

    Raises:
        DensifyError: a layer does not slide (attention over all positions, a gate computed from the whole image).
        VerificationError: the result is not what the model gives on a window, although nothing pads.
    """
    captured = capture(model, (x,), None, dynamic_shapes=({0: torch.export.Dim.AUTO},), mode="export")
    slider = _Slider(captured.gm, captured.barriers, tuple(int(s) for s in x.shape[2:]))
    gm = slider.run()
    gm.window, gm.window_stride = slider.window, slider.out.stride  # type: ignore[assignment]
    verification: dict[str, Any] = {"status": "not run", "reason": "verify=False"}
    advice: list[Remark] = []
    if verify:
        verification, advice = _verify(model, gm, x, slider)
    status = "confirmed" if verify else "not run"
    before, after = _Prices(captured.gm, captured.barriers, x), _Prices(gm, captured.barriers, x)
    report = Report(
        model=type(model).__name__,
        capture=Capture(captured.how, tuple(captured.notes)),
        rewrites=tuple(
            replace(r, before=before.of(r.nodes), after=after.of(r.new_nodes), verdict={"status": status}) for r in slider.rewrites
        ),
        advice=tuple(advice),
        cost_before=before.total,
        cost_after=after.total,
        verification=verification,
    )
    result: fx.GraphModule = attach(gm, report)
    return result


class _Prices:
    """What the operators of a graph cost at the training size, as fxconv's cost model has it."""

    def __init__(self, gm: fx.GraphModule, barriers: Mapping[str, str], x: torch.Tensor) -> None:
        from fxconv.transform import _roots

        propagate(gm, (x,), dynamic="none")
        lifter = Lifter(gm, barriers)
        lifter.run()
        self._state = State(lifter, CostModel(load_profile("default"), {}), TARGETS[None], "latency")
        self._state.load(_roots(gm, lifter))
        self.total = _cost(self._state.honest_total())

    def of(self, nodes: tuple[str, ...]) -> Cost:
        originals = self._state.originals.values()
        return _cost(sum((o.price for o in originals if o.node.name in nodes), Price()))


def _cost(p: Price) -> Cost:
    return Cost(round(p.macs), round(p.params), round(p.launches), round(p.bytes), p.seconds)


class _Slider:
    """Writes the sliding graph of a captured one."""

    def __init__(self, gm: fx.GraphModule, barriers: Mapping[str, str], window: tuple[int, ...]) -> None:
        self.gm, self.barriers, self.window = gm, barriers, window
        self.nd = len(window)
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.grids: dict[fx.Node, Grid] = {}
        self.rewrites: list[Rewrite] = []
        self.padded: list[str] = []
        self.rounded = False  # a pooling was merged into a Linear, whose weights were rounded for it
        self.out = Grid(window, (1,) * self.nd, (1,) * self.nd)

    def run(self) -> fx.GraphModule:
        for node in self.gm.graph.nodes:
            self._node(node)
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        self.graph.lint()
        return fx.GraphModule(self.gm, self.graph, type(self.gm).__name__)

    def _node(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.new[node] = self.graph.node_copy(node)
            self.grids[node] = Grid(self.window, (1,) * self.nd, (1,) * self.nd)
        elif node.op == "output":
            self._output(node)
        elif node.op == "get_attr" or not any(n in self.grids for n in node.all_input_nodes):
            if all(n in self.new for n in node.all_input_nodes):
                self.new[node] = self.graph.node_copy(node, lambda n: self.new[n])
        elif isinstance(node.meta.get("val"), (torch.SymInt, int)):
            return  # a size of the window: what asks for it is rewritten
        else:
            self._tensor(node)

    def _output(self, node: fx.Node) -> None:
        def one(n: fx.Node) -> fx.Node:
            grid = self.grids.get(n)
            if grid is None or grid.pool or any(s != 1 for s in grid.spread):
                raise self._refuse(n, "an output")
            self.out = grid
            return self.new[n]

        (out,) = node.args
        if isinstance(out, (tuple, list)) and len(out) == 1:
            (out,) = out
        if not isinstance(out, fx.Node):
            raise DensifyError("the model returns several things: take the part of it that gives one tensor of scores")
        self.graph.output(fx.map_arg(node.args[0], one))

    def _refuse(self, node: fx.Node, what: str) -> DensifyError:
        return DensifyError(
            f"{node.name}: {what} does not slide over a larger image. densify wants convolutions, pooling, elementwise "
            "functions, flatten and Linear; take the part of the model before it"
        )

    # -- one operator -------------------------------------------------------------------------------------------------

    def _tensor(self, node: fx.Node) -> None:
        op = canonical(node, self.gm, self.barriers)
        name = op.name if isinstance(op, Op) else ""
        source = next(n for n in node.all_input_nodes if n in self.grids)
        grid = self.grids[source]
        if node.target is operator.getitem and _opname(source).startswith("adaptive_max_pool"):
            self._set(node, self.new[source], grid)  # which has become a pooling without indices
        elif node.target is operator.getitem or isinstance(op, Barrier) and self._pointwise(node):
            self._same(node)
        elif isinstance(op, Barrier):
            self._barrier(node, source, grid, op)
        elif name == "linear":
            self._linear(node, source, grid)
        elif name in ("conv", "avg_pool", "max_pool") and not grid.flat:
            self._window(node, op, grid)
        elif name == "adaptive_avg_pool":
            self._adaptive(node, source, grid, tuple(op.attrs["output_size"]))
        elif name == "mean" and tuple(op.attrs["dims"]) == tuple(range(2, 2 + self.nd)) and not grid.flat:
            self._adaptive(node, source, grid, (1,) * self.nd, flat=not op.attrs["keepdim"])
        elif name == "reshape":
            self._reshape(node, source, grid)
        elif name in ("add", "sub", "mul", "div", "neg", "identity", "relu", "leaky_relu", "prelu", "batch_norm"):
            self._same(node)
        elif name == "cat" and op.attrs["dim"] == 1 and not (grid.flat and not grid.single):
            self._same(node)
        else:
            raise self._refuse(node, f"'{name}'")

    @staticmethod
    def _pointwise(node: fx.Node) -> bool:
        # Torch does not tag all of them.
        return torch.Tag.pointwise in getattr(node.target, "tags", ()) or _opname(node) in ELEMENTWISE

    def _barrier(self, node: fx.Node, source: fx.Node, grid: Grid, op: Barrier) -> None:
        """Softmax over the channels slides; what else is not affine does not, as far as is known."""
        target = _opname(node)
        softmax = target in ("softmax", "log_softmax", "_softmax", "_log_softmax")
        if softmax and int(node.args[1]) % source.meta["val"].dim() == 1:  # type: ignore[arg-type]
            new = self.graph.node_copy(node, lambda n: self.new[n])
            new.args = (new.args[0], 1, *new.args[2:])
            self._set(node, new, grid)
        elif target == "amax" and self._over_positions(node):
            flat = not (len(node.args) > 2 and node.args[2])
            self._adaptive(node, source, grid, (1,) * self.nd, flat=flat, maximum=True)
        elif target.startswith("adaptive_max_pool") and not self._indices_read(node):
            size: Any = node.args[1]
            wanted = (size,) * self.nd if isinstance(size, int) else tuple(size)
            self._adaptive(node, source, grid, wanted, maximum=True)
        elif target == "max_pool2d_with_indices" or not op.reason:
            raise self._refuse(node, f"'{target}'")
        else:
            raise self._refuse(node, f"'{target}' ({op.reason})")

    def _over_positions(self, node: fx.Node) -> bool:
        dims = node.args[1] if len(node.args) > 1 else ()
        rank = 2 + self.nd
        return sorted(int(d) % rank for d in dims) == list(range(2, rank))  # type: ignore[arg-type, union-attr]

    @staticmethod
    def _indices_read(node: fx.Node) -> bool:
        """Whether anything reads where a pooling found its maxima."""
        return any(u.target is operator.getitem and u.args[1] != 0 and u.users for u in node.users)

    def _set(self, node: fx.Node, new: fx.Node, grid: Grid) -> None:
        new.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        self.new[node], self.grids[node] = new, grid

    def _same(self, node: fx.Node) -> None:
        """An operator that treats every position alike."""
        grids = [self.grids[n] for n in node.all_input_nodes if n in self.grids]
        if any(g.size != grids[0].size or g.stride != grids[0].stride or g.flat != grids[0].flat for g in grids):
            raise self._refuse(node, f"combining windows of {' and '.join(str(g.size) for g in grids)}")
        if any(g.pool for g in grids):
            raise self._refuse(node, "something between a pooling to an uneven size and its Linear")
        new = self.graph.node_copy(node, lambda n: self.new[n])
        if grids[0].flat:
            new.args = tuple(
                self._behind_channels(a, new_a) if isinstance(a, fx.Node) and a not in self.grids else new_a
                for a, new_a in zip(node.args, new.args, strict=True)
            )
            if not grids[0].single and any(isinstance(a, fx.Node) and a not in self.grids for a in node.args):
                raise self._refuse(node, "a weight per position")
        self._set(node, new, grids[0])

    def _behind_channels(self, old: fx.Node, new: Any) -> Any:
        """A constant over the features, made to broadcast over the map; BatchNorm's stay."""
        val = old.meta.get("val")
        if not isinstance(val, torch.Tensor) or val.dim() == 0 or any("batch_norm" in str(u.target) for u in old.users):
            return new
        shape = [*([1] * (2 - val.dim())), *val.shape, *([1] * self.nd)]
        with self.graph.inserting_after(new):
            return self.graph.call_function(aten.reshape.default, (new, [int(s) for s in shape]))

    def _window(self, node: fx.Node, op: Op, grid: Grid) -> None:
        if any(s != 1 for s in grid.spread) or grid.pool:
            raise self._refuse(node, "a window behind a pooling to a fixed size")
        stride = tuple(op.attrs["stride"])
        if op.attrs.get("transposed"):
            raise self._refuse(node, "a transposed convolution")
        padding = [p if isinstance(p, tuple) else (p, p) for p in op.attrs["padding"]]
        if any(lo or hi for lo, hi in padding) or op.attrs.get("ceil_mode"):
            self.padded.append(node.name)
        new = self.graph.node_copy(node, lambda n: self.new[n])
        size = tuple(int(s) for s in node.meta["val"].shape[2:])
        self._set(node, new, Grid(size, tuple(a * b for a, b in zip(grid.stride, stride, strict=True)), grid.spread))

    def _adaptive(
        self,
        node: fx.Node,
        source: fx.Node,
        grid: Grid,
        wanted: tuple[int, ...],
        flat: bool = False,
        maximum: bool = False,
    ) -> None:
        if any(s != 1 for s in grid.spread) or grid.pool or grid.flat:
            raise self._refuse(node, "a pooling to a fixed size behind another")
        if wanted == grid.size:
            self._set(node, self.new[source], Grid(grid.size, grid.stride, grid.spread, flat))
            return
        if all(n % o == 0 for n, o in zip(grid.size, wanted, strict=True)):
            kernel = [n // o for n, o in zip(grid.size, wanted, strict=True)]
            pool = _MAX_POOL if maximum else _POOL
            new = self.graph.call_function(pool[self.nd], (self.new[source], kernel, [1] * self.nd))
            spread = tuple(1 if o == 1 else k for o, k in zip(wanted, kernel, strict=True))
            self._set(node, new, Grid(wanted, grid.stride, spread, flat))
            return
        if maximum:
            raise self._refuse(node, f"a maximum over uneven parts ({grid.size} to {wanted})")
        pools = tuple(matrix("adaptive_avg", (), n, o) for n, o in zip(grid.size, wanted, strict=True))
        self._set(node, self.new[source], Grid(wanted, grid.stride, grid.spread, flat, pools))

    def _reshape(self, node: fx.Node, source: fx.Node, grid: Grid) -> None:
        before, after = source.meta["val"].shape, node.meta["val"].shape
        if len(after) == 2 and (grid.flat or after[1] == math.prod(before[1:])):
            self._set(node, self.new[source], Grid(grid.size, grid.stride, grid.spread, True, grid.pool))
        elif grid.flat and grid.single and len(after) == 2 + self.nd and all(s == 1 for s in after[2:]):
            self._set(node, self.new[source], Grid(grid.size, grid.stride, grid.spread))
        elif tuple(before) == tuple(after):
            self._set(node, self.new[source], grid)
        elif grid.single and not grid.flat and before[1] == after[1] and math.prod(after[2:]) == 1 and self._regrouped(node):
            self._set(node, self.new[source], grid)  # squeezed dim by dim
        else:
            raise self._refuse(node, f"a view from {tuple(before)} to {tuple(after)}")

    def _regrouped(self, node: fx.Node) -> bool:
        """Whether all that reads a view is another view."""
        ops = [canonical(u, self.gm, self.barriers) for u in node.users]
        return all(isinstance(op, Op) and op.name == "reshape" for op in ops)

    def _linear(self, node: fx.Node, source: fx.Node, grid: Grid) -> None:
        weight_node = node.args[1]
        assert isinstance(weight_node, fx.Node)
        if not grid.flat or weight_node.op != "get_attr":
            raise self._refuse(node, "a Linear along one axis, or with a computed weight")
        weight = _attribute(self.gm, str(weight_node.target))
        w = weight.detach().reshape(weight.shape[0], -1, *grid.size)
        if grid.pool:
            for d, table in enumerate(grid.pool):
                w = torch.tensordot(w.double().movedim(2 + d, -1), table.to(w.device), 1).movedim(-1, 2 + d)
            w, self.rounded = w.to(weight.dtype), True
        name = f"{node.name}_sliding_weight"
        # The captured module is our own.
        self.gm.register_parameter(name, nn.Parameter(w.contiguous(), requires_grad=weight.requires_grad))
        bias = node.args[2] if len(node.args) > 2 else None
        args = (
            self.new[source],
            self.graph.get_attr(name),
            self.new[bias] if isinstance(bias, fx.Node) else None,
            [1] * self.nd,
            [0] * self.nd,
            list(grid.spread),
        )
        new = self.graph.call_function(_CONV[self.nd], args)
        ones = (1,) * self.nd
        self._set(node, new, Grid(ones, grid.stride, ones, True))
        self.rewrites.append(Rewrite(new.name, (node.name,), (new.name,), ("slide",), where=module_path(node)))


def _opname(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", node.target))


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


# -- Verification -----------------------------------------------------------------------------------------------------


def window_scores(model: nn.Module, image: torch.Tensor, window: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """The model on each window of an image, ``(N, K, *map)``: what a densified one should give."""
    counts = [(n - w) // s + 1 for n, w, s in zip(image.shape[2:], window, stride, strict=True)]
    out = []
    for place in itertools.product(*map(range, counts)):
        index = [slice(p * s, p * s + w) for p, s, w in zip(place, stride, window, strict=True)]
        out.append(model(image[tuple([slice(None), slice(None), *index])]))
    return torch.stack(out, -1).reshape(*out[0].shape, *counts)


def _verify(model: nn.Module, gm: fx.GraphModule, x: torch.Tensor, slider: _Slider) -> tuple[dict[str, Any], list[Remark]]:
    small = sum(p.numel() for p in model.parameters()) <= _DOUBLE
    dtype = torch.float64 if small else x.dtype
    original = copy.deepcopy(model).to(dtype) if small else model
    dense = copy.deepcopy(gm).to(dtype) if small else gm
    limit = 1e-12 if small and not slider.rounded else 1e4 * torch.finfo(x.dtype).eps
    stride = slider.out.stride
    larger = [w + (2 if i == 0 else 1) * s for i, (w, s) in enumerate(zip(slider.window, stride, strict=True))]
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, x.shape[1], *larger, generator=generator, dtype=torch.float64).to(x.device, dtype)
    with torch.no_grad():
        at_home = _difference(original(x.to(dtype)), dense(x.to(dtype)).flatten(1))
        expected, got = window_scores(original, image, slider.window, stride), dense(image)
    if at_home > limit:
        raise VerificationError(f"at the training size the densified model differs by {at_home:.1e} of the scores")
    result = {"status": "verified", "error": at_home, "dtype": str(dtype).removeprefix("torch.")}
    if got.shape != expected.shape and not slider.padded:
        raise VerificationError(f"the map has shape {tuple(got.shape)}, one score per window has {tuple(expected.shape)}")
    where = "×".join(map(str, larger))
    if not slider.padded:
        away = _difference(expected, got)
        if away > limit:
            raise VerificationError(f"on an image of {where} windows differ by {away:.1e} of the scores")
        return {**result, "error": max(at_home, away)}, []
    common = tuple(slice(0, min(a, b)) for a, b in zip(expected.shape, got.shape, strict=True))
    away = _difference(expected[common], got[common])
    count = len(slider.padded)
    names = ", ".join(slider.padded[:3]) + ("…" if count > 3 else "")
    reason = (
        f"{count} layer{'s pad' if count > 1 else ' pads'} ({names}): the original sees zeros at the border of "
        f"each window where the larger image goes on, so on {where} of noise scores differ by up to {away:.1e} of "
        "the largest"
    )
    return {**result, "windows": away, "notes": [reason]}, [Remark("advice", slider.padded[0], "slide", reason, "nothing padded")]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))


__all__ = ["DensifyError", "densify", "window_scores"]
