"""The search's state: a lifted graph with its prices, and the log of what was changed in it.

Every change is logged with the prices that it replaced, so that a trial is undone by playing back the log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from fxconv.axes import as_size, shape_of
from fxconv.cost import Price
from fxconv.expr import Const, Leaf, Node, Value, View, operands, walk
from fxconv.kernel import Kernel
from fxconv.original import layout_copies, original_steps
from fxconv.pricing import IMPOSSIBLE, PricedValues
from fxconv.steps import Layout, Step
from fxconv.strides import read_as_view
from fxconv.values import Original


@dataclass
class _Change:
    """One entry of the log: what a value's node was, and what was priced otherwise then."""

    v: Value
    node: Node
    restated: bool
    total: Price
    priced: dict[Value, tuple[Price | None, Layout | None]] = field(default_factory=dict)


def _storage(w: Kernel) -> Hashable:
    """What two readers of one stored tensor have in common."""
    path: Hashable = w._facts.get("path")
    return path if path is not None else w


@dataclass
class State(PricedValues):
    """Values of one graph under rewriting.

    Attributes:
        target_name: the target as the user named it.
        folding: values whose original computation computes constants at every call.
        roots: the values that barriers and outputs read.
    """

    target_name: str | None = None
    folding: set[Value] = field(default_factory=set)
    roots: list[Value] = field(default_factory=list)
    unwritable: dict[Value, str] = field(default_factory=dict)
    """Values whose rewrites could not be written, with what was raised."""
    _log: list[_Change] = field(default_factory=list)

    def load(self, roots: Iterable[Value]) -> None:
        """Take over a lifted graph; ``roots`` are the values that barriers and outputs read."""
        lifted = self.lifter.lifted
        counted: set[fx.Node] = set()
        steps_of: dict[fx.Node, list[Step]] = {}
        readers: Counter[Hashable] = Counter()
        for node in lifted.producers.values():
            op = lifted.ops.get(node)
            steps_of[node] = original_steps(self.lifter, node, op) if op is not None else []
            readers.update({_storage(w) for step in steps_of[node] for w in step.weights})
        for value, node in lifted.producers.items():
            ref = lifted.refs[node]
            op = lifted.ops.get(node)
            steps = steps_of[node]
            price = Price()
            for step in steps:
                # A weight that several operators share is stored once: a rewrite of one of them frees only its part.
                price = price + self.model.price(step, lambda w: readers[_storage(w)])
            if op is not None and steps:
                for step, sharing in layout_copies(self.lifter, op, self.model.number):
                    price = price + self.model.price(step).times(1 / sharing)
            reads: list[Value] = []
            for operand in op.inputs if op is not None else ():
                if isinstance(operand, fx.Node):
                    # Weights computed in the graph are computed anew at every call.
                    computing = self._constant_price(operand, counted)
                    price = price + computing
                    if computing.launches:
                        self.folding.add(value)
                if isinstance(operand, fx.Node) and (found := lifted.refs.get(operand)) is not None:
                    reads.append(found.value)
            allowed = all(self._allowed(step) for step in steps)
            memory = self._memory(node, ref.dims)
            viewed = memory != ref.dims and read_as_view(node)
            self.originals[value] = Original(node, value.node, tuple(reads), price, ref.dims, memory, allowed, viewed)
            self.levels[value] = len(self.levels) + 1
        for inner in walk(list(lifted.producers)):
            self.table.setdefault(inner.node, inner)
            for x in operands(inner.node):
                if x not in self.originals:
                    self.owners.setdefault(x, []).append(inner)
        self.roots = list(dict.fromkeys(roots))
        for v in self.roots:
            touched: dict[Value, int] = {}
            self.use(v, None, touched)
            self.reprice({x: 0 for x, count in touched.items() if count == 0})

    def _constant_price(self, node: fx.Node, counted: set[fx.Node]) -> Price:
        """What the original graph spends on a constant that it computes, charged to the first reader."""
        price, stack = Price(), [node]
        while stack:
            n = stack.pop()
            if n in counted or not n.op.startswith("call_") or not self.lifter.is_constant(n):
                continue
            counted.add(n)
            val = n.meta.get("val")
            if isinstance(val, torch.Tensor):
                shape = shape_of(val)
                price = price + self.model.price(Step("scale", shape, shape))
            stack.extend(n.all_input_nodes)
        return price

    def _memory(self, node: fx.Node, dims: Layout) -> Layout:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or val.layout != torch.strided:
            return dims
        strides = [self.model.number(as_size(s)) for s in val.stride()]
        real = [d for d in range(len(dims)) if dims[d]]
        if any(strides[d] == 0 for d in real):
            return dims
        order = sorted(real, key=lambda d: -strides[d])
        return dims if order == real else tuple(dims[d] for d in order)

    def _allowed(self, step: Step) -> bool:
        if step.kind == "linear":
            return self.target.linear
        if step.kind in ("conv", "conv_transpose"):
            return len(step.weights[0].shape) - 2 in self.target.conv
        return True

    def forbidden(self) -> list[Value]:
        """Values that are still computed by an operator that the target forbids."""
        return [v for v in self.uses if self.unchanged(v) and not self.originals[v].allowed]

    def redefine(self, v: Value, new: Value) -> bool:
        """Let ``v`` be computed as ``new`` is; False where that changes nothing, or would make v depend on itself."""
        new = self.intern(new)
        node: Node = new.node
        if new is v:
            # The same expression written anew.
            if not self.unchanged(v):
                return False
            self._set(v, node, restate=True)
            return True
        if self.depends(new, v):
            return False
        if new in self.uses or new in self.originals or isinstance(node, (Leaf, Const)):
            # Another value that exists: v is an alias of it.
            node = View(new, tuple((s,) for s in new.sizes), tuple((i,) for i in range(new.rank)))
        if node == v.node and not self.unchanged(v):
            return False
        self._set(v, node, restate=False)
        return True

    def revert(self, v: Value) -> bool:
        """Let v be computed by the node of the original graph again; False where it is."""
        if v not in self.originals or self.unchanged(v):
            return False
        self._set(v, self.originals[v].definition, restate=False)
        return True

    def _set(self, v: Value, node: Node, restate: bool) -> None:
        change = _Change(v, v.node, v in self.restated, self.total)
        self._log.append(change)
        self._assign(v, node, restate, change.priced)

    def _assign(
        self, v: Value, node: Node, restate: bool, before: dict[Value, tuple[Price | None, Layout | None]] | None = None
    ) -> None:
        """Let v be computed by a node; ``before`` takes the prices and layouts that this changes."""
        touched = self.rewire(v, node, restate)
        if touched:
            self.reprice(touched, v, before)

    def snapshot(self, v: Value) -> tuple[Node, bool]:
        """How v is computed now, for `reinstate`."""
        return v.node, v in self.restated

    def reinstate(self, v: Value, kept: tuple[Node, bool]) -> None:
        """Let v be computed as it was at a snapshot."""
        self._assign(v, *kept)

    def restore(self, v: Value) -> None:
        """Let v be computed by the node it came from again."""
        self._assign(v, self.originals[v].definition, False)

    def retract_impossible(self) -> None:
        """Restore what the target has no operator for: where there is none either way, the original stays."""
        again = True
        while again:  # restoring a value brings others to life
            again = False
            for v in [v for v in self.originals if v in self.uses and not self.unchanged(v)]:
                if v in self.uses and self._impossible(v):
                    self.restore(v)
                    again = True

    def _impossible(self, v: Value) -> bool:
        stack = [v]
        while stack:
            x = stack.pop()
            if x is v or x not in self.originals:
                if self.prices.get(x, Price()).launches >= IMPOSSIBLE.launches:
                    return True
                stack.extend(self.reads(x))
        return False

    def mark(self) -> int:
        return len(self._log)

    def undo(self, mark: int) -> None:
        while len(self._log) > mark:
            change = self._log.pop()
            self.rewire(change.v, change.node, change.restated)
            for x, (price, layout) in change.priced.items():
                if price is None:
                    self.prices.pop(x, None)
                else:
                    self.prices[x] = price
                if layout is None:
                    self.layouts.pop(x, None)
                else:
                    self.layouts[x] = layout
            self.total = change.total
