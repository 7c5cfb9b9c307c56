"""Canonical operators → expressions: writes into a part of a tensor (``y[:, :, :p] = c``, as ``slice_scatter``).

Where all sizes are fixed, a write is the concatenation of what it leaves and what it writes. At an end of an axis of dynamic
size the part has no place that can be named, but a constant that does not vary along that axis can be written all the same:
``y[:p] = c`` is ``pad(y[p:] − c) + c``. A border filled side by side becomes the one padding that it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from fxconv import kernel as kernels
from fxconv.algebra import compose
from fxconv.axes import Size, as_size, is_static, same
from fxconv.expr import Const, Kept, Map, Role, Sum, Value, Window, is_selection
from fxconv.operators import align, rule, scale
from fxconv.operators_window import concatenate, place
from fxconv.refs import LiftError, Ref, arrange, make_map, make_sum
from fxconv.window import Filter, selection_filter

if TYPE_CHECKING:
    from fxconv.lift import Lifter
    from fxconv.spelling import Op


@rule("write")
def _write(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    base, part = lifter.ref(op.inputs[0]), lifter.ref(op.inputs[1])
    d, start = int(op.attrs["dim"]), as_size(op.attrs["start"])
    if op.attrs["select"]:
        part = Ref(part.value, (*part.dims[:d], (), *part.dims[d:]))
    n, m = base.shape[d], part.shape[d]
    if same(n, m):
        return part
    if op.attrs["step"] != 1:
        raise LiftError(f"a write to every {op.attrs['step']}th element")
    filling = _filling(part, d)
    if filling is not None and is_static(m):
        if same(start, 0):
            return _filled(base, d, int(m), 0, filling)
        if same(as_size(start + m), n):
            return _filled(base, d, 0, int(m), filling)
    if not (is_static(n) and is_static(m) and is_static(start)):
        raise LiftError(f"a write of {m} elements at place {start} of an axis of size {n}")
    stop = int(start) + int(m)
    pieces = [(0, int(start), None), (int(start), int(m), part), (stop, int(n) - stop, None)]
    kept = [new if new is not None else place(base, {d: (at, size)}) for at, size, new in pieces if size > 0]
    return concatenate(kept, d, base.shape)


def _filling(part: Ref, d: int) -> Ref | None:
    """A constant that does not vary along a dim, with one element there; None where the part is anything else."""
    c = part.value.node
    if not isinstance(c, Const) or any(c.varies[s] for s in part.dims[d]):
        return None
    left = [s for s in range(len(c.sizes)) if s not in part.dims[d]]
    value = Value(Const(tuple(c.sizes[s] for s in left), tuple(c.varies[s] for s in left), c.kernel))
    return Ref(value, tuple(() if k == d else tuple(left.index(s) for s in dim) for k, dim in enumerate(part.dims)))


def _filled(base: Ref, d: int, lo: int, hi: int, filling: Ref) -> Ref:
    """The tensor with the first ``lo`` and the last ``hi`` elements of a dim replaced by a constant."""
    shape = base.shape
    x, slots = arrange(base, [(shape[d],) if k == d else None for k in range(len(shape))])
    inner = Ref(_cropped(x, slots[d][0], lo, hi), tuple(map(tuple, slots)))
    if isinstance(filling.value.node, Const) and filling.value.node.kernel.uniform == 0.0:
        return place(inner, {d: (-lo, shape[d])})
    values, dims = align([inner, filling], inner.shape)
    less = Ref(_without(values[0], values[1], scale(Ref(values[1], dims), -1.0).value), dims)
    padded = _padded(less, d, lo, shape[d])
    values, dims = align([padded, filling], shape)
    return Ref(make_sum(values), dims)


def _padded(ref: Ref, d: int, lo: int, size: Size) -> Ref:
    """A dim padded with zeros, in one selection with the padding of other dims."""
    x = ref.value
    out = place(ref, {d: (-lo, size)})
    if isinstance(x.node, Map) and is_selection(x.node) and isinstance(out.value.node, Map) and out.value.node.x is x:
        both = compose(out.value.node, x.node)
        if not isinstance(both, str):
            return Ref(both, out.dims)
    return out


def _without(x: Value, c: Value, negative: Value) -> Value:
    """A value less a constant: what was added before is taken away again, rather than added with another sign."""
    terms = list(x.node.terms) if isinstance(x.node, Sum) else [x]
    if len(terms) > 1:
        for t in terms:
            if isinstance(t.node, Const) and isinstance(c.node, Const) and _equal(t.node, c.node):
                return make_sum([other for other in terms if other is not t])
    return make_sum([*terms, negative])


def _equal(a: Const, b: Const) -> bool:
    if a.varies != b.varies or not (a.kernel.is_static and b.kernel.is_static):
        return False
    return torch.equal(a.kernel.tensor(), b.kernel.tensor())


def _cropped(x: Value, slot: int, lo: int, hi: int, padded: bool = False) -> Value:
    """A value without the first ``lo`` and the last ``hi`` places of a slot; padding that is cropped was never there.

    ``padded`` says that only padding at the other end makes the axis long enough for sure.
    """
    if not lo and not hi:
        return x
    m = x.node
    if isinstance(m, Sum):
        return make_sum([_cropped(t, slot, lo, hi, padded) for t in m.terms])
    if isinstance(m, Map) and is_selection(m):
        r = m.roles[slot]
        if isinstance(r, Kept):
            return _again(m, slot, _cropped(m.x, r.src, lo, hi, padded), None)
        if isinstance(r, Window) and r.filter.down == 1:
            before, after = max(r.filter.offset, 0), max(r.filter.pad_hi, 0)
            inside = max(lo - before, 0), max(hi - after, 0)
            operand = _cropped(m.x, r.src, *inside, padded or before + after > 0)
            cut_lo, cut_hi = lo - inside[0], hi - inside[1]
            f = Filter(1, 1, 1, 1, r.filter.offset - cut_lo, r.filter.extent - cut_lo - cut_hi)
            size = as_size(x.sizes[slot] - lo - hi)
            return _again(m, slot, operand, Window(r.src, f, size))
    n = x.sizes[slot]
    size = as_size(n - lo - hi)
    if is_static(size) and int(size) < 1:
        raise LiftError(f"a write to all of an axis of size {n}")
    if padded and lo + hi > 1 and not is_static(size) and not isinstance(m, Const):
        raise LiftError(f"a write that may reach past an axis of size {n}")
    cut = Window(slot, selection_filter(lo, n, size), size)
    roles: list[Role] = [cut if s == slot else Kept(s) for s in range(x.rank)]
    return make_map(x, roles, kernels.uniform((1,), 1.0))


def _again(m: Map, slot: int, operand: Value, role: Role | None) -> Value:
    roles = [role if role is not None and o == slot else r for o, r in enumerate(m.roles)]
    return make_map(operand, roles, m.kernel)
