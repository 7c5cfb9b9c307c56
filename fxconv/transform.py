"""`transform`: capture, lift, search, emit, verify, report."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from fxconv import fingerprint
from fxconv.advice import advice
from fxconv.asks import asks_shape
from fxconv.blame import bisect, reproduction
from fxconv.capture import Captured, capture, restore_inplace
from fxconv.clusters import Cutter, Pair
from fxconv.cost import CostModel, Price
from fxconv.emit import Cluster, Emitted, Emitter
from fxconv.errors import CaptureError, VerificationError
from fxconv.expr import Const, Leaf, Value
from fxconv.identities import remove_identities
from fxconv.law import Law
from fxconv.lift import Lifter
from fxconv.measure import Judge, Loser, example_sizes, whole
from fxconv.options import Options
from fxconv.plan import TARGETS
from fxconv.profiles import load_profile
from fxconv.program import fake_mode_of, set_attribute
from fxconv.report import Capture, Cost, Remark, Report, Rewrite, attach, read
from fxconv.rounding import check_rounding
from fxconv.search import Search
from fxconv.spelling import user_name
from fxconv.state import State
from fxconv.structure import structural_copy
from fxconv.verify_cluster import Verdict, check_cluster
from fxconv.verify_model import ModelVerdict, check_model
from fxconv.weight_map import TRAINABLE_LAWS, record_weights, reversible

logger = logging.getLogger("fxconv")

Symbols = dict[sympy.Symbol, tuple[int, "int | None", int]]


@dataclass
class Outcome:
    """Everything one transform came to, before it is handed back."""

    captured: Captured
    state: State
    search: Search
    emitted: Emitted
    before: Price
    after: Price
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    pairs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rolled_back: dict[str, tuple[Cluster, Verdict, tuple[str, ...]]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    slower: list[Loser] = field(default_factory=list)


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


def run_captured(model: Any, captured: Captured, options: Options, took: float = 0.0) -> tuple[Any, Report]:
    """Transform a graph that has been captured, by `capture` or by a pipeline (``took`` seconds).

    ``model`` is what the result is compared with, called on the captured inputs.
    """
    outcome = rewrite(captured, options)
    outcome.timings["capture"] = took
    result = _hand_back(captured, outcome.emitted.gm)
    if isinstance(model, fx.GraphModule) and _unchanged(captured.gm, outcome.emitted):
        result = structural_copy(model)  # nothing to do is nothing done: in the dialect and the order that it came in
    clock = time.perf_counter()
    verdict = _verify_model(model, result, captured, options)
    if isinstance(verdict, ModelVerdict) and verdict.status == "failed" and outcome.emitted.clusters:
        outcome, result, verdict = _find_guilty(model, captured, options, outcome, verdict)
    outcome.timings["verify model"] = time.perf_counter() - clock
    record_weights(model, result, outcome.emitted)
    measured: dict[str, Any] = {}
    if options.measure:
        measured = whole(_callable(model), _callable(result), captured)
        if measured and measured["high"] < 1.0:
            logger.warning("the result is slower than the model (%.2f): all is taken back", measured["ratio"])
            result, verdict, measured = *_undone(model, captured, options, outcome), {}
    record = replace(_report(model, result, captured, options, outcome, verdict), measured=measured)
    if options.verify == "raise" and not record.verified and verdict is not None:
        if isinstance(verdict, ModelVerdict) and not verdict:
            raise VerificationError(f"the rewritten model is {verdict}")
    return result, record


def _hand_back(captured: Captured, gm: fx.GraphModule) -> Any:
    """The rewritten graph as the kind of thing that was given."""
    remove_identities(gm, captured.barriers)
    restore_inplace(gm)
    gm.recompile()
    return captured.rebuild(gm)


def _unchanged(before: fx.GraphModule, emitted: Emitted) -> bool:
    def calls(gm: fx.GraphModule) -> int:
        return sum(n.op.startswith("call_") for n in gm.graph.nodes)

    return not emitted.clusters and calls(before) == calls(emitted.gm)


def _undone(
    model: Any, captured: Captured, options: Options, outcome: Outcome
) -> tuple[Any, ModelVerdict | None]:
    """The model without any rewrite."""
    for cluster in outcome.emitted.clusters:
        take_back(outcome.state, cluster.value)
    outcome.emitted = _emit(captured, outcome.state)
    outcome.after = outcome.state.total
    result = _hand_back(captured, outcome.emitted.gm)
    return result, _verify_model(model, result, captured, options)


def _callable(model: Any) -> Any:
    from fxconv.verify_model import _module

    return _module(model)


def rewrite(captured: Captured, options: Options) -> Outcome:
    """Lift, search, emit and check a captured graph; rewrites that fail their check are taken back one by one."""
    timings: dict[str, float] = {}
    clock = time.perf_counter()
    lifter = Lifter(captured.gm, captured.barriers)
    lifter.run()
    clock = _lap(timings, "lift", clock)
    symbols = symbol_ranges(captured.gm)
    sizes = example_sizes(captured, {s: hint for s, (_, _, hint) in symbols.items()})
    profile = load_profile(options.profile)
    if not profile.measured:
        captured.notes.append(f"times are predicted for {profile.name!r}, whose speeds nobody measured")
    model = CostModel(profile, sizes)
    state = State(lifter, model, TARGETS[options.target], options.objective)
    state.target_name = options.target
    state.frozen = _frozen(captured.gm, lifter, options)
    state.load(_roots(captured.gm, lifter))
    before = state.honest_total()
    search = Search(state, _laws(options))
    search.run()
    state.retract_impossible()
    clock = _lap(timings, "search", clock)
    outcome = Outcome(captured, state, search, _emit(captured, state), before, state.total, timings=timings)
    if options.trainable:
        _keep_reversible(outcome)
    clock = _lap(timings, "emit", clock)
    if options.measure:
        judge = Judge(captured.gm, state, lambda: _emit(captured, state), sizes)
        outcome.emitted = judge.run(outcome.emitted)
        outcome.after, outcome.slower = state.total, judge.losers
        clock = _lap(timings, "measure", clock)
    if options.verify != "off":
        _verify_clusters(outcome, symbols, options)
        _lap(timings, "verify rewrites", clock)
    return outcome


def _keep_reversible(outcome: Outcome) -> None:
    """Take back the rewrites whose weights are no single weight of the original."""
    for _ in range(len(outcome.emitted.clusters) + 1):
        mixed = [
            c
            for c in outcome.emitted.clusters
            if not reversible(outcome.emitted, _parameters_of(outcome.emitted, c))
        ]
        if not mixed:
            return
        for c in mixed:
            take_back(outcome.state, c.value)
        outcome.emitted = _emit(outcome.captured, outcome.state)
        outcome.after = outcome.state.total


def _lap(timings: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    timings[name] = now - since
    logger.info("%s: %.2f s", name, now - since)
    return now


def _laws(options: Options) -> list[Law]:
    from fxconv.passes import LAWS, densify

    laws = list(options.laws) if options.laws is not None else list(LAWS)
    if options.target == "linear":
        laws.insert(-1, densify.law)
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


def _frozen(gm: fx.GraphModule, lifter: Lifter, options: Options) -> set[Value]:
    """Values that options say to leave alone."""
    if not options.allow and not options.deny:
        return set()
    frozen: set[Value] = set()
    for value, node in lifter.lifted.producers.items():
        if not options.module_allowed(module_path(node)):
            frozen.add(value)
    return frozen


def _has(gm: fx.GraphModule, path: str) -> bool:
    found: Any = gm
    for part in path.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def module_path(node: fx.Node) -> str:
    """The qualified name of the module that a node belongs to, "" where it is not known."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    if isinstance(stack, dict) and stack:
        path = str(list(stack.values())[-1][0])
        return path.replace("L['self'].", "").replace("L['self']", "").strip(".")
    return ""


def symbol_ranges(gm: fx.GraphModule) -> Symbols:
    """Range and example value of every symbol in the graph's sizes."""
    mode = fake_mode_of(gm.graph)
    env = getattr(mode, "shape_env", None)
    if env is None:
        return {}
    values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    out: Symbols = {}
    for symbol, value in values.items():
        interval = env.var_to_range.get(symbol)
        low, high = 2, None
        if interval is not None:
            low = int(interval.lower) if interval.lower.is_Integer else 2
            high = int(interval.upper) if interval.upper.is_Integer and interval.upper < 2**31 else None
        out[symbol] = (low, high, int(value))
    return out


def _emit(captured: Captured, state: State) -> Emitted:
    graph = copy.deepcopy(captured.gm.graph)
    gm = fx.GraphModule(captured.gm, graph, captured.gm.__class__.__name__)
    # A GraphModule copies what its graph reads; a program's signature may name more (num_batches_tracked).
    for name, value in (*captured.gm.named_parameters(), *captured.gm.named_buffers()):
        if not _has(gm, name):
            set_attribute(gm, name, value)
    gm.meta = dict(captured.gm.meta)
    twins = dict(zip(captured.gm.graph.nodes, gm.graph.nodes, strict=True))
    return Emitter(state, gm, twins, captured.dialect).run()


# -- Verification -----------------------------------------------------------------------------------------------------


def _verify_clusters(outcome: Outcome, symbols: Symbols, options: Options) -> None:
    """Check every rewrite; take back the ones that fail, and emit again without them, until all pass."""
    # What is taken back may leave a smaller rewrite in its place, so the bound is on values rather than on clusters.
    for _ in range(len(outcome.state.originals) + 1):
        cutter = Cutter(outcome.state, outcome.captured.gm, outcome.emitted)
        failed: list[tuple[Cluster, Verdict, Pair]] = []
        verdicts: dict[str, Verdict] = {}
        for i, cluster in enumerate(outcome.emitted.clusters):
            known = outcome.verdicts.get(cluster.node)
            if known is not None and not outcome.rolled_back:
                verdicts[cluster.node] = known
                continue
            pair = cutter.cut(cluster)
            outcome.pairs[cluster.node] = pair.nodes
            verdict = check_cluster(
                pair.original,
                pair.replacement,
                pair.inputs,
                symbols=symbols,
                seed=options.seed + i,
                affine=not pair.homogeneous,
                positively_homogeneous=pair.homogeneous,
            )
            if verdict.status == "failed" and _exactness(outcome.emitted, cluster) != "exact":
                verdict = _to_rounding(verdict, outcome, cluster)
            if verdict.status != "failed":
                rounding = _check_rounding(outcome.emitted, cluster)
                if rounding.status == "failed":
                    verdict = rounding
            verdicts[cluster.node] = verdict
            if verdict.status == "failed":
                failed.append((cluster, verdict, pair))
            _release(outcome.emitted, cluster)
        outcome.verdicts = verdicts
        if not failed:
            return
        if options.verify == "raise":
            cluster, verdict, pair = min(failed, key=lambda f: len(f[2].nodes))
            example = {s: hint for s, (_, _, hint) in symbols.items()}
            script = reproduction(pair.original, pair.replacement, pair.inputs, options.seed, example)
            raise VerificationError(
                f"the rewrite of {', '.join(pair.nodes)} is not what it replaced: {verdict.reason}\n\n{script}"
            )
        for cluster, verdict, pair in failed:
            logger.warning("%s is taken back: %s", cluster.node, verdict.reason)
            outcome.rolled_back[cluster.node] = (cluster, verdict, pair.nodes)
            take_back(outcome.state, cluster.value)
        outcome.emitted = _emit(outcome.captured, outcome.state)
        outcome.after = outcome.state.total


def _exactness(emitted: Emitted, cluster: Cluster) -> str:
    """Whether a rewrite uses a structure that holds within half a unit in the last place of each weight only."""
    from fxconv.passes.recover import to_rounding

    found = any(to_rounding(emitted.parameters[name]) for name in _parameters_of(emitted, cluster))
    return "exact to rounding" if found else "exact"


def _to_rounding(verdict: Verdict, outcome: Outcome, cluster: Cluster) -> Verdict:
    """The verdict on weights that were moved by up to half a unit in the last place: an error of that size is no failure."""
    dtype = outcome.state.originals[cluster.value].node.meta["val"].dtype
    limit = torch.finfo(dtype).eps
    if not verdict.probes or verdict.max_error > limit:
        return verdict
    return Verdict(
        "confirmed", f"to rounding: the structure holds within half an ulp of {dtype}", verdict.probes, verdict.max_error, limit
    )


def _check_rounding(emitted: Emitted, cluster: Cluster) -> Verdict:
    exact: dict[str, torch.Tensor] = {}
    stored: dict[str, torch.Tensor] = {}
    dtype = torch.float32
    for name in _parameters_of(emitted, cluster):
        value = emitted.gm
        for part in name.split("."):
            value = getattr(value, part)
        exact[name], stored[name] = emitted.parameters[name].tensor(), value.detach()  # type: ignore[operator]
        dtype = stored[name].dtype
    return check_rounding(exact, stored, dtype)


def _parameters_of(emitted: Emitted, cluster: Cluster) -> list[str]:
    names = set(cluster.new_nodes)
    out: list[str] = []
    for node in emitted.gm.graph.nodes:
        if node.name not in names:
            continue
        if node.op == "get_attr" and node.target in emitted.parameters:
            out.append(str(node.target))
        elif node.op == "call_module":
            out += [n for n in (f"{node.target}.weight", f"{node.target}.bias") if n in emitted.parameters]
    return out


def _release(emitted: Emitted, cluster: Cluster) -> None:
    """Forget the float64 weights of a rewrite that has been checked."""
    for name in _parameters_of(emitted, cluster):
        emitted.parameters[name].release()


def take_back(state: State, v: Value) -> None:
    """Let a value be computed by the node it came from again."""
    state.restore(v)


def _find_guilty(
    model: Any, captured: Captured, options: Options, outcome: Outcome, verdict: ModelVerdict
) -> tuple[Outcome, Any, ModelVerdict | None]:
    """The whole model fails although every rewrite passed: bisect, and take back the guilty ones."""
    clusters = outcome.emitted.clusters
    definitions = {c.node: (c.value, outcome.state.snapshot(c.value)) for c in clusters}
    results: dict[str, Any] = {}

    def passes(active: frozenset[int]) -> bool:
        for i, c in enumerate(clusters):
            value, kept = definitions[c.node]
            if i in active:
                outcome.state.reinstate(value, kept)
            else:
                outcome.state.restore(value)
        outcome.emitted = _emit(captured, outcome.state)
        results["result"] = _hand_back(captured, outcome.emitted.gm)
        results["verdict"] = _verify_model(model, results["result"], captured, options)
        return results["verdict"] is None or results["verdict"].status != "failed"

    guilty = bisect(passes, len(clusters))
    if options.verify == "raise" and guilty:
        names = ", ".join(clusters[i].node for i in sorted(guilty))
        raise VerificationError(f"the rewritten model is {verdict}; the rewrite to blame: {names}")
    passes(frozenset(range(len(clusters))) - guilty)
    for i in sorted(guilty):
        c = clusters[i]
        why = Verdict("failed", f"the whole model is wrong with it: {verdict.reason}")
        outcome.rolled_back[c.node] = (c, why, outcome.pairs.get(c.node, (c.node,)))
        outcome.verdicts.pop(c.node, None)
    outcome.after = outcome.state.total
    return outcome, results["result"], results["verdict"]


def _verify_model(model: Any, result: Any, captured: Captured, options: Options) -> ModelVerdict | None:
    if options.verify == "off" or not (captured.args or captured.kwargs):
        return None
    from fxconv.verify_model import _module

    return check_model(_module(model), _module(result), captured.args, captured.kwargs, seed=options.seed)


# -- Report -----------------------------------------------------------------------------------------------------------


def _cost(p: Price) -> Cost:
    return Cost(round(p.macs), round(p.params), round(p.launches), round(p.bytes), p.seconds)


def _report(
    model: Any, result: Any, captured: Captured, options: Options, outcome: Outcome, verdict: ModelVerdict | None
) -> Report:
    state = outcome.state
    rewrites: list[Rewrite] = []
    for cluster in outcome.emitted.clusters:
        v = outcome.verdicts.get(cluster.node)
        rewrites.append(
            Rewrite(
                cluster.result,
                outcome.pairs.get(cluster.node, (cluster.node,)),
                cluster.new_nodes,
                outcome.search.laws_of(cluster.value),
                _cost(state.price_before(cluster.value, outcome.pairs.get(cluster.node, ()))),
                _cost(state.price_after(cluster.value)),
                _verdict(v),
                module_path(state.originals[cluster.value].node),
                _exactness(outcome.emitted, cluster),
            )
        )
    for cluster, v, nodes in outcome.rolled_back.values():
        rewrites.append(
            Rewrite(
                cluster.node,
                nodes,
                cluster.new_nodes,
                outcome.search.laws_of(cluster.value),
                verdict={**_verdict(v), "status": "rolled back"},
                where=module_path(state.originals[cluster.value].node),
            )
        )
    verification: dict[str, Any]
    if verdict is not None:
        verification = verdict.to_dict()
    else:
        why = "verify='off'" if options.verify == "off" else "no example inputs: rewrites were checked at synthetic sizes"
        verification = {"status": "not run", "reason": why}
    counts: dict[str, int] = {}
    for reason in state.lifter.lifted.barriers.values():
        if reason:
            counts[reason] = counts.get(reason, 0) + 1
    return Report(
        model=type(model).__name__,
        objective=options.objective,
        target=options.target,
        capture=Capture(captured.how, tuple(captured.notes), outcome.timings.get("capture", 0.0)),
        rewrites=tuple(rewrites),
        missed=remarks(outcome),
        advice=advice(captured.gm),
        barriers=counts,
        cost_before=_cost(outcome.before),
        cost_after=_cost(state.honest_total()),
        verification=verification,
        timings=outcome.timings,
        hashes={"before": fingerprint.weights_hash(model), "after": fingerprint.weights_hash(result)},
    )


def _verdict(v: Verdict | None) -> dict[str, Any]:
    if v is None:
        return {"status": "not run", "reason": "verify='off'"}
    return {
        "status": v.status if v.status != "failed" else "rolled back",
        "reason": v.reason,
        "probes": [{"kinds": p.kinds, "shapes": p.shapes, "seed": p.seed, "error": p.error} for p in v.probes],
        "seeds": sorted({p.seed for p in v.probes}),
        "max_error": v.max_error,
        "tolerance": v.tolerance,
    }


def remarks(outcome: Outcome) -> tuple[Remark, ...]:
    """What was refused, and what was legal and did not pay, where it is still there to be done."""
    state = outcome.state
    out: dict[tuple[str, str, str], Remark] = {}
    for missed in outcome.search.refusals.values():
        node = nearest_node(state, missed.value)
        if node is None:
            continue
        kind = "missed" if missed.reason.startswith("does not pay") else "refused"
        key = (node.name, missed.law, missed.reason)
        out.setdefault(key, Remark(kind, node.name, missed.law, missed.reason, missed.would_fire_if))
    for loser in outcome.slower:
        laws = ", ".join(outcome.search.laws_of(loser.cluster.value))
        out.setdefault((loser.cluster.node, laws, "slower"), Remark("missed", loser.cluster.node, laws, loser.reason))
    for v in state.forbidden():
        name = state.originals[v].node.name
        reason = f"target={state.target_name!r} forbids this operator, and no other form was found"
        out[name, "target", reason] = Remark("refused", name, "target", reason)
    for node, reason in state.lifter.lifted.barriers.items():
        if reason and any(isinstance(a, fx.Node) and a in state.lifter.lifted.ops for a in node.all_input_nodes):
            out.setdefault((node.name, "", reason), Remark("barrier", node.name, "", reason))
    for node, op in state.lifter.lifted.ops.items():
        if op.name in NONLINEAR and _between_affine(state, node):
            reason = f"{user_name(node, state.lifter.gm)} is not affine"
            out.setdefault((node.name, "", reason), Remark("barrier", node.name, "", reason))
    return tuple(out.values())


NONLINEAR = frozenset(("relu", "leaky_relu", "prelu", "max_pool", "norm_affine"))
"""Operators that are lifted, since a scale passes through them or follows them, and still part two affine ones."""


def _between_affine(state: State, node: fx.Node) -> bool:
    """Whether a node reads what an affine operator computes, and an affine operator reads it."""
    ops = state.lifter.lifted.ops
    around = (node.all_input_nodes, list(node.users))
    return all(any(n in ops and ops[n].name not in NONLINEAR for n in side) for side in around)


def nearest_node(state: State, v: Value) -> fx.Node | None:
    """The node of the original graph that a value came from, or the nearest one that reads it."""
    seen: set[Value] = set()
    queue = [v]
    while queue:
        x = queue.pop(0)
        if x in seen:
            continue
        seen.add(x)
        original = state.originals.get(x)
        if original is not None and not isinstance(x.node, Leaf):
            return original.node
        queue.extend(state.users.get(x, ()))
        queue.extend(state.owners.get(x, ()))
    return None


