"""Lazy kernels: the numbers of a linear map, known by shape until they are needed, then computed once in float64.

A kernel is identified by how it was made, so that equal derivations are the same object (hash-consing); its values are
cached until `release` is called.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from fxconv.axes import Size, is_static, product

Thunk = Callable[[], torch.Tensor]


class Kernel:
    """A lazily computed float64 tensor.

    Attributes:
        shape: sizes of its axes; dynamic sizes only where it is uniform.
        uniform: the value of every entry where that is known without computing (1.0 for a selection), else None.
    """

    __slots__ = ("shape", "uniform", "spec", "parents", "_thunk", "_value", "_facts", "__weakref__")

    def __init__(
        self,
        shape: tuple[Size, ...],
        spec: Hashable,
        parents: tuple[Kernel, ...],
        thunk: Thunk,
        uniform: float | None = None,
    ) -> None:
        self.shape, self.spec, self.parents, self.uniform = shape, spec, parents, uniform
        self._thunk = thunk
        self._value: torch.Tensor | None = None
        self._facts: dict[Hashable, Any] = {}

    def tensor(self) -> torch.Tensor:
        """The values: float64, of ``shape``."""
        value = self._value
        if value is None:
            self._compute_parents()
            value = self._thunk()
            if tuple(value.shape) != tuple(self.shape):
                raise AssertionError(f"kernel {self.spec!r} has shape {tuple(value.shape)}, declared {self.shape}")
            self._value = value
        return value

    def _compute_parents(self) -> None:
        """Compute what this kernel is derived from, deepest first: a chain of 200 Linears must not recurse 200 deep."""
        stack: list[tuple[Kernel, bool]] = [(p, False) for p in self.parents]
        while stack:
            k, ready = stack.pop()
            if k._value is not None:
                continue
            if ready:
                k._value = k._thunk()
            else:
                stack.append((k, True))
                stack.extend((p, False) for p in k.parents)

    def fact(self, name: str, compute: Callable[[torch.Tensor], Any]) -> Any:
        """A named predicate of the values, computed once ("positive", "zero", …)."""
        if name not in self._facts:
            self._facts[name] = compute(self.tensor())
        return self._facts[name]

    def note_scale(self, scale: Kernel, other: Kernel) -> None:
        """Each entry is one of ``scale`` times one of ``other``: rows, columns or groups of that are multiplied by numbers."""
        self._facts.setdefault("scaled", (scale, other))

    @property
    def scaling(self) -> tuple[Kernel, Kernel] | None:
        """What `note_scale` was told."""
        found: tuple[Kernel, Kernel] | None = self._facts.get("scaled")
        return found

    def release(self) -> None:
        """Forget computed values (they are computed again when asked for)."""
        stack = [self]
        while stack:
            k = stack.pop()
            if k._value is not None or k is self:
                k._value = None
                stack.extend(k.parents)

    @property
    def is_static(self) -> bool:
        return all(is_static(s) for s in self.shape)

    @property
    def entries(self) -> Size:
        return product(self.shape)

    def __repr__(self) -> str:
        return f"Kernel({'×'.join(map(str, self.shape)) or '1'}{'' if self.uniform is None else f' of {self.uniform}'})"


_table: weakref.WeakValueDictionary[Hashable, Kernel] = weakref.WeakValueDictionary()


def forget() -> None:
    """Forget the values of all kernels: what search asked of them, and what it never came to emit."""
    for k in list(_table.values()):
        k._value = None


def derive(shape: Sequence[Size], spec: Hashable, parents: Sequence[Kernel], thunk: Thunk, uniform: float | None = None) -> Kernel:
    """A kernel computed from others; the same spec and parents give the same object."""
    shape, parents = tuple(shape), tuple(parents)
    # Parents are held by the kernel, so their ids stay theirs as long as the entry lives.
    key = (spec, shape, tuple(id(p) for p in parents))
    found = _table.get(key)
    if found is None:
        found = _table[key] = Kernel(shape, spec, parents, thunk, uniform)
    return found


def stored(values: Callable[[], torch.Tensor], shape: Sequence[Size], identity: Hashable) -> Kernel:
    """A kernel read from the model: ``values`` gives it in float64; ``identity`` names the storage it comes from."""
    return derive(shape, ("stored", identity), (), values)


def uniform(shape: Sequence[Size], value: float) -> Kernel:
    """Every entry the same value; sizes may be dynamic as long as the numbers are never asked for."""
    shape = tuple(shape)

    def full() -> torch.Tensor:
        return torch.full(tuple(int(s) for s in shape), value, dtype=torch.float64)

    return derive(shape, ("uniform", value), (), full, uniform=value)


def literal(tensor: torch.Tensor) -> Kernel:
    """A kernel of given float64 values (not hash-consed)."""
    tensor = tensor.detach().to(torch.float64)
    return Kernel(tuple(tensor.shape), ("literal",), (), lambda: tensor)


def reshape(k: Kernel, shape: Sequence[Size]) -> Kernel:
    shape = tuple(shape)
    if shape == k.shape:
        return k
    if k.uniform is not None:
        return uniform(shape, k.uniform)
    if (multiple := multiple_of(k))[0] != 1.0:
        return scaled(reshape(multiple[1], shape), multiple[0])
    return derive(shape, "reshape", (k,), lambda: k.tensor().reshape(tuple(int(s) for s in shape)))


def permute(k: Kernel, dims: Sequence[int]) -> Kernel:
    dims = tuple(dims)
    if dims == tuple(range(len(k.shape))):
        return k
    shape = tuple(k.shape[d] for d in dims)
    if k.uniform is not None:
        return uniform(shape, k.uniform)
    if (multiple := multiple_of(k))[0] != 1.0:
        return scaled(permute(multiple[1], dims), multiple[0])
    return derive(shape, ("permute", dims), (k,), lambda: k.tensor().permute(dims))


def flip(k: Kernel, dims: Sequence[int]) -> Kernel:
    dims = tuple(dims)
    if k.uniform is not None or not dims:
        return k
    return derive(k.shape, ("flip", dims), (k,), lambda: k.tensor().flip(dims))


def scaled(k: Kernel, factor: float) -> Kernel:
    if factor == 1.0:
        return k
    if k.uniform is not None:
        return uniform(k.shape, k.uniform * factor)
    before, k = multiple_of(k)
    factor *= before
    return derive(k.shape, ("scaled", factor), (k,), lambda: k.tensor() * factor) if factor != 1.0 else k


def multiple_of(k: Kernel) -> tuple[float, Kernel]:
    """A kernel as a number times another one; the number is 1 where it was not made as a multiple."""
    if isinstance(k.spec, tuple) and k.spec and k.spec[0] == "scaled":
        return k.spec[1], k.parents[0]
    return 1.0, k


def take(k: Kernel, dim: int, start: int, stop: int) -> Kernel:
    """``k[start:stop]`` along ``dim``."""
    if (start, stop) == (0, k.shape[dim]):
        return k
    shape = (*k.shape[:dim], stop - start, *k.shape[dim + 1 :])
    if k.uniform is not None:
        return uniform(shape, k.uniform)
    return derive(shape, ("take", dim, start, stop), (k,), lambda: k.tensor().narrow(dim, start, stop - start))


def expand(k: Kernel, shape: Sequence[Size]) -> Kernel:
    """Broadcast size-1 axes to ``shape``."""
    shape = tuple(shape)
    if shape == k.shape:
        return k
    if k.uniform is not None:
        return uniform(shape, k.uniform)
    return derive(shape, "expand", (k,), lambda: k.tensor().expand(tuple(int(s) for s in shape)))


def diagonal(k: Kernel, dim: int) -> Kernel:
    """Expand axis ``dim`` (size n) to two, (n, n) with the old entries on the diagonal; the new axis comes last."""
    n = k.shape[dim]

    def thunk() -> torch.Tensor:
        return torch.diag_embed(k.tensor().movedim(dim, -1)).movedim(-2, dim)

    return derive((*k.shape, n), ("diagonal", dim), (k,), thunk)


def placed(k: Kernel, dim: int, size: int, start: int, step: int) -> Kernel:
    """Put axis ``dim`` into an axis of ``size`` zeros at ``start, start + step, …``."""
    if size == k.shape[dim]:
        return k
    shape = (*k.shape[:dim], size, *k.shape[dim + 1 :])

    def thunk() -> torch.Tensor:
        value = k.tensor()
        out = value.new_zeros(tuple(int(s) for s in shape))
        index: list[slice] = [slice(None)] * len(shape)
        index[dim] = slice(start, start + (value.shape[dim] - 1) * step + 1, step)
        out[tuple(index)] = value
        return out

    return derive(shape, ("placed", dim, size, start, step), (k,), thunk)


def add(kernels: Sequence[Kernel]) -> Kernel:
    """The sum of kernels of equal shape; multiples of one kernel are added up as numbers, so that those that cancel are gone.

    So are kernels of one number each; what rounding leaves of numbers that cancel is nothing.
    """
    numbers = [k.uniform for k in kernels if k.uniform is not None]
    if len(numbers) > 1:
        total = math.fsum(numbers)
        if abs(total) <= 4 * torch.finfo(torch.float64).eps * sum(map(abs, numbers)):
            total = 0.0
        others = [k for k in kernels if k.uniform is None]
        kernels = [uniform(kernels[0].shape, total), *others] if total or not others else others
    factors: dict[Kernel, float] = {}
    for k in kernels:
        factor, of = multiple_of(k)
        factors[of] = factors.get(of, 0.0) + factor
    if len(factors) < len(kernels):
        kernels = [scaled(k, factor) for k, factor in factors.items() if factor] or [uniform(kernels[0].shape, 0.0)]

    def thunk() -> torch.Tensor:
        total = kernels[0].tensor().clone()
        for k in kernels[1:]:
            total += k.tensor()
        return total

    kernels = tuple(kernels)
    if len(kernels) == 1:
        return kernels[0]
    return derive(kernels[0].shape, "add", kernels, thunk)


def concatenate(kernels: Sequence[Kernel], dim: int) -> Kernel:
    kernels = tuple(kernels)
    shape = list(kernels[0].shape)
    shape[dim] = sum(int(k.shape[dim]) for k in kernels)
    return derive(shape, ("cat", dim), kernels, lambda: torch.cat([k.tensor() for k in kernels], dim))
