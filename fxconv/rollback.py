"""Rewrites as transactions: each is checked, one that fails is taken back alone, and the whole is checked with what stays."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fxconv.blame import bisect, reproduction
from fxconv.capture import Captured
from fxconv.clusters import Cutter, Pair
from fxconv.emit import Cluster, Emitted
from fxconv.errors import VerificationError
from fxconv.options import Options
from fxconv.outcome import Outcome, Symbols, emit, hand_back, parameters_of, symbol_ranges
from fxconv.probe import Numbers
from fxconv.rounding import check_rounding
from fxconv.verify_cluster import Probe, Verdict, check_cluster
from fxconv.verify_model import ModelVerdict, as_module, check_model

logger = logging.getLogger("fxconv")


def verify_clusters(outcome: Outcome, symbols: Symbols, options: Options) -> None:
    """Check every rewrite; take back the ones that fail, and emit again without them, until all pass."""
    numbers = Numbers(options.seed)
    # What is taken back may leave a smaller rewrite in its place, so the bound is on values rather than on clusters.
    for _ in range(len(outcome.state.originals) + 1):
        cutter = Cutter(outcome.state, outcome.captured.gm, outcome.emitted)
        failed: list[tuple[Cluster, Verdict, Pair]] = []
        verdicts: dict[str, Verdict] = {}
        for cluster in outcome.emitted.clusters:
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
                numbers=numbers,
                affine=not pair.homogeneous,
                positively_homogeneous=pair.homogeneous,
            )
            if verdict.status == "failed" and exactness(outcome.emitted, cluster) != "exact":
                verdict = _to_rounding(verdict, outcome, cluster)
            if verdict.status != "failed":
                rounding = _check_rounding(outcome.emitted, cluster)
                if rounding.status == "failed":
                    verdict = rounding
            verdicts[cluster.node] = verdict
            if verdict.status == "failed":
                failed.append((cluster, verdict, pair))
            if verdict.status != "failed" or options.verify != "raise":
                pair.let_go()
            _release(outcome.emitted, cluster)
        outcome.verdicts = verdicts
        if not failed:
            return
        if options.verify == "raise":
            cluster, verdict, pair = min(failed, key=lambda f: len(f[2].nodes))
            probe = verdict.probes[-1] if verdict.probes else None
            script = _script(pair, symbols, options, probe)
            raise VerificationError(f"the rewrite of {', '.join(pair.nodes)} is not what it replaced: {verdict.reason}\n\n{script}")
        for cluster, verdict, pair in failed:
            logger.warning("%s is taken back: %s", cluster.node, verdict.reason)
            outcome.rolled_back[cluster.node] = (cluster, verdict, pair.nodes)
            outcome.state.restore(cluster.value)
        outcome.emitted = emit(outcome.captured, outcome.state)
        outcome.after = outcome.state.total


def _script(pair: Pair, symbols: Symbols, options: Options, probe: Probe | None = None) -> str:
    example = {s: hint for s, (_, _, hint) in symbols.items()}
    return reproduction(pair.original, pair.replacement, pair.inputs, options.seed, example, probe)


def exactness(emitted: Emitted, cluster: Cluster) -> str:
    """Whether a rewrite uses a structure that holds within half a unit in the last place of each weight only."""
    from fxconv.passes.recover import to_rounding

    found = any(to_rounding(emitted.parameters[name]) for name in parameters_of(emitted, cluster))
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
    fits = True
    for name in parameters_of(emitted, cluster):
        value = emitted.gm
        for part in name.split("."):
            value = getattr(value, part)
        exact[name], stored[name] = emitted.parameters[name].tensor(), value.detach()  # type: ignore[operator]
        dtype = stored[name].dtype
        fits &= emitted.parameters[name] not in emitted.unfit
    return check_rounding(exact, stored, dtype, fits=fits)


def _release(emitted: Emitted, cluster: Cluster) -> None:
    """Forget the float64 weights of a rewrite that has been checked."""
    for name in parameters_of(emitted, cluster):
        emitted.parameters[name].release()


def find_guilty(
    model: Any, captured: Captured, options: Options, outcome: Outcome, verdict: ModelVerdict
) -> tuple[Outcome, Any, ModelVerdict | None]:
    """The whole model fails although every rewrite passed: bisect, and take back the guilty ones.

    What is taken back may leave a smaller rewrite in its place, which may be to blame as well: once more, then.
    """
    result: Any = None
    found: ModelVerdict | None = verdict
    for _ in range(len(outcome.state.originals)):
        clusters = outcome.emitted.clusters
        guilty = _bisect(model, captured, options, outcome)
        if options.verify == "raise" and guilty:
            raise VerificationError(_accusation(verdict, [clusters[i] for i in sorted(guilty)], captured, options, outcome))
        for i in sorted(guilty):
            c = clusters[i]
            why = Verdict("failed", f"the whole model is wrong with it: {verdict.reason}")
            outcome.rolled_back[c.node] = (c, why, outcome.pairs.get(c.node, (c.node,)))
            outcome.verdicts.pop(c.node, None)
            outcome.state.restore(c.value)
        if guilty:
            outcome.emitted = emit(captured, outcome.state)
            outcome.after = outcome.state.total
            verify_clusters(outcome, symbol_ranges(captured.gm), options)
        result = hand_back(captured, outcome.emitted.gm)
        found = verify_model(model, result, captured, options, outcome.emitted)
        if not guilty or found is None or found.status != "failed":
            break
        verdict = found
    return outcome, result, found


def _bisect(model: Any, captured: Captured, options: Options, outcome: Outcome) -> frozenset[int]:
    """The clusters without which the whole model passes; the state is as it was afterwards."""
    state, clusters = outcome.state, outcome.emitted.clusters
    kept = {v: state.snapshot(v) for v in state.originals if not state.unchanged(v)}

    def passes(active: frozenset[int]) -> bool:
        names = {clusters[i].node for i in active}
        for c in clusters:
            if c.node not in names:
                state.restore(c.value)
        found = emit(captured, state)
        while extra := [c for c in found.clusters if c.node not in names]:
            for c in extra:  # smaller rewrites in the place of those that were taken back
                state.restore(c.value)
            found = emit(captured, state)
        verdict = verify_model(model, hand_back(captured, found.gm), captured, options, found)
        for v, how in kept.items():
            state.reinstate(v, how)
        return verdict is None or verdict.status != "failed"

    return bisect(passes, len(clusters))


def _accusation(verdict: ModelVerdict, guilty: list[Cluster], captured: Captured, options: Options, outcome: Outcome) -> str:
    """Which rewrites are to blame, and a script that runs the smallest of them."""
    cutter = Cutter(outcome.state, captured.gm, outcome.emitted)
    pair = min((cutter.cut(c) for c in guilty), key=lambda p: len(p.nodes))
    names = ", ".join(c.node for c in guilty)
    what = f"the rewritten model is {verdict}; the rewrite to blame: {names}; what the smallest one replaces"
    return f"{what}: {', '.join(pair.nodes)}\n\n{_script(pair, symbol_ranges(captured.gm), options)}"


class _Exact(Mapping[str, torch.Tensor]):
    """The float64 weights of an emitted graph by name; each is made when it is asked for, and kept by nobody."""

    def __init__(self, emitted: Emitted, names: Iterable[str]) -> None:
        self.kernels = {name: emitted.parameters[name] for name in names if name in emitted.parameters}

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self.kernels[name].tensor()
        self.kernels[name].release()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.kernels)

    def __len__(self) -> int:
        return len(self.kernels)


def verify_model(
    model: Any, result: Any, captured: Captured, options: Options, emitted: Emitted | None = None
) -> ModelVerdict | None:
    """The whole result against the whole original; None where options or the lack of inputs forbid it.

    Where the original's output hangs on rounding (detections that are sorted and cut off), its own dtype can tell
    nothing. With the float64 weights of ``emitted``, unrounded, float64 can: then that is what is compared.
    """
    if options.verify == "off" or not (captured.args or captured.kwargs):
        return None
    a, b = as_module(model), as_module(result)
    exact, unrewritten = None, emitted is not None and not emitted.clusters
    if emitted and all(exactness(emitted, c) == "exact" for c in emitted.clusters):
        exact = _Exact(emitted, dict(b.named_parameters()))
    return check_model(
        a, b, captured.args, captured.kwargs, exact=exact, exact_if_unstable=True, unrewritten=unrewritten, seed=options.seed
    )
