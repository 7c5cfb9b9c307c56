"""Canonical operators → expressions: the registry, and the operators of layout, scale and addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxconv import kernel as kernels
from fxconv.axes import Size, is_static, product, same, shape_of
from fxconv.expr import Apply, Const, Kept, New, Role, Shared, Value
from fxconv.refs import (
    LiftError,
    Ref,
    arrange,
    check_shape,
    make_map,
    make_sum,
    refine_together,
    regroup_dims,
)
from fxconv.steps import Chain, Layout, Step

if TYPE_CHECKING:
    from fxconv.emit import Emitter
    from fxconv.lift import Lifter
    from fxconv.spelling import Op, Operand

Rule = Callable[["Lifter", "fx.Node", "Op"], Ref]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the meaning of canonical operators."""

    def register(f: Rule) -> Rule:
        for name in names:
            RULES[name] = f
        return f

    return register


def lift_operator(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    """The expression of one operator.

    Raises:
        LiftError: it has none, with the reason.
    """
    import fxconv.operators_composite
    import fxconv.operators_linear
    import fxconv.operators_norm
    import fxconv.operators_window
    import fxconv.operators_write  # noqa: F401

    if op.name not in RULES:
        raise LiftError(f"{op.name} is not affine")
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or not val.is_floating_point():
        raise LiftError(f"{op.name} does not give a floating-point tensor")
    for operand in op.inputs:
        if isinstance(operand, fx.Node):
            given = operand.meta.get("val")
            if isinstance(given, torch.Tensor) and given.dtype != val.dtype and not lifter.is_constant(operand):
                raise LiftError(f"mixed dtypes {given.dtype} and {val.dtype}")
    ref = RULES[op.name](lifter, node, op)
    check_shape(ref, shape_of(val))
    return ref


def out_shape(node: fx.Node) -> tuple[Size, ...]:
    return shape_of(node.meta["val"])


# -- Layout -----------------------------------------------------------------------------------------------------------


@rule("identity")
def _identity(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    return lifter.ref(op.inputs[0])


@rule("reshape", "pixel_shuffle_view")
def _reshape(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    if op.attrs.get("bare_squeeze"):
        raise LiftError("a squeeze() that also drops a dynamic dim where it is 1 (the batch): write squeeze(dim) or flatten(1)")
    return regroup_dims(lifter.ref(op.inputs[0]), out_shape(node))


@rule("permute")
def _permute(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    return Ref(ref.value, tuple(ref.dims[d] for d in op.attrs["dims"]))


@rule("expand")
def _expand(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    return broadcast(lifter.ref(op.inputs[0]), out_shape(node))


@rule("full")
def _full(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    return filled(out_shape(node), op.attrs["value"])


def filled(shape: tuple[Size, ...], value: float) -> Ref:
    """A tensor whose entries are all the same."""
    sizes = tuple(s for s in shape if s != 1)
    count = iter(range(len(sizes)))
    dims = tuple((next(count),) if s != 1 else () for s in shape)
    return Ref(Value(Const(sizes, (False,) * len(sizes), kernels.uniform((), value))), dims)


def broadcast(ref: Ref, shape: tuple[Size, ...]) -> Ref:
    """A tensor expanded to a shape: new slots along which the map is 1."""
    lead = len(shape) - len(ref.dims)
    grown = [
        d for d, s in enumerate(shape) if s != 1 and (d < lead or (not ref.dims[d - lead] and not same(ref.shape[d - lead], s)))
    ]
    if not grown:
        return Ref(ref.value, ((),) * lead + ref.dims)
    x = ref.value
    sizes = tuple(shape[d] for d in grown)
    dims: list[tuple[int, ...]] = [()] * lead + list(ref.dims)
    for k, d in enumerate(grown):
        dims[d] = (x.rank + k,)
    if isinstance(x.node, Const):
        c = x.node
        return Ref(Value(Const((*c.sizes, *sizes), (*c.varies, *(False,) * len(sizes)), c.kernel)), tuple(dims))
    roles: list[Role] = [*(Kept(i) for i in range(x.rank)), *(New(s) for s in sizes)]
    return Ref(make_map(x, roles, kernels.uniform(sizes, 1.0)), tuple(dims))


@rule("pixel_shuffle")
def _pixel_shuffle(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    *lead, c, h, w = ref.shape
    r = int(op.attrs["factor"])
    if not is_static(c):
        raise LiftError("pixel shuffle of a dynamic number of channels")
    fine = regroup_dims(ref, (*lead, int(c) // r**2, r, r, h, w))
    d = fine.dims
    n = len(lead)
    return Ref(fine.value, (*d[:n], d[n], d[n + 3] + d[n + 1], d[n + 4] + d[n + 2]))


@rule("pixel_unshuffle")
def _pixel_unshuffle(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    r = int(op.attrs["factor"])
    shape = out_shape(node)
    *lead, c, _, _ = ref.shape
    fine = regroup_dims(ref, (*lead, c, shape[-2], r, shape[-1], r))
    d = fine.dims
    n = len(lead)
    return Ref(fine.value, (*d[:n], d[n] + d[n + 2] + d[n + 4], d[n + 1], d[n + 3]))


@rule("channel_shuffle")
def _channel_shuffle(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    n, c, *rest = ref.shape
    g = int(op.attrs["groups"])
    if not is_static(c):
        raise LiftError("channel shuffle of a dynamic number of channels")
    fine = regroup_dims(ref, (n, g, int(c) // g, *rest))
    d = fine.dims
    return Ref(fine.value, (d[0], d[2] + d[1], *d[3:]))


# -- Scale and addition -----------------------------------------------------------------------------------------------


def scale(ref: Ref, factor: float) -> Ref:
    """The tensor times a number."""
    x = ref.value
    return Ref(make_map(x, [Kept(i) for i in range(x.rank)], kernels.uniform((), factor)), ref.dims)


def align(refs: list[Ref], shape: tuple[Size, ...]) -> tuple[list[Value], tuple[tuple[int, ...], ...]]:
    """Values with the same slots, in the order of an output shape's dims, broadcast where they are smaller."""
    refs = [broadcast(r, shape) for r in refs]
    # A constant that does not vary along a dim imposes no atoms there, and neither does it need any.
    dim_of = [list(range(len(shape)))] * len(refs)
    atoms = refine_together(refs, dim_of)
    values = [arrange(r, atoms)[0] for r in refs]
    count = iter(range(sum(map(len, atoms))))
    return values, tuple(tuple(next(count) for _ in a) for a in atoms)


@rule("add", "sub")
def _add(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    a, b = op.inputs
    sign = -1.0 if op.name == "sub" else 1.0
    alpha = sign * float(op.attrs.get("alpha", 1))
    left, right = lifter.ref(a), lifter.ref(b)
    if alpha != 1.0:
        right = scale(right, alpha)
    values, dims = align([left, right], out_shape(node))
    return Ref(make_sum(values), dims)


@rule("neg")
def _neg(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    return scale(lifter.ref(op.inputs[0]), -1.0)


@rule("mul")
def _mul(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    a, b = op.inputs
    if lifter.is_constant(a) and not lifter.is_constant(b):
        a, b = b, a
    if not lifter.is_constant(b):
        raise LiftError("a product of two activations is not affine")
    return multiply(lifter.ref(a), lifter.kernel(b), out_shape(node))


@rule("div")
def _div(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    a, b = op.inputs
    if not lifter.is_constant(b):
        raise LiftError("a quotient by an activation is not affine")
    return multiply(lifter.ref(a), reciprocal(lifter.kernel(b)), out_shape(node))


def reciprocal(k: kernels.Kernel) -> kernels.Kernel:
    """1 / k."""
    if k.uniform is None:
        return kernels.derive(k.shape, "reciprocal", (k,), lambda: k.tensor().reciprocal())
    if k.uniform == 0:
        raise LiftError("division by zero")
    return kernels.uniform(k.shape, 1.0 / k.uniform)


def multiply(ref: Ref, k: kernels.Kernel, shape: tuple[Size, ...]) -> Ref:
    """The tensor times a constant that broadcasts to ``shape`` (and may expand the tensor)."""
    if all(s == 1 for s in k.shape):
        if k.uniform is not None:
            return scale(broadcast(ref, shape), k.uniform)
        return multiply_along(broadcast(ref, shape), k, [])
    lead = len(shape) - len(k.shape)
    along = [d for d in range(lead, len(shape)) if k.shape[d - lead] != 1]
    return multiply_along(broadcast(ref, shape), k, along)


def multiply_along(ref: Ref, k: kernels.Kernel, along: list[int]) -> Ref:
    """The tensor times a kernel that varies along the given dims (its axes of other sizes are 1)."""
    x = ref.value
    shared = [s for d in along for s in ref.dims[d]]
    # The kernel's axes follow dims; a map's follow slots.
    k = kernels.reshape(k, [x.sizes[s] for s in shared])
    k = kernels.permute(k, sorted(range(len(shared)), key=lambda i: shared[i]))
    roles: list[Role] = [Shared(i) if i in shared else Kept(i) for i in range(x.rank)]
    return Ref(make_map(x, roles, k), ref.dims)


def add_along(ref: Ref, k: kernels.Kernel, dim: int) -> Ref:
    """The tensor plus a vector that varies along one dim."""
    x = ref.value
    slots = ref.dims[dim]
    k = kernels.reshape(k, [x.sizes[s] for s in slots])
    k = kernels.permute(k, sorted(range(len(slots)), key=lambda i: slots[i]))
    varies = tuple(i in slots for i in range(x.rank))
    return Ref(make_sum([x, Value(Const(x.sizes, varies, k))]), ref.dims)


@rule("batch_norm")
def _batch_norm(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    x, weight, bias, mean, var = op.inputs
    ref = lifter.ref(x)
    for operand in (weight, bias, mean, var):
        if operand is not None and not lifter.is_constant(operand):
            raise LiftError("BatchNorm whose parameters are computed from activations")
    eps = float(op.attrs["eps"])
    k_var, k_mean = lifter.kernel(var), lifter.kernel(mean)
    gamma = lifter.kernel(weight) if weight is not None else kernels.uniform(k_var.shape, 1.0)
    beta = lifter.kernel(bias) if bias is not None else kernels.uniform(k_var.shape, 0.0)
    factor = kernels.derive(
        k_var.shape, ("bn scale", eps), (gamma, k_var), lambda: gamma.tensor() / torch.sqrt(k_var.tensor() + eps)
    )
    shift = kernels.derive(
        k_var.shape,
        "bn shift",
        (beta, k_mean, factor),
        lambda: beta.tensor() - k_mean.tensor() * factor.tensor(),
    )
    return add_along(multiply_along(ref, factor, [1]), shift, 1)


# -- Nonlinear functions that a positive scale passes through ---------------------------------------------------------


@rule("relu", "leaky_relu", "prelu", "elementwise")
def _activation(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    if isinstance(ref.value.node, Const):
        raise LiftError(f"{op.name} of a constant")
    if op.name == "leaky_relu" and not float(op.attrs["slope"]) >= 0:
        raise LiftError(f"LeakyReLU with slope {op.attrs['slope']}")
    x = ref.value
    function = Nonlinear(node, op, ref.dims, lifter.functions)
    return Ref(Value(Apply(x, function, x.sizes, (True,) * x.rank, False)), ref.dims)


@rule("max_pool")
def _max_pool(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    ref = lifter.ref(op.inputs[0])
    nd = len(op.attrs["kernel"])
    shape = out_shape(node)
    lead = len(shape) - nd
    x, slots = arrange(ref, [None] * lead + [[s] for s in ref.shape[lead:]])
    sizes = [x.sizes[i] for d in slots[:lead] for i in d] + list(shape[lead:])
    kept = [True] * (len(sizes) - nd) + [False] * nd
    dims = tuple(tuple(d) for d in slots)
    out = Value(Apply(x, Nonlinear(node, op, dims), tuple(sizes), tuple(kept), True))
    return Ref(out, dims)


ANYWHERE = ("relu", "leaky_relu", "elementwise")
"""Functions of one element each."""


class Nonlinear:
    """An operator to write again: its node, and how the operand's slots group into the dims that it expects.

    ``any_layout``: whether to write it anew in the layout that its operand comes in.
    """

    def __init__(self, node: fx.Node, op: Op, dims: tuple[tuple[int, ...], ...], any_layout: bool = False) -> None:
        self.node, self.op, self.dims, self.any_layout = node, op, dims, any_layout
        self.homogeneous = op.name != "elementwise"

    def _key(self) -> tuple[Any, ...]:
        return (self.node, self.dims)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nonlinear) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def any_operand(self) -> bool:
        """Whether it is applied to every element by itself, so that it may be applied to any tensor."""
        return self.op.name in ANYWHERE

    def alike(self, other: Any) -> bool:
        """Whether another one is the same function of an element."""
        return (
            self.any_operand and isinstance(other, Nonlinear) and (self.op.name, self.op.attrs) == (other.op.name, other.op.attrs)
        )

    def with_dims(self, dims: tuple[tuple[int, ...], ...]) -> Nonlinear:
        """The operator on an operand with its slots in another order."""
        return Nonlinear(self.node, self.op, dims, self.any_layout)

    def _arranged(self, x: Value, layout: Layout) -> Chain:
        """The operand in the dims that the operator expects; an activation takes any."""
        chain = Chain(x.sizes, layout)
        if self.op.name not in ANYWHERE:
            chain.to(self.dims)
        return chain

    def layout(self, node: Apply, layout: Layout) -> Layout:
        return self._arranged(node.x, layout).layout

    def steps(self, node: Apply, layout: Layout) -> list[Step]:
        """The steps that applying the operator to a tensor in some layout takes."""
        chain = self._arranged(node.x, layout)
        out = tuple(product([node.sizes[s] for s in g]) for g in chain.layout)
        return [*chain.steps, Step("apply", chain.shape(), out)]

    def emit(self, node: Apply, x: fx.Node, layout: Layout, emitter: Emitter) -> tuple[fx.Node, Layout]:
        """Write the operator again, on another operand."""
        chain = self._arranged(node.x, layout)
        for step in chain.steps:
            x = emitter.writer.write(step, x)
        shape = chain.shape()
        if len(x.meta["val"].shape) != len(shape):
            x = emitter.writer.write(Step("reshape", shape, shape), x)
        operand = self.op.inputs[0]
        assert isinstance(operand, fx.Node)
        return emitter.writer.again(emitter.twins[self.node], emitter.twins[operand], x), chain.layout


def operand_constant(lifter: Lifter, operand: Operand, what: str) -> kernels.Kernel:
    """A kernel operand.

    Raises:
        LiftError: it is computed from activations.
    """
    if not lifter.is_constant(operand):
        raise LiftError(f"{what} is computed from activations")
    return lifter.kernel(operand)
