"""The report of a transform: every rewrite with its verdict and price, and what stood in the way of the others."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxconv import fingerprint
from fxconv.advice import advice
from fxconv.captured import Captured
from fxconv.cost import Price
from fxconv.emit import module_path
from fxconv.expr import Leaf, Value
from fxconv.options import Options
from fxconv.outcome import Outcome
from fxconv.report import Capture, Cost, Remark, Report, Rewrite
from fxconv.rollback import exactness
from fxconv.spelling import user_name
from fxconv.state import State
from fxconv.verify_cluster import Verdict
from fxconv.verify_model import ModelVerdict


def _cost(p: Price) -> Cost:
    return Cost(round(p.macs), round(p.params), round(p.launches), round(p.bytes), p.seconds)


def summarise(
    model: Any, result: Any, captured: Captured, options: Options, outcome: Outcome, verdict: ModelVerdict | None
) -> Report:
    """The report of a finished transform."""
    state = outcome.state
    before = state.prices_before()
    rewrites: list[Rewrite] = []
    for cluster in outcome.emitted.clusters:
        v = outcome.verdicts.get(cluster.node)
        rewrites.append(
            Rewrite(
                cluster.result,
                outcome.pairs.get(cluster.node, (cluster.node,)),
                cluster.new_nodes,
                outcome.search.laws_of(cluster.value),
                _cost(sum((before[n] for n in outcome.pairs.get(cluster.node, ()) if n in before), Price())),
                _cost(state.price_after(cluster.value)),
                _verdict(v),
                module_path(state.originals[cluster.value].node),
                exactness(outcome.emitted, cluster),
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
    for cluster, reason in outcome.refused:
        laws = ", ".join(outcome.search.laws_of(cluster.value))
        out.setdefault((cluster.node, laws, reason), Remark("refused", cluster.node, laws, reason, "the dtype were wider"))
    for v, reason in state.unwritable.items():
        name, laws = state.originals[v].node.name, ", ".join(outcome.search.laws_of(v))
        out[name, laws, reason] = Remark("refused", name, laws, reason)
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


NONLINEAR = frozenset(("relu", "leaky_relu", "prelu", "max_pool", "norm_affine", "elementwise"))
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
