"""Outputs of any kind side by side: their leaves, what differs in structure, and how far apart they are in value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

SMALL = 2.0**-10
"""A sample whose output is below this share of the largest is measured on the scale of that share."""


SHARE = 1e-4
"""Share of entries that may always differ of what is no finite number: those that were all but on the border."""


class OverflowFound(Exception):
    """The result is not finite where the original is, or the other way round; the message is the reason."""


@dataclass(frozen=True)
class ErrorRow:
    """Errors of one sample in one norm (0: largest entry, 1: root mean square), relative to its magnitude in it."""

    norm: int
    original: float
    result: float
    result64: float
    noise: float


def errors_of(reference: torch.Tensor, others: Sequence[torch.Tensor], samples: int, top: float, name: str) -> Iterator[ErrorRow]:
    """Errors of the original, the result, the result in float64 and the perturbed original, per sample and norm."""
    if reference.numel() == 0:
        return
    split = samples if samples > 1 and reference.dim() and reference.shape[0] == samples else 1
    wide = [widened(t).reshape(split, -1) for t in (reference, *others)]
    for row in zip(*wide, strict=True):
        ref, original, *results, noise = row
        valid = ref.isfinite() & original.isfinite()
        # What the original is not only by rounding (the logarithm of a negative number), the result has to be too.
        special = ~ref.isfinite() & (_kind(ref) == _kind(original))
        for r in results:
            if bool((valid & ~r.isfinite()).any()):
                raise OverflowFound(f"{name} overflows, the original does not")
            other = special & (_kind(r) != _kind(ref))
            if float(other.double().mean()) > SHARE:
                at = int(other.to(torch.uint8).argmax())
                raise OverflowFound(f"{name} is {float(r[at]):.3g} where the original is {float(ref[at]):.3g}")
        ref = ref[valid]
        if ref.numel() == 0:
            continue
        gaps = [(t[valid] - ref).abs() for t in (original, *results, noise)]
        scale = max(float(ref.abs().max()), SMALL * top) or 1.0
        yield ErrorRow(0, *(float(g.max()) / scale for g in gaps))
        rms = max(float(ref.square().mean().sqrt()), SMALL * top) or 1.0
        yield ErrorRow(1, *(float(g.square().mean().sqrt()) / rms for g in gaps))


def _kind(t: torch.Tensor) -> torch.Tensor:
    """0 for finite numbers, 1 and -1 for the infinities, 2 for NaN."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), 0.0))


def structural_difference(a: list[Any], a_spec: Any, b: list[Any], b_spec: Any, names: list[str]) -> str:
    """What differs in structure, shape, dtype or device, "" if nothing does."""
    if a_spec != b_spec:
        return f"the outputs' structure differs: {_describe(a_spec)} against {_describe(b_spec)}"
    for name, x, y in zip(names, a, b, strict=True):
        of = "" if len(names) == 1 else f" of {name}"
        if type(x) is not type(y) and not (is_tensor(x) and is_tensor(y)):
            return f"the types{of} differ: {type(x).__name__} against {type(y).__name__}"
        if not is_tensor(x):
            if not _opaque(x) and x != y:
                return f"the values{of} differ: {x!r} against {y!r}"
            continue
        if x.shape != y.shape:
            return f"shapes{of} differ: {tuple(x.shape)} against {tuple(y.shape)}"
        if x.dtype != y.dtype:
            return f"dtypes{of} differ: {x.dtype} against {y.dtype}"
        if x.device != y.device:
            return f"devices{of} differ: {x.device} against {y.device}"
    return ""


def flatten_output(value: Any) -> tuple[list[Any], Any]:
    """Leaves and structure; dataclasses that torch does not know as containers are opened."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and _is_leaf(value):
        value = (type(value).__qualname__, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    leaves, spec = pytree.tree_flatten(value)
    return leaves, spec


def comparable(leaf: Any) -> Any:
    """A leaf as a dense tensor where it is a sparse or quantised one, or a number that was computed."""
    if isinstance(leaf, float):
        return torch.tensor(leaf, dtype=torch.float64)
    if isinstance(leaf, torch.Tensor) and leaf.layout != torch.strided:
        return leaf.to_dense()
    return leaf.dequantize() if isinstance(leaf, torch.Tensor) and leaf.is_quantized else leaf


def _is_leaf(value: Any) -> bool:
    leaves, _ = pytree.tree_flatten(value)
    return len(leaves) == 1 and leaves[0] is value


def leaf_names(spec: Any, count: int) -> list[str]:
    if count == 1 and spec.is_leaf():
        return ["output"]
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))
    return ["output" + pytree.keystr(path) for path, _ in paths]


def _describe(spec: Any) -> str:
    return "one tensor" if spec.is_leaf() else str(spec).replace("\n", " ")


def is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def is_floating(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


def _opaque(x: Any) -> bool:
    return not isinstance(x, bool | int | float | str | None)


def widened(t: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(t.to(torch.complex128)) if t.dtype.is_complex else t.to(torch.float64)


def magnitude(t: torch.Tensor) -> float:
    return float(widened(t).abs().nan_to_num(0, 0, 0).max()) if t.numel() else 0.0


def contiguity(t: torch.Tensor) -> tuple[bool, bool]:
    return t.is_contiguous(), t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
