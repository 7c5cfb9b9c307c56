"""Expressions back to fx nodes: every value that the search redefined is written at the place of the node it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from fxconv import kernel as kernels
from fxconv.asks import redirect_asks
from fxconv.axes import as_size
from fxconv.expr import Apply, Const, Leaf, Map, Sum, Value, View
from fxconv.kernel import Kernel
from fxconv.plan_conv import as_images
from fxconv.pricing import slot_order
from fxconv.state import State
from fxconv.steps import Chain, Layout, Step, plan_view
from fxconv.storage import has_effect
from fxconv.strides import needs_copy, read_as_view
from fxconv.sums import plan_sum
from fxconv.writer import Writer

_DYNAMO_ROOT = re.compile(r"^[LG]\['[^']*'\]")
"""How Dynamo writes the variable that holds the model, in front of a module's path."""


@dataclass(frozen=True)
class Cluster:
    """One rewrite: a value of the original graph that is now computed otherwise.

    Attributes:
        value: the value.
        node: the original node's name (in the captured graph).
        result: the new node's name (in the emitted graph).
        new_nodes: names of the nodes written for it.
        reads: values of the original graph that the new nodes read.
    """

    value: Value
    node: str
    result: str
    new_nodes: tuple[str, ...]
    reads: tuple[Value, ...]


@dataclass(frozen=True)
class Emitted:
    """A rewritten graph: its clusters, and the float64 kernel behind each new parameter."""

    gm: fx.GraphModule
    clusters: tuple[Cluster, ...]
    parameters: dict[str, Kernel]
    unfit: dict[Kernel, str] = field(default_factory=dict)
    """Kernels that the dtype of their parameter cannot hold, with the reason."""

    @cached_property
    def parameters_read(self) -> dict[str, list[str]]:
        """The new parameters that a node reads, by its name: one walk for all rewrites of a graph."""
        found: dict[str, list[str]] = {}
        for node in self.gm.graph.nodes:
            names = [str(node.target)] if node.op == "get_attr" else []
            if node.op == "call_module":
                names = [f"{node.target}.weight", f"{node.target}.bias"]
            if known := [name for name in names if name in self.parameters]:
                found[node.name] = known
        return found


class UnwritableError(Exception):
    """A value that could not be written; the cause is what was raised."""

    def __init__(self, value: Value) -> None:
        super().__init__(f"{value} can't be written")
        self.value = value


class Emitter:
    """Writes the state's redefined values into a copy of the captured graph."""

    def __init__(self, state: State, gm: fx.GraphModule, twins: dict[fx.Node, fx.Node], dialect: str) -> None:
        """
        Args:
            state: the searched state.
            gm: a copy of the captured graph module, to be changed.
            twins: the copy's node for each node of the captured graph.
            dialect: "aten" or "module".
        """
        self.state, self.gm, self.twins = state, gm, twins
        self._copied = set(twins.values())
        lifted = state.lifter.lifted.producers.items()
        self._movable = {twins[n] for v, n in lifted if state.unchanged(v) and not isinstance(v.node, Leaf)}
        requires_grad = any(p.requires_grad for p in gm.parameters())
        self.writer = Writer(gm, dialect, self._fresh_name, requires_grad)
        self.tensors: dict[Value, tuple[fx.Node, Layout]] = {}
        self.reads: dict[Value, None] = {}
        self._reads_of: dict[Value, dict[Value, None]] = {}

    def _fresh_name(self, wanted: str) -> str:
        name, count = wanted, 0
        while hasattr(self.gm, name):
            count += 1
            name = f"{wanted}_{count}"
        return name

    def run(self) -> Emitted:
        state, clusters = self.state, []
        producers = state.lifter.lifted.producers
        changed = [(v, n) for v, n in producers.items() if v in state.uses and not state.unchanged(v)]
        order = {n: i for i, n in enumerate(self.twins)}
        for v, original in sorted(changed, key=lambda c: order[c[1]]):
            try:
                clusters.append(self._emit_cluster(v, original))
            except Exception as error:
                raise UnwritableError(v) from error
        by_name = {n.name: n for n in self.gm.graph.nodes}
        for c in clusters:
            if not state.anchored(c.value):
                continue
            old = self.twins[state.originals[c.value].node]
            new = by_name[c.result]
            for user in list(old.users):
                if user is not new:
                    user.replace_input_with(old, new)
        self._clean()
        alive = {n.name for n in self.gm.graph.nodes}
        kept = [
            Cluster(c.value, c.node, c.result, tuple(n for n in c.new_nodes if n in alive), c.reads)
            for c in clusters
            # A value whose only readers absorbed it, or that is in another layout, is checked as a part of those.
            if c.result in alive and state.anchored(c.value)
        ]
        return Emitted(self.gm, tuple(kept), self.writer.parameters, self.writer.unfit)

    def _clean(self) -> None:
        self._erase_dead()
        redirect_asks(self.gm)
        self._erase_dead()
        self.gm.graph.lint()

    def _erase_dead(self) -> None:
        # fx's own dead-code elimination keeps random operators, and eval-mode dropout counts as one.
        for node in reversed(self.gm.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output") and not has_effect(node, self.gm):
                self.gm.graph.erase_node(node)

    def _emit_cluster(self, v: Value, original: fx.Node) -> Cluster:
        twin = self.twins[original]
        w = self.writer
        val = original.meta["val"]
        w.base = f"{_stem(original)}_fused"
        w.dtype, w.device = val.dtype, val.device
        w.written = []
        w.meta = {key: original.meta[key] for key in ("stack_trace", "nn_module_stack", "source_fn_stack") if key in original.meta}
        w.meta["fxconv_replaces"] = original.name
        mode = getattr(val, "fake_mode", None)
        if mode is not None:
            w.meta["fake_mode"] = mode
        self.place = twin
        with self.gm.graph.inserting_before(twin):
            node, layout = self._emit(v)
            if self.state.anchored(v):
                node = self._strided_for_views(v, self._in_dims(v, node, layout, original), layout, original)
                if needs_copy(self.state, v):
                    shape = self.state.lifter.lifted.refs[original].shape
                    node = w.write(Step("contiguous", shape, shape), node)
                self.tensors[v] = self._in_memory_order(v, node)
            if node in self._copied:
                # An alias of another node: give the rewrite a node of its own name by a view.
                node = w.call(torch.ops.aten.alias.default, node) if w.dialect == "aten" else node
        names = tuple(n.name for n in w.written)
        return Cluster(v, original.name, node.name, names, tuple(self._reads_of[v]))

    def _in_dims(self, v: Value, node: fx.Node, layout: Layout, original: fx.Node) -> fx.Node:
        """The tensor in the dims that the original node's users expect."""
        ref = self.state.lifter.lifted.refs[original]
        chain = Chain(v.sizes, layout)
        chain.to(ref.dims)
        node = self._chain(chain.steps, node)
        want = original.meta["val"]
        if len(node.meta["val"].shape) != len(want.shape):
            node = self.writer.write(Step("reshape", ref.shape, ref.shape), node)
        if node.meta["val"].shape != want.shape:
            from fxconv.axes import same, shape_of

            have = shape_of(node.meta["val"])
            if not all(same(a, b) for a, b in zip(have, ref.shape, strict=True)):
                node = self.writer.write(Step("reshape", have, ref.shape), node)
        return node

    def _strided_for_views(self, v: Value, node: fx.Node, layout: Layout, original: fx.Node) -> fx.Node:
        """The tensor, copied where it comes in another order than the original's and a reader takes a view that needs that."""
        if slot_order(layout, v) == slot_order(self.state.originals[v].memory, v) or not read_as_view(original):
            return node
        order = self._stride_order(v)
        shape = tuple(as_size(s) for s in node.meta["val"].shape)
        permuted = tuple(shape[d] for d in order)
        node = self.writer.write(Step("permute", shape, permuted, attrs={"dims": tuple(order)}), node)
        node = self.writer.write(Step("contiguous", permuted, permuted), node)
        back = tuple(order.index(d) for d in range(len(order)))
        return self.writer.write(Step("permute", permuted, shape, attrs={"dims": back}), node)

    def _stride_order(self, v: Value) -> list[int]:
        """The dims of the original's tensor in the order of its strides, those without slots last."""
        original = self.state.originals[v]
        dims = list(original.layout)
        if original.memory == original.layout:
            return list(range(len(dims)))
        order = [dims.index(g) for g in original.memory if g]
        return order + [d for d in range(len(dims)) if d not in order]

    def _in_memory_order(self, v: Value, node: fx.Node) -> tuple[fx.Node, Layout]:
        """A tensor of the original graph with its dims in the order of its strides: a view, and contiguous."""
        original = self.state.originals[v]
        if original.memory == original.layout or self.state.layout(v) != original.memory:
            return node, original.layout
        order = self._stride_order(v)
        shape = tuple(as_size(s) for s in node.meta["val"].shape)
        permuted = tuple(shape[d] for d in order)
        node = self.writer.write(Step("permute", shape, permuted, attrs={"dims": tuple(order)}), node)
        if len(order) != len(original.memory):
            node = self.writer.write(Step("reshape", permuted, permuted[: len(original.memory)]), node)
        return node, original.memory

    def _chain(self, steps: list[Step] | tuple[Step, ...], node: fx.Node) -> fx.Node:
        for step in steps:
            node = self.writer.write(step, node)
        return node

    def _arranged(self, v: Value, node: fx.Node, have: Layout, want: Layout) -> fx.Node:
        """The tensor of a value, brought from the layout that it came out in to another."""
        chain = Chain(v.sizes, have)
        chain.to(want)
        return self._chain(chain.steps, node)

    def _emit(self, v: Value) -> tuple[fx.Node, Layout]:
        """The tensor of a value: its node and layout, written if it is not there yet."""
        found = self.tensors.get(v)
        if found is None:
            outer, self.reads = self.reads, {}
            found = self.tensors[v] = self._write(v)
            self._reads_of[v], self.reads = self.reads, outer
        if self._is_boundary(v):
            self.reads[v] = None
        else:
            self.reads.update(self._reads_of[v])
        return found

    def _is_boundary(self, v: Value) -> bool:
        """Whether v has a node of its own in the original's dims: where one rewrite ends and another begins."""
        return v in self.state.originals and (self.state.unchanged(v) or self.state.anchored(v))

    def _write(self, v: Value) -> tuple[fx.Node, Layout]:
        state = self.state
        if state.unchanged(v) or isinstance(v.node, Leaf):
            twin = self.twins[state.lifter.lifted.producers[v]]
            if self._come_before(twin):
                return self._in_memory_order(v, twin)
        if isinstance(v.node, Sum):
            return self._emit_sum(v.node)
        if isinstance(v.node, Const):
            shape = [s if f else 1 for s, f in zip(v.node.sizes, v.node.varies, strict=True)]
            node = self.writer.parameter(kernels.reshape(v.node.kernel, shape), "constant")
            node = self.writer.write(Step("expand", tuple(shape), v.sizes), node)
            return node, tuple((i,) for i in range(v.rank))
        if isinstance(v.node, Apply):
            x, layout = self._emit(v.node.x)
            return v.node.op.emit(v.node, x, layout, self)
        if isinstance(v.node, View):
            x, layout = self._emit(v.node.x)
            plan = plan_view(v.node, layout)
            return self._chain(plan.steps, x), plan.layout
        return self._emit_map(v, None)

    def _come_before(self, node: fx.Node) -> bool:
        """Move a node of the original, with all it reads, in front of what is being written; false where one can't be moved.

        A law may find that it wants what the original computes as well, but further down: pool(conv(x)) beside pool(x).
        """
        if node < self.place:
            return True
        late = [node]
        for n in late:
            # What is written anew already has been placed by where its node stood, and may read what comes after this place.
            if n is self.place or n not in self._movable:
                return False
            late += [a for a in n.all_input_nodes if a not in late and not a < self.place]
        for n in sorted(late):
            self.place.prepend(n)
        return True

    def _emit_map(self, v: Value, bias: Const | None) -> tuple[fx.Node, Layout]:
        assert isinstance(v.node, Map)
        x, layout = self._emit(v.node.x)
        self.state.layouts[v.node.x] = layout
        plan = self.state.best_plan(v, bias)
        if plan is None:
            raise AssertionError(f"no operator computes {v}: {v.node.roles}")
        readers = self.state.users_of(v)
        if self.state.alone(v) and len(readers) == 1 and isinstance(readers[0].node, View) and 2 in self.state.target.conv:
            plan = as_images(plan, readers[0].node)
        return self._chain(plan.steps, x), plan.layout

    def _emit_biased(self, t: Value, m: Value, bias: Const) -> tuple[fx.Node, Layout]:
        """A term of a sum that is a map, itself or through a view, with the sum's constant added by the map's operator."""
        node, layout = self._emit_map(m, bias)
        if not isinstance(t.node, View):
            return node, layout
        plan = plan_view(t.node, layout)
        return self._chain(plan.steps, node), plan.layout

    def _emit_sum(self, node: Sum) -> tuple[fx.Node, Layout]:
        state = self.state
        plan = plan_sum(node, state.layout, state.alone)
        total: fx.Node | None = None
        constants: list[Step] = []
        for part in plan.parts:
            if part.kind == "const":
                assert part.step is not None
                constants.append(part.step)
                continue
            if part.kind == "cat":
                xs = [self._arranged(x, *self._emit(x), plan.layout) for x in part.values]
                assert part.step is not None
                tensor = self.writer.cat(xs, part.step.attrs["dim"])
            else:
                t = part.values[0]
                made = self._emit(t) if part.bias is None else self._emit_biased(t, *part.bias)
                tensor = self._arranged(t, *made, plan.layout)
            total = tensor if total is None else self.writer.add(total, tensor, part.factor)
        for step in constants:
            if total is None:
                raise AssertionError("a sum of constants only")
            total = self.writer.write(step, total)
        assert total is not None
        return total, plan.layout


def module_path(node: fx.Node) -> str:
    """The qualified name of the module that a node belongs to, "" where it is not known."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    if isinstance(stack, dict) and stack:
        path = str(list(stack.values())[-1][0])
        return _DYNAMO_ROOT.sub("", path).strip(".")
    return ""


def _stem(node: fx.Node) -> str:
    """A name that says where a node came from: its module's path where there is one."""
    return "".join(c if c.isalnum() else "_" for c in module_path(node)).strip("_") or node.name
