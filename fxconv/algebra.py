"""The algebra of maps: refinement of axes, composition, evaluation at a constant, and the normal form.

Everything here works on `Raw` maps (roles and kernel over given input sizes, no value attached). One composition
function covers every pair of roles; the numbers are computed later, when the kernel is asked for them, as a sum over the
taps of a window of one `einsum` each, which is the inner map's adjoint applied to the outer map's rows.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from fxconv import kernel as kernels
from fxconv.axes import Size, common_refinement, is_static, product
from fxconv.expr import (
    Const,
    Kept,
    Map,
    New,
    Node,
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
from fxconv.resample import matrix
from fxconv.window import Cascade, Filter, affine_pairs, cascade, stays_inside

Splits = tuple[tuple[Size, ...], ...]


@dataclass(frozen=True)
class Raw:
    """A linear map by itself: as `Map`, on input slots of the given sizes."""

    in_sizes: tuple[Size, ...]
    roles: tuple[Role, ...]
    kernel: Kernel

    @property
    def out_sizes(self) -> tuple[Size, ...]:
        return tuple(role_size(r, self.in_sizes) for r in self.roles)

    @property
    def contracted(self) -> tuple[int, ...]:
        named = {r.src for r in self.roles if not isinstance(r, New)}
        return tuple(i for i in range(len(self.in_sizes)) if i not in named)

    def axes(self) -> list[tuple[str, int]]:
        """What each kernel axis belongs to: ("out", output slot) or ("in", contracted input slot)."""
        outs = [("out", o) for o, r in enumerate(self.roles) if isinstance(r, (Shared, New, Window))]
        return outs + [("in", i) for i in self.contracted]


def raw(m: Map) -> Raw:
    return Raw(m.x.sizes, m.roles, m.kernel)


def as_value(x: Value | Node) -> Value:
    return x if isinstance(x, Value) else Value(x)


def moved(role: Role, src: int) -> Role:
    """The role with another source slot."""
    if isinstance(role, Kept):
        return Kept(src)
    if isinstance(role, Shared):
        return Shared(src)
    if isinstance(role, Window):
        return Window(src, role.filter, role.size)
    if isinstance(role, Resample):
        return Resample(src, role.kind, role.parameters, role.size)
    return role


# -- Refinement -------------------------------------------------------------------------------------------------------


def refine(m: Raw, in_splits: Splits | None, out_splits: Splits | None) -> tuple[Raw, Splits, Splits] | str:
    """Split slots of a map into atoms (new ⇒ new × new, contracted ⇒ contracted × contracted, kept on both sides).

    Returns the refined map and the splits of its input and output slots, which can be finer than those asked for where
    a kept slot was split differently on its two sides; or the reason why it can't be done.
    """
    ins: list[tuple[Size, ...]] = list(in_splits) if in_splits is not None else [(s,) for s in m.in_sizes]
    outs: list[tuple[Size, ...]] = list(out_splits) if out_splits is not None else [(s,) for s in m.out_sizes]
    for o, role in enumerate(m.roles):
        if isinstance(role, (Kept, Shared)):
            if role_size(role, m.in_sizes) == 1:
                ins[role.src] = outs[o] = ins[role.src] if len(ins[role.src]) < len(outs[o]) else outs[o]
                continue
            fine = common_refinement(ins[role.src], outs[o])
            if fine is None:
                return f"axes {ins[role.src]} and {outs[o]} have no common refinement"
            ins[role.src] = outs[o] = fine
        elif isinstance(role, (Window, Resample)):
            if len(outs[o]) > 1 or len(ins[role.src]) > 1:
                return "a window slides along an axis that is split here"
            if not ins[role.src]:
                ins[role.src] = (1,)
            if not outs[o]:
                outs[o] = (1,)
    start = list(itertools.accumulate((len(s) for s in ins), initial=0))
    roles: list[Role] = []
    shape: list[Size] = []
    for o, role in enumerate(m.roles):
        if isinstance(role, New):
            roles += [New(s) for s in outs[o]]
            shape += outs[o]
        elif isinstance(role, (Kept, Shared)):
            for k in range(len(outs[o])):
                roles.append(moved(role, start[role.src] + k))
            if isinstance(role, Shared):
                shape += outs[o]
        else:
            roles.append(moved(role, start[role.src]))
            if isinstance(role, Window):
                shape.append(role.filter.taps)
    for i in m.contracted:
        shape += ins[i]
    in_sizes = tuple(s for split in ins for s in split)
    return Raw(in_sizes, tuple(roles), kernels.reshape(m.kernel, shape)), tuple(ins), tuple(outs)


# -- Composition ------------------------------------------------------------------------------------------------------


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
    spec = (outer.in_sizes, outer.roles, tuple(perm), inner.in_sizes, inner.roles)
    kernel = kernels.derive(
        shape,
        ("compose", spec),
        (outer.kernel, inner.kernel),
        lambda: _compose_numbers(outer, tuple(perm), inner, shape, relations, contracted),
        uniform=_uniform_product(outer, inner, relations),
    )
    return Raw(inner.in_sizes, tuple(roles), kernel)


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
    equation = "{},{}->{}".format(
        *("".join(letters[s] for s in subs if s >= 0) for subs in (subs2, subs1, subs_out))
    )
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
    if has_resample(outer) == has_resample(inner):
        return compose(outer, inner, between)
    if has_resample(inner):
        return None
    m = meet(outer, inner, between)
    if isinstance(m, str):
        return m
    resampled = {o: role.src for o, role in enumerate(m.outer.roles) if isinstance(role, Resample)}
    known = (New, Shared, Window) if is_selection(inner) else (New, Shared)
    if any(not isinstance(m.inner.roles[m.perm[src]], known) for src in resampled.values()):
        return None
    dense = densify_resampling(m.outer, set(resampled))
    return dense if isinstance(dense, str) else _composed(replace(m, outer=dense), inner)


def _composed(m: Meeting, inner: Map) -> Value | str:
    composed = compose_raw(m.outer, m.perm, m.inner)
    if isinstance(composed, str):
        return composed
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


# -- Normal form ------------------------------------------------------------------------------------------------------


def normal(x: Value, roles: Sequence[Role], kernel: Kernel) -> Value:
    """The value of a map in normal form: its operand's view absorbed as far as it goes, idle windows gone.

    A patch convolution (kept prefix and contracted suffix of one slot) becomes a window with ``taps = down``, so that
    patchify → Linear and a strided convolution are the same expression.
    """
    m = _tidy(Raw(x.sizes, tuple(roles), kernel))
    if isinstance(x.node, View):
        return _absorb(m, x.node)
    return _finish(x, m)


def _finish(x: Value, m: Raw) -> Value:
    if m.kernel.uniform == 1.0 and m.roles == tuple(Kept(i) for i in range(x.rank)):
        return x
    if m.kernel.uniform == 1.0 and not m.contracted and all(isinstance(r, Kept) for r in m.roles):
        order = tuple(r.src for r in m.roles if isinstance(r, Kept))
        return as_value(view(x, tuple((s,) for s in x.sizes), tuple((i,) for i in order)))
    return Value(Map(x, m.roles, m.kernel))


def _tidy(m: Raw) -> Raw:
    """Turn windows that do nothing, and scales that are all the same, into kept slots."""
    roles: list[Role] = []
    squeeze: list[int] = []
    axis = 0
    for role in m.roles:
        if isinstance(role, Window) and role.filter.is_identity:
            squeeze.append(axis)
            roles.append(Kept(role.src))
        elif isinstance(role, Shared) and m.kernel.uniform is not None:
            squeeze.append(axis)
            roles.append(Kept(role.src))
        else:
            roles.append(role)
        axis += not isinstance(role, (Kept, Resample))
    if not squeeze:
        return m
    shape = tuple(s for a, s in enumerate(m.kernel.shape) if a not in squeeze)
    return Raw(m.in_sizes, tuple(roles), kernels.reshape(m.kernel, shape))


def _absorb(m: Raw, v: View) -> Value:
    """A map of a view as (a view of) a map of the view's operand, with as few splits left as possible."""
    atoms = v.atoms
    refined = refine(m, tuple(tuple(atoms[a] for a in g) for g in v.groups), None)
    if isinstance(refined, str) or len(refined[0].in_sizes) != sum(map(len, v.groups)):
        return _finish(Value(v), m)
    fine, _, out_splits = refined
    order = [a for g in v.groups for a in g]
    use: dict[int, tuple[str, int]] = {}  # atom -> (what becomes of it, refined output slot or axis)
    for o, role in enumerate(fine.roles):
        if not isinstance(role, New):
            use[order[role.src]] = (type(role).__name__, o)
    for i in fine.contracted:
        use[order[i]] = ("contracted", i)
    axis_of = {key: position for position, key in enumerate(fine.axes())}

    new_splits: list[tuple[Size, ...]] = []
    in_slot = 0
    out_of: dict[int, tuple[Role, list[int], list[int]]] = {}  # first refined out -> (role, outs it holds, kernel axes)
    held: set[int] = set()
    contracted: list[list[int]] = []  # kernel axes per contracted slot
    a = 0
    for split in v.splits:
        members = list(range(a, a + len(split)))
        a += len(split)
        kinds = [use[t][0] if t in use else "dropped" for t in members]
        solid = [(t, k) for t, k in zip(members, kinds, strict=True) if k != "dropped"]
        names = [k for _, k in solid]
        outs = [use[t][1] for t, k in solid if k != "contracted"]
        columns = [axis_of["in", use[t][1]] for t, k in solid if k == "contracted"]
        kept = names.count("Kept")
        if all(k == "contracted" for k in names):
            contracted.append(columns)
            new_splits.append((product(split),))
            in_slot += 1
        elif set(names) in ({"Kept"}, {"Shared"}):
            whole: Role = Kept(in_slot) if names[0] == "Kept" else Shared(in_slot)
            axes = [] if names[0] == "Kept" else [axis_of["out", o] for o in outs]
            out_of[outs[0]] = (whole, outs, axes)
            held.update(outs)
            new_splits.append((product(split),))
            in_slot += 1
        elif (
            0 < kept < len(names)
            and names == ["Kept"] * kept + ["contracted"] * (len(names) - kept)
            and is_static(patch := product([atoms[t] for t, _ in solid[kept:]]))
        ):
            p = int(patch)
            size = product([atoms[t] for t, _ in solid[:kept]])
            out_of[outs[0]] = (Window(in_slot, Filter(1, p, p, 1, 0, 0), size), outs, columns)
            held.update(outs)
            new_splits.append((product(split),))
            in_slot += 1
        else:
            new_splits.append(tuple(split))
            for t, k in zip(members, kinds, strict=True):
                if k == "contracted":
                    contracted.append([axis_of["in", use[t][1]]])
                elif k == "dropped":
                    contracted.append([])
                else:
                    o = use[t][1]
                    role = fine.roles[o]
                    axes = [axis_of["out", o]] if isinstance(role, (Shared, Window)) else []
                    out_of[o] = (moved(role, in_slot), [o], axes)
                    held.add(o)
                in_slot += 1
    roles: list[Role] = []
    axes_order: list[list[int]] = []
    out_members: list[list[int]] = []
    for o, role in enumerate(fine.roles):
        if isinstance(role, New):
            roles.append(role)
            axes_order.append([axis_of["out", o]])
            out_members.append([o])
        elif o in out_of:
            new_role, outs, axes = out_of[o]
            roles.append(new_role)
            out_members.append(outs)
            if not isinstance(new_role, (Kept, Resample)):
                axes_order.append(axes)
    axes_order += contracted
    kernel = kernels.permute(fine.kernel, [x for group in axes_order for x in group])
    kernel = kernels.reshape(kernel, [product([fine.kernel.shape[x] for x in group]) for group in axes_order])
    base = as_value(split_view(v.x, tuple(new_splits)))
    out = _finish(base, _tidy(Raw(base.sizes, tuple(roles), kernel)))
    sizes = fine.out_sizes
    post_splits = tuple(tuple(sizes[o] for o in outs) for outs in out_members)
    number = {o: n for n, o in enumerate(o for outs in out_members for o in outs)}
    count = itertools.count()
    groups = tuple(tuple(number[next(count)] for _ in split) for split in out_splits)
    return as_value(view(out, post_splits, groups))


# -- Constants --------------------------------------------------------------------------------------------------------


def densify_resampling(m: Raw, slots: set[int]) -> Raw | str:
    """Write resampling along the given output slots as a dense matrix (contracted input, new output)."""
    for o in sorted(slots, reverse=True):
        role = m.roles[o]
        assert isinstance(role, Resample)
        n_in = m.in_sizes[role.src]
        if not (is_static(n_in) and is_static(role.size)):
            return f"resampling as a matrix needs static sizes, not {n_in} → {role.size}"
        roles = (*m.roles[:o], New(role.size), *m.roles[o + 1 :])
        before = Raw(m.in_sizes, m.roles, m.kernel).axes()
        after = Raw(m.in_sizes, roles, m.kernel).axes()
        position_out, position_in = after.index(("out", o)), after.index(("in", role.src))
        shape = kernel_shape(roles, m.in_sizes)

        def numbers(
            m: Raw = m,
            role: Resample = role,
            n_in: int = int(n_in),
            out: int = position_out,
            inp: int = position_in,
        ) -> torch.Tensor:
            table = matrix(role.kind, role.parameters, n_in, int(role.size))
            k = m.kernel.tensor()
            full = k[..., None, None] * table.to(k.device)
            first, second = (out, inp) if out < inp else (inp, out)
            if out > inp:
                full = full.transpose(-1, -2)
            return full.movedim((-2, -1), (first, second))

        assert len(after) == len(before) + 2
        m = Raw(m.in_sizes, roles, kernels.derive(shape, ("resample", o, m.roles, m.in_sizes), (m.kernel,), numbers))
    return m


def map_constant(m: Map, c: Const) -> Const | str:
    """The value of a map at a constant; a constant stays one along windows that never read padding."""
    r = raw(m)
    resampled = {
        o for o, role in enumerate(r.roles) if isinstance(role, Resample) and c.varies[role.src]
    }
    if resampled:
        dense = densify_resampling(r, resampled)
        if isinstance(dense, str):
            return dense
        r = dense
    # Slots along which the constant doesn't vary: sum the kernel over them where that is the same at every output.
    varies, kernel = list(c.varies), r.kernel
    roles: list[Role] = []
    drop: list[int] = []
    keep_size: dict[int, Size] = {}
    c_kernel = c.kernel
    axis = {key: k for k, key in enumerate(r.axes())}
    counts = 1.0
    for o, role in enumerate(r.roles):
        if isinstance(role, Window) and not varies[role.src]:
            count = _constant_taps(role.filter, r.in_sizes[role.src], role.size, kernel.uniform is not None)
            if count:
                drop.append(axis["out", o])
                roles.append(Kept(role.src))
                keep_size[o] = role.size
                counts *= count / role.filter.taps
                continue
            if not is_static(r.in_sizes[role.src]) or not is_static(role.size):
                return "a constant varies at the border of a window whose size is dynamic"
            c_kernel, varies = _vary(c.sizes, varies, c_kernel, role.src)
        elif isinstance(role, Resample):
            roles.append(Kept(role.src))
            keep_size[o] = role.size
            continue
        roles.append(role)
    flat_inputs = []
    for i in r.contracted:
        if not varies[i]:
            if not is_static(r.in_sizes[i]):
                return f"a constant is summed over an axis of dynamic size {r.in_sizes[i]}"
            drop.append(axis["in", i])
            flat_inputs.append(i)
    if drop:
        dims = tuple(sorted(drop))
        source = kernel
        shape = tuple(s for d, s in enumerate(source.shape) if d not in dims)
        factor = counts
        kernel = kernels.derive(
            shape, ("sum", dims, factor), (source,), lambda: source.tensor().sum(dims) * factor
        )
    # What remains varies: compose with the constant as a map from nothing whose rows are its values.
    slots = [i for i in range(len(varies)) if i not in flat_inputs]
    renumber = {i: k for k, i in enumerate(slots)}
    outer = Raw(
        tuple(r.in_sizes[i] for i in slots),
        tuple(moved(role, renumber[role.src]) if not isinstance(role, New) else role for role in roles),
        kernel,
    )
    phantom = [i for i in slots if not varies[i]]
    inner_roles: list[Role] = [
        New(c.sizes[i]) if varies[i] else Kept(phantom.index(i)) for i in slots
    ]
    inner = Raw(tuple(c.sizes[i] for i in phantom), tuple(inner_roles), c_kernel)
    composed = compose_raw(outer, list(range(len(slots))), inner)
    if isinstance(composed, str):
        return composed
    sizes = tuple(keep_size.get(o, s) for o, s in enumerate(composed.out_sizes))
    result_varies = tuple(not isinstance(role, Kept) for role in composed.roles)
    return Const(sizes, result_varies, composed.kernel)


def _constant_taps(f: Filter, n_in: Size, n_out: Size, uniform_kernel: bool) -> int:
    """How many taps each output reads inside the input, if it is all of them (or, for equal taps, the same number)."""
    if f.up == 1:
        return f.taps if stays_inside(f, n_in, n_out) else 0
    if not uniform_kernel:
        return 0
    trial = range(1, 8) if not is_static(n_in) else (int(n_in),)
    seen = set()
    for n in trial:
        size = f.out_size(n) if not is_static(n_out) else int(n_out)
        for o in range(size):
            seen.add(
                sum((j := o * f.down + t * f.dilation - f.offset) % f.up == 0 and 0 <= j < f.up * n for t in range(f.taps))
            )
    return seen.pop() if len(seen) == 1 else 0


def _vary(sizes: tuple[Size, ...], varies: list[bool], k: Kernel, slot: int) -> tuple[Kernel, list[bool]]:
    position = sum(varies[:slot])
    shape = list(k.shape)
    shape.insert(position, 1)
    k = kernels.reshape(k, shape)
    shape[position] = sizes[slot]
    varies = list(varies)
    varies[slot] = True
    return kernels.expand(k, shape), varies


def view_constant(v: View, c: Const) -> Const:
    """A constant seen through a view."""
    kernel, varies = c.kernel, list(c.varies)
    # A slot that varies splits into atoms that vary; a group with some varying atom varies as a whole.
    atom_varies = [varies[slot] for slot, split in enumerate(v.splits) for _ in split]
    atoms = v.atoms
    shape = [s for flag, s in zip(atom_varies, atoms, strict=True) if flag]
    kernel = kernels.reshape(kernel, shape)
    groups_vary = tuple(any(atom_varies[a] for a in g) for g in v.groups)
    axes = [a for a, flag in enumerate(atom_varies) if flag]
    for g, flag in zip(v.groups, groups_vary, strict=True):
        for a in g if flag else ():
            if a not in axes:
                shape = [*kernel.shape, 1]
                kernel = kernels.reshape(kernel, shape)
                kernel = kernels.expand(kernel, [*shape[:-1], atoms[a]])
                axes.append(a)
    order = [axes.index(a) for g, flag in zip(v.groups, groups_vary, strict=True) if flag for a in g]
    order += [k for k, a in enumerate(axes) if all(a not in g for g in v.groups)]
    kernel = kernels.permute(kernel, order)
    sizes = tuple(product([atoms[a] for a in g]) for g in v.groups)
    kernel = kernels.reshape(kernel, [s for s, flag in zip(sizes, groups_vary, strict=True) if flag])
    return Const(sizes, groups_vary, kernel)


def constant_before(v: View, c: Const) -> Const:
    """The constant that a view shows as the given one; it varies along whole slots, so perhaps along more than it needs to."""
    place = {a: i for i, a in enumerate(a for g in v.groups for a in g)}
    splits = tuple(tuple(v.atoms[a] for a in g) for g in v.groups)
    count = itertools.count()
    groups = tuple(tuple(place[a] for _ in split if (a := next(count)) in place) for split in v.splits)
    return view_constant(View(Value(c), splits, groups), c)
