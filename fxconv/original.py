"""What the operators of the original graph cost, in the same steps that plans are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxconv.axes import Size, as_size, product, shape_of
from fxconv.kernel import Kernel
from fxconv.steps import Step

if TYPE_CHECKING:
    from fxconv.lift import Lifter
    from fxconv.spelling import Op

FREE = frozenset(
    ("identity", "reshape", "permute", "expand", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "tensor_unfold")
)


ORDERED = frozenset(("conv", "linear", "matmul", "addmm", "avg_pool", "adaptive_avg_pool", "interpolate"))
"""Operators that want their first operand contiguous, and copy it where it is not."""


VIEWS = frozenset(("slice", "select", "index"))
"""Operators whose result is a view of what they read, so that its own readers are charged with copies."""


def original_steps(lifter: Lifter, node: fx.Node, op: Op) -> list[Step]:
    """The steps that an operator stands for, as it is spelled."""
    if op.name in FREE:
        return []
    shape = shape_of(node.meta["val"])
    variable = [n for n in op.inputs if isinstance(n, fx.Node) and not lifter.is_constant(n)]
    in_shape: tuple[Size, ...] = shape
    if variable and isinstance(variable[0].meta.get("val"), torch.Tensor):
        in_shape = shape_of(variable[0].meta["val"])
    constants: tuple[Kernel, ...] = tuple(
        lifter.kernel(n) for n in op.inputs if n is not None and not isinstance(n, (int, float)) and lifter.is_constant(n)
    )
    if op.name == "conv":
        weight = constants[0]
        taps = math.prod(int(s) for s in weight.shape[2:])
        if op.attrs["transposed"]:
            kind, macs = "conv_transpose", product([*in_shape, int(weight.shape[1]) * taps])
        else:
            kind, macs = "conv", product([*shape, int(weight.shape[1]) * taps])
        attrs = {"groups": op.attrs["groups"], "stride": tuple(op.attrs["stride"])}
        conv = Step(kind, in_shape, shape, constants, attrs, macs)
        uneven = [abs(hi - lo) for lo, hi in op.attrs["padding"]]
        if not any(uneven):
            return [conv]
        # torch pads what is more on one side by itself (padding="same" with an even kernel).
        lead = len(in_shape) - len(uneven)
        padded = (*in_shape[:lead], *(s + more for s, more in zip(in_shape[lead:], uneven, strict=True)))
        return [Step("pad", in_shape, padded), conv]
    if op.name in ("linear", "matmul", "addmm", "einsum"):
        if not constants:
            return [Step("matmul", in_shape, shape)]
        weight = max(constants, key=lambda k: len(k.shape))
        rows = _contracted_size(weight, in_shape, shape)
        macs = product([*shape, rows]) if rows else 0
        return [Step("linear", in_shape, shape, constants, {}, macs)]
    if op.name == "batch_norm":
        return [Step("batch_norm", in_shape, shape, constants[:2])]
    if op.name == "norm_affine":
        return [Step("norm", in_shape, shape, constants)]
    if op.name in ("mul", "div", "neg"):
        return [Step("scale", in_shape, shape, constants[:2])]
    if op.name in ("add", "sub"):
        if constants or len(variable) < 2:
            return [Step("add_const", in_shape, shape, constants)]
        return [Step("add", in_shape, shape)]
    if op.name in ("slice", "select", "index"):
        return [Step("slice", shape, shape)]
    if op.name in ("cat", "stack", "roll", "write", "col2im"):
        return [Step("cat", shape, shape)]
    if op.name == "avg_pool":
        return [Step("avg_pool", in_shape, shape, attrs={"kernel": tuple(op.attrs["kernel"])})]
    if op.name in ("adaptive_avg_pool", "mean", "sum"):
        return [Step("mean", in_shape, shape)]
    if op.name == "repeat_interleave":
        return [Step("nearest", in_shape, shape)]
    if op.name == "repeat":
        return [Step("expand", in_shape, shape), Step("copy", shape, shape)]
    if op.name == "interpolate":
        kind = "nearest" if str(op.attrs["mode"]).startswith("nearest") else "interpolate"
        return [Step(kind, in_shape, shape, attrs={"mode": op.attrs["mode"]})]
    return [Step(op.name, in_shape, shape)]


def _contracted_size(weight: Kernel, in_shape: tuple[Size, ...], shape: tuple[Size, ...]) -> Size:
    """Multiply-adds per output element of a product with a constant: in·weight/out counted once each."""
    out = shape[-1]
    sizes = [s for s in weight.shape if s != 1]
    if len(sizes) < 2:
        return sizes[0] if sizes else 1
    # A weight [O, I] or [I, O] (batched ones have more axes in front): what is not the output's last size.
    a, b = sizes[-2], sizes[-1]
    if b == out and b == in_shape[-1] and a != in_shape[-1]:
        return a
    return b if a == out else a


def layout_copies(lifter: Lifter, op: Op, number: Callable[[Size], float]) -> Iterator[tuple[Step, int]]:
    """The copies that layout operators make between an operator and what it reads, and how many readers share each.

    A permute is a view, and so is a reshape of dims that are neighbours in memory; a reshape after a permute copies, and
    so does a convolution or a matrix product of a permuted tensor. A permute that nothing copies for is a "turn".

    Args:
        lifter: the lifted graph.
        op: the operator.
        number: the value of a dynamic size.
    """
    for k, operand in enumerate(op.inputs):
        n = operand
        copied, turns, sharing = False, list[tuple[Step, int]](), 1
        if isinstance(n, fx.Node) and k == 0 and op.name in ORDERED and _permuted(n, number):
            yield Step("permute", shape_of(n.meta["val"]), shape_of(n.meta["val"])), 1
            copied = True
        while isinstance(n, fx.Node) and (layout := lifter.lifted.ops.get(n)) is not None and layout.name in FREE:
            source = layout.inputs[0]
            if not isinstance(source, fx.Node):
                break
            sharing *= max(sum(not _is_size(u) for u in n.users), 1)  # a copy serves all that read what is made of it
            if _copies(n, layout, source, number):
                yield Step("permute", shape_of(source.meta["val"]), shape_of(n.meta["val"])), sharing
                copied = True
            elif layout.name == "permute" and _moves(layout, source):
                turns.append((Step("turn", shape_of(source.meta["val"]), shape_of(n.meta["val"])), sharing))
            n = source
        if not copied and op.name not in VIEWS:
            yield from turns


def _permuted(n: fx.Node, number: Callable[[Size], float]) -> bool:
    """Whether a tensor's dims are not in the order of its strides, nor channels last."""
    val = n.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return False
    strides = [number(as_size(s)) for size, s in zip(val.shape, val.stride(), strict=True) if as_size(size) != 1]
    last = [*strides[:1], *strides[2:], *strides[1:2]] if val.dim() > 3 else strides
    return sorted(strides, reverse=True) not in (strides, last)


def _is_size(n: fx.Node) -> bool:
    """Whether a node asks for a size, rather than reading entries."""
    return isinstance(n.meta.get("val"), (int, torch.SymInt))


def _moves(permute: Op, source: fx.Node) -> bool:
    """Whether a permute changes the order of dims that have more than one entry."""
    sizes = shape_of(source.meta["val"])
    order = [d for d in permute.attrs["dims"] if sizes[d] != 1]
    return order != sorted(order)


def _copies(node: fx.Node, op: Op, source: fx.Node, number: Callable[[Size], float]) -> bool:
    if op.name in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"):
        return True
    if op.name != "reshape":
        return False
    before, after = source.meta["val"], node.meta["val"]
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    sizes = [int(number(as_size(s))) for s in before.shape]
    strides = [int(number(as_size(s))) for s in before.stride()]
    try:
        torch.empty_strided(sizes, strides, device="meta").view([int(number(as_size(s))) for s in after.shape])
    except RuntimeError:
        return True
    return False
