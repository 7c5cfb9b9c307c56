"""Models that cannot be captured whole: each child that can be is transformed, and put back into a copy of the parent.

The parent's Python stays as it is. The children's inputs are those of a real forward pass, so what is verified per child
is what the model does; the whole is verified as well.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import nn

from fxconv.errors import CaptureError, VerificationError
from fxconv.options import Options
from fxconv.parts import assemble, capture_parts
from fxconv.report import Capture, Cost, Remark, Report, Rewrite
from fxconv.transform import run_captured
from fxconv.verify_model import check_model


def transform_parts(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, error: CaptureError
) -> tuple[Any, Report]:
    """Transform what can be captured of a model; ``error`` says why the whole could not be.

    Raises:
        CaptureError: no part could be captured either, or ``options.strict``.
        VerificationError: the assembled model fails, under ``verify="raise"``.
    """
    if options.strict:
        raise error
    clock = time.perf_counter()
    found = capture_parts(model, args, kwargs, mode=options.capture)
    if not found.parts:
        raise error
    took = time.perf_counter() - clock
    results: dict[str, nn.Module] = {}
    reports: dict[str, Report] = {}
    for part in found.parts:
        results[part.name], reports[part.name] = run_captured(part.module, part.captured, options, where=part.name)
    result = assemble(model, results)
    notes = [f"captured in parts: {error}"]
    notes += [f"{name} stays as it is: {why}" for name, why in found.opaque.items()]
    verification: dict[str, Any] = {"status": "not run", "reason": "verify='off'"}
    if options.verify != "off":
        verdict = check_model(model, result, args, kwargs, seed=options.seed)
        if verdict.status == "failed":
            if options.verify == "raise":
                raise VerificationError(f"the model with its parts rewritten is {verdict}")
            notes.append(f"everything was taken back: the model with its parts rewritten is {verdict.reason}")
            result, reports = assemble(model, {}), {}
            verdict = check_model(model, result, args, kwargs, seed=options.seed)
        verification = verdict.to_dict()
    return result, _joined(model, options, reports, tuple(notes), verification, took)


def _joined(
    model: nn.Module,
    options: Options,
    reports: dict[str, Report],
    notes: tuple[str, ...],
    verification: dict[str, Any],
    took: float,
) -> Report:
    rewrites: list[Rewrite] = []
    missed: list[Remark] = []
    barriers: dict[str, int] = {}
    before, after = Cost(), Cost()
    timings: dict[str, float] = {"capture": took}
    for name, r in reports.items():
        rewrites += [replace(w, where=f"{name}.{w.where}".strip(".")) for w in r.rewrites]
        missed += [replace(m, where=f"{name}.{m.where}") for m in r.missed]
        notes += tuple(f"{name}: {n}" for n in r.capture.notes)
        before, after = before + r.cost_before, after + r.cost_after
        for reason, count in r.barriers.items():
            barriers[reason] = barriers.get(reason, 0) + count
        for stage, seconds in r.timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
    return Report(
        model=type(model).__name__,
        objective=options.objective,
        target=options.target,
        capture=Capture("parts", notes, took),
        rewrites=tuple(rewrites),
        missed=tuple(missed),
        barriers=barriers,
        cost_before=before,
        cost_after=after,
        verification=verification,
        timings=timings,
    )
