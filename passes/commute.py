"""Maps that act on different axes change places.

``A(B(x)) ⇒ B(A(x))`` when every axis that A contracts, scales, slides or resamples along is one that B keeps, and the
other way round: a 1×1 convolution below an upsampling or behind a pooling, a scale in front of a selection.

Exact always. A scale that varies along the very axis that a selection selects from also changes places with it, as the
scale of the selected places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fxconv import kernel as kernels
from fxconv.algebra import Meeting, meet, regroup
from fxconv.axes import is_static
from fxconv.expr import Kept, Map, New, Role, Shared, Value, Window, is_selection, split_view
from fxconv.law import Context, Law, Outcome, Refusal, mapped_operand
from fxconv.normal_form import normal
from fxconv.raw import Raw, as_value, moved
from fxconv.window import affine_pairs


def _commute(v: Value, context: Context) -> Iterator[Outcome]:
    found = mapped_operand(v)
    if found is None or not isinstance(found[2].node, Map):
        return
    outer, view, x = found
    assert isinstance(x.node, Map)
    if is_selection(outer) and is_selection(x.node):
        return  # they compose; in another order they are no cheaper
    m = meet(outer, x.node, view)
    if isinstance(m, str):
        yield Refusal(m)
        return
    result = exchange(m)
    if result is not None:
        yield result


def exchange(m: Meeting) -> Value | None:
    """``outer ∘ inner`` as ``inner' ∘ outer'``, or None where they act on a common axis."""
    outer, inner, perm = m.outer, m.inner, m.perm
    kernel = outer.kernel
    moves: set[int] = set()
    for k in outer.acting:
        r1 = inner.roles[perm[k]]
        if isinstance(r1, Kept):
            continue
        if isinstance(r1, Shared):
            selected = _selected_scale(outer, k, inner, perm[k])
            if selected is None:
                return None
            inner = selected
            moves.add(k)
            continue
        z = next((z for z, r in enumerate(outer.roles) if isinstance(r, Shared) and r.src == k), None)
        if z is None or not isinstance(r1, Window) or not r1.filter.is_selection:
            return None
        n_in = inner.in_sizes[r1.src]
        if not (is_static(n_in) and is_static(r1.size)):
            return None
        pairs = affine_pairs(1, r1.filter.down, -r1.filter.offset, int(r1.size), int(n_in))
        if pairs is None:
            return None
        # Places that the selection leaves out get scale 0; nobody reads them.
        axis = outer.axes().index(("out", z))
        kernel = _gathered(kernel, axis, pairs.y, pairs.i, int(n_in))
        moves.add(k)
    if not outer.acting and outer.kernel.uniform is None:
        return None  # a number acts on no axis, and still changes places
    # First the outer map, on the inner one's input: kept slots of the inner map carry its roles over. They come in the order
    # of that input, as they would had the model computed this there, which then is the same value.
    outer_axes = {key: i for i, key in enumerate(outer.axes())}
    columns = sorted((source(inner.roles[perm[k]]), outer_axes["in", k]) for k in outer.contracted)
    slots: list[tuple[int, tuple[str, int], Role]] = [(i, ("in", i), Kept(i)) for i in inner.contracted]
    for z, r in enumerate(outer.roles):
        if isinstance(r, New):
            slots.append((columns[0][0] if columns else len(inner.in_sizes), ("out", z), r))
            continue
        r1 = inner.roles[perm[r.src]]
        if not isinstance(r1, New):
            stays = r.src in moves or isinstance(r1, Kept)
            slots.append((r1.src, ("out", z), moved(r, r1.src) if stays else Kept(r1.src)))
    slots.sort(key=lambda slot: slot[0])
    place = {key: i for i, (_, key, _) in enumerate(slots)}
    kernel_axes = [outer_axes[key] for _, key, _ in slots if key in outer_axes and key[0] == "out"]
    kernel_axes += [axis for _, axis in columns]
    first_roles = [r for _, _, r in slots]
    base = as_value(split_view(m.x, m.in_splits))
    first = normal(base, first_roles, kernels.permute(kernel, kernel_axes))
    return inner_on(replace(m, inner=inner), outer, first, place)


def source(r: Role) -> int:
    """The input slot that an output slot was."""
    assert not isinstance(r, New)
    return r.src


def _selected_scale(outer: Raw, k: int, inner: Raw, axis: int) -> Raw | None:
    """The inner map with its scale along ``axis`` at the places that the outer one selects, or None where it does not select."""
    r = next((r for r in outer.roles if isinstance(r, Window) and r.src == k), None)
    if r is None or not r.filter.is_selection or not (is_static(outer.in_sizes[k]) and is_static(r.size)):
        return None
    pairs = affine_pairs(1, r.filter.down, -r.filter.offset, int(r.size), int(outer.in_sizes[k]))
    if pairs is None:
        return None
    # What is padded is 0 before the scale too.
    kernel = _gathered(inner.kernel, inner.axes().index(("out", axis)), pairs.i, pairs.y, int(r.size))
    return Raw(inner.in_sizes, inner.roles, kernel)


Place = Mapping[tuple[str, int], int]
"""Slots of the outer map's result on the inner one's input: ("out", z) for each slot z that the outer one makes or keeps,
("in", i) for each slot i that the inner one contracts, ("tap", k) for an axis over the taps of the inner window that makes k.
"""


def inner_on(m: Meeting, outer: Raw, first: Value, place: Place, windows: Mapping[int, Window] | None = None) -> Value | None:
    """The inner map of a meeting, on ``first``, which is the outer one on its input; None where an axis of it is not there.

    ``windows`` stand in for the inner map's, by the slot of what it makes; those in ``place`` as taps are contracted.
    """
    inner, perm, windows = m.inner, m.perm, windows or {}
    axes = {key: i for i, key in enumerate(inner.axes())}
    roles: list[Role] = []
    order: list[int] = []
    for z, r in enumerate(outer.roles):
        if isinstance(r, New):
            roles.append(Kept(place["out", z]))
            continue
        r1 = windows.get(r.src, inner.roles[perm[r.src]])
        roles.append(r1 if isinstance(r1, New) else moved(r1, place["out", z]))
        if ("out", perm[r.src]) in axes:
            order.append(axes["out", perm[r.src]])
    columns = [(place["in", i], axes["in", i]) for i in inner.contracted]
    columns += [(slot, axes["out", perm[k]]) for (what, k), slot in place.items() if what == "tap"]
    order += [axis for _, axis in sorted(columns)]
    if len(order) != len(axes):
        return None
    return regroup(normal(first, roles, kernels.permute(inner.kernel, order)), m.out_splits, m.count)


def _gathered(k: kernels.Kernel, axis: int, source: slice, target: slice, size: int) -> kernels.Kernel:
    taken = kernels.derive(
        (*k.shape[:axis], len(range(source.start, source.stop, source.step)), *k.shape[axis + 1 :]),
        ("every", axis, source.start, source.stop, source.step),
        (k,),
        lambda: k.tensor()[(slice(None),) * axis + (source,)],
    )
    return kernels.placed(taken, axis, size, target.start, target.step)


# An activation that a runtime computed within the convolution may be computed by itself now: behind a pool, or a resampling.
law = Law("commute", _commute, margin=0.05)
