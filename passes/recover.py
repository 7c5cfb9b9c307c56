"""A dense kernel that has a structure becomes the map of that structure.

``W x ⇒`` zero, a scale, a selection of entries (each times a factor), blocks (a grouped map), a window (Toeplitz, 1-d and
2-d, strided, padded, several channels), a smaller map of the live columns, repeated rows of a smaller map, two maps of
low rank, and for a k×k window two windows k×1 and 1×k: "a Linear with lots of zeros performs a convolution".

Exact where the structure holds on the stored values; where it holds within half a unit in the last place of every
weight (Toeplitz, low rank) the kernel's ``spec`` says so and the report calls the rewrite "exact to rounding".
Anything looser is `fxconv.approximate`'s.

A structure may have another one inside: a window whose channels fall into groups, blocks of low rank.

The tests (`fxconv.structures`) look at a sample first, so that an ordinary weight costs next to nothing, and read the
stored weight in its own dtype. Composed kernels are looked at where they are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import cast

import torch

from fxconv import kernel as kernels
from fxconv import structures
from fxconv.axes import Size, is_static
from fxconv.constant_images import view_constant
from fxconv.expr import Const, Kept, Map, New, Role, Shared, Sum, Value, View, Window, kernel_shape, view
from fxconv.kernel import Kernel
from fxconv.law import Context, Law, Outcome
from fxconv.normal_form import normal
from fxconv.raw import as_value
from fxconv.refs import make_sum
from fxconv.structures import Axis
from fxconv.window import Filter, selection_filter

Build = Callable[[Map], Value]

_COMPOSED = 2**14
"""Entries up to which kernels that are no stored weight are computed to be looked at."""


def _recover(v: Value, context: Context) -> Iterator[Outcome]:
    m = v.node
    if isinstance(m, Sum):
        yield from _with_bias(m, context)
    elif isinstance(m, Map):
        for build in _structures(m):
            yield build(m)


def _structures(m: Map) -> tuple[Build, ...]:
    """What a map's kernel is found to be, tested once for all maps that have it."""
    if m.kernel.uniform is not None or not m.kernel.is_static:
        return ()
    if isinstance(m.kernel.spec, tuple) and m.kernel.spec[:1] == ("gather",) or to_rounding(m.kernel):
        return ()  # what was found to rounding is not looked into further: its label would be lost
    if any(not isinstance(r, (Kept, New, Shared, Window)) for r in m.roles):
        return ()
    root = _unshaped(m.kernel)
    # Equal under every reshape: rows by columns is all that a dense kernel's tests see.
    rows = math.prod(int(r.size) for r in m.roles if isinstance(r, New))
    key = ("structures", rows) if _plain(m) else ("structures", m.roles, m.x.sizes)
    if key not in root._facts:
        if not _plain(m) and _scales_what_has_none(root, key):
            root._facts[key] = ()
        else:
            w = native(m.kernel)
            root._facts[key] = tuple(_found(m, w)) if w is not None else ()
    found: tuple[Build, ...] = root._facts[key]
    return found


def _scales_what_has_none(k: Kernel, key: Hashable) -> bool:
    """Whether a kernel is one without structures whose rows, columns or groups are multiplied by numbers other than 0: what
    is looked for in windows are ranks and zeros, which that does not change."""
    if k.scaling is None:
        return False
    scale, other = k.scaling
    return _unshaped(other)._facts.get(key) == () and without_zeros(scale)


def without_zeros(k: Kernel) -> bool:
    """Whether no entry is zero, as far as that can be said without computing a product."""
    if "without zeros" not in k._facts:
        k._facts["without zeros"] = _without_zeros(k)
    found: bool = k._facts["without zeros"]
    return found


def _without_zeros(k: Kernel) -> bool:
    stack, seen = [k], {k}  # chains of scales are deep, so nothing here recurses
    while stack:
        x = stack.pop()
        if x.uniform is not None:
            some = x.uniform == 0.0
        elif "without zeros" in x._facts:
            some = not x._facts["without zeros"]
        elif x.scaling is not None or _rearranged(x):
            more = [p for p in (x.scaling or x.parents) if p not in seen]
            seen.update(more)
            stack += more
            continue
        else:
            w = native(x)
            x._facts["without zeros"] = w is not None and bool(w.all())
            some = not x._facts["without zeros"]
        if some:
            return False
    return True


def _unshaped(k: Kernel) -> Kernel:
    """What a kernel is a reshape of."""
    while k.spec == "reshape":
        k = k.parents[0]
    return k


def _rearranged(k: Kernel) -> bool:
    """Whether a kernel has the entries of the one that it is derived from, in other places."""
    return k.spec == "reshape" or isinstance(k.spec, tuple) and k.spec[0] in ("permute", "flip")


def _structured(v: Value) -> Hashable:
    """Which structures v's kernel has, and of which sizes: all that the price of what comes of them depends on."""
    return tuple(map(_summary, _structures(v.node))) if isinstance(v.node, Map) else ()


def _summary(x: object) -> Hashable:
    if isinstance(x, torch.Tensor):
        return tuple(x.shape)
    if isinstance(x, partial):
        return (x.func.__name__, *((k, _summary(value)) for k, value in sorted(x.keywords.items())))
    if isinstance(x, (structures.Taps, structures.Factors)):
        return tuple(_summary(value) for value in vars(x).values())
    return x


def _with_bias(s: Sum, context: Context) -> Iterator[Outcome]:
    """A map's structure and the constant added to it: ``view(M x) + c ⇒ view(M x + c')``, where c' is the operator's bias:
    one value a channel, or one for all where there is one channel."""
    constants = [t for t in s.terms if isinstance(t.node, Const)]
    maps = [t for t in s.terms if isinstance(t.node, Map)]
    if len(constants) != 1 or len(maps) != 1 or len(s.terms) != 2:
        return
    for found in _recover(maps[0], context):
        if not isinstance(found, Value):
            continue
        c = cast(Const, constants[0].node)
        if isinstance(found.node, Map):
            few = _fewer(c)
            if few != c:
                yield make_sum([found, Value(few)])
        elif isinstance(found.node, View) and isinstance(found.node.x.node, Map):
            after = found.node
            yield as_value(view(make_sum([after.x, _before(after, c)]), after.splits, after.groups))


def _before(after: View, c: Const) -> Value:
    """The constant that is ``c`` once it is seen through the view; it varies along the atoms that it must only."""
    atoms = after.atoms
    order = [a for g in after.groups for a in g]
    splits = tuple(tuple(atoms[a] for a in g) if g else (1,) for g in after.groups)
    places: list[int] = []
    at = 0
    for g in after.groups:
        places += range(at, at + len(g))
        at += len(g) or 1
    fine = _fewer(view_constant(View(Value(c), splits, tuple((p,) for p in places)), c))
    position = {a: i for i, a in enumerate(order)}
    groups: list[tuple[int, ...]] = []
    first = 0
    for split in after.splits:
        groups.append(tuple(position[a] for a in range(first, first + len(split)) if a in position))
        first += len(split)
    return Value(view_constant(View(Value(fine), tuple((n,) for n in fine.sizes), tuple(groups)), fine))


def _fewer(c: Const) -> Const:
    """The same constant without the axes along which its values do not vary."""
    kernel, varies = c.kernel, list(c.varies)
    if kernel.is_static and math.prod(int(n) for n in kernel.shape) <= _COMPOSED:
        values = kernel.tensor()
        axes = [i for i, flag in enumerate(varies) if flag]
        for k in reversed(range(len(axes))):
            if bool((values == values.narrow(k, 0, 1)).all()):
                values, varies[axes[k]] = values.narrow(k, 0, 1), False
                kernel = kernels.take(kernel, k, 0, 1)
                kernel = kernels.reshape(kernel, [n for i, n in enumerate(kernel.shape) if i != k])
                values = values.squeeze(k)
    return Const(c.sizes, tuple(varies), kernel)


def _plain(m: Map) -> bool:
    """Whether a map is a Linear: rows and columns, nothing shared and nothing sliding."""
    return all(isinstance(r, (Kept, New)) for r in m.roles) and bool(m.contracted)


def native(k: Kernel) -> torch.Tensor | None:
    """The kernel's values: of a stored weight in its own dtype and without a copy where its layout allows."""
    chain: list[Kernel] = []
    root = k
    while _rearranged(root):
        chain.append(root)
        root = root.parents[0]
    stored = root._facts.get("native")
    if stored is None and _is_recovered(root):
        stored = root.tensor()
    if not isinstance(stored, torch.Tensor):
        small = math.prod(int(s) for s in k.shape) <= _COMPOSED and _work(k) <= 16 * _COMPOSED
        return k.tensor() if small else None
    t = stored.detach()
    for step in reversed(chain):
        if step.spec == "reshape":
            t = t.reshape([int(s) for s in step.shape])
        elif step.spec[0] == "permute":  # type: ignore[index]
            t = t.permute(step.spec[1])  # type: ignore[index]
        else:
            t = t.flip(step.spec[1])  # type: ignore[index]
    return t


def _work(k: Kernel) -> int:
    """Entries of everything that a kernel is computed from."""
    total, seen, stack = 0, set[int](), [k]
    while stack:
        x = stack.pop()
        if id(x) not in seen:
            seen.add(id(x))
            total += math.prod(int(s) if is_static(s) else 1 << 30 for s in x.shape)
            stack.extend(x.parents)
    return total


def _found(m: Map, w: torch.Tensor) -> Iterator[Build]:
    """The structures of a map's kernel, as functions that build the equal value."""
    if structures.is_zero(w.reshape(w.shape[0] if w.dim() else 1, -1)):
        yield _zero
        return
    rows = math.prod(int(r.size) for r in m.roles if isinstance(r, New))
    if _plain(m) and rows > 1:
        yield from _dense(w.reshape(rows, -1))
    elif any(isinstance(r, Window) for r in m.roles):
        yield from _windowed(m, w)


def _zero(m: Map) -> Value:
    sizes = Value(m).sizes
    return Value(Const(sizes, (False,) * len(sizes), kernels.uniform((), 0.0)))


# -- Dense kernels ----------------------------------------------------------------------------------------------------


def _dense(w: torch.Tensor) -> Iterator[Build]:
    rows, columns = w.shape
    if columns < 2:
        return
    if (chosen := structures.selection(w)) is not None:
        yield partial(_selected, columns=columns, index=tuple(chosen[0].tolist()), factors=chosen[1])
    for axis in structures.block_axes(w):
        yield partial(_blocks, w=w, axis=axis)
    axes = structures.toeplitz_axes(w, slack=w.dtype != torch.float64)
    for chosen_axes in structures.toeplitz_sets(w, axes) if axes else ():
        taps = structures.taps(w, chosen_axes)
        if taps is not None:
            yield partial(_toeplitz, shape=w.shape, axes=chosen_axes, taps=taps)
    if (live := structures.live_columns(w)) is not None:
        yield partial(_live, w=w, index=tuple(live.tolist()))
    if (distinct := structures.distinct_rows(w)) is not None:
        yield partial(_distinct, w=w, first=distinct[0], index=tuple(distinct[1].tolist()))
    factors = structures.low_rank(w, (rows * columns - 1) // (rows + columns))
    if factors is not None:
        yield partial(_factored, factors=factors)


def _around(m: Map, columns: Sequence[int], body: Callable[[Value, int], Value]) -> Value:
    """``body`` on the operand with its slots as kept ones, then the given factors of the contracted ones.

    ``body`` gets that value and the number of kept slots, and returns one whose slots are the kept ones, then factors
    of the rows; those become the map's new slots.
    """
    kept = [r.src for r in m.roles if isinstance(r, Kept)]
    x = as_value(view(m.x, _singles(m.x.sizes), (*((i,) for i in kept), m.contracted)))
    n = len(kept)
    x = as_value(view(x, (*_singles(x.sizes[:n]), tuple(columns)), _singles(range(n + len(columns)))))
    out = body(x, n)
    out = as_value(view(out, _singles(out.sizes), (*_singles(range(n)), tuple(range(n, out.rank)))))
    news = [r.size for r in m.roles if isinstance(r, New)]
    order: list[tuple[int, ...]] = []
    at_kept, at_new = 0, n
    for r in m.roles:
        if isinstance(r, Kept):
            order.append((at_kept,))
            at_kept += 1
        else:
            order.append((at_new,))
            at_new += 1
    return as_value(view(out, (*_singles(out.sizes[:n]), tuple(news)), tuple(order)))


def _singles(items: Sequence[Size]) -> tuple[tuple[Size, ...], ...]:
    return tuple((i,) for i in items)


def _numbers(values: torch.Tensor, shape: Sequence[Size], exact: bool = True) -> Kernel:
    """A kernel of found values; ``exact`` is part of its spec, where `to_rounding` finds it."""
    sizes = [int(s) for s in shape]
    # The same tensor gives the same kernel, whose own structure is then looked for once.
    return kernels.derive(tuple(shape), ("recovered", exact, id(values)), (), lambda: values.double().reshape(sizes))


def _is_recovered(k: Kernel) -> bool:
    return isinstance(k.spec, tuple) and k.spec[:1] == ("recovered",)


def to_rounding(k: Kernel) -> bool:
    """Whether a kernel was derived from a structure that holds within half a unit in the last place only."""
    seen, stack = set[int](), [k]
    while stack:
        x = stack.pop()
        if _is_recovered(x) and not cast(tuple[object, ...], x.spec)[1]:
            return True
        if id(x) not in seen:
            seen.add(id(x))
            stack.extend(x.parents)
    return False


def _gather(x: Value, n: int, index: tuple[int, ...]) -> Value:
    """Entries of the last slot, by their indices."""
    size = int(x.sizes[-1])
    kept: list[Role] = [Kept(i) for i in range(n)]
    step = index[1] - index[0] if len(index) > 1 else 1
    if step > 0 and index == tuple(range(index[0], index[-1] + 1, step)):
        filter_ = selection_filter(index[0], size, len(index), step)
        return normal(x, [*kept, Window(n, filter_, len(index))], kernels.uniform((1,), 1.0))

    def numbers() -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(index), size).double()

    return normal(x, [*kept, New(len(index))], kernels.derive((len(index), size), ("gather", index), (), numbers))


def _selected(m: Map, columns: int, index: tuple[int, ...], factors: torch.Tensor) -> Value:
    """Entries of the operand, each times a factor."""

    def body(x: Value, n: int) -> Value:
        x = _gather(x, n, index)
        if bool((factors == 1).all()):
            return x
        roles: list[Role] = [*(Kept(i) for i in range(n)), Shared(n)]
        return normal(x, roles, _numbers(factors, factors.shape))

    return _around(m, [columns], body)


def _rows(x: Value, n: int, values: torch.Tensor, exact: bool = True) -> Value:
    """A matrix on the last slot."""
    roles: list[Role] = [*(Kept(i) for i in range(n)), New(values.shape[0])]
    return normal(x, roles, _numbers(values, values.shape, exact))


def _blocks(m: Map, w: torch.Tensor, axis: Axis) -> Value:
    row_atoms, column_atoms = structures.atoms(w.shape, (axis,))
    parts = structures.blocks(w, axis)  # [g, row outer, row inner, column outer, column inner]
    same = bool((parts == parts[:1]).all())

    def body(x: Value, n: int) -> Value:
        slots, x = _without_ones(x, n, column_atoms)
        roles: list[Role] = [Kept(i) for i in range(n)]
        if row_atoms[0] > 1:
            roles.append(New(row_atoms[0]))
        roles.append(Kept(slots[1]) if same else Shared(slots[1]))
        if row_atoms[2] > 1:
            roles.append(New(row_atoms[2]))
        shape = kernel_shape(tuple(roles), x.sizes)
        values = parts[0] if same else parts.movedim(0, 1)
        if same and values.numel() == 1:
            return normal(x, roles, kernels.uniform((), float(values)))
        return normal(x, roles, _numbers(values, shape))

    return _around(m, column_atoms, body)


def _without_ones(x: Value, n: int, atoms: Sequence[int]) -> tuple[dict[int, int], Value]:
    """The value without those of its atoms (slots from n on) that are 1, and where the others are now."""
    left = [k for k, a in enumerate(atoms) if a != 1]
    slots = {k: n + i for i, k in enumerate(left)}
    order = (*range(n), *(n + k for k in left))
    return slots, as_value(view(x, _singles(x.sizes), _singles(order)))


def _toeplitz(m: Map, shape: torch.Size, axes: tuple[Axis, ...], taps: structures.Taps) -> Value:
    row_atoms, column_atoms = structures.atoms(shape, axes)

    def body(x: Value, n: int) -> Value:
        slots, x = _without_ones(x, n, column_atoms)
        roles: list[Role] = [Kept(i) for i in range(n)]
        for d, a in enumerate(axes):
            if row_atoms[2 * d] > 1:
                roles.append(New(row_atoms[2 * d]))
            count = taps.values.shape[1 + 2 * d]
            f = Filter(1, max(a.stride, 1), count, taps.step[d], -taps.first[d], a.m * a.stride - a.n)
            roles.append(Window(slots[1 + 2 * d], f, a.m))
        if row_atoms[-1] > 1:
            roles.append(New(row_atoms[-1]))
        kernel = _numbers(taps.values, kernel_shape(tuple(roles), x.sizes), taps.exact)
        return normal(x, roles, kernel)

    return _around(m, column_atoms, body)


def _live(m: Map, w: torch.Tensor, index: tuple[int, ...]) -> Value:
    return _around(m, [w.shape[1]], lambda x, n: _rows(_gather(x, n, index), n, w[:, torch.tensor(index, device=w.device)]))


def _distinct(m: Map, w: torch.Tensor, first: torch.Tensor, index: tuple[int, ...]) -> Value:
    return _around(m, [w.shape[1]], lambda x, n: _gather(_rows(x, n, w[first.to(w.device)]), n, index))


def _factored(m: Map, factors: structures.Factors) -> Value:
    def body(x: Value, n: int) -> Value:
        return _rows(_rows(x, n, factors.right, factors.exact), n, factors.left, factors.exact)

    return _around(m, [factors.right.shape[1]], body)


# -- Windows ----------------------------------------------------------------------------------------------------------


def _windowed(m: Map, w: torch.Tensor) -> Iterator[Build]:
    windows = [o for o, r in enumerate(m.roles) if isinstance(r, Window)]
    shared = any(isinstance(r, Shared) for r in m.roles)
    news = [o for o, r in enumerate(m.roles) if isinstance(r, New)]
    moving = [o for o in windows if m.roles[o].filter.taps > 1]  # type: ignore[union-attr]
    if len(windows) == 2 and len(moving) == 2 and not (shared and (news or m.contracted)):
        yield from _separable(m, w, windows)
    if not shared and news and m.contracted:
        yield from _grouped(m, w, news, windows)
        yield from _narrow(m, w, news)


def _order(m: Map, first: Sequence[int]) -> list[int]:
    """Kernel axes: those of the given output slots first, then the rest as they are."""
    position: dict[int, int] = {}
    for o, r in enumerate(m.roles):
        if not isinstance(r, Kept):
            position[o] = len(position)
    head = [position[o] for o in first]
    return head + [a for a in range(len(m.kernel.shape)) if a not in head]


def _separable(m: Map, w: torch.Tensor, windows: list[int]) -> Iterator[Build]:
    """k×k as k×1 ∘ 1×k: of a depthwise kernel per channel, of a dense one through as many channels as its rank."""
    a, b = windows
    ta, tb = (m.roles[o].filter.taps for o in windows)  # type: ignore[union-attr]
    groups = [o for o, r in enumerate(m.roles) if isinstance(r, Shared)]
    if not m.contracted and all(not isinstance(r, New) for r in m.roles):
        k = w.permute(_order(m, [*groups, a, b])).reshape(-1, ta, tb)
        u, s, vh = torch.linalg.svd(k.double(), full_matrices=False)
        if bool((s[:, 1:2] > 64 * torch.finfo(w.dtype).eps * s[:, :1]).any()):
            return
        left, right = u[:, :, :1] * s[:, :1, None].sqrt(), vh[:, :1] * s[:, :1, None].sqrt()
        error = (left @ right - k.double()).abs()
        exact = bool((error <= 1e-15 * k.double().abs().amax((1, 2), keepdim=True) * 4).all())
        near = (left, right) if exact or w.dtype == torch.float64 else structures.within_half_ulp(k, left, right)
        if near is not None and (exact or w.dtype != torch.float64):
            left, right = near
            yield partial(_two_windows, a=a, b=b, left=left[..., 0], right=right[:, 0], rank=None, exact=exact)
        return
    news = [o for o, r in enumerate(m.roles) if isinstance(r, New)]
    k = w.permute(_order(m, [*news, a, b]))
    rows = math.prod(int(r.size) for r in m.roles if isinstance(r, New))
    matrix = k.reshape(rows * ta, -1)
    factors = structures.low_rank(matrix, min((matrix.numel() - 1) // sum(matrix.shape), 256))
    if factors is not None:
        rank = factors.right.shape[0]
        yield partial(_two_windows, a=a, b=b, left=factors.left, right=factors.right, rank=rank, exact=factors.exact)


def _two_windows(m: Map, a: int, b: int, left: torch.Tensor, right: torch.Tensor, rank: int | None, exact: bool) -> Value:
    first: list[Role] = []
    place: dict[int, int] = {}
    for o, r in enumerate(m.roles):
        if isinstance(r, New):
            continue
        place[o] = len(first)
        first.append(Kept(r.src) if o == a else r)
    if rank is not None:
        first.append(New(rank))
    shape = kernel_shape(tuple(first), m.x.sizes)
    if rank is not None:
        # [rank, taps b, columns] → [taps b, rank, columns]
        tb = int(m.roles[b].filter.taps)  # type: ignore[union-attr]
        right = right.reshape(rank, tb, -1).movedim(0, 1)
        inner = normal(m.x, first, _numbers(right, shape, exact))
    else:
        inner = normal(m.x, first, _in_role_order(first, m.x, right, shape, exact))
    second: list[Role] = []
    for o, r in enumerate(m.roles):
        if isinstance(r, New):
            second.append(r)
        elif o == a:
            assert isinstance(r, Window)
            second.append(Window(place[o], r.filter, r.size))
        elif rank is None and isinstance(r, Shared):
            second.append(Shared(place[o]))
        else:
            second.append(Kept(place[o]))
    shape = kernel_shape(tuple(second), inner.sizes)
    if rank is None:
        return normal(inner, second, _in_role_order(second, inner, left, shape, exact))
    news = [int(r.size) for r in second if isinstance(r, New)]
    values = left.reshape(*news, int(m.roles[a].filter.taps), rank)  # type: ignore[union-attr]
    # [news…, taps a, rank] → kernel axes in the order of the roles.
    axes = [o for o, r in enumerate(second) if isinstance(r, (New, Window))]
    new_slots = [o for o in axes if isinstance(second[o], New)]
    order = [len(new_slots) if isinstance(second[o], Window) else new_slots.index(o) for o in axes]
    return normal(inner, second, _numbers(values.permute([*order, len(order)]), shape, exact))


def _in_role_order(roles: list[Role], x: Value, values: torch.Tensor, shape: Sequence[Size], exact: bool) -> Kernel:
    """``[groups, taps]`` as a kernel whose axes follow the roles on x."""
    groups = [int(x.sizes[r.src]) for r in roles if isinstance(r, Shared)]
    values = values.reshape(*groups, -1)
    kinds = [isinstance(r, Window) for r in roles if isinstance(r, (Shared, Window))]
    count = iter(range(len(groups)))
    order = [len(groups) if window else next(count) for window in kinds]
    return _numbers(values.permute(order), shape, exact)


def _grouped(m: Map, w: torch.Tensor, news: list[int], windows: list[int]) -> Iterator[Build]:
    """A dense convolution whose channels fall into groups."""
    if len(news) != 1 or len(m.contracted) != 1:
        return
    k = w.permute(_order(m, news))  # [rows, taps…, columns]
    middle = k.flatten(1, -2)[:, math.prod(k.shape[1:-1]) // 2]
    if not structures.block_axes(middle, most=1):
        return
    pattern = (k != 0).flatten(1, -2).any(1).to(w.dtype)
    for axis in structures.block_axes(pattern):
        if axis.row * axis.m == pattern.shape[0] and axis.column * axis.n == pattern.shape[1]:
            yield partial(_group_windows, k=k, axis=axis, new=news[0])


def _group_windows(m: Map, k: torch.Tensor, axis: Axis, new: int) -> Value:
    g, (column,) = axis.m, m.contracted
    splits = tuple((g, int(s) // g) if i == column and s != g else (s,) for i, s in enumerate(m.x.sizes))
    base = as_value(view(m.x, splits, _singles(range(sum(map(len, splits))))))
    shift = lambda i: i + (i > column and axis.column > 1)  # noqa: E731
    roles: list[Role] = []
    out_groups: list[tuple[int, ...]] = []
    for o, r in enumerate(m.roles):
        start = len(roles)
        if o == new:
            roles.append(Shared(column))
            if axis.row > 1:
                roles.append(New(axis.row))
        elif isinstance(r, Kept):
            roles.append(Kept(shift(r.src)))
        else:
            assert isinstance(r, Window)
            roles.append(Window(shift(r.src), r.filter, r.size))
        out_groups.append(tuple(range(start, len(roles))))
    taps = list(k.shape[1:-1])
    full = k.reshape(g, axis.row, *taps, g, axis.column)
    parts = full.diagonal(dim1=0, dim2=2 + len(taps)).movedim(-1, 0)  # [g, row, taps…, column]
    # Taps of windows that come before the channels go in front of them.
    before = sum(isinstance(r, Window) for r in m.roles[:new])
    parts = parts.movedim(list(range(2, 2 + before)), list(range(before)))
    out = normal(base, roles, _numbers(parts, kernel_shape(tuple(roles), base.sizes)))
    return as_value(view(out, _singles(out.sizes), tuple(out_groups)))


def _narrow(m: Map, w: torch.Tensor, news: list[int]) -> Iterator[Build]:
    """A convolution of low rank: the same window to fewer channels, then 1×1."""
    rows = math.prod(int(r.size) for r in m.roles if isinstance(r, New))
    matrix = w.permute(_order(m, news)).reshape(rows, -1)
    columns = matrix.shape[1]
    factors = structures.low_rank(matrix, (rows * columns - 1) // (rows + columns)) if rows > 2 else None
    if factors is not None:
        yield partial(_window_factored, factors=factors)


def _window_factored(m: Map, factors: structures.Factors) -> Value:
    rank = factors.right.shape[0]
    first: list[Role] = [New(rank), *(r for r in m.roles if not isinstance(r, New))]
    inner = normal(m.x, first, _numbers(factors.right, kernel_shape(tuple(first), m.x.sizes), factors.exact))
    count = iter(range(1, len(first)))
    second: list[Role] = [r if isinstance(r, New) else Kept(next(count)) for r in m.roles]
    return normal(inner, second, _numbers(factors.left, kernel_shape(tuple(second), inner.sizes), factors.exact))


law = Law("recover", _recover, numbers=_structured)
