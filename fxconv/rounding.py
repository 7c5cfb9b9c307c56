"""Are the emitted weights the float64 ones, rounded once, and can the dtype hold them?"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxconv.errors import OptionError
from fxconv.verify_cluster import Verdict

__all__ = ["check_rounding"]

_CHUNK = 2**22
"""Entries judged at once: 32 MiB in float64."""


def check_rounding(
    exact: Mapping[str, torch.Tensor],
    emitted: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    channel_dims: Mapping[str, int] | None = None,
) -> Verdict:
    """Whether ``emitted`` is ``exact`` (float64) rounded once to ``dtype``, and whether ``dtype`` can hold it.

    Fails on another value anywhere, on a finite weight that became infinite, and on a kernel of whose entries so many
    are below the least normal number that a row (one output channel; dim 0 or ``channel_dims[name]``) is not as
    accurate as normal rounding leaves it: relative error of the row, in the 2-norm, above twice the unit roundoff. A
    vector (a bias) is judged as a whole, since what is small in it is added to what is large.

    ``max_error`` and ``tolerance`` are those of the worst row.
    """
    if not dtype.is_floating_point:
        raise OptionError(f"weights are rounded to a floating dtype, not to {dtype}")
    missing = sorted(set(exact) ^ set(emitted))
    if missing:
        return Verdict("failed", f"the weights {', '.join(missing)} are on one side only")
    limit = torch.finfo(dtype).eps  # twice the unit roundoff
    worst = 0.0
    for name, value in exact.items():
        stored = emitted[name]
        if not value.dtype.is_floating_point:
            if stored.dtype != value.dtype or not torch.equal(stored, value):
                return Verdict("failed", f"{name} ({value.dtype}) was changed")
            continue
        if stored.dtype != dtype or stored.shape != value.shape:
            return Verdict(
                "failed",
                f"{name} was emitted as {stored.dtype} {tuple(stored.shape)} instead of {dtype} {tuple(value.shape)}",
            )
        rounded = value.detach().to(dtype)
        same = (rounded == stored) | (rounded.isnan() & stored.isnan())
        if not bool(same.all()):
            at = tuple((~same).nonzero()[0].tolist())
            return Verdict(
                "failed",
                f"{name}{list(at)} is {float(stored[at])!r}, and rounding {float(value[at])!r} once gives "
                f"{float(rounded[at])!r}: {int((~same).sum())} of {same.numel()} entries differ",
            )
        overflow = value.isfinite() & ~rounded.isfinite()
        if bool(overflow.any()):
            largest = float(value[overflow].abs().max())
            return Verdict(
                "failed", f"{name} overflows {dtype}: it holds {largest:.3g}, the most is {torch.finfo(dtype).max:.3g}"
            )
        error = _row_error(value.detach(), rounded, (channel_dims or {}).get(name, 0))
        if error > limit:
            return Verdict(
                "failed",
                f"{name} is too small for {dtype}: a row loses {error:.1e} of itself, normal rounding at most "
                f"{limit / 2:.1e}; its largest entry is {float(value.abs().max()):.1e}, the least normal number "
                f"{torch.finfo(dtype).tiny:.1e}",
                max_error=error,
                tolerance=limit,
            )
        worst = max(worst, error)
    return Verdict("confirmed", "", max_error=worst, tolerance=limit)


def _row_error(value: torch.Tensor, rounded: torch.Tensor, dim: int) -> float:
    """The largest relative 2-norm error over the rows along ``dim``; of a vector or number that of the whole."""
    if value.numel() == 0:
        return 0.0
    rows, stored = (t.movedim(dim, 0).flatten(1) if t.dim() > 1 else t.reshape(1, -1) for t in (value, rounded))
    step = max(1, _CHUNK // max(rows.shape[1], 1))
    worst = 0.0
    for start in range(0, rows.shape[0], step):
        v, r = rows[start : start + step], stored[start : start + step].to(torch.float64)
        finite = v.isfinite()
        v, r = torch.where(finite, v, 0.0), torch.where(finite, r, 0.0)
        size, error = v.norm(dim=1), (v - r).norm(dim=1)
        worst = max(worst, float(torch.where(size > 0, error / size, 0.0).max()))
    return worst
