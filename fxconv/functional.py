"""In-place operators out of a graph.

``relu_``, ``add_`` and slice assignments appear in exported graphs and mean mutation: a reader before and a reader
after see different values of one node. The rewriting works on values, so each in-place node becomes its out-of-place
form and every later reader of the mutated value reads that instead, where this is provably the same. What cannot be
shown to be the same stays in place, and everything that shares its storage becomes a barrier.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxconv.axes import same_shape, shape_of
from fxconv.spelling_common import attribute
from fxconv.storage import MUTATING_METHODS, OPERATORS, Storages, aliased_arguments, may_alias, mutated_argument

INPLACE = "fxconv_inplace"
aten = torch.ops.aten


@dataclass(frozen=True)
class Write:
    """A write that was taken out of a graph; the node that computes what was written carries it as ``meta[INPLACE]``.

    Attributes:
        target: the operator in place (True for a module's ``inplace``).
        producer: name of the node that made the storage (see :func:`producer`).
        readers: names of the nodes that read a storage of which a part is written, the write itself among them.
    """

    target: Any
    producer: str
    readers: frozenset[str] = frozenset()


def producer(node: fx.Node, gm: fx.GraphModule) -> fx.Node:
    """The node that made the storage which ``node`` has in the original: through views and what is written in place."""
    while node.op in ("call_function", "call_method", "call_module"):
        if INPLACE in node.meta and node.target not in COPIES:
            node = node.all_input_nodes[0]
        elif may_alias(node, gm) and (sources := aliased_arguments(node, gm)):
            node = sources[0]
        else:
            break
    return node


def functionalise(gm: fx.GraphModule) -> dict[str, str]:
    """Replace in-place operators by out-of-place ones wherever that is the same; returns the barriers for the rest.

    Works on both dialects. A replaced node carries a :class:`Write`, for
    :func:`fxconv.inplace.restore_inplace`. Modules with ``inplace=True`` (of this private graph module) are switched to False.
    """
    barriers: dict[str, str] = {}
    for node in list(gm.graph.nodes):
        if node.target in OPERATORS and mutated_argument(node, gm) is None:
            node.target = OPERATORS[node.target]
    nodes = [n for n in gm.graph.nodes if mutated_argument(n, gm) is not None]
    storages = Storages(gm) if nodes else None
    for node in nodes:
        assert storages is not None
        _functionalise_node(gm, node, storages)
    remaining = [n for n in gm.graph.nodes if mutated_argument(n, gm) is not None]
    if remaining:
        storages = Storages(gm)
        _keep_alive(gm, remaining)
        for node in remaining:
            for member in storages.of(node):
                reason = f"its storage is written in place by {node.name}"
                barriers[member.name] = reason
                for user in member.users:  # a reader must not move across the write
                    if user.op != "output":
                        barriers.setdefault(user.name, f"reads a value that {node.name} writes in place")
    _see_through_writes(gm, barriers)
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


def _functionalise_node(gm: fx.GraphModule, node: fx.Node, storages: Storages) -> None:
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
    made_by = producer(value, gm).name
    target = _make_out_of_place(gm, node)
    if target is None:
        return
    node.meta[INPLACE] = Write(target, made_by)
    value.replace_all_uses_with(node, delete_user_cb=lambda user: storages.after(user, node))
    if base is not None:
        _scatter_back(gm, node, value, base, storages)


def _make_out_of_place(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Make ``node`` out of place; returns what it was (True for a module), None where it has no such form."""
    target: Any = node.target
    original: Any = target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
        if name == "copy_":
            return original if _copy_out_of_place(node) else None
        if name in ("fill_", "zero_"):
            return original if _fill_out_of_place(node) else None
        packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
        overload = getattr(packet, target._overloadname, None) if packet is not None else None
        if overload is None or overload._schema.is_mutable:
            return None
        node.target = overload
    elif node.op == "call_module":
        module = attribute(gm, str(target))
        module.inplace = False
        original = True
    elif node.op == "call_method":
        name = str(target)
        if name in MUTATING_METHODS or not hasattr(torch.Tensor, name[:-1]):
            return None
        node.target = name[:-1]
    elif target in OPERATORS:
        node.target = OPERATORS[target]
    elif node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif target is operator.setitem or not target.__name__.endswith("_"):
        return None
    else:
        name = target.__name__
        namespace = torch if hasattr(torch, name[:-1]) else torch.nn.functional
        if not hasattr(namespace, name[:-1]):
            return None
        node.target = getattr(namespace, name[:-1])
    return original


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
    if same_shape(shape_of(to), shape_of(of)):
        node.target, node.args = aten.clone.default, (source,)
    else:
        sizes = [_size(node, destination, i) for i in range(to.dim())]
        node.target, node.args = aten.expand_copy.default, (source, sizes)
    node.kwargs = {}
    return True


def _fill_out_of_place(node: fx.Node) -> bool:
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

SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
COPIES = frozenset((aten.clone.default, aten.expand_copy.default))
"""What ``copy_`` becomes out of place; their argument is what was written."""

_SAME_SIZE = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
_END = 2**63 - 1


def is_whole(view: fx.Node) -> bool:
    """Whether a view holds all of what it views, in the same places: ``y[:]`` is y."""
    if view.target in _SAME_SIZE:
        return True
    if view.target is not aten.slice.Tensor:
        return False
    source: Any = view.args[0]
    whole, part = source.meta.get("val"), view.meta.get("val")
    tensors = isinstance(whole, torch.Tensor) and isinstance(part, torch.Tensor)
    return tensors and same_shape(shape_of(whole), shape_of(part))


def viewed(node: Any) -> Any:
    """What ``node`` is all of."""
    while isinstance(node, fx.Node) and is_whole(node):
        node = node.args[0]
    return node


def place(node: fx.Node) -> tuple[Any, ...]:
    """Which part of its first argument a slice or select holds, or a scatter overwrites: what is equal is the same."""
    source: Any = node.args[0]
    arguments = node.args[1 if node.target in SCATTERS else 2 :]
    select = node.target in (aten.select.int, aten.select_scatter.default)
    names: tuple[str, ...] = ("dim", "index") if select else ("dim", "start", "end", "step")
    defaults = (0, 0) if select else (0, 0, _END, 1)
    given = dict(zip(names, arguments, strict=False)) | dict(node.kwargs)
    dim, *rest = (d if (value := given.get(n)) is None else value for n, d in zip(names, defaults, strict=True))
    return select, dim % source.meta["val"].dim(), *rest


def same_part(view: Any, scatter: fx.Node) -> bool:
    """Whether a view holds what a scatter into a tensor of the same shape overwrites."""
    return isinstance(view, fx.Node) and SCATTERS.get(view.target) is scatter.target and place(view) == place(scatter)


def _see_through_writes(gm: fx.GraphModule, barriers: Mapping[str, str]) -> None:
    """Read what was written instead of a part of what it was written to; write once where a place is written twice.

    ``y[a] += b`` is three steps in Python: a part is taken, added to in place, and assigned to the same place once more.
    """
    scatters = frozenset(SCATTERS.values())
    seen = [n for n in gm.graph.nodes if (n.target in SCATTERS or n.target in scatters) and n.name not in barriers]
    for node in seen:
        before = viewed(node.args[0])
        if not isinstance(before, fx.Node) or before.target not in scatters or before.name in barriers:
            continue
        part: Any = before.args[1]
        if same_part(node, before):
            if part.meta["val"].dtype == node.meta["val"].dtype and part.name not in barriers:
                node.replace_all_uses_with(part)
        elif node.target is before.target and place(node) == place(before):
            node.args = (before.args[0], *node.args[1:])
    for node in reversed(seen):
        if not node.users:
            gm.graph.erase_node(node)


def _chain(value: fx.Node) -> list[fx.Node]:
    """The views between the base and ``value``, innermost (nearest to the base) first."""
    chain: list[fx.Node] = []
    while value.target in SCATTERS or value.target in _SAME_SIZE:
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


def _scatter_back(gm: fx.GraphModule, node: fx.Node, value: fx.Node, base: fx.Node, storages: Storages) -> None:
    """Write the new part back: base' = scatter(base, part'), and let later readers of base read base'."""
    chain = _chain(value)
    readers = frozenset(u.name for m in storages.of(base) for u in m.users if not storages.after(u, node))
    write = Write(aten.copy_.default, node.meta[INPLACE].producer, readers)
    views = [view for view in reversed(chain) if not is_whole(view)]
    part, last = node, node
    if views and node.target is aten.clone.default and not node.users:
        part = node.all_input_nodes[0]  # a scatter copies
    for view in views:
        source: Any = view.args[0]
        with gm.graph.inserting_after(last):
            scatter = SCATTERS[view.target]
            scattered = gm.graph.call_function(scatter, (source, part, *view.args[1:]), dict(view.kwargs))
        scattered.meta = {**node.meta, INPLACE: write, "val": source.meta["val"]}
        storages.add(scattered, like=base, at=node)
        part = last = scattered
    base.replace_all_uses_with(part, delete_user_cb=lambda user: storages.after(user, node))
    for view in (node, *reversed(chain)):
        if not view.users:  # they were taken only to be written to, and would keep alive what they view
            gm.graph.erase_node(view)
