"""Inputs on which whole models are compared: the example, and Gaussian ones like it, stacked along the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxconv.errors import ArgsError
from fxconv.outputs import is_floating, is_tensor

__all__ = ["Batches", "random_like"]


class Batches:
    """The leaves of ``(args, kwargs)``, one sample at a time and several at once.

    ``dims`` is the batch dim of every leaf, or None where nothing is batched; then the shapes stay the example's.
    """

    def __init__(self, leaves: Sequence[Any], dims: Sequence[int | None] | str | None) -> None:
        self.leaves = list(leaves)
        self.guessed = dims == "auto"
        self.dims: list[int | None] | None = None
        self.size = 1
        if isinstance(dims, str) and not self.guessed:
            raise ArgsError(f"batch_dims is {dims!r}: expected 'auto', None, or a dim or None for each input")
        known = _guess(self.leaves) if isinstance(dims, str) else dims
        if known is None:
            return
        if len(known) != len(self.leaves):
            raise ArgsError(f"batch_dims has {len(known)} entries, and the inputs have {len(self.leaves)} leaves")
        sizes = {x.shape[d] for x, d in zip(self.leaves, known, strict=True) if d is not None}
        if len(sizes) == 1 and 0 not in sizes:
            self.dims = list(known)
            self.size = sizes.pop()

    def one(self) -> list[Any]:
        """The example's first sample; all of it where nothing is batched."""
        return [x if d is None else x.narrow(d, 0, 1) for x, d in self._pairs(self.leaves)]

    def with_gaussian(self, seed: int) -> list[Any]:
        """The example's first sample and a Gaussian one; only Gaussian inputs where nothing is batched."""
        return self._stack(self.one(), seed, keep=True)

    def gaussian(self, seed: int) -> list[Any]:
        """Two Gaussian samples, or Gaussian inputs of the example's shapes."""
        return self._stack(self.one(), seed, keep=False)

    @property
    def stacked(self) -> int:
        """Samples in what `with_gaussian` and `gaussian` return."""
        return 1 if self.dims is None else 2

    def _pairs(self, leaves: Sequence[Any]) -> list[tuple[Any, int | None]]:
        return list(zip(leaves, self.dims or [None] * len(leaves), strict=True))

    def _stack(self, one: list[Any], seed: int, *, keep: bool) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        if self.dims is None:
            return [random_like(x, generator) for x in one]
        return [
            x if d is None else torch.cat([x if keep else random_like(x, generator), random_like(x, generator)], d)
            for x, d in self._pairs(one)
        ]


def fixed_batch(module: nn.Module) -> bool:
    """Whether a graph says that dim 0 of its first tensor input is a number."""
    if not isinstance(module, fx.GraphModule):
        return False
    for node in module.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(value, torch.Tensor) and value.dim():
            return isinstance(value.shape[0], int)
    return False


def random_like(x: Any, generator: torch.Generator) -> Any:
    """Something like ``x``: Gaussian of unit variance; integers from the example's range; booleans shuffled."""
    if not isinstance(x, torch.Tensor) or x.numel() == 0:
        return x
    if x.dtype.is_floating_point or x.dtype.is_complex:
        dtype = torch.complex128 if x.dtype.is_complex else torch.float64
        return torch.randn(x.shape, generator=generator, dtype=dtype).to(x)
    if x.dtype == torch.bool:
        # Shuffled, since a mask that hides everything would make NaN.
        return x.reshape(-1)[torch.randperm(x.numel(), generator=generator).to(x.device)].reshape(x.shape)
    low, high = int(x.min()), int(x.max())
    return torch.randint(low, high + 1, x.shape, generator=generator).to(x)


def _guess(leaves: Sequence[Any]) -> list[int | None] | None:
    """Dim 0 of every tensor that is there as large as the first floating one, or the first of any dtype."""
    tensors = [x for x in leaves if is_tensor(x) and x.dim()]
    first = next((x for x in tensors if is_floating(x)), tensors[0] if tensors else None)
    if first is None:
        return None
    return [0 if is_tensor(x) and x.dim() and x.shape[0] == first.shape[0] else None for x in leaves]
