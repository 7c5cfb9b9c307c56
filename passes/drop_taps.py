"""Taps that never count are dropped from a window.

``Σ_t K[t] x[o·down + t·dilation − offset] ⇒`` the same sum from the first tap that counts to the last: a 3×3 convolution of a
1×1 map (after global pooling) reads its middle tap only, a 5×5 one of a 2×2 map its middle 3×3; a kernel whose border was
pruned to zeros is a smaller kernel. Where no tap counts the result is the constant 0.

A tap does not count when at every output it reads padding (`window.live_taps`), which is known for static sizes only, or
when all its weights are zero (read off the values).

Exact always. Costs nothing, and saves the multiply-adds of the taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from fxconv import kernel as kernels
from fxconv.axes import is_static
from fxconv.expr import Const, Map, Role, Value, Window, axis_positions
from fxconv.kernel import Kernel
from fxconv.law import Context, Law, Outcome
from fxconv.normal_form import normal
from fxconv.passes.recover import native, without_zeros
from fxconv.window import live_taps


def _nonzero(k: Kernel, axis: int) -> tuple[int, int] | None:
    """The half-open range of taps that have a weight other than zero; None where the values are not at hand."""
    if without_zeros(k):
        return 0, int(k.shape[axis])
    key = ("nonzero", axis)
    if key not in k._facts:
        w = native(k)
        k._facts[key] = _ends(w, axis) if w is not None else None
    found: tuple[int, int] | None = k._facts[key]
    return found


def _ends(w: torch.Tensor, axis: int) -> tuple[int, int]:
    lo, hi = 0, w.shape[axis]
    while lo < hi and not bool(w.select(axis, lo).any()):
        lo += 1
    while lo < hi and not bool(w.select(axis, hi - 1).any()):
        hi -= 1
    return lo, hi


def _drop_taps(v: Value, context: Context) -> Iterator[Outcome]:
    m = v.node
    if not isinstance(m, Map) or m.kernel.uniform is not None:
        return
    axis = axis_positions(m)
    roles: list[Role] = list(m.roles)
    kernel = m.kernel
    for o, r in enumerate(m.roles):
        if not isinstance(r, Window) or r.filter.taps == 1:
            continue
        f, n_in = r.filter, m.x.sizes[r.src]
        lo, hi = live_taps(f, int(n_in), int(r.size)) if is_static(n_in) and is_static(r.size) else (0, f.taps)
        nonzero = _nonzero(m.kernel, axis[o])
        if nonzero is not None:
            lo, hi = max(lo, nonzero[0]), min(hi, nonzero[1])
        if lo >= hi:
            yield Value(Const(v.sizes, (False,) * v.rank, kernels.uniform((), 0.0)))
            return
        kernel = kernels.take(kernel, axis[o], lo, hi)
        roles[o] = Window(r.src, replace(f, taps=hi - lo, offset=f.offset - lo * f.dilation), r.size)
    if kernel is not m.kernel:
        yield normal(m.x, roles, kernel)


def _numbers(v: Value) -> tuple[tuple[int, int] | None, ...]:
    """The taps of v's windows that have weights other than zero."""
    m = v.node
    if not isinstance(m, Map) or m.kernel.uniform is not None:
        return ()
    axis = axis_positions(m)
    return tuple(_nonzero(m.kernel, axis[o]) for o, r in enumerate(m.roles) if isinstance(r, Window) and r.filter.taps > 1)


law = Law("drop taps", _drop_taps, numbers=_numbers)
