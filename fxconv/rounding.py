"""Are the emitted weights the float64 ones, rounded once, and can the dtype hold them?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fxconv.errors import OptionError
from fxconv.verify_cluster import Verdict

__all__ = ["check_rounding", "unfit"]

_CHUNK = 2**22
"""Entries judged at once: 32 MiB in float64."""


def check_rounding(
    exact: Mapping[str, torch.Tensor],
    emitted: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    channel_dims: Mapping[str, int] | None = None,
    fits: bool = False,
) -> Verdict:
    """Whether ``emitted`` is ``exact`` (float64) rounded once to ``dtype``, and whether ``dtype`` can hold it.

    Fails on another value anywhere, on a finite weight that became infinite, and on a kernel of whose entries so many
    are below the least normal number that a row (one output channel; dim 0 or ``channel_dims[name]``) is not as
    accurate as normal rounding leaves it: relative error of the row, in the 2-norm, above twice the unit roundoff. A
    vector (a bias) is judged as a whole, since what is small in it is added to what is large.

    ``fits``: that the dtype can hold them is known already, from when they were written.

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
        value = value.detach()
        rounded = value.to(dtype)
        if not torch.equal(rounded, stored):
            reason = _first_difference(name, value, rounded, stored)
            if reason:
                return Verdict("failed", reason)
        if fits:
            continue
        reason, error = unfit(name, value, rounded, (channel_dims or {}).get(name, 0))
        if reason:
            return Verdict("failed", reason, max_error=error, tolerance=limit)
        worst = max(worst, error)
    return Verdict("confirmed", "", max_error=worst, tolerance=limit)


def unfit(name: str, value: torch.Tensor, rounded: torch.Tensor, dim: int = 0) -> tuple[str, float]:
    """Why the dtype of ``rounded`` cannot hold ``value`` (float64), "" where it can; the error of the worst row.

    Args:
        name: what the reason calls the weight.
        value: the weight.
        rounded: the weight, rounded once.
        dim: the dim that output channels lie along.
    """
    dtype = rounded.dtype
    if value.numel() == 0:
        return "", 0.0
    rows, stored = (t.movedim(dim, 0).flatten(1) if t.dim() > 1 else t.reshape(1, -1) for t in (value, rounded))
    # Reductions of what was rounded, which is smaller; torch's aminmax along a dim is ten times as slow as these two.
    largest = torch.maximum(stored.amax(1), -stored.amin(1)).to(torch.float64)
    if not math.isfinite(float(largest.max())):
        overflow = value.isfinite() & ~rounded.isfinite()
        if bool(overflow.any()):
            most = torch.finfo(dtype).max
            held = float(value[overflow].abs().max())
            return f"{name} overflows {dtype}: it holds {held:.3g}, the most is {most:.3g}", float("inf")
    error, limit = _row_error(rows, stored, largest), torch.finfo(dtype).eps
    if error <= limit:
        return "", error
    return (
        f"{name} is too small for {dtype}: a row loses {error:.1e} of itself, normal rounding at most "
        f"{limit / 2:.1e}; its largest entry is {float(value.abs().max()):.1e}, the least normal number "
        f"{torch.finfo(dtype).tiny:.1e}"
    ), error


def _row_error(rows: torch.Tensor, stored: torch.Tensor, largest: torch.Tensor) -> float:
    """The largest relative 2-norm error over the rows; ``largest`` is each row's largest entry, rounded."""
    # Normal numbers lose one unit roundoff at most, those below the least normal one half its last place. Where a row's
    # largest entry outweighs as many of those as the row has entries, nothing needs to be added up.
    unit = torch.finfo(stored.dtype).eps / 2
    outweighing = torch.finfo(stored.dtype).tiny * math.sqrt(rows.shape[1])
    if float(largest.min()) >= outweighing:
        return unit
    if not bool(rows.any()):
        return 0.0
    # What was rounded to zero altogether is doubtful too.
    doubtful = ~(largest >= outweighing)
    worst = 0.0 if bool(doubtful.all()) else unit
    suspects = doubtful.nonzero()[:, 0]
    for part in suspects.split(max(1, _CHUNK // rows.shape[1])) if suspects.numel() else ():
        v, r = rows[part], stored[part].to(torch.float64)
        finite = v.isfinite()
        v, r = torch.where(finite, v, 0.0), torch.where(finite, r, 0.0)
        size, error = v.norm(dim=1), (v - r).norm(dim=1)
        worst = max(worst, float(torch.where(size > 0, error / size, 0.0).max()))
    return worst


def _first_difference(name: str, value: torch.Tensor, rounded: torch.Tensor, stored: torch.Tensor) -> str:
    """Where the stored weight is not the rounded one; "" where they differ in nothing but how NaN compares."""
    differ = ~((rounded == stored) | (rounded.isnan() & stored.isnan()))
    if not bool(differ.any()):
        return ""
    at = tuple(differ.nonzero()[0].tolist())
    return (
        f"{name}{list(at)} is {float(stored[at])!r}, and rounding {float(value[at])!r} once gives "
        f"{float(rounded[at])!r}: {int(differ.sum())} of {differ.numel()} entries differ"
    )
