"""What a cluster is probed with: at which sizes, and with which inputs.

Sizes. Symbolic dims are the batch (symbols that occur in dim 0 only) or spatial (all others). The small sizes are the
least at which the cluster's own dims hold border and interior, differ between height and width, and over two choices
take both parities; the example's own size is used once.

Inputs. Zero (leaves the offset), Gaussian (misses a real difference with probability zero), supported on the border,
supported on one channel, and, where a ReLU or max-pool lies within, shifted far to either side, where it is affine.
Kinds share one batch: they are rows of one evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch

from fxconv.errors import OptionError

__all__ = ["KINDS", "SHIFTED", "SPARSE", "InputSpec", "Numbers", "Sizes", "draw", "shapes_at"]

Values = Mapping[sympy.Symbol, int]
Symbols = Mapping[sympy.Symbol, tuple[int, int | None, int]]

KINDS = ("zero", "gaussian", "border", "channel")
SPARSE = "sparse"
"""Gaussian, and all but the border and one channel of it faint: three rows in one, where a row of each is dear.

What is wrong at the border or in the channel shows as it does against nothing at all; what is wrong elsewhere at this
size (an index, a parity) is not so small that the scale could hide it.
"""
_FAINT = 2.0**-20
SHIFTED = ("positive", "negative", "mixed")
_SHIFT = 128.0
_STRETCH = 2**16
"""Numbers drawn at once."""

# Least sizes of the cluster's dims, for the 1st, 2nd, … spatial symbol: (5, 6) hold a 3x3 window's border and interior,
# (6, 7) are of the other parity each and of another remainder by 3, for strides and ceil_mode; all hold them at a stride of 2.
_TARGETS = ((5, 6), (6, 7))


@dataclass(frozen=True)
class InputSpec:
    """One input of a cluster."""

    kind: str
    """"tensor", or "symint": a size that the cluster reads as a number."""
    shape: tuple[int | sympy.Expr, ...]
    """The tensor's shape; of a symint the one expression."""
    dtype: torch.dtype = torch.float64
    """The dtype in the model; tensors are probed in float64."""
    channel_dim: int | None = None
    """The dim that channels lie along; None: dim 1, or the last of a matrix."""

    def __post_init__(self) -> None:
        if self.kind not in ("tensor", "symint"):
            raise OptionError(f"an input's kind is {self.kind!r}: expected 'tensor' or 'symint'")
        if self.kind == "symint" and len(self.shape) != 1:
            raise OptionError(f"a symint has one expression, and was given {len(self.shape)}: {self.shape}")
        if self.channel_dim is not None and not 0 <= self.channel_dim < max(len(self.shape), 1):
            raise OptionError(f"channel_dim {self.channel_dim} is not a dim of shape {self.shape}")


def _int(size: int | sympy.Expr, values: Values) -> int:
    return size if isinstance(size, int) else _number(size, tuple(values[s] for s in _symbols_of(size)))


@lru_cache(maxsize=65536)
def _number(size: sympy.Expr, values: tuple[int, ...]) -> int:
    """The size with these values for `_symbols_of` it: layers of a network are of a few sizes, and sympy is slow."""
    return int(sympy.sympify(size).xreplace(dict(zip(_symbols_of(size), map(sympy.Integer, values), strict=True))))


def shapes_at(inputs: Sequence[InputSpec], values: Values) -> list[tuple[int, ...]]:
    """Every input's shape with numbers for the symbols."""
    return [tuple(_int(d, values) for d in spec.shape) for spec in inputs]


class Sizes:
    """Which values the symbols of a cluster's inputs shall take."""

    def __init__(self, inputs: Sequence[InputSpec], symbols: Symbols) -> None:
        self.inputs = inputs
        self.symbols = symbols
        used: set[sympy.Symbol] = set()
        elsewhere: set[sympy.Symbol] = set()
        for spec in inputs:
            for dim, size in enumerate(spec.shape):
                free = _symbols_of(size)
                used.update(free)
                if dim > 0 or spec.kind == "symint":
                    elsewhere.update(free)
        missing = sorted(str(s) for s in used if s not in symbols)
        if missing:
            raise OptionError(f"no range and hint given for the symbols {', '.join(missing)}")
        order = [s for s in symbols if s in used]
        # A symint may well be the batch (a view with N written out): it is the batch if a dim 0 is exactly that symbol.
        leading = {spec.shape[0] for spec in inputs if spec.kind == "tensor" and spec.shape}
        in_dims = {s for spec in inputs if spec.kind == "tensor" for d in spec.shape[1:] for s in _symbols_of(d)}
        self.batch = [s for s in order if s not in elsewhere or (s in leading and s not in in_dims)]
        self.spatial = [s for s in order if s not in self.batch]

    def _clamped(self, symbol: sympy.Symbol, value: int) -> int:
        low, high, _ = self.symbols[symbol]
        # A traced graph says 2 where it saw a batch of 2: it cannot say 1. It is run with 1 all the same.
        low = 1 if low == 2 and symbol in self.batch else low
        value = max(value, low, 1)
        return value if high is None else min(value, high)

    def at(self, batch: int, spatial: Values | None = None) -> dict[sympy.Symbol, int]:
        """Values with this batch; of the spatial symbols the example's unless given."""
        values = {s: self._clamped(s, batch) for s in self.batch}
        for s in self.spatial:
            values[s] = self.symbols[s][2] if spatial is None else spatial[s]
        return values

    def small(self, which: int) -> Iterator[dict[sympy.Symbol, int]]:
        """Candidates for the spatial symbols, smallest first; ``which`` is 0 or 1, two choices of different parity.

        Later candidates are for clusters that refuse the earlier ones: multiples of what divides the example's size,
        then larger sizes. The last is the example's own.
        """
        seen: list[dict[sympy.Symbol, int]] = []
        hints = {s: self.symbols[s][2] for s in self.spatial}
        for scale in (1, 2, 4, 8):
            least = {s: self._least(s, scale * _TARGETS[which][i % 2] + 2 * (i // 2)) for i, s in enumerate(self.spatial)}
            for divisor in (1, 2, 3, 4, 5, 7, 8, 14, 16, 28, 32, 64):
                if any(h % divisor for h in hints.values()):
                    continue
                values = {s: self._clamped(s, -(-v // divisor) * divisor) for s, v in least.items()}
                # A larger multiple is left to a larger scale: a smaller size may do there.
                if values not in seen and all(values[s] <= 2 * v for s, v in least.items()):
                    seen.append(values)
                    yield values
        if hints not in seen:
            yield hints

    def _least(self, symbol: sympy.Symbol, target: int) -> int:
        """The least value at which every dim with this symbol is at least ``target``; else the most that is tried."""
        low, high, hint = self.symbols[symbol]
        dims = [d for spec in self.inputs for d in spec.shape if symbol in _symbols_of(d)]
        at_hint = {s: v[2] for s, v in self.symbols.items()}

        def enough(value: int) -> bool:
            values = {**at_hint, symbol: value}
            return all(_int(d, values) >= target for d in dims)

        low = max(low, 1)
        top = hint if high is None or high <= hint else min(high, 2 * hint)
        if not enough(top):
            return top
        while low < top:  # sizes grow with the symbol, so halving finds the least
            middle = (low + top) // 2
            low, top = (low, middle) if enough(middle) else (middle + 1, top)
        return low


def _symbols_of(size: int | sympy.Expr) -> tuple[sympy.Symbol, ...]:
    return () if isinstance(size, int) else _free_symbols(size)


@lru_cache(maxsize=65536)
def _free_symbols(size: sympy.Expr) -> tuple[sympy.Symbol, ...]:
    return tuple(sorted(sympy.sympify(size).free_symbols, key=str))


class Numbers:
    """Gaussian numbers of a seed, by position; drawn once for all the probes that begin with the first of them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._drawn = torch.empty(0, dtype=torch.float64)

    def take(self, start: int, count: int) -> torch.Tensor:
        """A copy of ``count`` numbers from position ``start`` on, in float64."""
        have = self._drawn.numel()
        if have < start + count:
            # In float32, widened: four times as fast, and as good as any number to multiply by.
            more = []
            for k in range(have // _STRETCH, -(-(start + count) // _STRETCH)):
                generator = torch.Generator().manual_seed(self.seed * 2**20 + k)
                more.append(torch.randn(_STRETCH, generator=generator, dtype=torch.float32).to(torch.float64))
            self._drawn = torch.cat([self._drawn, *more])
        return self._drawn[start : start + count].clone()


def draw(inputs: Sequence[InputSpec], values: Values, kinds: Sequence[str], numbers: Numbers, device: torch.device) -> list[Any]:
    """Float64 tensors whose rows (dim 0), in equal shares, are of these kinds; a number for each symint.

    The tensors take stretches of ``numbers`` one after the other, from the first on.
    """
    out: list[Any] = []
    start = 0
    for spec, shape in zip(inputs, shapes_at(inputs, values), strict=True):
        if spec.kind != "tensor":
            out.append(shape[0])
            continue
        x = numbers.take(start, math.prod(shape)).reshape(shape)
        start += x.numel()
        channel = spec.channel_dim
        if channel is None:
            channel = 1 if len(shape) > 2 else len(shape) - 1
        rows = torch.arange(shape[0]) * len(kinds) // max(shape[0], 1) if shape else torch.empty(0)
        for k, kind in enumerate(kinds):
            mine = rows == k
            if kind != "gaussian" and bool(mine.any()):
                x[mine] = _of_kind(kind, x[mine], channel)
        out.append(x.to(device))
    return out


def _of_kind(kind: str, x: torch.Tensor, channel: int) -> torch.Tensor:
    if kind == "zero":
        return torch.zeros_like(x)
    if kind in ("border", SPARSE):
        keep = torch.zeros(x.shape, dtype=torch.bool)
        for dim in range(1, x.dim()):
            if dim != channel and x.shape[dim] > 1:
                keep.narrow(dim, 0, 1).fill_(True)
                keep.narrow(dim, x.shape[dim] - 1, 1).fill_(True)
        # Of something without a border (a matrix) it is the first and the last entry of each row.
        if x.dim() == 2:
            keep[:, 0] = keep[:, -1] = True
        if kind == "border":
            return x * keep
        if channel == 0 or x.dim() < 2:
            return x
        keep.narrow(channel, x.shape[channel] - 1, 1).fill_(True)
        return torch.where(keep, x, x * _FAINT)
    if kind == "channel":
        if channel == 0 or x.dim() < 2:
            return x
        keep = torch.zeros(x.shape, dtype=torch.bool)
        keep.narrow(channel, x.shape[channel] - 1, 1).fill_(True)
        return x * keep
    if kind == "positive":
        return x + _SHIFT
    if kind == "negative":
        return x - _SHIFT
    if kind == "mixed":
        sign = torch.ones(x.shape[channel] if channel < x.dim() else 1, dtype=x.dtype)
        sign[::2] = -1
        return x + _SHIFT * sign.reshape([-1 if d == channel else 1 for d in range(x.dim())])
    raise OptionError(f"unknown kind of probe {kind!r}: expected one of {', '.join((*KINDS, SPARSE, *SHIFTED))}")
