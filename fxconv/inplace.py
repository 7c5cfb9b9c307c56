"""In-place operators back into a graph, where nobody can tell: what was written without a copy shall not need one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxconv.axes import same_shape, shape_of
from fxconv.functional import COPIES, INPLACE, SCATTERS, producer, same_part, viewed
from fxconv.spelling import base_name
from fxconv.spelling_common import attribute
from fxconv.storage import Storages

aten = torch.ops.aten

_NOT_RESTORED = COPIES | {aten.fill.Scalar, aten.fill.Tensor, aten.zeros_like.default}
"""They do not read what they overwrite: in place they would have to wait for it."""

_OVERLAPPING = frozenset("expand expand_as broadcast_to unfold as_strided".split())
"""Views that hold one element at several places: PyTorch refuses to write to them."""

_RESULT_NOT_KEPT = frozenset(
    "linear addmm matmul mm bmm baddbmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "convolution add sub mul div cat stack pad constant_pad_nd mean sum avg_pool1d avg_pool2d avg_pool3d index_select clone "
    "Linear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d AvgPool1d AvgPool2d AvgPool3d".split()
)
"""Operators whose backward formula does not use their result, so that it may be overwritten where gradients are wanted."""

_ARGUMENTS_NOT_KEPT = frozenset(
    "add sub cat stack constant_pad_nd mean sum clone relu tanh sigmoid exp softmax _softmax log_softmax _log_softmax".split()
)
"""Operators whose backward formula does not use their arguments."""


def restore_inplace(gm: fx.GraphModule) -> None:
    """Put in-place operators back where their input is a fresh value that nobody else reads.

    Fresh: computed by this graph, no view, shares no storage with anything read later, not a parameter. To be called
    after emission, when the graph has its final form.
    """
    calls = ("call_function", "call_method", "call_module")
    marked = [n for n in gm.graph.nodes if INPLACE in n.meta and n.op in calls]
    if not marked:
        return
    storages = Storages(gm)
    by_module: dict[str, list[bool]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and INPLACE not in node.meta:
            by_module.setdefault(str(node.target), []).append(False)
    for node in marked:
        if node.target in SCATTERS.values():
            _restore_part(gm, node, storages)
            continue
        possible = _may_write(gm, node, storages)
        if node.op == "call_module":
            by_module.setdefault(str(node.target), []).append(possible)
        elif possible and node.target not in _NOT_RESTORED:
            original = node.meta.pop(INPLACE).target
            if "inplace" in node.kwargs and original is node.target:
                node.kwargs = {**node.kwargs, "inplace": True}
            else:
                node.target = original
    for name, possible_sites in by_module.items():
        if all(possible_sites) and possible_sites and hasattr(attribute(gm, name), "inplace"):
            attribute(gm, name).inplace = True
    gm.recompile()


def _may_write(gm: fx.GraphModule, node: fx.Node, storages: Storages) -> bool:
    """Whether ``node`` may overwrite its first argument."""
    value = node.args[0] if node.args else None
    if not isinstance(value, fx.Node) or len(value.users) != 1 or list(node.args[1:]).count(value):
        return False
    if not _is_free(gm, value, node, {node}, storages):
        return False
    return _same_kind(value, node)


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors agree in dtype and shape, as far as these are known."""
    before, after = a.meta.get("val"), b.meta.get("val")
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return before.dtype == after.dtype and same_shape(shape_of(before), shape_of(after))
    return before is None and after is None


def _is_free(gm: fx.GraphModule, value: fx.Node, first: fx.Node, writes: set[fx.Node], storages: Storages) -> bool:
    """Whether the storage of ``value`` may be overwritten from ``first`` on: ``writes`` alone read it from there."""
    for member in storages.of(value):
        if member.op in ("placeholder", "get_attr") or base_name(member, gm) in _OVERLAPPING:
            return False
        # What is written in place is read through the write's own result.
        if member in writes or storages.after(member, first):
            continue
        if any(storages.after(user, first) for user in member.users if user not in writes):
            return False
    made_by = producer(value, gm)
    return made_by.name == first.meta[INPLACE].producer or base_name(made_by, gm) in _RESULT_NOT_KEPT


# ----------------------------------------------------------------- writes to a part


def _restore_part(gm: fx.GraphModule, scatter: fx.Node, storages: Storages) -> None:
    """Scatters of scatters, ``y' = scatter(y, scatter(y[a], part, b), a)``, back into a write to ``y[a][b]``."""
    chain = _nested(scatter)
    if chain is None:
        return
    inner, outer = chain[0], chain[-1]
    part: Any = inner.args[1]
    in_place = _computed_on_the_part(part, inner)
    first = part if in_place else inner
    base: Any = outer.args[0]
    shared = set(storages.of(base))
    operands = part.all_input_nodes[1:] if in_place else [part]
    if shared.intersection(operands) or not _is_free(gm, base, first, {*chain, first}, storages):
        return
    readers = {user for member in shared for user in member.users} - shared - {*chain, first}
    readers = {reader for reader in readers if base_name(reader, gm) not in _ARGUMENTS_NOT_KEPT}
    if not all(reader.name in scatter.meta[INPLACE].readers for reader in readers):
        return  # a new reader before the write keeps what it read for its gradient
    if in_place:
        part.target = part.meta.pop(INPLACE).target
        storages.join(part, base)
    else:
        _copy_to(gm, inner, part, storages)
    outer.replace_all_uses_with(base)
    storages.join(outer, base)
    for node in reversed(chain):
        gm.graph.erase_node(node)


def _nested(scatter: fx.Node) -> list[fx.Node] | None:
    """The scatters that write ``scatter`` back into what its argument is a part of, itself first; None without readers."""
    if not scatter.users:
        return None  # erased with another one
    chain = [scatter]
    while len(scatter.users) == 1:
        (outer,) = scatter.users
        if INPLACE not in outer.meta or outer.target not in SCATTERS.values() or outer.args[1] is not scatter:
            break
        if not _is_written(viewed(scatter.args[0]), outer):
            break
        chain.append(outer)
        scatter = outer
    return chain


def _is_written(view: Any, scatter: fx.Node) -> bool:
    """Whether a view is that part of the scatter's first argument which the scatter overwrites."""
    return same_part(view, scatter) and viewed(view.args[0]) is viewed(scatter.args[0])


def _computed_on_the_part(part: fx.Node, scatter: fx.Node) -> bool:
    """Whether what is written was computed in place, on the part that is written."""
    write = part.meta.get(INPLACE)
    if write is None or not isinstance(write.target, torch._ops.OpOverload):
        return False
    if part.target in COPIES or part.target in SCATTERS.values():
        return False
    view: Any = part.args[0]
    return _is_written(view, scatter) and _same_kind(view, part)


def _copy_to(gm: fx.GraphModule, scatter: fx.Node, part: fx.Node, storages: Storages) -> None:
    """Copy ``part`` to where the scatter writes it."""
    if part.target is aten.expand_copy.default and INPLACE in part.meta and len(part.users) == 1:
        part = part.all_input_nodes[0]  # copy_ broadcasts
    target = next(view for view, other in SCATTERS.items() if other is scatter.target)
    value: Any = scatter.args[1]
    with gm.graph.inserting_before(scatter):
        view = gm.graph.call_function(target, (scatter.args[0], *scatter.args[2:]), dict(scatter.kwargs))
        written = gm.graph.call_function(aten.copy_.default, (view, part))
    for node in (view, written):
        storages.add(node, like=scatter.all_input_nodes[0], at=scatter)
    view.meta["val"] = written.meta["val"] = value.meta["val"]
