"""Composition of maps.

One function covers every pair of roles, on `Raw` maps; the numbers are computed later, when the kernel is asked for them, as
a sum over the taps of a window of one `einsum` each, which is the inner map's adjoint applied to the outer map's rows.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from fxconv import kernel as kernels
from fxconv.axes import Size, is_static, product
from fxconv.expr import (
    Const,
    Kept,
    Map,
    New,
    Resample,
    Role,
    Shared,
    Value,
    View,
    Window,
    has_resample,
    is_selection,
    kernel_shape,
    role_size,
    split_view,
    view,
)
from fxconv.kernel import Kernel
from fxconv.normal_form import normal
from fxconv.picks import picked_at_once
from fxconv.raw import Raw, Splits, as_value, densify_resampling, moved, raw, refine
from fxconv.window import Cascade, Filter, affine_pairs, cascade


def compose_raw(outer: Raw, perm: Sequence[int], inner: Raw) -> Raw | str:
    """``outer ∘ inner`` as one map, or the reason why it isn't one; input slot k of outer is output ``perm[k]`` of inner.

    Per middle slot (rows: the outer role, columns: the inner role)::

                    kept i      shared i    new         window i
        kept        inner's role moves out unchanged
        shared      shared i    shared i    new         refused: a scale that varies under a window
        window      window i    refused     new (1)     window i (2)
        contracted  contr. i    contr. i    summed      contracted i (3)

    (1) the filter applied to the kernel's rows, (2) `window.cascade`, (3) the inner filter's adjoint applied to the
    outer kernel's columns. (1) and (3) need static sizes.
    """
    outer, inner = picked_at_once(outer, perm, inner)
    roles: list[Role] = []
    relations: list[tuple[str, int, int, object]] = []  # (kind, middle slot, outer out slot or -1, data)
    contracted: list[tuple[int, int]] = []  # (input slot, middle slot)
    for z, role in enumerate(outer.roles):
        if isinstance(role, New):
            roles.append(role)
            continue
        y = perm[role.src]
        r1 = inner.roles[y]
        if isinstance(role, Resample) or isinstance(r1, Resample):
            if isinstance(role, Kept):
                roles.append(r1)
            elif isinstance(r1, Kept):
                roles.append(moved(role, r1.src))
            else:
                return "resampling is kept apart from what changes the same axis"
        elif isinstance(role, Kept):
            roles.append(r1)
        elif isinstance(role, Shared):
            if isinstance(r1, Window):
                return "a scale that varies along an axis follows a window along it"
            roles.append(Shared(r1.src) if isinstance(r1, (Kept, Shared)) else r1)
        elif isinstance(r1, Kept):
            roles.append(moved(role, r1.src))
        elif isinstance(r1, Shared):
            return "a window follows a scale that varies along its axis"
        elif isinstance(r1, New):
            if not (is_static(r1.size) and is_static(role.size)):
                return "a window over the rows of a kernel needs a static size"
            roles.append(New(role.size))
            relations.append(("apply", y, z, (role.filter, r1.size, role.size)))
        else:
            joined = cascade(role.filter, r1.filter, inner.in_sizes[r1.src], r1.size, role.size)
            if isinstance(joined, str):
                return joined
            roles.append(Window(r1.src, joined.filter, role.size))
            relations.append(("cascade", y, z, joined))
    for k in outer.contracted:
        y = perm[k]
        r1 = inner.roles[y]
        if isinstance(r1, Resample):
            return "resampling is kept apart from what changes the same axis"
        if isinstance(r1, Window):
            n_in = inner.in_sizes[r1.src]
            if not (is_static(n_in) and is_static(r1.size)):
                return f"a window under a contraction needs a static size, not {n_in}"
            relations.append(("adjoint", y, -1, (r1.filter, n_in, r1.size)))
        if not isinstance(r1, New):
            contracted.append((r1.src, y))
    shape = kernel_shape(tuple(roles), inner.in_sizes)
    if not all(is_static(s) for s in shape):
        return f"the kernel would have a dynamic size: {shape}"
    if 0.0 in (outer.kernel.uniform, inner.kernel.uniform):
        return Raw(inner.in_sizes, tuple(roles), kernels.uniform(shape, 0.0))
    multiple = _multiple(outer, perm, inner)
    if multiple is not None:
        return Raw(inner.in_sizes, tuple(roles), multiple)
    spec = (outer.in_sizes, outer.roles, tuple(perm), inner.in_sizes, inner.roles)
    kernel = kernels.derive(
        shape,
        ("compose", spec),
        (outer.kernel, inner.kernel),
        lambda: _compose_numbers(outer, tuple(perm), inner, shape, relations, contracted),
        uniform=_uniform_product(outer, inner, relations),
    )
    if kernel.uniform is None and outer.kernel.uniform is not None and inner.kernel.uniform is not None:
        kernel = _evened(kernel)
    if kernel.uniform is None and not relations and len(contracted) == len(outer.contracted):  # nothing is summed
        for scale, other in ((outer, inner), (inner, outer)):
            if all(isinstance(r, (Kept, Shared)) for r in scale.roles) and not scale.contracted:
                kernel.note_scale(scale.kernel, other.kernel)
    return Raw(inner.in_sizes, tuple(roles), kernel)


_FEW = 2**12
"""Entries up to which a composition of uniform kernels is computed to see whether it is uniform."""


def _evened(k: Kernel) -> Kernel:
    """A kernel whose entries turn out to be the same (pooling of a pooling, or of an upsampling) as one that is known to be."""
    if math.prod(int(s) for s in k.shape) > _FEW:
        return k
    same = k.fact("same", lambda t: float(t.flatten()[0]) if t.numel() and bool((t == t.flatten()[0]).all()) else None)
    return k if same is None else kernels.uniform(k.shape, same)


def _multiple(outer: Raw, perm: Sequence[int], inner: Raw) -> Kernel | None:
    """The kernel of a composition with a number, or None where neither map is one: the other's kernel times that number."""
    if tuple(perm) != tuple(range(len(inner.roles))):
        return None
    for number, other in ((outer, inner), (inner, outer)):
        if number.kernel.shape == () and number.kernel.uniform is not None:
            if all(isinstance(r, Kept) and r.src == o for o, r in enumerate(number.roles)):
                return kernels.scaled(other.kernel, number.kernel.uniform)
    return None


def _uniform_product(outer: Raw, inner: Raw, relations: list[tuple[str, int, int, object]]) -> float | None:
    """The entries of a composition of uniform kernels where nothing is summed (scalars, selections), else None."""
    if outer.kernel.uniform is None or inner.kernel.uniform is None or outer.contracted or inner.contracted:
        return None
    for kind, _, _, data in relations:
        if kind != "cascade":
            return None
        assert isinstance(data, Cascade)
        if data.outer_taps > 1 or data.inner_taps > 1:
            return None
    return outer.kernel.uniform * inner.kernel.uniform


def _compose_numbers(
    outer: Raw,
    perm: tuple[int, ...],
    inner: Raw,
    shape: tuple[Size, ...],
    relations: list[tuple[str, int, int, object]],
    contracted: list[tuple[int, int]],
) -> torch.Tensor:
    names = itertools.count()
    middle = {y: next(names) for y in range(len(inner.roles))}
    related = {y: kind for kind, y, _, _ in relations}
    columns = {i: next(names) for i in inner.contracted}
    rows: dict[int, int] = {}

    subs2: list[int] = []
    axis2: dict[int, int] = {}  # middle slot -> axis of the outer kernel that a relation indexes
    for position, (side, slot) in enumerate(outer.axes()):
        if side == "in":
            y = perm[slot]
            axis2[y] = position
            subs2.append(middle[y])
            continue
        role = outer.roles[slot]
        if isinstance(role, New):
            rows[slot] = next(names)
            subs2.append(rows[slot])
        else:
            assert not isinstance(role, Kept)
            y = perm[role.src]
            axis2[y] = position
            subs2.append(-1 if related.get(y) in ("apply", "cascade") else middle[y])
    subs1: list[int] = []
    axis1: dict[int, int] = {}
    for position, (side, slot) in enumerate(inner.axes()):
        if side == "in":
            subs1.append(columns[slot])
        else:
            axis1[slot] = position
            subs1.append(-1 if related.get(slot) == "adjoint" else middle[slot])

    subs_out: list[int] = []
    axis_out: dict[int, int] = {}
    in_columns = {i: columns[i] for i in inner.contracted} | {i: middle[y] for i, y in contracted}
    source = {i: y for i, y in contracted}
    for z, role in enumerate(outer.roles):
        if isinstance(role, New):
            subs_out.append(rows[z])
            continue
        y = perm[role.src]
        if isinstance(role, (Kept, Resample)) and isinstance(inner.roles[y], (Kept, Resample)):
            continue
        axis_out[y] = len(subs_out)
        subs_out.append(middle[y])
    for i in sorted(in_columns):
        if i in source:
            axis_out[source[i]] = len(subs_out)
        subs_out.append(in_columns[i])

    choices: list[list[tuple[int, object, object, slice]]] = []
    for kind, y, _, data in relations:
        options: list[tuple[int, object, object, slice]] = []
        if kind == "cascade":
            assert isinstance(data, Cascade)
            options = [(y, t2, s1, s) for t2, s1, s in data.meetings()]
        else:
            f, n_in, n_out = cast("tuple[Filter, Size, Size]", data)
            for t in range(f.taps):
                pairs = affine_pairs(f.up, f.down, t * f.dilation - f.offset, int(n_out), int(n_in))
                if pairs is not None:
                    options.append((y, t, pairs.i, pairs.y) if kind == "apply" else (y, pairs.y, t, pairs.i))
        choices.append(options)

    k2, k1 = outer.kernel.tensor(), inner.kernel.tensor()
    k2 = k2.to(k1.device) if k2.device != k1.device else k2
    letters = string.ascii_letters
    equation = "{},{}->{}".format(*("".join(letters[s] for s in subs if s >= 0) for subs in (subs2, subs1, subs_out)))
    if not relations:
        if {*subs2, *subs1} <= {*subs_out}:  # nothing is summed: a scale
            return _spread(k2, subs2, subs_out) * _spread(k1, subs1, subs_out)
        return torch.einsum(equation, k2, k1).contiguous()
    out = k1.new_zeros(tuple(int(s) for s in shape))
    for combo in itertools.product(*choices):
        i2: list[object] = [slice(None)] * k2.dim()
        i1: list[object] = [slice(None)] * k1.dim()
        io: list[object] = [slice(None)] * out.dim()
        for y, in_outer, in_inner, in_out in combo:
            i2[axis2[y]], i1[axis1[y]], io[axis_out[y]] = in_outer, in_inner, in_out
        out[tuple(io)] += torch.einsum(equation, k2[tuple(i2)], k1[tuple(i1)])  # type: ignore[index]
    return out


def _spread(t: torch.Tensor, subs: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    """A view with the axes named ``subs`` in this order, and size 1 for those that it does not have."""
    t = t.permute([subs.index(s) for s in order if s in subs])
    for position, s in enumerate(order):
        if s not in subs:
            t = t.unsqueeze(position)
    return t


@dataclass(frozen=True)
class Meeting:
    """Two maps, the view between them resolved: input slot k of ``outer`` is output slot ``perm[k]`` of ``inner``.

    Attributes:
        x: what the inner map reads.
        in_splits: how the slots of x split into the inner map's input slots.
        out_splits: how the result's slots group the first ``count`` output slots of ``outer``; the others have size 1
            and are dropped.
    """

    outer: Raw
    perm: tuple[int, ...]
    inner: Raw
    x: Value
    in_splits: Splits
    out_splits: Splits
    count: int


def meet(outer: Map, inner: Map, between: View | None = None) -> Meeting | str:
    """Refine two maps until each input slot of the outer one is an output slot of the inner one, or say why not."""
    met = _meet(outer, inner, between)
    if isinstance(met, str) and between is not None:
        viewed_first = _behind_view(inner, between)
        if viewed_first is not None:
            return _meet(outer, *viewed_first)
    return met


def _behind_view(inner: Map, between: View) -> tuple[Map, View] | None:
    """``view ∘ map`` as ``rest ∘ map ∘ merge``, where the view merges slots that the map keeps; None where it merges none.

    ``flatten(2)`` of a BatchNorm is a BatchNorm of the flattened tensor: what slides along the flattened axis meets a map that
    keeps that axis, rather than two that it can't slide along.
    """
    sources: dict[int, list[int]] = {}  # first slot of a merged group -> the inner operand's slots
    slot_of = [o for o, split in enumerate(between.splits) for _ in split]
    merged: set[int] = set()
    for g in between.groups:
        outs = [slot_of[a] for a in g]
        found = [inner.roles[o] for o in outs]
        whole = all(len(between.splits[o]) == 1 for o in outs)
        if len(g) > 1 and whole and all(isinstance(r, Kept) for r in found):
            sources[outs[0]] = [r.src for r in found if isinstance(r, Kept)]
            merged.update(outs[1:])
    if not sources:
        return None
    heads = {srcs[0]: srcs for srcs in sources.values()}
    gone = {s for srcs in sources.values() for s in srcs[1:]}
    left = [s for s in range(inner.x.rank) if s not in gone]
    groups = tuple(tuple(heads.get(s, [s])) for s in left)
    x = as_value(view(inner.x, tuple((n,) for n in inner.x.sizes), groups))
    place = {s: i for i, s in enumerate(left)}
    kept = [o for o in range(len(inner.roles)) if o not in merged]
    roles = tuple(moved(r, place[r.src]) if not isinstance(r := inner.roles[o], New) else r for o in kept)
    new = Map(x, roles, inner.kernel)
    # The rest of the view: merged groups are one atom now.
    number: dict[int, int] = {}
    splits: list[tuple[Size, ...]] = []
    a = 0
    count = 0
    for o, split in enumerate(between.splits):
        if o not in merged:
            splits.append((role_size(roles[kept.index(o)], x.sizes),) if o in sources else split)
            for k in range(len(split)):
                number[a + k] = count + k
            count += len(split)
        a += len(split)
    rest = tuple(tuple(number[a] for a in g if a in number) for g in between.groups)
    return new, View(Value(new), tuple(splits), rest)


def _meet(outer: Map, inner: Map, between: View | None) -> Meeting | str:
    if between is None:
        sizes = raw(inner).out_sizes
        between_splits: Splits = tuple((s,) for s in sizes)
        groups: tuple[tuple[int, ...], ...] = tuple((i,) for i in range(len(sizes)))
    else:
        between_splits, groups = between.splits, between.groups
    refined1 = refine(raw(inner), None, between_splits)
    if isinstance(refined1, str):
        return refined1
    m1, in_splits, out_splits = refined1
    if out_splits != between_splits:
        return "a kept axis is split more finely than the view between the two maps"
    atoms = tuple(s for split in between_splits for s in split)
    refined2 = refine(raw(outer), tuple(tuple(atoms[a] for a in g) for g in groups), None)
    if isinstance(refined2, str):
        return refined2
    m2, splits1, splits2 = refined2
    order: list[int] = []
    ones = 0
    for g, split in zip(groups, splits1, strict=True):
        if g or not split:
            order += g
        else:  # a window slides along an axis of size 1 that has no slot
            order.append(len(atoms) + ones)
            ones += 1
    dropped = [a for a in range(len(atoms)) if a not in order]
    count = len(m2.roles)
    if ones:
        roles = (*m1.roles, *(New(1) for _ in range(ones)))
        m1 = Raw(m1.in_sizes, roles, kernels.reshape(m1.kernel, kernel_shape(roles, m1.in_sizes)))
    if dropped:
        # Size-1 slots of the inner map that the outer one doesn't see pass by it as kept slots.
        extra = tuple(Kept(len(order) + k) for k in range(len(dropped)))
        m2 = Raw((*m2.in_sizes, *(atoms[a] for a in dropped)), (*m2.roles, *extra), m2.kernel)
    return Meeting(m2, (*order, *dropped), m1, inner.x, in_splits, splits2, count)


def compose(outer: Map, inner: Map, between: View | None = None) -> Value | str:
    """``outer ∘ between ∘ inner`` in normal form, or the reason why it is not one map."""
    m = meet(outer, inner, between)
    return m if isinstance(m, str) else _composed(m, inner)


def join(outer: Map, inner: Map, between: View | None = None) -> Value | str | None:
    """`compose`, where resampling that meets what the inner map makes, scales or selects becomes a matrix.

    None where other resampling keeps the two apart: it has its own operator, and `commute` moves maps past it.
    """
    if has_resample(outer) == has_resample(inner) or is_selection(outer) and is_selection(inner):
        return compose(outer, inner, between)
    if has_resample(inner):
        return _under_contraction(outer, inner, between)
    m = meet(outer, inner, between)
    if isinstance(m, str):
        return m
    resampled = {o: role for o, role in enumerate(m.outer.roles) if isinstance(role, Resample)}
    known = (New, Shared, Window) if is_selection(inner) else (New, Shared)
    meeting = {o for o, role in resampled.items() if isinstance(m.inner.roles[m.perm[role.src]], known)}
    later = {o: role for o, role in resampled.items() if o not in meeting}
    if not meeting or any(not isinstance(m.inner.roles[m.perm[role.src]], Kept) for role in later.values()):
        return None
    # What the inner map keeps is resampled behind the composition.
    roles = tuple(Kept(later[o].src) if o in later else role for o, role in enumerate(m.outer.roles))
    dense = densify_resampling(replace(m.outer, roles=roles), meeting)
    composed = dense if isinstance(dense, str) else _composed(replace(m, outer=dense), inner)
    return composed if isinstance(composed, str) or not later else _resampled(composed, later, m.out_splits)


def _resampled(x: Value, resampled: Mapping[int, Resample], splits: Splits) -> Value | None:
    """A value with some slots resampled, which are counted as the parts that ``splits`` has; None for a constant."""
    if isinstance(x.node, Const):
        return None
    count = itertools.count()
    roles: list[Role] = []
    for slot, split in enumerate(splits):
        parts = [next(count) for _ in split]
        found = [resampled[o] for o in parts if o in resampled]
        roles.append(moved(found[0], slot) if found else Kept(slot))
    return normal(x, roles, kernels.uniform((), 1.0))


def _under_contraction(outer: Map, inner: Map, between: View | None) -> Value | str | None:
    """A contraction of what resampling makes, as one of what it reads; None where something else is done to that."""
    if not outer.contracted:
        return None
    m = meet(outer, inner, between)
    if isinstance(m, str):
        return None
    slots = {m.perm[k] for k in m.outer.contracted}
    resampled = {y for y in slots if isinstance(r := m.inner.roles[y], Resample) and r.size != 1}
    if not resampled:
        return None
    dense = densify_resampling(m.inner, resampled)
    return None if isinstance(dense, str) else _composed(replace(m, inner=dense), inner)


def _composed(m: Meeting, inner: Map) -> Value | str:
    composed = compose_raw(m.outer, m.perm, m.inner)
    if isinstance(composed, str):
        return composed
    if composed.kernel.uniform == 0.0:
        zeros = tuple(product(split) for split in m.out_splits)
        return Value(Const(zeros, (False,) * len(zeros), kernels.uniform((), 0.0)))
    x = as_value(split_view(m.x, m.in_splits))
    out = normal(x, composed.roles, composed.kernel)
    return regroup(out, m.out_splits, m.count)


def regroup(out: Value, splits: Splits, count: int) -> Value:
    """Group the first ``count`` slots of a value as ``splits`` says; further slots (of size 1) are dropped."""
    numbers = itertools.count()
    groups = tuple(tuple(next(numbers) for _ in split) for split in splits)
    if sum(map(len, groups)) != count:
        raise AssertionError(f"{count} slots do not regroup as {splits}")
    return as_value(view(out, tuple((s,) for s in out.sizes), groups))
