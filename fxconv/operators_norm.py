"""LayerNorm, GroupNorm, InstanceNorm and RMSNorm: barriers to everything, with an affine tail that is lifted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx

from fxconv import kernel as kernels
from fxconv.expr import Apply, Const, Value
from fxconv.operators import multiply_along, rule
from fxconv.refs import LiftError, Ref, make_sum
from fxconv.steps import Chain, Layout, Step

if TYPE_CHECKING:
    from fxconv.emit import Emitter
    from fxconv.lift import Lifter
    from fxconv.spelling import Op

NAMES = {"layer_norm": "LayerNorm", "group_norm": "GroupNorm", "instance_norm": "InstanceNorm", "rms_norm": "RMSNorm"}

aten = torch.ops.aten


class Norm:
    """A normalisation by its own input's statistics, without weight and bias: no map, and no scale passes through it."""

    homogeneous = False
    any_layout = False
    any_operand = False

    def __init__(self, node: fx.Node, op: Op, dims: tuple[tuple[int, ...], ...]) -> None:
        self.node, self.op, self.dims = node, op, dims

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Norm) and (self.node, self.dims) == (other.node, other.dims)

    def __hash__(self) -> int:
        return hash((self.node, self.dims))

    @property
    def name(self) -> str:
        return NAMES[str(self.op.attrs["kind"])]

    def with_dims(self, dims: tuple[tuple[int, ...], ...]) -> Norm:
        """The operator on an operand with its slots in another order."""
        return Norm(self.node, self.op, dims)

    def layout(self, node: Apply, layout: Layout) -> Layout:
        return self.dims

    def steps(self, node: Apply, layout: Layout) -> list[Step]:
        """The steps that applying the norm to a tensor in some layout takes."""
        chain = Chain(node.x.sizes, layout)
        chain.to(self.dims)
        return [*chain.steps, Step("norm", chain.shape(), chain.shape())]

    def emit(self, node: Apply, x: fx.Node, layout: Layout, emitter: Emitter) -> tuple[fx.Node, Layout]:
        """Write the bare norm: the same operator with neither weight nor bias."""
        chain = Chain(node.x.sizes, layout)
        chain.to(self.dims)
        writer = emitter.writer
        for step in chain.steps:
            x = writer.write(step, x)
        shape = chain.shape()
        if len(x.meta["val"].shape) != len(shape):
            x = writer.write(Step("reshape", shape, shape), x)
        out = self._call(writer, x)
        out.meta["fxconv_apply"] = True
        return out, self.dims

    def _call(self, writer: Any, x: fx.Node) -> fx.Node:
        a = self.op.attrs
        eps: float | None = a["eps"]
        kind = a["kind"]
        if kind == "layer_norm":
            shape = list(a["normalized_shape"])
            return writer.call(aten.layer_norm.default, x, shape, None, None, eps, module_target=F.layer_norm)
        if kind == "rms_norm":
            if eps == torch.finfo(x.meta["val"].dtype).eps:
                eps = None  # the default, which follows the dtype
            shape = list(a["normalized_shape"])
            return writer.call(aten.rms_norm.default, x, shape, None, eps, module_target=F.rms_norm)
        if kind == "group_norm":
            return writer.call(aten.group_norm.default, x, a["groups"], None, None, eps, module_target=F.group_norm)
        # torch.instance_norm takes the arguments of the ATen operator.
        args = (x, None, None, None, None, True, 0.0, eps, False)
        return writer.call(aten.instance_norm.default, *args, module_target=torch.instance_norm)


@rule("norm_affine")
def _norm_affine(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    x, weight, bias = op.inputs
    ref = lifter.ref(x)
    name = NAMES[str(op.attrs["kind"])]
    if isinstance(ref.value.node, Const):
        raise LiftError(f"{name} of a constant")
    for operand in (weight, bias):
        if operand is not None and not lifter.is_constant(operand):
            raise LiftError(f"{name} whose parameters are computed from activations")
    rank = ref.value.rank
    core = Value(Apply(ref.value, Norm(node, op, ref.dims), ref.value.sizes, (False,) * rank, False))
    out = Ref(core, ref.dims)
    if op.attrs["kind"] in ("layer_norm", "rms_norm"):
        along = list(range(len(ref.dims) - len(op.attrs["normalized_shape"]), len(ref.dims)))
    else:
        along = [1]
    if weight is not None:
        out = multiply_along(out, _over(lifter, weight, ref, along), along)
    if bias is not None:
        out = _shifted(out, _over(lifter, bias, ref, along), along)
    return out


def _over(lifter: Lifter, operand: Any, ref: Ref, along: list[int]) -> kernels.Kernel:
    return kernels.reshape(lifter.kernel(operand), [ref.shape[d] for d in along])


def _shifted(ref: Ref, k: kernels.Kernel, along: list[int]) -> Ref:
    """The tensor plus a constant that varies along the given dims."""
    x = ref.value
    slots = [s for d in along for s in ref.dims[d]]
    k = kernels.permute(kernels.reshape(k, [x.sizes[s] for s in slots]), sorted(range(len(slots)), key=lambda i: slots[i]))
    varies = tuple(i in slots for i in range(x.rank))
    return Ref(make_sum([x, Value(Const(x.sizes, varies, k))]), ref.dims)
