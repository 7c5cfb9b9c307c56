"""Nodes that ask for a tensor's shape: they read no values, and must not keep a tensor alive that nothing else reads."""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
from torch import fx

from fxconv.axes import is_static, same, same_shape, shape_of
from fxconv.storage import has_effect

_ATTRIBUTES = ("shape", "dtype", "device", "ndim")
_LIKE = ("reshape_as", "view_as", "expand_as")


def _asks_of(user: fx.Node, n: fx.Node) -> bool:
    """Whether a node asks n for its shape only: ``x.reshape_as(n)`` does too."""
    return asks_shape(user) or _is_like(user) and user.args[1] is n and user.args[0] is not n


def _is_like(node: fx.Node) -> bool:
    """Whether a node gives its first operand the shape of its second one."""
    name = str(node.target).removeprefix("aten.").split(".")[0] if node.op == "call_function" else str(node.target)
    return node.op in ("call_function", "call_method") and name in _LIKE and len(node.args) == 2


def asks_shape(node: fx.Node) -> bool:
    """Whether a node reads a tensor's shape (or dtype, device) and none of its values."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.target is builtins.getattr:
        return len(node.args) > 1 and node.args[1] in _ATTRIBUTES
    return node.op == "call_function" and str(node.target).startswith("aten.sym_")


def redirect_asks(gm: fx.GraphModule) -> None:
    """Let nodes that only ask a tensor for a size ask another tensor with that size, where that one is computed anyway."""
    nodes = list(gm.graph.nodes)
    position = {n: i for i, n in enumerate(nodes)}
    read = _read(gm)
    asked = [n for n in nodes if n.op.startswith("call_") and n.users and n not in read]
    if not asked:
        return
    alive = [n for n in nodes if n in read and n.users and isinstance(n.meta.get("val"), torch.Tensor)]
    alive = [n for n in alive if n.op != "get_attr"]
    for n in asked:
        if not isinstance(n.meta.get("val"), torch.Tensor):
            continue
        for ask in list(n.users):
            if not _asks_of(ask, n):
                continue
            if _is_like(ask):
                _redirect_like(n, ask, alive, position)
                continue
            for question, dim in _questions(ask):
                _redirect(n, question, dim, alive, position)


def _read(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values the outputs depend on; what only such nodes read that are asked for sizes is none of them."""
    stack = [n for n in gm.graph.nodes if n.op in ("placeholder", "output") or has_effect(n, gm)]
    read = set(stack)
    while stack:
        n = stack.pop()
        for x in n.all_input_nodes:
            if x not in read and not _asks_of(n, x):
                read.add(x)
                stack.append(x)
    return read


def _questions(ask: fx.Node) -> list[tuple[fx.Node, int | None]]:
    """The nodes whose result is one size (with the dim) or the whole shape (None) of what ``ask`` is asked of."""
    dim = ask.args[1] if len(ask.args) > 1 else ask.kwargs.get("dim")
    if isinstance(dim, int):
        return [(ask, dim)]
    if ask.target is builtins.getattr and dim != "shape" or ask.target not in (builtins.getattr, "size"):
        return [(ask, None)]
    parts = [(u, u.args[1]) for u in ask.users if u.target is operator.getitem and isinstance(u.args[1], int)]
    return parts if len(parts) == len(ask.users) else [(ask, None)]  # type: ignore[return-value]


def _redirect_like(n: fx.Node, ask: fx.Node, alive: list[fx.Node], position: dict[fx.Node, int]) -> None:
    """Let ``x.reshape_as(n)`` take the shape of another tensor."""
    wanted = shape_of(n.meta["val"])
    for other in alive:
        if position[other] >= position[ask]:
            break
        if same_shape(shape_of(other.meta["val"]), wanted):
            ask.args = (ask.args[0], other)
            return
    if "expand" not in str(ask.target):
        _spell_out(n, ask, alive, position)


def _spell_out(n: fx.Node, ask: fx.Node, alive: list[fx.Node], position: dict[fx.Node, int]) -> None:
    """Write ``x.reshape_as(n)`` as a reshape to sizes that other tensors have, one of them left open."""
    shape: list[Any] = [size if is_static(size) else None for size in shape_of(n.meta["val"])]
    earlier = [other for other in alive if position[other] < position[ask]]
    found: list[tuple[int, fx.Node, int]] = []
    for d, size in enumerate(shape_of(n.meta["val"])):
        if shape[d] is None and shape.count(None) > 1 + len(found):
            place = next(((o, k) for o in earlier for k, s in enumerate(shape_of(o.meta["val"])) if same(s, size)), None)
            if place is None:
                return
            found.append((d, *place))
    graph, call = ask.graph, ask.op == "call_method"
    with graph.inserting_before(ask):
        for d, other, k in found:
            size = graph.call_method("size", (other, k)) if call else graph.call_function(torch.ops.aten.sym_size.int, (other, k))
            size.meta["val"] = n.meta["val"].shape[d]
            shape[d] = size
        shape = [-1 if size is None else size for size in shape]
        args = (ask.args[0], shape)
        new = graph.call_method("reshape", args) if call else graph.call_function(torch.ops.aten.reshape.default, args)
    new.meta = dict(ask.meta)
    position[new] = position[ask]
    if ask in alive:
        alive[alive.index(ask)] = new
    ask.replace_all_uses_with(new)
    graph.erase_node(ask)


def _redirect(n: fx.Node, question: fx.Node, dim: int | None, alive: list[fx.Node], position: dict[fx.Node, int]) -> None:
    wanted = shape_of(n.meta["val"])
    first_user = min((position[u] for u in question.users if u in position), default=-1)
    for other in alive:
        if position[other] >= first_user:
            return
        have = shape_of(other.meta["val"])
        if other.meta["val"].dtype != n.meta["val"].dtype:
            continue
        if dim is None:
            if not same_shape(have, wanted):
                continue
            new_dim: int | None = None
        else:
            at = [d for d, size in enumerate(have) if same(size, wanted[dim])]
            if not at:
                continue
            new_dim = at[0]
        _ask(question, other, new_dim, position)
        return


def _ask(question: fx.Node, other: fx.Node, dim: int | None, position: dict[fx.Node, int]) -> None:
    """Put the same question to another tensor, no earlier than that tensor is there."""
    graph = question.graph
    place = question if position[other] < position[question] else other
    with graph.inserting_before(question) if place is question else graph.inserting_after(other):
        if dim is None:
            new = graph.create_node(question.op, question.target, (other, *question.args[1:]), dict(question.kwargs))
        elif question.op == "call_function" and question.target is not operator.getitem:
            new = graph.call_function(question.target, (other, dim))  # type: ignore[arg-type]
        else:
            new = graph.call_method("size", (other, dim))
    new.meta = dict(question.meta)
    position[new] = max(position[other], position[question])
    question.replace_all_uses_with(new)
    source = question.args[0]
    graph.erase_node(question)
    if isinstance(source, fx.Node) and not source.users and asks_shape(source):
        graph.erase_node(source)
