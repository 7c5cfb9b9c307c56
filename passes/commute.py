"""Maps that act on different axes change places.

``A(B(x)) ⇒ B(A(x))`` when every axis that A contracts, scales, slides or resamples along is one that B keeps, and the
other way round: a 1×1 convolution below an upsampling or behind a pooling, a scale in front of a selection.

Exact always. A scale that varies along the very axis that B selects from also changes places, as the scale of the
selected places.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv import kernel as kernels
from fxconv.algebra import Meeting, meet, regroup
from fxconv.axes import is_static
from fxconv.expr import Kept, Map, New, Role, Shared, Value, Window, is_selection, split_view
from fxconv.law import Context, Law, Outcome, Refusal, mapped_operand
from fxconv.normal_form import normal
from fxconv.raw import as_value, moved
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
    acts = {k for k in outer.contracted}
    acts |= {r.src for r in outer.roles if not isinstance(r, (New, Kept))}
    kernel = outer.kernel
    moved_scale: dict[int, int] = {}
    for k in acts:
        r1 = inner.roles[perm[k]]
        if isinstance(r1, Kept):
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
        moved_scale[k] = r1.src
    if not acts:
        return None
    # First the outer map, on the inner one's input: kept slots of the inner map carry its roles over.
    first_roles: list[Role] = []
    place: dict[tuple[str, int], int] = {}  # ("outer", z) or ("inner", input slot) -> slot of the result
    kernel_axes: list[int] = []
    outer_axes = {key: i for i, key in enumerate(outer.axes())}
    for z, r in enumerate(outer.roles):
        if isinstance(r, New):
            place["outer", z] = len(first_roles)
            first_roles.append(r)
            kernel_axes.append(outer_axes["out", z])
            continue
        r1 = inner.roles[perm[r.src]]
        if isinstance(r1, New):
            continue
        place["outer", z] = len(first_roles)
        first_roles.append(moved(r, r1.src) if isinstance(r1, Kept) or r.src in moved_scale else Kept(r1.src))
        if ("out", z) in outer_axes:
            kernel_axes.append(outer_axes["out", z])
    for i in inner.contracted:
        place["inner", i] = len(first_roles)
        first_roles.append(Kept(i))
    columns = []
    for k in outer.contracted:
        r1 = inner.roles[perm[k]]
        assert isinstance(r1, Kept)
        columns.append((r1.src, outer_axes["in", k]))
    kernel_axes += [axis for _, axis in sorted(columns)]
    base = as_value(split_view(m.x, m.in_splits))
    first = normal(base, first_roles, kernels.permute(kernel, kernel_axes))
    # Then the inner map, on that.
    second_roles: list[Role] = []
    inner_axes = {key: i for i, key in enumerate(inner.axes())}
    order: list[int] = []
    for z, r in enumerate(outer.roles):
        if isinstance(r, New):
            second_roles.append(Kept(place["outer", z]))
            continue
        y = perm[r.src]
        r1 = inner.roles[y]
        if isinstance(r1, New):
            second_roles.append(r1)
        elif isinstance(r1, Kept):
            second_roles.append(Kept(place["outer", z]))
        else:
            second_roles.append(moved(r1, place["outer", z]))
        if ("out", y) in inner_axes:
            order.append(inner_axes["out", y])
    inner_columns = sorted((place["inner", i], inner_axes["in", i]) for i in inner.contracted)
    order += [axis for _, axis in inner_columns]
    if len(order) != len(inner_axes):
        return None
    second = normal(first, second_roles, kernels.permute(inner.kernel, order))
    return regroup(second, m.out_splits, m.count)


def _gathered(k: kernels.Kernel, axis: int, source: slice, target: slice, size: int) -> kernels.Kernel:
    taken = kernels.derive(
        (*k.shape[:axis], len(range(source.start, source.stop, source.step)), *k.shape[axis + 1 :]),
        ("every", axis, source.start, source.stop, source.step),
        (k,),
        lambda: k.tensor()[(slice(None),) * axis + (source,)],
    )
    return kernels.placed(taken, axis, size, target.start, target.step)


law = Law("commute", _commute)
