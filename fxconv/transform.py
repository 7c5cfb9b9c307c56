"""`transform`: capture, lift, search, emit, verify, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxconv import kernel as kernels
from fxconv.asks import asks_shape
from fxconv.capture import Captured, capture
from fxconv.cost import CostModel
from fxconv.divisible import assume_divisible
from fxconv.emit import Emitted, module_path
from fxconv.errors import CaptureError, VerificationError
from fxconv.expr import Const, Value
from fxconv.garbage import collector_paused, collector_skips_the_past
from fxconv.law import Law
from fxconv.lift import Lifter
from fxconv.measure import Judge, example_sizes, whole
from fxconv.options import Options
from fxconv.outcome import Outcome, emit, hand_back, parameters_of, symbol_ranges
from fxconv.profiles import load_profile
from fxconv.report import Report, attach, read
from fxconv.rollback import find_guilty, verify_clusters, verify_model
from fxconv.search import Search
from fxconv.state import State
from fxconv.steps import TARGETS
from fxconv.structure import structural_copy
from fxconv.summary import summarise
from fxconv.verify_model import ModelVerdict, as_module
from fxconv.weight_map import TRAINABLE_LAWS, record_weights, reversible

logger = logging.getLogger("fxconv")


@collector_skips_the_past()
def transform(
    model: Any,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    objective: str = "latency",
    target: str | None = None,
    verify: str = "rollback",
    capture: str = "auto",
    laws: Sequence[Law] | None = None,
    measure: bool = False,
    options: Options | Mapping[str, Any] | str | None = None,
) -> Any:
    """Rewrite the affine work of a model into the exact form that is cheapest to run, or that the target can run.

    Args:
        model: an ``nn.Module`` in eval mode, a ``GraphModule`` or an ``ExportedProgram``. It is not changed; parameters that
            stay as they are are shared with the result.
        args: example positional inputs; a bare tensor is wrapped. Without them only what needs no shapes is rewritten.
        kwargs: example keyword inputs.
        dynamic_shapes: as for ``torch.export.export``; by default every dim is dynamic that can be.
        objective: "latency", "macs", "params" or "launches".
        target: None, "conv" (no Linear), "conv2d" (nor 1-d or 3-d convolutions) or "linear" (no convolution).
        verify: "rollback" takes back what is not confirmed, "raise" raises `VerificationError`, "off" checks nothing.
        capture: "auto", "export" or "symbolic".
        laws: law objects to use in place of `fxconv.passes.LAWS`.
        measure: time every rewrite on this machine, keep it only if it wins, and give the model back as it came where
            the result as a whole does not.
        options: `fxconv.Options`, a mapping or the path of a TOML file; arguments that differ from their defaults win.

    Returns:
        A GraphModule for a Module or GraphModule (a copy of the Module where it was captured in parts), an
        ExportedProgram for an ExportedProgram. `fxconv.report` reads what was done from it.

    Raises:
        FxconvError: a subclass that says what to do: `NotAModuleError`, `TrainingModeError`, `ArgsError`,
            `OptionError`, `CaptureError`, `VerificationError`.
    """
    chosen = Options.of(
        options,
        dynamic_shapes=dynamic_shapes,
        objective=objective,
        target=target,
        verify=verify,
        capture=capture,
        laws=tuple(laws) if laws is not None else None,
        measure=measure,
    )
    result, record = run(model, args, dict(kwargs or {}), chosen)
    return attach(result, record)


def explain(model: Any, args: Any = None, kwargs: Mapping[str, Any] | None = None, **keywords: Any) -> Report:
    """The report of a transform whose result is thrown away; the keywords are those of `transform`."""
    return read(transform(model, args, kwargs, **keywords))


def run(model: Any, args: Any, kwargs: dict[str, Any], options: Options) -> tuple[Any, Report]:
    """Transform under checked options: the result and its report."""
    if isinstance(args, torch.Tensor):
        args = (args,)
    started = time.perf_counter()
    try:
        captured = capture(model, args, kwargs, dynamic_shapes=options.dynamic_shapes, mode=options.capture)
    except CaptureError as error:
        if not isinstance(model, torch.nn.Module) or not (args or kwargs):
            raise
        from fxconv.piecewise import transform_parts  # it transforms the parts by this module

        return transform_parts(model, tuple(args or ()), kwargs, options, error)
    return run_captured(model, captured, options, time.perf_counter() - started)


@collector_skips_the_past()  # the captured graph too, from here on
def run_captured(model: Any, captured: Captured, options: Options, took: float = 0.0, where: str = "") -> tuple[Any, Report]:
    """Transform a graph that has been captured, by `capture` or by a pipeline (``took`` seconds).

    ``model`` is what the result is compared with, called on the captured inputs; ``where`` its qualified name, if it is
    a part of what the options speak of.
    """
    outcome = rewrite(captured, options, where)
    outcome.timings["capture"] = took
    result = hand_back(captured, outcome.emitted.gm)
    if isinstance(model, fx.GraphModule) and _unchanged(captured.gm, outcome.emitted):
        result = structural_copy(model)  # nothing to do is nothing done: in the dialect and the order that it came in
    clock = time.perf_counter()
    verdict = verify_model(model, result, captured, options, outcome.emitted)
    if isinstance(verdict, ModelVerdict) and verdict.status == "failed" and outcome.emitted.clusters:
        outcome, result, verdict = find_guilty(model, captured, options, outcome, verdict)
    outcome.timings["verify model"] = time.perf_counter() - clock
    record_weights(model, result, outcome.emitted)
    measured: dict[str, Any] = {}
    if options.measure:
        measured = whole(as_module(model), as_module(result), captured)
        if measured and measured["high"] < 1.0:
            logger.warning("the result is slower than the model (%.2f): all is taken back", measured["ratio"])
            result, verdict, measured = *_undone(model, captured, options, outcome), {}
    record = replace(summarise(model, result, captured, options, outcome, verdict), measured=measured)
    if options.verify == "raise" and not record.verified and verdict is not None:
        if isinstance(verdict, ModelVerdict) and not verdict:
            raise VerificationError(f"the rewritten model is {verdict}")
    return result, record


def _unchanged(before: fx.GraphModule, emitted: Emitted) -> bool:
    def calls(gm: fx.GraphModule) -> int:
        return sum(n.op.startswith("call_") for n in gm.graph.nodes)

    return not emitted.clusters and calls(before) == calls(emitted.gm)


def _undone(model: Any, captured: Captured, options: Options, outcome: Outcome) -> tuple[Any, ModelVerdict | None]:
    """The model without any rewrite."""
    for cluster in outcome.emitted.clusters:
        outcome.state.restore(cluster.value)
    outcome.emitted = emit(captured, outcome.state)
    outcome.after = outcome.state.total
    result = hand_back(captured, outcome.emitted.gm)
    return result, verify_model(model, result, captured, options)


def rewrite(captured: Captured, options: Options, where: str = "") -> Outcome:
    """Lift, search, emit and check a captured graph; rewrites that fail their check are taken back one by one.

    ``where`` is the qualified name of the module that was captured, "" for the model itself.
    """
    assumed = assume_divisible(captured.gm)
    outcome = _rewritten(captured, options, where)
    if outcome.emitted.clusters:
        captured.checks += assumed
    _check(outcome, options)
    return outcome


def _check(outcome: Outcome, options: Options) -> None:
    """Take back what options forbid, the dtype cannot hold, does not win or cannot be confirmed."""
    captured, state, timings = outcome.captured, outcome.state, outcome.timings
    clock = time.perf_counter() - timings["emit"]
    if options.trainable:
        _keep_reversible(outcome)
    _refuse_unfit(outcome)
    clock = _lap(timings, "emit", clock)
    if options.measure:
        judge = Judge(captured.gm, state, lambda: emit(captured, state), state.model.symbols)
        outcome.emitted = judge.run(outcome.emitted)
        outcome.after, outcome.slower = state.total, judge.losers
        clock = _lap(timings, "measure", clock)
    if options.verify != "off":
        verify_clusters(outcome, symbol_ranges(captured.gm), options)
        kernels.forget()
        _lap(timings, "verify rewrites", clock)


@collector_paused(kept=True)
def _rewritten(captured: Captured, options: Options, where: str) -> Outcome:
    """Lift, search and emit."""
    timings: dict[str, float] = {}
    clock = time.perf_counter()
    barriers = {**captured.barriers, **_left_alone(captured.gm, options, where)}
    # A target that wants another operator wants it in another layout, on both sides of a function.
    lifter = Lifter(captured.gm, barriers, functions=options.target is not None)
    lifter.run()
    clock = _lap(timings, "lift", clock)
    sizes = example_sizes(captured, {s: hint for s, (_, _, hint) in symbol_ranges(captured.gm).items()})
    profile = load_profile(options.profile)
    if not profile.measured:
        captured.notes.append(f"times are predicted for {profile.name!r}, whose speeds nobody measured")
    model = CostModel(profile, sizes)
    state = State(lifter, model, TARGETS[options.target], options.objective, target_name=options.target)
    state.load(_roots(captured.gm, lifter))
    before = state.honest_total()
    search = Search(state, _laws(options))
    search.run()
    state.retract_impossible()
    kernels.forget()
    clock = _lap(timings, "search", clock)
    outcome = Outcome(captured, state, search, emit(captured, state), before, state.total, timings=timings)
    timings["emit"] = time.perf_counter() - clock  # so far: `_check` may write it again
    return outcome


def _keep_reversible(outcome: Outcome) -> None:
    """Take back the rewrites whose weights are no single weight of the original."""
    for _ in range(len(outcome.emitted.clusters) + 1):
        mixed = [c for c in outcome.emitted.clusters if not reversible(outcome.emitted, parameters_of(outcome.emitted, c))]
        if not mixed:
            return
        for c in mixed:
            outcome.state.restore(c.value)
        outcome.emitted = emit(outcome.captured, outcome.state)
        outcome.after = outcome.state.total


def _refuse_unfit(outcome: Outcome) -> None:
    """Take back the rewrites whose weights the model's dtype cannot hold, whether or not anything is verified."""
    for _ in range(len(outcome.state.originals) + 1):
        found = False
        for c in outcome.emitted.clusters:
            weights = [outcome.emitted.parameters[name] for name in parameters_of(outcome.emitted, c)]
            reasons = [outcome.emitted.unfit[k] for k in weights if k in outcome.emitted.unfit]
            if reasons:
                outcome.refused.append((c, reasons[0]))
                outcome.state.restore(c.value)
                found = True
        if not found:
            return
        outcome.emitted = emit(outcome.captured, outcome.state)
        outcome.after = outcome.state.total


def _lap(timings: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    timings[name] = now - since
    logger.info("%s: %.2f s", name, now - since)
    return now


def _laws(options: Options) -> list[Law]:
    from fxconv.passes import LAWS, densify, full_length

    laws = list(options.laws) if options.laws is not None else list(LAWS)
    if options.target == "linear":
        laws[-1:-1] = [full_length.law, densify.law]
    options.check_laws([law.name for law in laws])
    if options.trainable:
        laws = [law for law in laws if law.name in TRAINABLE_LAWS]
    return [law for law in laws if options.law_allowed(law.name)]


def _roots(gm: fx.GraphModule, lifter: Lifter) -> list[Value]:
    """Values that nodes outside the affine regions read; asking for a shape is not reading."""
    roots: list[Value] = []
    for node in gm.graph.nodes:
        if node in lifter.lifted.ops or asks_shape(node):
            continue
        if lifter.lifted.barriers.get(node) == "" and all(u in lifter.lifted.ops or not u.users for u in node.users):
            # split, chunk: their parts are lifted from what they read.
            continue
        for operand in node.all_input_nodes:
            ref = lifter.lifted.refs.get(operand)
            if ref is not None and not isinstance(ref.value.node, Const):
                roots.append(ref.value)
    return roots


def _left_alone(gm: fx.GraphModule, options: Options, where: str) -> dict[str, str]:
    """Barriers, with the reason, for the nodes of modules that options say to leave alone.

    Nothing is known of what a barrier computes, so that no law can fold it into a neighbour either.
    """
    if not options.allow and not options.deny:
        return {}
    out: dict[str, str] = {}
    for node in gm.graph.nodes:
        path = f"{where}.{module_path(node)}".strip(".")
        if node.op.startswith("call_") and not options.module_allowed(path):
            out[node.name] = f"options leave {path!r} alone" if path else "options leave what is outside of `allow` alone"
    return out
