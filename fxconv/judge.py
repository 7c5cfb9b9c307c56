"""Errors of a model's outputs against their limits; `fxconv.verify_model` has the criteria, and why they are these."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxconv.outputs import ErrorRow, errors_of, is_floating, is_tensor, magnitude
from fxconv.tolerance import UNIT_ROUNDOFF, UNITS

__all__ = ["FACTOR", "FLOOR", "Judge", "OutputError", "Run"]

FACTOR = 4.0
"""How many times the original's own error the result's may be."""

FLOOR = 2.0
"""Unit roundoffs of the output's magnitude that are always allowed: the original may be exact by chance."""

ACCUMULATED = 32.0
"""The same for a result that is computed in float32, where an operator that sums n products is off by about √n roundoffs
(Higham and Mary, *A New Approach to Probabilistic Rounding Error Analysis*, 2019; 32 are some 1,000 products), whatever
the original does: ``x + f(x)`` hands on x as it is, and one convolution that computes both cannot. Half types are summed
in float32, and the result in float64 shows what its weights lose: there it is FLOOR."""

UNSTABLE = 0.25
"""Error of the original itself from which nothing can be said of its output: sorting or a threshold is in it."""

_UNSTABLE64 = 1e-6
"""The same for the limit in float64."""

_SHARE = 1e-4
"""Share of integer or boolean entries that may always differ: arg-maxima that were all but ties."""


@dataclass
class Run:
    """The outputs' leaves of one batch under the four runs."""

    label: str
    inputs: list[Any]
    samples: int
    """Samples in it: rows of outputs whose dim 0 is this are judged one by one."""
    original: list[Any] = dataclasses.field(default_factory=list)
    result: list[Any] = dataclasses.field(default_factory=list)
    original64: list[Any] = dataclasses.field(default_factory=list)
    result64: list[Any] = dataclasses.field(default_factory=list)
    noise: list[Any] = dataclasses.field(default_factory=list)
    """|O_δ − O| / δ of the original in float64, of what is no float whether it changed; None where the size did. Empty where
    it was not measured."""


@dataclass(frozen=True)
class OutputError:
    """Errors of one output tensor, relative to the original in float64: the worst over the samples.

    Errors and limits are those of the largest entry; `ratio` also knows the root mean square. Of an integer or boolean
    output they are shares of entries that differ.
    """

    name: str
    original: float
    """The original in its own dtype; in a float64 model, its estimate."""
    result: float
    """The result in the model's dtype."""
    float64: float
    """The result in float64."""
    limit: float
    """What `result` may be."""
    limit64: float
    """What `float64` may be."""
    ratio: float
    """The largest share of its limit that any sample reached in either norm; at most 1 passes."""
    unstable: str = ""
    """Why nothing can be said, "" where it can: the original's own output hangs on rounding."""
    note: str = ""
    """What else the user should know of it."""


@dataclass(frozen=True)
class Judge:
    """The criteria for models of one dtype.

    ``exact``: the result's float64 weights are the unrounded ones, so that in float64 it is judged at float64 rounding.
    """

    dtype: torch.dtype
    factor: float
    exact: bool

    def __call__(self, names: Sequence[str], runs: Sequence[Run]) -> tuple[OutputError, ...]:
        found = []
        for k, name in enumerate(names):
            if is_tensor(runs[0].original[k]):
                judge = self._floats if is_floating(runs[0].original[k]) else self._others
                found.append(judge(name, k, runs))
        return tuple(found)

    def _sizes(self, k: int, runs: Sequence[Run]) -> str:
        """Why the own dtype cannot be judged, "" where it can: the output's size follows the rounding."""
        for run in runs:
            reference, own = run.original64[k].shape, run.original[k].shape
            if reference != own:
                return f"its size hangs on rounding: {tuple(reference)} in float64, {tuple(own)} in {_short(self.dtype)}"
        return ""

    def _floats(self, name: str, k: int, runs: Sequence[Run]) -> OutputError:
        unstable = self._sizes(k, runs)
        if any(run.result64[k].shape != run.original64[k].shape for run in runs):
            return self._of_another_size(name, k, runs, unstable)
        top = max(magnitude(run.original64[k]) for run in runs)
        rows: list[ErrorRow] = []
        for run in runs:
            reference = run.original64[k]
            noise = run.noise[k] if run.noise else None
            moved = reference if noise is None else reference + UNIT_ROUNDOFF * noise
            pair = [reference, reference] if unstable else [run.original[k], run.result[k]]
            rows += errors_of(reference, [*pair, run.result64[k], moved], run.samples, top, name)

        def most(of: Callable[[ErrorRow], float], norm: int) -> float:
            return max((of(r) for r in rows if r.norm == norm), default=0.0)

        wide = self.dtype == torch.float64
        sharp = wide or self.exact
        narrow = ratio = limit = limit64 = 0.0
        for norm in (1, 0):
            own = self.factor * most(lambda r: r.original, norm)
            limit = own + (ACCUMULATED if self.dtype == torch.float32 else FLOOR) * _unit(self.dtype)
            stored = own + FLOOR * _unit(self.dtype)
            limit64 = UNITS * (most(lambda r: r.noise, norm) + UNIT_ROUNDOFF) if sharp else stored
            limit = max(limit, limit64 if wide else 0.0)
            if not unstable and limit > self.factor * UNSTABLE:
                share = most(lambda r: r.original, norm)
                unstable = f"the original itself is off by {share:.0%} in {_short(self.dtype)}"
            if not unstable:
                narrow = max(narrow, most(lambda r: r.result, norm) / limit)
            ratio = max(ratio, most(lambda r: r.result64, norm) / limit64)
        if not unstable:
            ratio = max(ratio, narrow)
        note = "" if top > 0 else "is empty, zero or not finite on every input: it says nothing of what leads to it"
        lost = any(run.noise and run.noise[k] is None for run in runs)  # its size hangs on rounding even there
        if sharp and limit64 <= _UNSTABLE64 and unstable and not lost:
            # What it computes was seen exactly; that its own dtype cannot resolve it is the original's doing.
            note, unstable = f"could be judged in float64 only, where it is {_right(ratio)}: {unstable}", ""
        elif sharp and limit64 > _UNSTABLE64 and not unstable:
            unstable = f"rounding in float64 moves the original by {limit64 / UNITS:.1e}"
        return OutputError(
            name,
            max(most(lambda r: r.original, 0), most(lambda r: r.noise, 0) if wide else 0.0),
            most(lambda r: r.result, 0),
            most(lambda r: r.result64, 0),
            limit,
            limit64,
            ratio,
            unstable,
            note,
        )

    def _of_another_size(self, name: str, k: int, runs: Sequence[Run], unstable: str) -> OutputError:
        """A size that differs in float64: with exact weights wrong, unless the original's own hangs on its rounding too."""
        steady = self.exact and not any(run.noise and run.noise[k] is None for run in runs)
        why = "" if steady else unstable or "its size hangs on rounding"
        note = "has another size in float64" if steady else ""
        return OutputError(name, 0.0, 0.0, 0.0, 0.0, 0.0, float("inf"), why, note)

    def _others(self, name: str, k: int, runs: Sequence[Run]) -> OutputError:
        """Indices and masks: as many entries may differ from float64 as do in the original, and 1 in 10,000."""
        unstable = self._sizes(k, runs)
        share = [0.0, 0.0, 0.0]
        for run in runs:
            reference = run.original64[k]
            for i, other in enumerate((run.original[k], run.result[k], run.result64[k])):
                if i < 2 and unstable:
                    continue
                if other.shape != reference.shape:
                    return self._of_another_size(name, k, runs, unstable)
                if reference.numel():
                    share[i] = max(share[i], float((other != reference).double().mean()))
        if share[0] > UNSTABLE:
            unstable = f"the original itself has {share[0]:.0%} of its entries different in {_short(self.dtype)}"
        limit = self.factor * share[0] + _SHARE
        limit64 = _SHARE if self.exact or self.dtype == torch.float64 else limit
        ratio = max(0.0 if unstable else share[1] / limit, share[2] / limit64)
        note = ""
        moved = [run.noise[k] for run in runs if run.noise]
        steady = all(n is not None and float(n.mean() if n.numel() else 0) <= _SHARE for n in moved)
        if unstable and self.exact and (ratio <= 1 or steady):
            note, unstable = f"could be judged in float64 only, where it is {_right(ratio)}: {unstable}", ""
        return OutputError(name, share[0], share[1], share[2], limit, limit64, ratio, unstable, note)


def _right(ratio: float) -> str:
    return "right" if ratio <= 1 else "wrong"


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
