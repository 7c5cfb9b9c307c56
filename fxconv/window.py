"""One-dimensional rational-rate filters (the `upfirdn` of signal processing) and their algebra.

``out[o] = Σ_t K[t] · xu[o·down + t·dilation − offset]``, where ``xu[j] = x[j / up]`` when ``up`` divides ``j`` and
``0 ≤ j/up < n_in``, else 0; and ``n_out = ⌊(up·n_in + extent) / down⌋``. Convolution is ``up = 1``, transposed
convolution ``down = 1``, zero padding, cropping and strided slicing are one tap, nearest upsampling is ``up`` taps of 1.

Composition and its border condition follow the noble identities of multirate filter theory (Vaidyanathan, *Multirate
Systems and Filter Banks*, 1993, ch. 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from torch.utils._sympy.functions import FloorDiv

from fxconv.axes import Size, as_size, evaluate, is_static, same


@dataclass(frozen=True)
class Filter:
    up: int = 1
    down: int = 1
    taps: int = 1
    dilation: int = 1
    offset: int = 0
    extent: int = 0
    transposed: bool = False
    """Whether it comes from a transposed convolution of stride 1: as a convolution, it would multiply with padding."""

    def __post_init__(self) -> None:
        if min(self.up, self.down, self.taps, self.dilation) < 1:
            raise ValueError(f"up, down, taps and dilation must be positive: {self}")

    @property
    def span(self) -> int:
        """How many positions of the upsampled input one output covers."""
        return (self.taps - 1) * self.dilation + 1

    @property
    def is_identity(self) -> bool:
        return (self.up, self.down, self.taps, self.offset, self.extent) == (1, 1, 1, 0, 0)

    @property
    def is_selection(self) -> bool:
        """Zero padding, cropping and strided slicing: each output reads at most one place."""
        return self.up == 1 and self.taps == 1

    @property
    def is_nearest(self) -> bool:
        """Nearest upsampling by a whole factor, which may be 1."""
        return self == nearest_filter(self.up)

    def out_size(self, n_in: Size) -> Size:
        total = self.up * n_in + self.extent
        return total // self.down if is_static(n_in) else as_size(FloorDiv(total, self.down))

    @property
    def pad_hi(self) -> int:
        """The padding after the last element that a convolution (up = 1) needs; negative where it crops."""
        return self.extent - self.offset + self.span - self.down


def conv_filter(kernel: int, stride: int, pad_lo: int, pad_hi: int, dilation: int) -> Filter:
    """The filter of a convolution or pooling along one axis."""
    span = (kernel - 1) * dilation + 1
    return Filter(1, stride, kernel, dilation, pad_lo, pad_lo + pad_hi - span + stride)


def transposed_filter(kernel: int, stride: int, padding: int, dilation: int, output_padding: int) -> Filter:
    """The filter of a transposed convolution along one axis; its taps are the stored ones reversed."""
    span = (kernel - 1) * dilation + 1
    extent = span - 1 - 2 * padding + output_padding - stride + 1
    return Filter(stride, 1, kernel, dilation, span - 1 - padding, extent, transposed=stride == 1 and span > 1)


def nearest_filter(scale: int) -> Filter:
    """Nearest upsampling by a whole factor: ``scale`` taps of 1."""
    return Filter(scale, 1, scale, 1, scale - 1, 0)


def selection_filter(start: int, n_in: Size, n_out: Size, step: int = 1) -> Filter:
    """``x[start::step]`` cut to ``n_out``; a negative start pads with zeros.

    Raises ValueError where n_out is not ⌊(n_in + extent)/step⌋ for any one extent.
    """
    diff = as_size(n_out * step - n_in)
    if is_static(diff):
        return Filter(1, step, 1, 1, -start, int(diff))
    # At any sizes, all but ``step`` extents are out of the question.
    example = {s: 2**16 for size in (n_in, n_out) if not isinstance(size, int) for s in size.free_symbols}
    least = evaluate(n_out, example) * step - evaluate(n_in, example)
    for extent in range(min(least + step - 1, step - 1 - start), least - 1, -1):
        filter_ = Filter(1, step, 1, 1, -start, extent)
        if same(filter_.out_size(n_in), n_out):
            return filter_
    raise ValueError(f"{n_out} elements, every {step}, from an axis of size {n_in}")


@dataclass(frozen=True)
class Affine:
    """All pairs ``(y, i)`` with ``up·i = y·down + shift``, ``0 ≤ y < n_y``, ``0 ≤ i < n_i``, as two slices."""

    y: slice
    i: slice
    count: int


def affine_pairs(up: int, down: int, shift: int, n_y: int, n_i: int) -> Affine | None:
    """Solve ``up·i = y·down + shift`` for y and i in range; None where there is no pair."""
    g = math.gcd(up, down)
    if shift % g:
        return None
    up, down, shift = up // g, down // g, shift // g
    # y·down ≡ −shift (mod up); down is invertible modulo up.
    y0 = (-shift * pow(down, -1, up)) % up if up > 1 else 0
    i0 = (y0 * down + shift) // up
    if i0 < 0:
        skip = (-i0 + down - 1) // down
        y0, i0 = y0 + skip * up, i0 + skip * down
    if y0 >= n_y or i0 >= n_i:
        return None
    count = min((n_y - 1 - y0) // up, (n_i - 1 - i0) // down) + 1
    return Affine(slice(y0, y0 + (count - 1) * up + 1, up), slice(i0, i0 + (count - 1) * down + 1, down), count)


@dataclass(frozen=True)
class Cascade:
    """The composition ``outer ∘ inner``: the filter, and which taps meet in which."""

    filter: Filter
    _outer_step: int
    _inner_step: int
    _first: int
    _unit: int
    outer_taps: int
    inner_taps: int

    def meetings(self) -> Iterator[tuple[int, slice, slice]]:
        """For each outer tap: (outer tap, slice of inner taps, slice of composite taps) that it contributes to."""
        for outer in range(self.outer_taps):
            pairs = affine_pairs(
                self._unit, self._inner_step, outer * self._outer_step - self._first, self.inner_taps, self.filter.taps
            )
            if pairs is not None:
                yield outer, pairs.y, pairs.i


def _reads(f: Filter, n_in: int, n_out: int) -> tuple[int, int]:
    """The least and greatest input position that the filter asks for, padding included (up to divisibility)."""
    lo = -(f.offset // f.up)
    hi = ((n_out - 1) * f.down + f.span - 1 - f.offset) // f.up
    return lo, hi


def _support(f: Filter, n_in: int) -> tuple[int, int]:
    """The least and greatest output position of the *uncropped* filter that touches the input."""
    lo = -((f.span - 1 - f.offset) // f.down)
    hi = (f.up * (n_in - 1) + f.offset) // f.down
    return lo, hi


def _touched(f: Filter, m: int, n_in: int) -> bool:
    return any((j := m * f.down + t * f.dilation - f.offset) % f.up == 0 and 0 <= j // f.up < n_in for t in range(f.taps))


def _asked(f: Filter, m: int, n_out: int) -> bool:
    return any((o := m * f.up - t * f.dilation + f.offset) % f.down == 0 and 0 <= o // f.down < n_out for t in range(f.taps))


@lru_cache(maxsize=65536)
def _border_is_zero(outer: Filter, inner: Filter, n_in: int, n_mid: int, n_out: int) -> bool:
    lo = max(_reads(outer, n_mid, n_out)[0], _support(inner, n_in)[0])
    hi = min(_reads(outer, n_mid, n_out)[1], _support(inner, n_in)[1])
    outside = [m for m in range(lo, min(hi, -1) + 1)] + [m for m in range(max(lo, n_mid), hi + 1)]
    return not any(_touched(inner, m, n_in) and _asked(outer, m, n_out) for m in outside)


def sizes_to_try(*filters: Filter) -> range:
    """Input sizes that show every behaviour of the filters at a border of dynamic size: a whole period past the spans."""
    period = math.prod(f.down for f in filters)
    reach = sum(f.span + abs(f.offset) for f in filters)
    return range(1, 2 * period + 2 * reach + 3)


@lru_cache(maxsize=65536)
def _cascade(outer: Filter, inner: Filter) -> Cascade | str:
    if math.gcd(inner.down, outer.up) != 1:
        return f"stride {inner.down} followed by upsampling {outer.up} is only periodically shift-invariant"
    up, down = inner.up * outer.up, inner.down * outer.down
    outer_step, inner_step = inner.down * outer.dilation, outer.up * inner.dilation
    offset = inner.down * outer.offset + outer.up * inner.offset
    if outer.up == 1:
        extent = inner.extent + inner.down * outer.extent
    elif inner.down == 1:
        extent = outer.up * inner.extent + outer.extent
    else:
        extent = 0  # not one formula; static callers set it from the sizes
    g = math.gcd(up, down)
    unit = math.gcd(outer_step if outer.taps > 1 else 0, inner_step if inner.taps > 1 else 0) or 1
    last = outer_step * (outer.taps - 1) + inner_step * (inner.taps - 1)
    first = 0
    if g > 1:
        # Only taps τ ≡ offset (mod g) are ever used; step through them.
        step = unit * g // math.gcd(unit, g)
        positions = [p for p in range(0, last + 1, unit) if (p - offset) % g == 0]
        if not positions:
            return "the composition is zero"
        first, last, unit = positions[0], positions[-1], step
    taps = (last - first) // unit + 1
    extent = extent // g if g > 1 else extent
    transposed = (outer.transposed or inner.transposed) and up == down == 1
    composite = Filter(up // g, down // g, taps, max(unit // g, 1), (offset - first) // g, extent, transposed)
    return Cascade(composite, outer_step, inner_step, first, unit, outer.taps, inner.taps)


def cascade(outer: Filter, inner: Filter, n_in: Size, n_mid: Size, n_out: Size) -> Cascade | str:
    """``outer ∘ inner`` as one filter, or the reason why it isn't one.

    Exact when ``gcd(inner.down, outer.up) = 1`` and (positions that outer reads) ∩ (support of the uncropped inner) lie
    in ``[0, n_mid)``; for a dynamic size this is decided for every size that it can have (the condition is periodic).
    """
    result = _cascade(outer, inner)
    if isinstance(result, str):
        return result
    if is_static(n_in) and is_static(n_mid) and is_static(n_out):
        if not _border_is_zero(outer, inner, int(n_in), int(n_mid), int(n_out)):
            return _border_reason(outer)
        f = result.filter
        return replace(result, filter=replace(f, extent=int(n_out) * f.down - f.up * int(n_in)))
    if outer.up > 1 and inner.down > 1:
        return "a dynamic size under a stride and then an upsampling has no single formula"
    modulus, rest = remainder(n_in)
    modulus = math.gcd(modulus, inner.down * outer.down)
    if not _border_is_zero_everywhere(outer, inner, modulus, rest % modulus):
        return _border_reason(outer)
    return result


def remainder(size: Size) -> tuple[int, int]:
    """What is known of a dynamic size: a number, and what the size leaves over divided by it; (1, 0) where nothing is."""
    if isinstance(size, int):
        return 1, 0
    rest, dynamic = size.as_coeff_Add()
    parts = [part.as_coeff_Mul() for part in dynamic.as_ordered_terms()]
    if not rest.is_Integer or not all(n.is_Integer and factor.is_integer for n, factor in parts):
        return 1, 0
    modulus = math.gcd(*(int(n) for n, _ in parts)) or 1
    return modulus, int(rest) % modulus


def _border_reason(outer: Filter) -> str:
    return f"the second window (offset {outer.offset}, {outer.taps} taps) reads zero padding where the first would go on"


@lru_cache(maxsize=65536)
def _border_is_zero_everywhere(outer: Filter, inner: Filter, modulus: int, rest: int) -> bool:
    for n_in in sizes_to_try(outer, inner):
        if n_in % modulus != rest:
            continue
        n_mid = inner.out_size(n_in)
        if n_mid < 1 or (n_out := outer.out_size(n_mid)) < 1:
            continue
        if not _border_is_zero(outer, inner, n_in, n_mid, n_out):
            return False
    return True


@lru_cache(maxsize=65536)
def stays_inside(f: Filter, n_in: Size, n_out: Size) -> bool:
    """Whether no output reads padding (so that, with up = 1, a constant stays a constant)."""
    if is_static(n_in) and is_static(n_out):
        lo, hi = _reads(f, int(n_in), int(n_out))
        return lo >= 0 and hi < int(n_in)
    # n_in is dynamic: pad_hi ≤ 0 means that the last window ends inside for every size.
    return f.offset <= 0 and f.pad_hi <= 0 and f.up == 1


def live_taps(f: Filter, n_in: int, n_out: int) -> tuple[int, int]:
    """The half-open range of taps that read something other than padding at some output; (0, 0) if none does."""
    live = [t for t in range(f.taps) if affine_pairs(f.up, f.down, t * f.dilation - f.offset, n_out, n_in) is not None]
    return (live[0], live[-1] + 1) if live else (0, 0)
