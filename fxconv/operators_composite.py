"""Operators that are made of others: mixtures by a constant, copies, turns, running sums."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxconv import kernel as kernels
from fxconv.axes import Size, as_size, is_static
from fxconv.expr import Kept, New, Role, Window
from fxconv.kernel import Kernel
from fxconv.operators import align, broadcast, multiply, operand_constant, out_shape, reciprocal, rule, scale
from fxconv.operators_window import along_dims, gather
from fxconv.refs import LiftError, Ref, arrange, make_map, make_sum
from fxconv.window import nearest_filter

if TYPE_CHECKING:
    from fxconv.lift import Lifter
    from fxconv.spelling import Op, Operand

RUNNING = 1 << 10
"""The longest running sum that becomes a matrix: its triangle has as many entries squared."""


def _times(lifter: Lifter, a: Operand, b: Operand, shape: tuple[Size, ...]) -> Ref:
    """a·b, one of which is constant."""
    if lifter.is_constant(a) and not lifter.is_constant(b):
        a, b = b, a
    if not lifter.is_constant(b):
        raise LiftError("a product of two activations is not affine")
    return multiply(lifter.ref(a), lifter.kernel(b), shape)


def _total(node: fx.Node, parts: list[Ref]) -> Ref:
    values, dims = align(parts, out_shape(node))
    return Ref(make_sum(values), dims)


@rule("addcmul")
def _addcmul(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    c, a, b = op.inputs
    part = _times(lifter, a, b, out_shape(node))
    return _total(node, [lifter.ref(c), scale(part, float(op.attrs["value"]))])


@rule("addcdiv")
def _addcdiv(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    c, a, b = op.inputs
    if not lifter.is_constant(b):
        raise LiftError("a quotient by an activation is not affine")
    part = multiply(lifter.ref(a), reciprocal(lifter.kernel(b)), out_shape(node))
    return _total(node, [lifter.ref(c), scale(part, float(op.attrs["value"]))])


@rule("lerp")
def _lerp(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    a, b, weight = op.inputs
    k = operand_constant(lifter, weight, "the weight of an interpolation between two tensors")
    shape = out_shape(node)
    return _total(node, [multiply(lifter.ref(a), _complement(k), shape), multiply(lifter.ref(b), k, shape)])


@rule("where")
def _where(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    condition, a, b = op.inputs
    mask = operand_constant(lifter, condition, "a condition")
    shape = out_shape(node)
    parts = []
    for x, k in ((a, mask), (b, _complement(mask))):
        if lifter.is_constant(x):
            value = lifter.kernel(x)
            if value.uniform == 0:
                continue
            if not (math.isfinite(value.uniform) if value.uniform is not None else value.tensor().isfinite().all()):
                raise LiftError("a mask with infinities")
        parts.append(multiply(lifter.ref(x), k, shape))
    return _total(node, parts)


def _complement(k: Kernel) -> Kernel:
    """1 − k."""
    if k.uniform is not None:
        return kernels.uniform(k.shape, 1.0 - k.uniform)
    return kernels.derive(k.shape, "complement", (k,), lambda: 1.0 - k.tensor())


# -- Copies, turns, running sums --------------------------------------------------------------------------------------


@rule("repeat")
def _repeat(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    counts = tuple(as_size(n) for n in op.attrs["counts"])
    lead = len(counts) - len(ref.dims)
    ref = Ref(ref.value, ((),) * lead + ref.dims)
    for d, count in enumerate(counts):
        if count != 1:
            ref = _copied(ref, d, count, outer=True)
    return ref


@rule("repeat_interleave")
def _repeat_interleave(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref, d, count = lifter.ref(op.inputs[0]), int(op.attrs["dim"]), int(op.attrs["count"])
    if d >= 2:  # a spatial dim: what nearest upsampling does
        role = Window(0, nearest_filter(count), out_shape(node)[d])
        return along_dims(ref, {d: role}, kernels.uniform((count,), 1.0))
    return _copied(ref, d, count, outer=False)


def _copied(ref: Ref, d: int, count: Size, outer: bool) -> Ref:
    """Copies of a dim one after the other (``outer``), or of each of its entries."""
    at = d if outer else d + 1
    fine = Ref(ref.value, (*ref.dims[:at], (), *ref.dims[at:]))
    grown = broadcast(fine, (*fine.shape[:at], count, *fine.shape[at + 1 :]))
    return Ref(grown.value, (*grown.dims[:d], grown.dims[d] + grown.dims[d + 1], *grown.dims[d + 2 :]))


@rule("rot90")
def _rot90(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref, k = lifter.ref(op.inputs[0]), int(op.attrs["k"])
    first, second = op.attrs["dims"]
    for d in {0: (), 1: (second,), 2: (first, second), 3: (first,)}[k]:
        n = ref.shape[d]
        if not is_static(n):
            raise LiftError(f"a turn of an axis of dynamic size {n}")
        ref = gather(ref, d, tuple(reversed(range(int(n)))))
    if k % 2:
        dims = list(ref.dims)
        dims[first], dims[second] = dims[second], dims[first]
        ref = Ref(ref.value, tuple(dims))
    return ref


@rule("cumsum")
def _cumsum(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref, d = lifter.ref(op.inputs[0]), int(op.attrs["dim"])
    n = ref.shape[d]
    if not is_static(n) or int(n) > RUNNING:
        raise LiftError(f"a running sum along an axis of size {n}")
    n = int(n)
    if n == 1:
        return ref
    x, slots = arrange(ref, [(n,) if i == d else None for i in range(len(ref.dims))])
    roles: list[Role] = [New(n) if i == slots[d][0] else Kept(i) for i in range(x.rank)]

    def triangle() -> torch.Tensor:
        return torch.ones(n, n, dtype=torch.float64).tril()

    out = make_map(x, roles, kernels.derive((n, n), ("running sum", n), (), triangle))
    return Ref(out, tuple(tuple(s) for s in slots))
