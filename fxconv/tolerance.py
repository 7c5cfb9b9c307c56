"""How far two float64 evaluations of the same map may lie apart, entry by entry.

Both f and its replacement g are exact over the reals, so f(x) − g(x) is rounding, and how much rounding there can be
depends on the weights: Σ wᵢxᵢ carries an error of about u·‖wx‖, whatever the sum comes to; a BatchNorm with a variance
of 1e-8 multiplies what came before by 316; a branch that cancels another leaves the errors of both. A bound from
|W|·|x| would need every operator's weights. Instead the *noise* N(x) = |f_δ(x) − f(x)| / δ is measured, where f_δ is f
with each intermediate result, entry by entry, multiplied by a random 1 ± δ (`fxconv.arithmetic.Perturb`): by how much
does the output move per unit of relative rounding error? The tolerance is

    UNITS · u · smooth(N),        u = 2⁻⁵³, UNITS = 2¹²,

that is 4.5e-13 of the noise. Why UNITS is safe: rounding in a sum of n terms exceeds one perturbation per term by at
most about √n (independent roundings of the partial sums; the BLAS and cascade summation stay far below), and n in a
region is below 2²⁴. Why it is sharp: a kernel rounded to float32 on its way moves the output by 2⁻²⁵·N, which is
30,000 tolerances; an eps that was lost from a BatchNorm of variance 1 moves it by 5e-6·N.

`smooth` makes one random draw reliable and stays local. The noise at an entry is the least, over the dims, of the
largest noise in the slice through that entry: a small channel is judged by the noise of that channel, a border row by
that of its row. A fixed share of the largest noise anywhere is the floor (4 ulps), for entries without any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["DELTA", "UNITS", "UNIT_ROUNDOFF", "Miss", "compare", "smooth"]

UNIT_ROUNDOFF = 2.0**-53
UNITS = 2.0**12
DELTA = 2.0**-40
"""The perturbation: far above 2⁻⁵³, so that it is measured well; far below what would flip a comparison by chance."""

_FLOOR = 2.0**-10
"""Least share of the largest noise: UNITS · _FLOOR = 4 units of the output's own rounding."""


@dataclass(frozen=True)
class Miss:
    """The largest error, in tolerances, of one output: where it is and what stands there."""

    ratio: float
    """Error ÷ tolerance; at most 1 passes; inf where one side is not finite and the other is."""
    index: tuple[int, ...]
    """Where; () when everything passes by the least tolerance anywhere, which `tolerance` then is."""
    expected: float
    got: float
    error: float
    """Largest absolute error ÷ largest magnitude of the expected output."""
    tolerance: float
    """Tolerance at `index` ÷ the same."""


def smooth(noise: torch.Tensor) -> torch.Tensor:
    """The least over dims of the largest in the slice through each entry, with a floor; broadcastable to ``noise``."""
    if noise.numel() == 0:
        return noise
    slices = _slices(noise)
    field = slices[0] if slices else noise
    for s in slices[1:]:
        field = torch.minimum(field, s)
    return torch.maximum(field, noise.amax() * _FLOOR)


def _slices(noise: torch.Tensor) -> list[torch.Tensor]:
    """Of each dim the largest noise in every slice across it; two reductions of everything, the rest are of those."""
    half = noise.dim() // 2
    groups = [list(range(half)), list(range(half, noise.dim()))]
    found = []
    for mine, others in (groups, groups[::-1]):
        reduced = noise.amax(others, keepdim=True) if others else noise
        for dim in mine:
            rest = [d for d in mine if d != dim]
            found.append(reduced.amax(rest, keepdim=True) if rest else reduced)
    return found


def compare(expected: torch.Tensor, got: torch.Tensor, noise: torch.Tensor | None = None) -> Miss:
    """The worst entry of ``got`` against ``expected`` (same shape), tolerance as in the module's docstring.

    ``noise``: |f_δ − f| / δ, of the same shape or broadcastable to it (already pooled over the batch, say). An entry
    counts at least its own magnitude as noise: no result is more accurate than its last place. With None that is all
    that is allowed, which is never more than with any noise: what passes so passes with the noise measured.
    """
    if expected.numel() == 0:
        return Miss(0.0, (), 0.0, 0.0, 0.0, 0.0)
    least, greatest = map(float, torch.aminmax(expected - got))
    most = max(-least, greatest)
    field = expected.abs() if noise is None else torch.maximum(noise, expected.abs())
    slices = _slices(field)
    top = float(slices[0].amax()) if slices else float(field)
    scale = (top if noise is None else float(expected.abs().amax())) or 1.0
    if math.isfinite(scale) and math.isfinite(most) and math.isfinite(top):
        # Most evaluations pass everywhere by the tolerance of their quietest slice, which is cheap to know.
        quietest = max(min((float(s.amin()) for s in slices), default=top), _FLOOR * top)
        if most <= (tolerance := UNITS * UNIT_ROUNDOFF * quietest):
            return Miss(most / tolerance if most else 0.0, (), 0.0, 0.0, most / scale, tolerance / scale)
    return _worst_entry(expected, got, noise)


def _worst_entry(expected: torch.Tensor, got: torch.Tensor, noise: torch.Tensor | None) -> Miss:
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(got)) or not _same_special(expected, got, finite):
        at = _first(finite != torch.isfinite(got))
        return Miss(float("inf"), at, float(expected[at]), float(got[at]), float("inf"), 0.0)
    zero = torch.zeros((), dtype=expected.dtype, device=expected.device)
    error = torch.where(finite, (expected - got).abs(), zero)
    magnitude = torch.where(finite, expected.abs(), zero)
    field = magnitude if noise is None else torch.maximum(torch.nan_to_num(noise, nan=0.0, posinf=0.0), magnitude)
    tolerance = (UNITS * UNIT_ROUNDOFF) * smooth(field).expand_as(error)
    # 0/0 is no error where none is allowed.
    ratio = torch.where(error > 0, error / tolerance, zero)
    flat = int(ratio.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape))
    scale = float(magnitude.amax()) or 1.0
    return Miss(
        ratio=float(ratio[at]),
        index=at,
        expected=float(expected[at]),
        got=float(got[at]),
        error=float(error.amax()) / scale,
        tolerance=float(tolerance[at]) / scale,
    )


def _same_special(a: torch.Tensor, b: torch.Tensor, finite: torch.Tensor) -> bool:
    if bool(finite.all()):
        return True
    return torch.equal(a[~finite].nan_to_num(nan=0.0), b[~finite].nan_to_num(nan=0.0))


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    """Index of the first True, or of the first entry where there is none (two different infinities)."""
    flat = int(mask.reshape(-1).to(torch.uint8).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), mask.shape))
