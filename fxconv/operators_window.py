"""Canonical operators → expressions: pooling, resampling, padding, slicing, concatenation, patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxconv import kernel as kernels
from fxconv.axes import Size, as_size, is_static, quotient, same
from fxconv.expr import Const, Kept, New, Resample, Role, Value, Window
from fxconv.operators import broadcast, out_shape, rule, scale
from fxconv.operators_linear import slide
from fxconv.refs import LiftError, Ref, arrange, make_map, make_sum, refine_together, regroup_dims
from fxconv.resample import CUBIC, PADDING, PICK
from fxconv.window import Filter, conv_filter, nearest_filter, selection_filter, transposed_filter

if TYPE_CHECKING:
    from fxconv.lift import Lifter
    from fxconv.spelling import Op


def along_dims(ref: Ref, new_roles: dict[int, Role | None], kernel: kernels.Kernel) -> Ref:
    """A map that does something to single dims and keeps the others.

    ``new_roles`` gives per dim the role of its (only) slot; its ``src`` is filled in. None stands for a dim of size 1
    that stays as it is.
    """
    wanted: list[Sequence[Size] | None] = [(ref.shape[d],) if new_roles.get(d) is not None else None for d in range(len(ref.dims))]
    x, slots = arrange(ref, wanted)
    roles: list[Role] = []
    dims: list[tuple[int, ...]] = []
    for d, source in enumerate(slots):
        role = new_roles.get(d)
        if role is None:
            dims.append(tuple(range(len(roles), len(roles) + len(source))))
            roles += [Kept(s) for s in source]
            continue
        dims.append((len(roles),))
        if isinstance(role, Window):
            roles.append(Window(source[0], role.filter, role.size))
        elif isinstance(role, Resample):
            roles.append(Resample(source[0], role.kind, role.parameters, role.size))
        else:
            raise AssertionError(role)
    out = make_map(x, roles, kernel)
    return Ref(out, tuple(_without_ones(d, out.sizes) for d in dims))


def _without_ones(dim: tuple[int, ...], sizes: tuple[Size, ...]) -> tuple[int, ...]:
    return tuple(s for s in dim if sizes[s] != 1)


# -- Pooling ----------------------------------------------------------------------------------------------------------


@rule("avg_pool")
def _avg_pool(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    a = op.attrs
    kernel, stride, padding = a["kernel"], a["stride"], a["padding"]
    nd = len(kernel)
    shape = out_shape(node)
    lead = len(shape) - nd
    floor = [_floor_size(ref.shape[lead + i], kernel[i], stride[i], padding[i]) for i in range(nd)]
    regular = all(same(floor[i], shape[lead + i]) for i in range(nd)) if a["ceil_mode"] else True
    plain = not any(padding) or bool(a["count_include_pad"]) or a["divisor"] is not None
    if regular and plain:
        divisor = a["divisor"] or math.prod(kernel)
        roles: dict[int, Role | None] = {
            lead + i: Window(0, conv_filter(kernel[i], stride[i], padding[i], padding[i], 1), shape[lead + i])
            for i in range(nd)
            if (kernel[i], stride[i], padding[i]) != (1, 1, 0)
        }
        taps = [kernel[d - lead] for d in sorted(roles)]
        return along_dims(ref, roles, kernels.uniform(taps, 1.0 / divisor))
    if a["divisor"] is not None:
        raise LiftError(f"divisor_override={a['divisor']} with ceil_mode=True")
    if a["count_include_pad"] and any(padding):
        raise LiftError("ceil_mode=True with padding that counts: the divisor differs in the last window")
    inside: dict[int, Role | None] = {
        lead + i: Resample(0, "avg_inside", (kernel[i], stride[i], padding[i], bool(a["ceil_mode"])), shape[lead + i])
        for i in range(nd)
    }
    return along_dims(ref, inside, kernels.uniform((), 1.0))


def _floor_size(n: Size, k: int, s: int, p: int) -> Size:
    if is_static(n):
        return (int(n) + 2 * p - k) // s + 1
    from torch.utils._sympy.functions import FloorDiv

    return as_size(FloorDiv(n + 2 * p - k, s) + 1)


@rule("adaptive_avg_pool")
def _adaptive_avg_pool(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    nd = len(op.attrs["output_size"])
    shape = out_shape(node)
    lead = len(shape) - nd
    windows: dict[int, Role | None] = {}
    resampled: dict[int, Role | None] = {}
    taps: list[int] = []
    for d in range(lead, len(shape)):
        n, m = ref.shape[d], shape[d]
        if same(n, m):
            continue
        ratio = quotient(n, m)
        if m != 1 and ratio is not None and is_static(ratio):
            r = int(ratio)
            windows[d] = Window(0, conv_filter(r, r, 0, 0, 1), m)
            taps.append(r)
        else:
            resampled[d] = Resample(0, "adaptive_avg", (), m)
    out = ref
    if windows:
        out = along_dims(out, windows, kernels.uniform(taps, 1.0 / math.prod(taps)))
    if resampled:
        out = along_dims(out, resampled, kernels.uniform((), 1.0))
    return out


@rule("mean", "sum")
def _mean(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    dims = set(op.attrs["dims"] or range(len(ref.dims)))
    keepdim = bool(op.attrs["keepdim"])
    averaged = [s for d in dims for s in ref.dims[d]]
    x = ref.value
    roles: list[Role] = [Resample(i, "adaptive_avg", (), 1) if i in averaged else Kept(i) for i in range(x.rank)]
    out = make_map(x, roles, kernels.uniform((), 1.0))
    out_dims = tuple(() if d in dims else ref.dims[d] for d in range(len(ref.dims)) if keepdim or d not in dims)
    result = Ref(out, out_dims)
    if op.name == "sum":
        count = math.prod(int(s) for i in averaged if is_static(s := x.sizes[i]))
        if not all(is_static(x.sizes[i]) for i in averaged):
            raise LiftError("a sum over an axis of dynamic size")
        result = scale(result, float(count))
    return result


# -- Resampling -------------------------------------------------------------------------------------------------------

_AXIS_KIND = {
    "linear": "linear",
    "bilinear": "linear",
    "trilinear": "linear",
    "bicubic": CUBIC,
    "nearest": "nearest",
    "nearest-exact": "nearest-exact",
    "area": "adaptive_avg",
}


@rule("interpolate")
def _interpolate(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    mode, align_corners = str(op.attrs["mode"]), bool(op.attrs["align_corners"])
    if mode not in _AXIS_KIND:
        raise LiftError(f"interpolation mode {mode!r}")
    kind = _AXIS_KIND[mode]
    scales = op.attrs["scales"]
    shape = out_shape(node)
    lead = 2
    windows: dict[int, Role | None] = {}
    resampled: dict[int, Role | None] = {}
    taps: list[int] = []
    for d in range(lead, len(shape)):
        n, m = ref.shape[d], shape[d]
        given = scales[d - lead] if scales else None
        factor = float(given) if given is not None else None
        if same(n, m) and (factor is None or factor == 1.0):
            continue
        up, down = quotient(m, n), quotient(n, m)
        exact = factor is None or (is_static(up or 0) and factor == up) or (down and factor * float(down) == 1.0)
        if mode.startswith("nearest") and exact and up is not None and is_static(up):
            windows[d] = Window(0, nearest_filter(int(up)), m)
            taps.append(int(up))
        elif mode == "nearest" and exact and down is not None and is_static(down):
            windows[d] = Window(0, selection_filter(0, n, m, int(down)), m)
            taps.append(1)
        elif n == 1 and is_static(m):
            windows[d] = Window(0, Filter(1, 1, int(m), 1, int(m) - 1, int(m) - 1), m)
            taps.append(int(m))
        elif n == 1:
            continue  # one pixel, at every place of an image of dynamic size
        else:
            resampled[d] = Resample(0, kind, () if kind == "adaptive_avg" else (align_corners, factor), m)
    out = ref
    if windows:
        out = along_dims(out, windows, kernels.uniform(taps, 1.0))
    if resampled:
        out = along_dims(out, resampled, kernels.uniform((), 1.0))
    return broadcast(out, shape)


# -- Padding, slicing, concatenation ----------------------------------------------------------------------------------


@rule("pad")
def _pad(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    mode, value = str(op.attrs["mode"]), float(op.attrs["value"] or 0.0)
    shape = out_shape(node)
    pads = op.attrs["pads"]
    if mode in PADDING:
        return _padded_with_values(ref, mode, pads, shape)
    if mode != "constant":
        raise LiftError(f"padding_mode={mode!r}")
    if not math.isfinite(value):
        raise LiftError(f"padding with {value}")
    out = place(ref, {d: (-lo, shape[d]) for d, (lo, hi) in enumerate(pads) if (lo, hi) != (0, 0)})
    if value == 0.0:
        return out
    if not all(is_static(shape[d]) and is_static(ref.shape[d]) for d, p in enumerate(pads) if p != (0, 0)):
        raise LiftError(f"padding with {value} to a dynamic size")
    return _fill_border(out, pads, value)


def _padded_with_values(ref: Ref, mode: str, pads: Sequence[tuple[int, int]], shape: tuple[Size, ...]) -> Ref:
    if min(min(p) for p in pads) < 0:
        raise LiftError(f"padding_mode={mode!r} with padding below zero")
    padded = {d: p for d, p in enumerate(pads) if p != (0, 0)}
    if any(ref.shape[d] == 1 for d in padded):
        raise LiftError(f"padding_mode={mode!r} of an axis of size 1")
    roles: dict[int, Role | None] = {d: Resample(0, mode, p, shape[d]) for d, p in padded.items()}
    return along_dims(ref, roles, kernels.uniform((), 1.0)) if roles else ref


def _fill_border(out: Ref, pads: Sequence[tuple[int, int]], value: float) -> Ref:
    x, slots = arrange(out, [None if p == (0, 0) else (out.shape[d],) for d, p in enumerate(pads)])
    varies = [False] * x.rank
    shape, inner = [], []
    for d, (lo, hi) in enumerate(pads):
        if (lo, hi) != (0, 0):
            n = int(out.shape[d])
            varies[slots[d][0]] = True
            shape.append(n)
            inner.append(slice(max(lo, 0), n - max(hi, 0)))
    border = torch.full(shape, value, dtype=torch.float64)
    border[tuple(inner)] = 0.0
    total = make_sum([x, Value(Const(x.sizes, tuple(varies), kernels.literal(border)))])
    return Ref(total, tuple(tuple(s) for s in slots))


def place(ref: Ref, starts: dict[int, tuple[int, Size]], step: dict[int, int] | None = None) -> Ref:
    """Crop, stride or zero-pad dims: per dim the first element (negative: padding) and the new size."""
    roles: dict[int, Role | None] = {}
    for d, (start, size) in starts.items():
        n = ref.shape[d]
        s = (step or {}).get(d, 1)
        if start == 0 and same(n, size) and s == 1:
            continue
        if (s == 1 or is_static(size)) and not is_static(as_size(size * s - n)):
            # The size of a window is ⌊(n + extent)/step⌋ with a fixed extent.
            raise LiftError(f"{size} elements from an axis of size {n}")
        try:
            roles[d] = Window(0, selection_filter(start, n, size, s), size)
        except ValueError as error:
            raise LiftError(str(error)) from error
    if not roles:
        return ref
    return along_dims(ref, roles, kernels.uniform([1] * len(roles), 1.0))


def pick(ref: Ref, d: int, places: Sequence[int]) -> Ref:
    """The entries of a dim at places that are counted from its ends, whatever its size."""
    return along_dims(ref, {d: Resample(0, PICK, tuple(places), len(places))}, kernels.uniform((), 1.0))


def _place(index: object, n: Size) -> Size:
    """The place that an index stands for; negative where it is known from the end of the axis only."""
    place = 0 if index is None else as_size(index)
    from_end = as_size(place - n)
    return from_end if not is_static(place) and is_static(from_end) else place


def _cut(ref: Ref, d: int, start: object, size: Size, step: int) -> Ref:
    """``x[start::step]`` of a dim, cut to ``size``."""
    first = _place(start, ref.shape[d])
    if is_static(first) and is_static(size) and not is_static(ref.shape[d]):
        return pick(ref, d, range(int(first), int(first) + int(size) * step, step))
    return place(ref, {d: (_bounds(ref.shape[d], start, size, step), size)}, {d: step})


def _bounds(n: Size, start: object, size: Size, step: int) -> int:
    """The first element of a slice as a non-negative number."""
    first = 0 if start is None else as_size(start)
    if not is_static(first):
        raise LiftError(f"a slice that starts at a dynamic place {first}")
    first = int(first)
    if first < 0:
        if not is_static(n):
            # From the end of a dynamic axis: the place is known only if the size tells it.
            difference = as_size(n - size) if step == 1 else None
            if difference is not None and is_static(difference):
                return int(difference)
            raise LiftError(f"a slice from the end of a dynamic axis {n}")
        first += int(n)
    return max(min(first, int(n)) if is_static(n) else first, 0)


@rule("slice")
def _slice(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    d, step = int(op.attrs["dim"]), int(op.attrs["step"] or 1)
    size = out_shape(node)[d]
    if same(size, 0):
        raise LiftError("an empty slice")
    return _cut(ref, d, op.attrs["start"], size, step)


def _select(ref: Ref, d: int, index: object) -> Ref:
    n = ref.shape[d]
    i = _place(index, n)
    if not is_static(i):
        raise LiftError(f"an element at a dynamic place {i}")
    i = int(i)
    out = place(ref, {d: (i if i >= 0 else i + int(n), 1)}) if is_static(n) else pick(ref, d, (i,))
    return Ref(out.value, out.dims[:d] + out.dims[d + 1 :])


@rule("select")
def _select_rule(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    return _select(lifter.ref(op.inputs[0]), int(op.attrs["dim"]), op.attrs["index"])


@rule("index")
def _index(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    shape = out_shape(node)
    d = out_d = 0
    for item in op.attrs["items"]:
        if item[0] == "new":
            ref = Ref(ref.value, (*ref.dims[:d], (), *ref.dims[d:]))
            d, out_d = d + 1, out_d + 1
        elif item[0] == "select":
            ref = _select(ref, d, item[1])
        else:
            step = int(item[3] or 1)
            size = shape[out_d]
            if same(size, 0):
                raise LiftError("an empty slice")
            ref = _cut(ref, d, item[1], size, step)
            d, out_d = d + 1, out_d + 1
    return ref


@rule("cat", "stack")
def _cat(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    refs = [lifter.ref(x) for x in op.inputs]
    d = int(op.attrs["dim"])
    if op.name == "stack":
        refs = [Ref(r.value, (*r.dims[:d], (), *r.dims[d:])) for r in refs]
    return concatenate(refs, d, out_shape(node))


def concatenate(refs: Sequence[Ref], d: int, shape: tuple[Size, ...]) -> Ref:
    """A sum of selections into disjoint places along dim ``d``."""
    total = shape[d]
    others = [list(range(len(shape))) for _ in refs]
    for row in others:
        row[d] = None  # type: ignore[call-overload]
    atoms: list[Sequence[Size]] = list(refine_together(refs, others))
    start: Size = 0
    parts: list[Value] = []
    dims: tuple[tuple[int, ...], ...] = ()
    for r in refs:
        size = r.shape[d]
        if not is_static(start):
            raise LiftError(f"concatenation at a dynamic place {start}")
        if same(size, 0):
            continue
        wanted = [*atoms[:d], (size,), *atoms[d + 1 :]]
        x, slots = arrange(r, wanted)
        placed = place(Ref(x, tuple(tuple(s) for s in slots)), {d: (-int(start), total)})
        parts.append(placed.value)
        dims = placed.dims
        start = as_size(start + size)
    return Ref(make_sum(parts), dims)


@rule("roll")
def _roll(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    for shift, d in zip(op.attrs["shifts"], op.attrs["dims"], strict=True):
        n = ref.shape[d]
        if not (is_static(n) and is_static(as_size(shift))):
            raise LiftError(f"a roll by {shift} along an axis of dynamic size {n}")
        k = int(as_size(shift)) % int(n)
        if k:
            tail = place(ref, {d: (int(n) - k, k)})
            head = place(ref, {d: (0, int(n) - k)})
            ref = concatenate([tail, head], d, ref.shape)
    return ref


@rule("flip")
def _flip(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    for d in op.attrs["dims"]:
        n = ref.shape[d]
        if not is_static(n):
            raise LiftError(f"a flip of an axis of dynamic size {n}")
        ref = gather(ref, d, tuple(reversed(range(int(n)))))
    return ref


@rule("index_select")
def _index_select(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref, d = lifter.ref(op.inputs[0]), int(op.attrs["dim"])
    index = op.attrs["index"]
    if index is None:
        if not lifter.is_constant(op.inputs[1]):
            raise LiftError("indices that are no constants")
        index = tuple(lifter.constants.value(op.inputs[1]).tolist())
    n = ref.shape[d]
    if not is_static(n):
        return pick(ref, d, tuple(int(i) for i in index))
    return gather(ref, d, tuple(int(i) % int(n) for i in index))


def gather(ref: Ref, d: int, index: tuple[int, ...]) -> Ref:
    """Entries of a dim by their indices: a contraction with rows of the identity, that is never computed as one."""
    n = int(ref.shape[d])
    if not index:
        raise LiftError("an empty selection")
    step = index[1] - index[0] if len(index) > 1 else 1
    if step > 0 and index == tuple(range(index[0], index[-1] + 1, step)):
        return place(ref, {d: (index[0], len(index))}, {d: step})
    x, slots = arrange(ref, [(n,) if i == d else None for i in range(len(ref.dims))])
    roles: list[Role] = [New(len(index)) if i == slots[d][0] else Kept(i) for i in range(x.rank)]

    def rows() -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(index), n).double()

    out = make_map(x, roles, kernels.derive((len(index), n), ("gather", index), (), rows))
    return Ref(out, tuple(_without_ones(tuple(s), out.sizes) for s in slots))


# -- Patches ----------------------------------------------------------------------------------------------------------


@rule("im2col")
def _im2col(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    a = op.attrs
    n = [ref.shape[2], ref.shape[3]]
    filters = [conv_filter(a["kernel"][i], a["stride"][i], a["padding"][i], a["padding"][i], a["dilation"][i]) for i in range(2)]
    sizes = [f.out_size(s) for f, s in zip(filters, n, strict=True)]
    x, slots = arrange(ref, [None, None, (n[0],), (n[1],)])
    kept = [Kept(s) for d in slots[:2] for s in d]
    kh, kw = a["kernel"]
    roles: list[Role] = [
        *kept,
        New(kh),
        New(kw),
        Window(slots[2][0], filters[0], sizes[0]),
        Window(slots[3][0], filters[1], sizes[1]),
    ]
    eye = torch.einsum("ac,bd->abcd", torch.eye(kh, dtype=torch.float64), torch.eye(kw, dtype=torch.float64))
    out = make_map(x, roles, kernels.literal(eye))
    c = len(kept)
    dims = (tuple(slots[0]), (*slots[1], c, c + 1), (c + 2, c + 3))
    return Ref(out, tuple(_without_ones(d, out.sizes) for d in dims))


@rule("col2im")
def _col2im(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    a, shape = op.attrs, out_shape(node)
    kernel, stride, padding, dilation = a["kernel"], a["stride"], a["padding"], a["dilation"]
    n, channels, taps = ref.shape[0], shape[1], math.prod(kernel)
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    places = [_floor_size(shape[2 + i], reach[i], stride[i], padding[i]) for i in range(2)]
    touching = all(same(as_size(places[i] * kernel[i]), shape[2 + i]) for i in range(2))
    if touching and tuple(stride) == tuple(kernel) and not any(padding) and tuple(dilation) == (1, 1):
        fine = regroup_dims(ref, (n, channels, *kernel, *places))
        d = fine.dims
        return Ref(fine.value, (d[0], d[1], d[4] + d[2], d[5] + d[3]))
    # What unfolding reads from a place, added up there: a transposed convolution whose kernel is one for each tap.
    more = [as_size(shape[2 + i] + 2 * padding[i] - reach[i] - (places[i] - 1) * stride[i]) for i in range(2)]
    if not all(is_static(s) for s in (channels, *more)):
        raise LiftError(f"a fold to a dynamic size {shape[2:]}")
    filters = [transposed_filter(kernel[i], stride[i], padding[i], dilation[i], int(more[i])) for i in range(2)]
    eye = torch.eye(taps, dtype=torch.float64).reshape(1, 1, taps, *kernel).flip(3, 4)
    k = kernels.expand(kernels.literal(eye), (int(channels), 1, taps, *kernel))
    return slide(regroup_dims(ref, (n, as_size(channels * taps), *places)), k, filters, shape)


@rule("tensor_unfold")
def _tensor_unfold(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    d, size, step = int(op.attrs["dim"]), int(op.attrs["size"]), int(op.attrs["step"])
    n = ref.shape[d]
    f = conv_filter(size, step, 0, 0, 1)
    x, slots = arrange(ref, [(n,) if i == d else None for i in range(len(ref.dims))])
    roles: list[Role] = [Kept(i) for i in range(x.rank)]
    source = slots[d][0]
    roles[source] = Window(source, f, out_shape(node)[d])
    out = make_map(x, [*roles, New(size)], kernels.literal(torch.eye(size, dtype=torch.float64)))
    dims = (*(tuple(s) for s in slots), (x.rank,))
    return Ref(out, tuple(_without_ones(t, out.sizes) for t in dims))
