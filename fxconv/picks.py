"""Entries picked at places that are counted from the ends of an axis, met by what picks, crops or pads that axis too.

A class token is the first entry of an axis whose size nobody knows: a window there would have an extent that depends on the
size. As a role it is a `Resample` of kind "pick", whose parameters are the places, negative from the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxconv import kernel as kernels
from fxconv.axes import Size, is_static
from fxconv.expr import Kept, New, Resample, Role, Window, kernel_shape
from fxconv.raw import Raw
from fxconv.resample import PICK
from fxconv.window import Filter


def picked_at_once(outer: Raw, perm: Sequence[int], inner: Raw) -> tuple[Raw, Raw]:
    """The same two maps, where one picks entries of an axis along which the other one picks, crops or pads: what is read in
    the end is picked at once, by the outer map. Where all of that is padding, the outer map is zero.

    Input slot k of outer is output ``perm[k]`` of inner.
    """
    for z, role in enumerate(outer.roles):
        if isinstance(role, New) or not isinstance(inner.roles[y := perm[role.src]], (Window, Resample)):
            continue
        r1 = inner.roles[y]
        assert isinstance(r1, (Window, Resample))
        n_in = inner.in_sizes[r1.src]
        places = _places(role, r1, n_in)
        if places is None:
            continue
        zero = None in places
        new = Resample(role.src, PICK, (0,) * len(places) if zero else tuple(places), len(places))
        sizes = (*outer.in_sizes[: role.src], n_in, *outer.in_sizes[role.src + 1 :])
        outer = _with_role(Raw(sizes, outer.roles, outer.kernel), z, new)
        inner = _with_role(inner, y, Kept(r1.src))
        if zero:
            outer = replace(outer, kernel=kernels.uniform(outer.kernel.shape, 0.0))
    return outer, inner


def _with_role(m: Raw, o: int, role: Role) -> Raw:
    """The map with a role without an axis of the kernel in the place of a window of one tap or of such a role."""
    roles = (*m.roles[:o], role, *m.roles[o + 1 :])
    return Raw(m.in_sizes, roles, kernels.reshape(m.kernel, kernel_shape(roles, m.in_sizes)))


def _places(outer: Role, inner: Window | Resample, n_in: Size) -> list[int | None] | None:
    """Which places of the inner role's axis are read in the end, all None where all are padding; or None where that has no
    answer, or no one picks."""
    picks = [r for r in (outer, inner) if isinstance(r, Resample) and r.kind == PICK]
    crops = [r for r in (outer, inner) if isinstance(r, Window) and r.filter.is_selection]
    if len(picks) + len(crops) != 2 or not picks:
        return None
    found: list[int | None]
    if isinstance(outer, Window):  # of what is picked, whose size is known
        assert isinstance(inner, Resample)
        at = [o * outer.filter.down - outer.filter.offset for o in range(int(outer.size))] if is_static(outer.size) else []
        found = [inner.parameters[i] if 0 <= i < len(inner.parameters) else None for i in at]
    elif isinstance(inner, Resample):
        assert isinstance(outer, Resample)
        found = [inner.parameters[i] for i in outer.parameters]
    else:
        assert isinstance(outer, Resample)
        found = []
        for i in outer.parameters:
            place = _place_before(inner.filter, i, n_in)
            if place is None:
                return None
            found.append(None if isinstance(place, str) else place)
    padding = found.count(None)
    return found if found and padding in (0, len(found)) else None


_PADDING = "padding"


def _place_before(f: Filter, i: int, n_in: Size) -> int | str | None:
    """The place that a selection shows at place ``i`` of its result, which is there; None where that depends on the size."""
    if is_static(n_in):
        if i < 0 and f.down != 1:
            return None
        at = i * f.down - f.offset if i >= 0 else int(n_in) + f.extent + i - f.offset
        return at if 0 <= at < int(n_in) else _PADDING
    if i >= 0:
        at = i * f.down - f.offset
        return _PADDING if at < 0 else at if f.pad_hi <= 0 or at == 0 else None
    if f.down != 1:
        return None
    at = f.extent - f.offset + i  # from the end: of the n + extent places, the first one shows place −offset
    return _PADDING if at >= 0 else at if f.offset <= 0 or at == -1 else None
