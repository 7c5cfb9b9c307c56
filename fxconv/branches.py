"""Branches: maps of one base value with the views around them resolved, and their sum as one map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from fxconv import kernel as kernels
from fxconv.algebra import compose, regroup
from fxconv.axes import Size, common_refinement, is_static
from fxconv.expr import (
    Kept,
    Map,
    New,
    Resample,
    Role,
    Shared,
    Value,
    View,
    Window,
    identity_map,
    is_selection,
    role_size,
    split_view,
)
from fxconv.kernel import Kernel
from fxconv.normal_form import normal
from fxconv.raw import Raw, Splits, as_value, banded, raw, refine
from fxconv.window import Filter


@dataclass(frozen=True)
class Branch:
    """``out = regroup(map(split(base)))``: a raw map from atoms of a base value to atoms of the result.

    Attributes:
        base: the value that the branch reads.
        map: the map, its input slots the atoms of the base's slots in order, its output slots those of the result's.
        in_splits, out_splits: which atoms make up each slot of the base and of the result.
    """

    base: Value
    map: Raw
    in_splits: Splits
    out_splits: Splits


Reading = tuple[Value, Callable[[], Branch | None]]
"""The base that a value would be read as a branch of, and the branch."""


def readings(t: Value) -> Iterator[Reading]:
    """The ways to read a value as a branch: as a map of its operand, of what selections lead to, and as itself.

    Maps of disjoint slices of one value are column blocks of one map, and a padded or cropped map is a map. The branches are
    worked out when they are asked for: most bases have one only.
    """
    outer = t.node if isinstance(t.node, View) else None
    inner = outer.x if outer is not None else t
    if isinstance(inner.node, Map):
        maps: tuple[Map, ...] = (inner.node,)
        x = inner.node.x
        yield _viewed(x), partial(_branch, inner.node, outer)
        while isinstance(x.node, Map) and (is_selection(maps[-1]) or is_selection(x.node)):
            maps, x = (*maps, x.node), x.node.x
            yield _viewed(x), partial(_composed_branch, maps, outer)
    yield _viewed(inner), partial(_branch, identity_map(inner), outer)


def as_branch(t: Value) -> Branch | None:
    """A value as a branch of what it is a map of, or else of itself."""
    return next((branch for _, read in readings(t) if (branch := read()) is not None), None)


def _viewed(x: Value) -> Value:
    return x.node.x if isinstance(x.node, View) else x


def _composed_branch(maps: Sequence[Map], outer: View | None) -> Branch | None:
    """Maps in a row, the first one outermost, as one branch."""
    m = maps[-1]
    for before in reversed(maps[:-1]):
        composed = compose(before, m)
        if isinstance(composed, str) or not isinstance(composed.node, Map):
            return None
        m = composed.node
    return _branch(m, outer)


def _branch(m: Map, outer: View | None) -> Branch | None:
    out_splits: Splits = tuple((s,) for s in raw(m).out_sizes)
    refined = refine(raw(m), None, outer.splits if outer is not None else out_splits)
    if isinstance(refined, str):
        return None
    fine, in_splits, splits = refined
    result_splits: Splits = splits
    if outer is not None:
        if splits != outer.splits:
            return None
        order = [a for g in outer.groups for a in g]
        atoms = outer.atoms
        result_splits = tuple(tuple(atoms[a] for a in g) for g in outer.groups)
        for left_out in sorted(set(range(len(atoms))) - set(order), reverse=True):
            without = _without_slot(fine, left_out)
            if without is None:
                return None
            fine, order = without, [a - (a > left_out) for a in order]
        fine = _permute_outs(fine, order)
    base = m.x
    if isinstance(base.node, View) and any(len(s) != 1 for s in in_splits):
        # The refinement above split slots of the base's view: they are slots of a finer view.
        base = as_value(split_view(base, in_splits))
        in_splits = tuple((s,) for s in base.sizes)
        if base.rank != len(fine.in_sizes):
            return None
    # The map's input slots split into the atoms of the base's view.
    if isinstance(base.node, View):
        v = base.node
        atoms = v.atoms
        again = refine(fine, tuple(tuple(atoms[a] for a in g) for g in v.groups), None)
        if isinstance(again, str):
            return None
        fine, _, out_again = again
        order = [a for g in v.groups for a in g]
        if sorted(order) != list(range(len(atoms))) or len(fine.in_sizes) != len(order):
            return None
        fine = permute_ins(fine, order)
        flat = iter(out_again)
        result_splits = tuple(tuple(s for _ in split for s in next(flat)) for split in result_splits)
        in_splits, base = v.splits, v.x
    return Branch(base, fine, in_splits, result_splits)


def _without_slot(m: Raw, o: int) -> Raw | None:
    """A map without an output slot of size 1: what is slid along, kept or scaled there is contracted; None where it is no such
    slot."""
    role = m.roles[o]
    if isinstance(role, Resample) or role_size(role, m.in_sizes) != 1:
        return None
    if isinstance(role, Window) and not is_static(m.in_sizes[role.src]):
        return None
    if not isinstance(role, New):
        m = densify(m, o)
    shape = [s for key, s in zip(m.axes(), m.kernel.shape, strict=True) if key != ("out", o)]
    return Raw(m.in_sizes, (*m.roles[:o], *m.roles[o + 1 :]), kernels.reshape(m.kernel, shape))


def _permute_outs(m: Raw, order: Sequence[int]) -> Raw:
    roles = tuple(m.roles[o] for o in order)
    axes = m.axes()
    before = {key: i for i, key in enumerate(axes)}
    new_axes = [("out", o) for o in order if ("out", o) in before] + [key for key in axes if key[0] == "in"]
    return Raw(m.in_sizes, roles, kernels.permute(m.kernel, [before[key] for key in new_axes]))


def permute_ins(m: Raw, order: Sequence[int]) -> Raw:
    """Rename input slots: old slot k becomes slot ``order[k]``."""
    sizes = [m.in_sizes[0]] * len(order)
    for k, o in enumerate(order):
        sizes[o] = m.in_sizes[k]
    roles: list[Role] = []
    for r in m.roles:
        if isinstance(r, New):
            roles.append(r)
        elif isinstance(r, Window):
            roles.append(Window(order[r.src], r.filter, r.size))
        elif isinstance(r, Resample):
            roles.append(Resample(order[r.src], r.kind, r.parameters, r.size))
        else:
            roles.append(type(r)(order[r.src]))
    outs = sum(key[0] == "out" for key in m.axes())
    columns = sorted(range(len(m.contracted)), key=lambda i: order[m.contracted[i]])
    return Raw(tuple(sizes), tuple(roles), kernels.permute(m.kernel, [*range(outs), *(outs + i for i in columns)]))


def merge(branches: Sequence[Branch]) -> Value | str:
    """The sum of branches of one base as one map in normal form, or the reason why it isn't one."""
    base = branches[0].base
    refined = _to_common_atoms(branches)
    if isinstance(refined, str):
        return refined
    raws, in_splits, out_splits = refined
    unified = unify(raws)
    if isinstance(unified, str):
        return unified
    roles, summed = unified
    x = as_value(split_view(base, in_splits))
    out = normal(x, roles, kernels.add(summed))
    return regroup(out, out_splits, sum(map(len, out_splits)))


def _to_common_atoms(branches: Sequence[Branch]) -> tuple[list[Raw], Splits, Splits] | str:
    ins, outs = list(branches[0].in_splits), list(branches[0].out_splits)
    raws = [b.map for b in branches]
    have = [(b.in_splits, b.out_splits) for b in branches]
    for _ in range(4):
        for i_splits, o_splits in have:
            for joint, mine in ((ins, i_splits), (outs, o_splits)):
                for k, split in enumerate(mine):
                    fine = common_refinement(joint[k], split)
                    if fine is None:
                        return f"branches split an axis as {joint[k]} and {split}"
                    joint[k] = fine if fine else joint[k]
        done = True
        for n, (i_splits, o_splits) in enumerate(have):
            if all(a == b for a, b in zip(i_splits, ins, strict=True)) and all(a == b for a, b in zip(o_splits, outs, strict=True)):
                continue
            done = False
            result = refine(raws[n], _relative(i_splits, ins), _relative(o_splits, outs))
            if isinstance(result, str):
                return result
            raws[n], fine_in, fine_out = result
            have[n] = (_regroup_splits(i_splits, fine_in), _regroup_splits(o_splits, fine_out))
        if done:
            return raws, tuple(ins), tuple(outs)
    return "branches have no common axes"


def _relative(mine: Splits, joint: Sequence[tuple[Size, ...]]) -> Splits:
    from fxconv.axes import split_like

    out: list[tuple[Size, ...]] = []
    for split, fine in zip(mine, joint, strict=True):
        parts = split_like(split, fine)
        out.extend(parts if parts is not None else [(s,) for s in split])
    return tuple(out)


def _regroup_splits(old: Splits, fine: Splits) -> Splits:
    flat = iter(fine)
    return tuple(tuple(s for _ in split for s in next(flat)) for split in old)


def unify(raws: Sequence[Raw]) -> tuple[tuple[Role, ...], list[Kernel]] | str:
    """Common roles for maps between the same slots, and each map's kernel for them; or why there are none."""
    raws = list(raws)
    count = len(raws[0].roles)
    for _ in range(count + 1):
        dense: set[int] = set()
        for o in range(count):
            roles = [m.roles[o] for m in raws]
            sources = {r.src for r in roles if not isinstance(r, New)}
            kinds = {type(r) for r in roles}
            if Resample in kinds:
                if len(set(roles)) > 1:
                    return "resampling beside another branch"
            elif New in kinds and kinds != {New} or len(sources) > 1:
                dense.add(o)
        if not dense and len({m.contracted for m in raws}) > 1:
            every = {i for m in raws for i in m.contracted}
            for m in raws:
                dense |= {o for o, r in enumerate(m.roles) if isinstance(r, (Kept, Shared, Window)) and r.src in every}
                if any(isinstance(r, Resample) and r.src in every for r in m.roles):
                    return "resampling beside a contraction of the same axis"
            if not dense:
                return "branches contract different axes"
        if not dense:
            break
        for n, m in enumerate(raws):
            for o in sorted(dense):
                role = m.roles[o]
                if isinstance(role, (Kept, Shared, Window)):
                    size = m.in_sizes[role.src]
                    if not is_static(size) or not is_static(role_size(role, m.in_sizes)):
                        return f"an axis of dynamic size {size} beside a contraction"
                    m = densify(m, o)
            raws[n] = m
    roles_out: list[Role] = []
    for o in range(count):
        roles = [m.roles[o] for m in raws]
        kinds = {type(r) for r in roles}
        if Window in kinds:
            joined = _common_window(roles)
            if isinstance(joined, str):
                return joined
            src = next(r.src for r in roles if isinstance(r, Window))
            size = next(r.size for r in roles if isinstance(r, Window))
            for n, m in enumerate(raws):
                raws[n] = _widen(m, o, Window(src, joined, size))
            roles_out.append(Window(src, joined, size))
        elif kinds == {Kept, Shared}:
            src = next(r.src for r in roles if isinstance(r, Shared))
            for n, m in enumerate(raws):
                raws[n] = share(m, o)
            roles_out.append(Shared(src))
        else:
            roles_out.append(roles[0])
    return tuple(roles_out), [m.kernel for m in raws]


def _insert_axis(m: Raw, o: int, role: Role, size: int) -> Raw:
    """Give output slot ``o`` (kept) a role with a kernel axis, equal along it."""
    roles = (*m.roles[:o], role, *m.roles[o + 1 :])
    position = sum(not isinstance(r, (Kept, Resample)) for r in m.roles[:o])
    shape = list(m.kernel.shape)
    k = kernels.reshape(m.kernel, [*shape[:position], 1, *shape[position:]])
    return Raw(m.in_sizes, roles, kernels.expand(k, [*shape[:position], size, *shape[position:]]))


def share(m: Raw, o: int) -> Raw:
    """A kept slot as a shared one (the kernel is equal along it)."""
    role = m.roles[o]
    if not isinstance(role, Kept):
        return m
    return _insert_axis(m, o, Shared(role.src), int(m.in_sizes[role.src]))


def densify(m: Raw, o: int) -> Raw:
    """A slot that is kept, shared or slid along as a contraction: with a diagonal, or a band of the window's taps, as kernel."""
    m = share(m, o)
    role = m.roles[o]
    assert isinstance(role, (Shared, Window))
    axes = m.axes()
    at, size = axes.index(("out", o)), role_size(role, m.in_sizes)
    if isinstance(role, Window):
        k = banded(m.kernel, at, role.filter, int(m.in_sizes[role.src]), int(size))
    else:
        k = kernels.diagonal(m.kernel, at)
    roles = (*m.roles[:o], New(size), *m.roles[o + 1 :])
    out = Raw(m.in_sizes, roles, k)
    # The new column axis is last; contracted slots come in ascending order.
    order = [axes.index(key) if key in axes else len(axes) for key in out.axes()]
    return Raw(m.in_sizes, roles, kernels.permute(k, order))


def _common_window(roles: Sequence[Role]) -> Filter | str:
    filters = [r.filter if isinstance(r, Window) else Filter() for r in roles]
    if len({(f.up, f.down) for f in filters}) > 1:
        return f"windows with different strides {sorted({(f.up, f.down) for f in filters})}"
    first = filters[0]
    lo = min(-f.offset for f in filters)
    hi = max((f.taps - 1) * f.dilation - f.offset for f in filters)
    step = 0
    for f in filters:
        step = math.gcd(step, -f.offset - lo)
        if f.taps > 1:
            step = math.gcd(step, f.dilation)
    step = step or 1
    transposed = all(f.transposed for f in filters)
    return Filter(first.up, first.down, (hi - lo) // step + 1, step, -lo, first.extent, transposed)


def _widen(m: Raw, o: int, window: Window) -> Raw:
    role = m.roles[o]
    if isinstance(role, Kept):
        m = _insert_axis(m, o, Window(role.src, Filter(), window.size), 1)
        old = Filter()
    else:
        assert isinstance(role, Window)
        old = role.filter
    new = window.filter
    position = m.axes().index(("out", o))
    start = (new.offset - old.offset) // new.dilation
    step = old.dilation // new.dilation if old.taps > 1 else 1
    k = kernels.placed(m.kernel, position, new.taps, start, step)
    return Raw(m.in_sizes, (*m.roles[:o], window, *m.roles[o + 1 :]), k)
