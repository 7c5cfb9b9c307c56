"""What maps and views make of constants, and the constant that a view makes a given one of."""

from __future__ import annotations

import itertools

from fxconv import kernel as kernels
from fxconv.algebra import compose_raw
from fxconv.axes import Size, is_static, product
from fxconv.expr import Const, Kept, Map, New, Resample, Role, Value, View, Window, view
from fxconv.kernel import Kernel
from fxconv.normal_form import normal
from fxconv.raw import Raw, as_value, densify_resampling, moved, raw
from fxconv.window import Filter, stays_inside


def viewed(between: View | None, x: Value) -> Value:
    """A value through a view, or as it is where there is none; of a constant the constant."""
    if between is None:
        return x
    if isinstance(x.node, Const):
        return Value(view_constant(View(x, between.splits, between.groups), x.node))
    return as_value(view(x, between.splits, between.groups))


def mapped(m: Map, between: View | None, x: Value) -> Value:
    """The value of a map, after a view, at another operand of the same sizes."""
    return normal(viewed(between, x), m.roles, m.kernel)


def image(m: Map, between: View | None, t: Value) -> Value | str:
    """The value of a map, after a view, at a value that is constant; or the reason why there is none."""
    c = t.node
    assert isinstance(c, Const)
    if between is not None:
        c = view_constant(View(t, between.splits, between.groups), c)
    result = map_constant(m, c)
    return result if isinstance(result, str) else Value(result)


def map_constant(m: Map, c: Const) -> Const | str:
    """The value of a map at a constant; a constant stays one along windows that never read padding, and zero is zero."""
    r = raw(m)
    if c.kernel.uniform == 0.0:
        return Const(r.out_sizes, (False,) * len(r.roles), kernels.uniform((), 0.0))
    resampled = {o for o, role in enumerate(r.roles) if isinstance(role, Resample) and c.varies[role.src]}
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
        kernel = kernels.derive(shape, ("sum", dims, factor), (source,), lambda: source.tensor().sum(dims) * factor)
    # What remains varies: compose with the constant as a map from nothing whose rows are its values.
    slots = [i for i in range(len(varies)) if i not in flat_inputs]
    renumber = {i: k for k, i in enumerate(slots)}
    outer = Raw(
        tuple(r.in_sizes[i] for i in slots),
        tuple(moved(role, renumber[role.src]) if not isinstance(role, New) else role for role in roles),
        kernel,
    )
    phantom = [i for i in slots if not varies[i]]
    inner_roles: list[Role] = [New(c.sizes[i]) if varies[i] else Kept(phantom.index(i)) for i in slots]
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
            seen.add(sum((j := o * f.down + t * f.dilation - f.offset) % f.up == 0 and 0 <= j < f.up * n for t in range(f.taps)))
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
