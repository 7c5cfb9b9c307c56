"""The normal form of a map: its operand's view absorbed as far as it goes, idle windows and scales gone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fxconv import kernel as kernels
from fxconv.axes import Size, is_static, product
from fxconv.expr import Kept, Map, New, Resample, Role, Shared, Value, View, Window, split_view, view
from fxconv.kernel import Kernel
from fxconv.raw import Raw, as_value, moved, refine
from fxconv.window import Filter


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
