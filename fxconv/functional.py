"""In-place operators out of a graph, and back in.

``relu_``, ``add_`` and slice assignments appear in exported graphs and mean mutation: a reader before and a reader
after see different values of one node. The rewriting works on values, so each in-place node becomes its out-of-place
form and every later reader of the mutated value reads that instead, where this is provably the same. What cannot be
shown to be the same stays in place, and everything that shares its storage becomes a barrier.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from fxconv.spelling import base_name
from fxconv.spelling_common import attribute
from fxconv.spelling_layout import same_size

INPLACE = "fxconv_inplace"
aten = torch.ops.aten

_VIEWS = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "numpy_T", "mT", "T", "H", "mH", "adjoint", "movedim", "moveaxis", "swapaxes", "swapdims", "expand", "expand_as",
    "broadcast_to", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unbind",
    "getitem", "getattr", "detach", "alias", "contiguous", "to", "float", "double", "half", "bfloat16", "type_as",
    "type", "cpu", "cuda", "lift_fresh", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_dropout", "feature_alpha_dropout", "einsum", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d", "unfold", "as_strided", "diagonal",
    "view_as", "reshape_as", "ravel", "real", "imag", "view_as_real", "view_as_complex", "resolve_conj", "resolve_neg",
    "hsplit", "vsplit", "dsplit", "data", "requires_grad", "swap_dims", "unsafe_chunk", "unsafe_split",
    "_reshape_alias", "iter", "next", "stochastic_depth", "pin_memory", "tuple", "list",
}  # fmt: skip
"""Names whose result may share storage with an argument. Erring on the side of sharing only costs a barrier."""

_VIEW_MODULES = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle,
)  # fmt: skip
_MUTATING_METHODS = {"__setitem__", "copy_", "fill_", "zero_"}
_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
    operator.imod: operator.mod,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.imatmul: operator.matmul,
}
_OUT_OF_PLACE = {value: key for key, value in _OPERATORS.items()}


# ----------------------------------------------------------------- who mutates, who shares storage


def _may_alias(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether the result of ``node`` may share storage with one of its arguments."""
    target: Any = node.target
    if isinstance(node.meta.get("val"), (torch.Size, int, float, torch.SymInt)):
        return False
    if node.op == "call_module":
        module = attribute(gm, str(target))
        if type(module).__module__.startswith("torch.nn.") and not isinstance(module, _VIEW_MODULES):
            return bool(getattr(module, "inplace", False))
        return True
    if isinstance(target, torch._ops.OpOverload):
        if any(r.alias_info is not None for r in target._schema.returns):
            return True
        return base_name(node, gm) in _VIEWS
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    name = base_name(node, gm)
    if node.op == "call_function" and _is_unknown(target):
        return True
    return name in _VIEWS or mutated_argument(node, gm) is not None


def mutated_argument(node: fx.Node, gm: fx.GraphModule) -> fx.Node | None:
    """The node whose value ``node`` overwrites, or None."""
    target: Any = node.target
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if isinstance(target, torch._ops.OpOverload):
        if not target._schema.is_mutable:
            return None
        for index, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
                if isinstance(value, fx.Node):
                    return value
        return None
    mutates = False
    if isinstance(out := node.kwargs.get("out"), fx.Node):
        return out
    if node.op == "call_method":
        name = str(target)
        mutates = name in _MUTATING_METHODS or (name.endswith("_") and not name.endswith("__"))
        mutates = mutates and name != "requires_grad_"
    elif node.op == "call_module":
        mutates = bool(getattr(attribute(gm, str(target)), "inplace", False))
    elif node.op == "call_function":
        name = getattr(target, "__name__", "")
        mutates = (
            target in _OPERATORS
            or target is operator.setitem
            or getattr(torch.Tensor, name, None) is target
            and name.endswith("_")
            and not name.endswith("__")
            or bool(node.kwargs.get("inplace", False))
            or (name.endswith("_") and not name.endswith("__") and hasattr(torch, name))
        )
    if not mutates or not isinstance(first, fx.Node):
        return None
    if target in _OPERATORS and not isinstance(first.meta.get("val", torch.empty(0)), torch.Tensor):
        return None  # h += 1 on a size
    return first


def has_effect(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether ``node`` must stay although nothing reads its result: it writes, or nobody knows what it does.

    Unknown are hooked modules (the hook may record) and Python functions that were wrapped for tracing.
    """
    if node.op == "call_module":
        module = attribute(gm, str(node.target))
        if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
            return True
    elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    elif node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload) and _is_unknown(node.target):
        return True
    return mutated_argument(node, gm) is not None


def _is_unknown(function: Any) -> bool:
    module_name = getattr(function, "__module__", None) or "torch"
    return str(module_name).split(".")[0] not in ("torch", "_operator", "operator", "math", "builtins")


def _aliased_arguments(node: fx.Node, gm: fx.GraphModule) -> list[fx.Node]:
    """The arguments whose storage the result of ``node`` may share."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        annotated = [
            node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            for i, argument in enumerate(target._schema.arguments)
            if argument.alias_info is not None
        ]
        if annotated:
            return [a for a in annotated if isinstance(a, fx.Node)]
    mutated = mutated_argument(node, gm)
    if mutated is not None:
        return [mutated]
    name = base_name(node, gm)
    if name in _VIEWS and name != "einsum" and node.args and isinstance(node.args[0], fx.Node):
        return [node.args[0]]
    return node.all_input_nodes


class _Storages:
    """Which nodes may share storage, by union-find over the graph in order, and where each node stands."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}
        self.order: dict[fx.Node, int] = {}
        for i, node in enumerate(gm.graph.nodes):
            self.parent[node] = node
            self.order[node] = i
            if node.op in ("call_function", "call_method", "call_module") and _may_alias(node, gm):
                for source in _aliased_arguments(node, gm):
                    if isinstance(source.meta.get("val", torch.empty(0)), (torch.Tensor, tuple, list)):
                        self.parent[self.find(source)] = self.find(node)
        self.members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.parent:
            self.members.setdefault(self.find(node), []).append(node)

    def find(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def of(self, node: fx.Node) -> list[fx.Node]:
        return self.members[self.find(node)]

    def add(self, node: fx.Node, like: fx.Node, at: fx.Node) -> None:
        """A node made during the pass: it takes the place of ``like`` and stands where ``at`` does."""
        self.parent[node] = self.find(like)
        self.members[self.find(like)].append(node)
        self.order[node] = self.order[at]

    def after(self, user: fx.Node, node: fx.Node) -> bool:
        return self.order.get(user, -1) > self.order[node]


# ----------------------------------------------------------------- out of place


def functionalise(gm: fx.GraphModule) -> dict[str, str]:
    """Replace in-place operators by out-of-place ones wherever that is the same; returns the barriers for the rest.

    Works on both dialects. A replaced node carries ``meta["fxconv_inplace"]``, the original target, for
    :func:`restore_inplace`. Modules with ``inplace=True`` (of this private graph module) are switched to False.
    """
    barriers: dict[str, str] = {}
    for node in list(gm.graph.nodes):
        if node.target in _OPERATORS and mutated_argument(node, gm) is None:
            node.target = _OPERATORS[node.target]
    nodes = [n for n in gm.graph.nodes if mutated_argument(n, gm) is not None]
    storages = _Storages(gm) if nodes else None
    for node in nodes:
        assert storages is not None
        _functionalise_node(gm, node, storages)
    remaining = [n for n in gm.graph.nodes if mutated_argument(n, gm) is not None]
    if remaining:
        storages = _Storages(gm)
        _keep_alive(gm, remaining)
        for node in remaining:
            for member in storages.of(node):
                reason = f"its storage is written in place by {node.name}"
                barriers[member.name] = reason
                for user in member.users:  # a reader must not move across the write
                    if user.op != "output":
                        barriers.setdefault(user.name, f"reads a value that {node.name} writes in place")
    gm.graph.lint()
    gm.recompile()
    return barriers


def _keep_alive(gm: fx.GraphModule, writes: list[fx.Node]) -> None:
    """``eliminate_dead_code`` knows that ATen writes are effects; make it know of methods and modules too."""
    for node in writes:
        if node.op == "call_method":
            method: Any = getattr(torch.Tensor, str(node.target))
            node.op, node.target = "call_function", method
            fx.node.has_side_effect(method)
        elif node.op == "call_module":
            attribute(gm, str(node.target))._is_impure = True


def _functionalise_node(gm: fx.GraphModule, node: fx.Node, storages: _Storages) -> None:
    value = mutated_argument(node, gm)
    if value is None:
        return
    shared = storages.of(node)
    if any(n.op in ("placeholder", "get_attr") for n in shared):
        return  # writes to the caller's input or to the model's state: that is an effect, not a value
    later = {
        member
        for member in shared
        if member is not value and not storages.after(member, node) and member is not node
        for user in member.users
        if storages.after(user, node)
    }
    base = None
    if later:
        base = _scatter_base(value, later)
        if base is None:
            return
    if not _make_out_of_place(gm, node):
        return
    value.replace_all_uses_with(node, delete_user_cb=lambda user: storages.after(user, node))
    if base is not None:
        _scatter_back(gm, node, value, base, storages)


def _make_out_of_place(gm: fx.GraphModule, node: fx.Node) -> bool:
    target: Any = node.target
    original: Any = target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
        if name == "copy_":
            return _copy_out_of_place(node)
        if name in ("fill_", "zero_"):
            return _fill_out_of_place(gm, node)
        packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
        overload = getattr(packet, target._overloadname, None) if packet is not None else None
        if overload is None or overload._schema.is_mutable:
            return False
        node.target = overload
    elif node.op == "call_module":
        module = attribute(gm, str(target))
        module.inplace = False
        original = True
    elif node.op == "call_method":
        name = str(target)
        if name in _MUTATING_METHODS or not hasattr(torch.Tensor, name[:-1]):
            return False
        node.target = name[:-1]
    elif target in _OPERATORS:
        node.target = _OPERATORS[target]
    elif node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif target is operator.setitem or not target.__name__.endswith("_"):
        return False
    else:
        name = target.__name__
        namespace = torch if hasattr(torch, name[:-1]) else torch.nn.functional
        if not hasattr(namespace, name[:-1]):
            return False
        node.target = getattr(namespace, name[:-1])
    node.meta[INPLACE] = original
    return True


def _copy_out_of_place(node: fx.Node) -> bool:
    """``dst.copy_(src)`` is src, broadcast to dst, where dtype and device already agree."""
    destination, source = node.args[0], node.args[1]
    if not isinstance(destination, fx.Node) or not isinstance(source, fx.Node):
        return False
    to, of = destination.meta.get("val"), source.meta.get("val")
    if not isinstance(to, torch.Tensor) or not isinstance(of, torch.Tensor):
        return False
    if to.dtype != of.dtype or to.device != of.device:
        return False
    if _same_shape(to, of):
        node.target, node.args = aten.clone.default, (source,)
    else:
        sizes = [_size(node, destination, i) for i in range(to.dim())]
        node.target, node.args = aten.expand_copy.default, (source, sizes)
    node.kwargs = {}
    return True


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares expressions: asking a SymInt whether it equals another would add a guard."""
    return a.dim() == b.dim() and all(same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def _fill_out_of_place(gm: fx.GraphModule, node: fx.Node) -> bool:
    target: Any = node.target
    if target is aten.zero_.default:
        node.target = aten.zeros_like.default
        return True
    functional = {aten.fill_.Scalar: aten.fill.Scalar, aten.fill_.Tensor: aten.fill.Tensor}.get(target)
    if functional is None:
        return False
    node.target = functional
    return True


def _size(before: fx.Node, tensor: fx.Node, dim: int) -> Any:
    """Dim ``dim`` of a tensor as an int or a ``sym_size`` node placed before ``before``."""
    size = tensor.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    with before.graph.inserting_before(before):
        node = before.graph.call_function(aten.sym_size.int, (tensor, dim))
    node.meta["val"] = size
    return node


# ----------------------------------------------------------------- writes through a view: slice_scatter and friends

_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
_SAME_SIZE = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}


def _whole(view: fx.Node) -> bool:
    """Whether a view holds all of what it views, in the same places: ``y[:]`` is y."""
    if view.target in _SAME_SIZE:
        return True
    source: Any = view.args[0]
    whole, part = source.meta.get("val"), view.meta.get("val")
    same = isinstance(whole, torch.Tensor) and isinstance(part, torch.Tensor) and _same_shape(whole, part)
    return same and view.target is aten.slice.Tensor


def _chain(value: fx.Node) -> list[fx.Node]:
    """The views between the base and ``value``, innermost (nearest to the base) first."""
    chain: list[fx.Node] = []
    while value.target in _SCATTERS or value.target in _SAME_SIZE:
        chain.append(value)
        source = value.args[0]
        if not isinstance(source, fx.Node):
            break
        value = source
    return chain[::-1]


def _scatter_base(value: fx.Node, later: set[fx.Node]) -> fx.Node | None:
    """The value that ``value`` is a part of, where the only later reads are of that value itself."""
    chain = _chain(value)
    base = chain[0].args[0] if chain else None
    return base if isinstance(base, fx.Node) and later == {base} else None


def _scatter_back(gm: fx.GraphModule, node: fx.Node, value: fx.Node, base: fx.Node, storages: _Storages) -> None:
    """Write the new part back: base' = scatter(base, part'), and let later readers of base read base'."""
    part = node
    chain = _chain(value)
    for view in reversed(chain):
        if _whole(view):
            continue
        source: Any = view.args[0]
        with gm.graph.inserting_after(part):
            scatter = _SCATTERS[view.target]
            scattered = gm.graph.call_function(scatter, (source, part, *view.args[1:]), dict(view.kwargs))
        scattered.meta = {k: v for k, v in node.meta.items() if k != INPLACE}
        scattered.meta["val"] = source.meta["val"]
        storages.add(scattered, like=base, at=node)
        part = scattered
    base.replace_all_uses_with(part, delete_user_cb=lambda user: storages.after(user, node))
    for view in reversed(chain):
        if not view.users:  # they were taken only to be written to, and would keep alive what they view
            gm.graph.erase_node(view)


# ----------------------------------------------------------------- and back in


def restore_inplace(gm: fx.GraphModule) -> None:
    """Put in-place operators back where their input is a fresh value that nobody else reads.

    Fresh: computed by this graph, no view, shares no storage with anything read later, not a parameter. To be called
    after emission, when the graph has its final form.
    """
    calls = ("call_function", "call_method", "call_module")
    marked = [n for n in gm.graph.nodes if INPLACE in n.meta and n.op in calls]
    if not marked:
        return
    storages = _Storages(gm)
    by_module: dict[str, list[bool]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and INPLACE not in node.meta:
            by_module.setdefault(str(node.target), []).append(False)
    for node in marked:
        possible = _may_write(node, storages)
        if node.op == "call_module":
            by_module.setdefault(str(node.target), []).append(possible)
        elif possible:
            original = node.meta.pop(INPLACE)
            if "inplace" in node.kwargs and original is node.target:
                node.kwargs = {**node.kwargs, "inplace": True}
            elif not (isinstance(original, torch._ops.OpOverload) and node.target in _NOT_RESTORED):
                node.target = original
    for name, possible_sites in by_module.items():
        if all(possible_sites) and possible_sites and hasattr(attribute(gm, name), "inplace"):
            attribute(gm, name).inplace = True
    gm.recompile()


_NOT_RESTORED = {
    aten.clone.default, aten.expand_copy.default, aten.fill.Scalar, aten.fill.Tensor, aten.zeros_like.default,
}  # fmt: skip


def _may_write(node: fx.Node, storages: _Storages) -> bool:
    value = node.args[0] if node.args else None
    if not isinstance(value, fx.Node) or value.op in ("placeholder", "get_attr"):
        return False
    if len(value.users) != 1 or list(node.args[1:]).count(value):
        return False
    shared = storages.of(value)
    for member in shared:
        if member.op in ("placeholder", "get_attr"):
            return False
        # Nothing that shares the storage may be read after this node, except through the node's own result.
        if member is node or storages.after(member, node):
            continue
        if any(storages.after(user, node) for user in member.users):
            return False
    before, after = value.meta.get("val"), node.meta.get("val")
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return before.dtype == after.dtype and _same_shape(before, after)
    return before is None and after is None
