"""Random small models of affine operations (and the odd ReLU), with integer weights.

In float64 every value is a dyadic rational far below 2^53, whatever the order of the operations: an exact rewrite
gives results
that are equal, not merely close, so that algebra and rounding cannot be confused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One operation: which, on which earlier values, with which numbers."""

    op: str
    inputs: tuple[int, ...]
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """A model to be: the input's shape, the steps, which values are outputs, a seed for the weights."""

    shape: Shape
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    seed: int


def _ints(shape: Shape, generator: torch.Generator, low: int = -2, high: int = 3) -> Tensor:
    return torch.randint(low, high, shape, generator=generator).double()


class Model(nn.Module):
    """Runs a Program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.layers = nn.ModuleDict()
        generator = torch.Generator().manual_seed(program.seed)
        shapes: list[Shape] = [program.shape]
        for i, step in enumerate(program.steps):
            layer = _layer(step, [shapes[j] for j in step.inputs])
            if layer is not None:
                with torch.no_grad():
                    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                        if name == "running_var":  # a square, so that its root is exact
                            tensor.copy_(4.0 ** _ints(tuple(tensor.shape), generator, -1, 2))
                        elif tensor.is_floating_point():
                            tensor.copy_(_ints(tuple(tensor.shape), generator))
                self.layers[str(i)] = layer
            shapes.append(shape_after(step, [shapes[j] for j in step.inputs]))
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for i, step in enumerate(self.program.steps):
            inputs = [values[j] for j in step.inputs]
            values.append(self.layers[str(i)](inputs[0]) if str(i) in self.layers else _apply(step, inputs))
        outputs = tuple(values[i] for i in self.program.outputs)
        return outputs[0] if len(outputs) == 1 else outputs


def _layer(step: Step, shapes: list[Shape]) -> nn.Module | None:
    channels, n = shapes[0][1], step.numbers
    if step.op == "conv":
        out, kernel, stride, padding, dilation, groups, bias = n
        return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bool(bias))
    if step.op == "up_conv":
        out, kernel, stride, padding, bias = n
        return nn.ConvTranspose2d(channels, out, kernel, stride, padding, bias=bool(bias))
    if step.op == "norm":
        return nn.BatchNorm2d(channels, eps=0.0)
    if step.op == "linear":
        return nn.Linear(shapes[0][-1], n[0], bias=bool(n[1]))
    return None


def _apply(step: Step, xs: list[Tensor]) -> Tensor:
    x, n = xs[0], step.numbers
    if step.op == "add":
        return torch.add(x, xs[1], alpha=n[0])
    if step.op == "cat":
        return torch.cat(xs, 1)
    if step.op == "scale":
        return x * (n[0] / 2) + n[1]
    if step.op == "pool":
        return F.avg_pool2d(x, 2, n[0], n[1])
    if step.op == "pad":
        return F.pad(x, n)
    if step.op == "slice":
        return x[:, n[0] : n[1] : n[2]]
    if step.op == "crop":
        return x[:, :, n[0] : n[1] or None : n[2], :: n[3]]
    if step.op == "flip":
        return x.flip(n[0])
    if step.op == "halves":
        a, b = x.chunk(2, 1)
        return a - 2 * b
    if step.op == "sum":
        return x.sum(1, keepdim=True)
    if step.op == "unshuffle":
        return F.pixel_unshuffle(x, 2)
    if step.op == "pixels":
        return F.pixel_shuffle(x, 2)
    if step.op == "nearest":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    if step.op == "swap":  # width and channels
        return x.permute(0, 3, 2, 1)
    if step.op == "shuffle":
        b, c, h, w = x.shape
        return x.reshape(b, n[0], c // n[0], h, w).transpose(1, 2).reshape(b, c, h, w)
    if step.op == "tokens":
        return x.flatten(2).transpose(1, 2)
    if step.op == "mean":
        return x.mean((2, 3), keepdim=True)
    if step.op == "flatten":
        return x.flatten(1)
    assert step.op == "relu", step.op
    return F.relu(x)


def shape_after(step: Step, shapes: list[Shape]) -> Shape:
    """The shape of a step's result, found by running it on nothing."""
    layer = _layer(step, shapes)
    with torch.no_grad():
        inputs = [torch.zeros(s) for s in shapes]
        return tuple((layer.eval()(inputs[0]) if layer is not None else _apply(step, inputs)).shape)


MAPS = (
    "conv",
    "conv",
    "conv",
    "up_conv",
    "norm",
    "add",
    "add",
    "cat",
    "scale",
    "pool",
    "pad",
    "slice",
    "crop",
    "nearest",
    "swap",
)
MAPS += ("shuffle", "tokens", "mean", "flatten", "relu", "linear")
MAPS += ("flip", "halves", "sum", "unshuffle", "pixels")


def _numbers(op: str, shape: Shape, draw: Any) -> tuple[int, ...] | None:
    """Numbers that fit the shape, or None where the operation does not."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    if op == "linear":
        return (pick(2, 3, 5), pick(0, 1))
    if op in ("scale", "relu"):
        return (pick(-1, 1, 2, 4), pick(0, 3)) if op == "scale" else ()
    if len(shape) != 4:
        return None
    c, h, w = shape[1:]
    small = min(h, w)
    if op == "conv":
        kernel = pick(*(k for k in (1, 2, 3) if k <= small))
        dilation = pick(1, 2) if 2 * kernel - 1 <= small else 1
        out = pick(2, 4, 6)
        groups = pick(*(g for g in (1, 1, 2, c) if c % g == 0 and out % g == 0))
        return out, kernel, pick(1, 1, 2), pick(0, kernel // 2), dilation, groups, pick(0, 1)
    if op == "up_conv":
        kernel = pick(2, 4)
        return (pick(2, 3), kernel, 2, pick(0, kernel // 2 - 1), pick(0, 1)) if small <= 8 else None
    if op == "pool":  # powers of two only: other averages are not exact
        return (pick(1, 2), pick(0, 1)) if small >= 2 else None
    if op == "pad":
        return (pick(0, 1, 2), pick(0, 1), pick(0, 1), pick(0, 2))
    if op == "slice":
        start = pick(*range(c))
        return start, pick(*range(start + 1, c + 1)), pick(1, 1, 2)
    if op == "crop":
        return (pick(0, 1), pick(0, 0, -1, -2), pick(1, 2, 3), pick(1, 2)) if h >= 4 else None
    if op == "flip":
        return (pick(1, 2),)
    if op == "halves":
        return () if c % 2 == 0 else None
    if op == "sum":  # written as a mean where that is cheaper: the same restriction
        return () if c & (c - 1) == 0 else None
    if op == "unshuffle":
        return () if h % 2 == w % 2 == 0 and c <= 4 else None
    if op == "pixels":
        return () if c % 4 == 0 and small <= 8 else None
    if op == "nearest":
        return () if small <= 8 else None
    if op == "shuffle":
        return (pick(*(g for g in range(1, c + 1) if c % g == 0)),)
    if op == "mean":
        return () if (h * w) & (h * w - 1) == 0 else None
    return ()


@st.composite
def programs(draw: Any, max_steps: int = 6) -> Program:
    """A connected DAG of 2 to `max_steps` operations; most read the last value, so that chains and diamonds both
    appear.
    """
    shape: Shape = (
        2,
        draw(st.sampled_from([2, 3, 4])),
        draw(st.sampled_from([4, 5, 8])),
        draw(st.sampled_from([4, 6, 8])),
    )
    shapes, steps = [shape], []
    for _ in range(draw(st.integers(2, max_steps))):
        op = draw(st.sampled_from(MAPS))
        near = draw(st.booleans())
        first = len(shapes) - 1 if near else draw(st.integers(0, len(shapes) - 1))
        inputs: tuple[int, ...] = (first,)
        if op in ("add", "cat"):
            like = [
                i
                for i, other in enumerate(shapes)
                if other == shapes[first] or op == "cat" and other[:1] + other[2:] == shapes[first][:1] + shapes[first][2:]
            ]
            inputs = (first, draw(st.sampled_from(like)))
            # x - x is a constant, which is no region.
            factors = [1, 1, 2] if len(set(inputs)) == 1 else [1, 1, -1, 2]
            numbers: tuple[int, ...] | None = (draw(st.sampled_from(factors)),) if op == "add" else ()
        else:
            numbers = _numbers(op, shapes[first], draw)
        if numbers is None:
            continue
        step = Step(op, inputs, numbers)
        steps.append(step)
        shapes.append(shape_after(step, [shapes[i] for i in inputs]))
    used = {i for step in steps for i in step.inputs}
    outputs = tuple(i for i in range(1, len(shapes)) if i not in used)  # everything is read or returned
    if not steps:
        steps, outputs = [Step("scale", (0,), (2, 3))], (1,)
    return Program(shape, tuple(steps), outputs, draw(st.integers(0, 2**16)))
