"""``python -m benchmarks.never_worse``: is any model of the sweep slower after fxconv than before?

    python -m benchmarks.never_worse                    # every model that its JSON does not have yet
    python -m benchmarks.never_worse --only 'timm:res'  # names that match
    python -m benchmarks.never_worse --table            # what is there

Original ÷ result on one thread, paired and interleaved, in eager PyTorch, ONNX Runtime and OpenVINO, at the sweep's inputs
with a batch of 1; the median over the pairs and its 95 % interval. A model is worse on an engine where the whole interval
lies below 0.98. Where in memory an engine puts its weights is worth some percent, the same model made twice included; so
such a ratio is measured again on sides made anew, in turn first and second, and then the median over those, with its
interval, is what counts. Each model runs in a process of its own. What is timed is not verified here: `benchmarks.sweep`
does that.
"""

from __future__ import annotations

import copy
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.peers import PEERS, NotApplicable, Runner
from benchmarks.sweep import DETECTION, make, names, options, run, settle, sweep, work
from fxconv.timing import median_interval, paired

DEFAULT_JSON = Path("benchmarks/results/never_worse.json")
ENGINES = ("eager", "onnxruntime", "openvino")
LEAST = 0.98
"""Where the upper end of the interval may not lie below."""

SECONDS = 2.0

INSTANCES = 7
"""How often both sides are made anew where a ratio looks bad: the fewest whose extremes are a 95 % interval, and one more."""


def measure(name: str) -> dict[str, Any]:
    """Per engine, the ratio and its interval, or why there is none."""
    import fxconv

    row: dict[str, Any] = {"model": name}
    try:
        model, inputs = make(name)
        settle(model, *inputs(2))
        args = inputs(1)
        if re.search(DETECTION, name):  # in float64 there, since what is detected hangs on the last digit
            model, args = model.float(), pytree.tree_map(lambda image: image.float(), args)
        result = fxconv.transform(model, args, verify="off")
    except Exception as error:  # whatever a model raises: the sweep has it as a row
        return row | {"status": f"not transformed: {type(error).__name__}"}
    for engine in ENGINES:
        try:
            with torch.no_grad():
                sides = PEERS[engine](model, args), PEERS[engine](result, args)
                row[engine] = _time(*sides, args, SECONDS)
                if row[engine]["high"] < LEAST:
                    del sides
                    row[engine] = _made_anew(engine, model, result, args)
        except NotApplicable as why:
            row[engine] = {"skipped": str(why)[:200]}
        except Exception as error:  # an engine that does not run the model
            row[engine] = {"skipped": f"{type(error).__name__}: {error}"[:200]}
    return row | {"status": "measured", "rewrites": len(fxconv.report(result).applied)}


def _made_anew(engine: str, model: nn.Module, result: nn.Module, args: tuple[Any, ...]) -> dict[str, float]:
    """The ratio over several instances of both sides, and the interval of its median over them."""
    found = []
    for i in range(INSTANCES):
        order = (model, result) if i % 2 else (result, model)
        made = {id(m): PEERS[engine](copy.deepcopy(m), args) for m in order}
        found.append(_time(made[id(model)], made[id(result)], args, SECONDS))
    ratios = sorted(f["ratio"] for f in found)
    low, high = median_interval(len(ratios))
    return {k: statistics.median(f[k] for f in found) for k in found[0]} | {"low": ratios[low], "high": ratios[high]}


def _time(before: Runner, after: Runner, args: tuple[Any, ...], seconds: float) -> dict[str, float]:
    found = paired(before, after, args, budget_s=seconds, min_pairs=15, max_pairs=1000, clock=time.process_time)
    return {k: float(found[k]) for k in ("ratio", "low", "high", "before_s", "after_s")}


def worse(row: dict[str, Any]) -> list[str]:
    """The engines on which a model got slower."""
    return [e for e in ENGINES if row.get(e, {}).get("high", 1.0) < LEAST]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Every model that was measured, and what it comes to."""
    lines = []
    done = [r for r in rows.values() if r["status"] == "measured"]
    for name, r in sorted(rows.items()):
        if r["status"] == "measured":
            lines.append([name, r["rewrites"], *(_ratio(r[e]) for e in ENGINES), ", ".join(worse(r))])
    out = [tabulate(lines, ["model", "rewrites", *ENGINES, "worse on"], disable_numparse=True), ""]
    for e in ENGINES:
        ratios = sorted(r[e]["ratio"] for r in done if "ratio" in r[e])
        if ratios:
            bad = [r["model"] for r in done if e in worse(r)]
            median = ratios[len(ratios) // 2]
            out.append(f"{e}: {len(ratios)} models, median {median:.2f}, least {ratios[0]:.2f}; worse: {', '.join(bad) or 'none'}")
    return "\n".join(out)


def _ratio(t: dict[str, Any]) -> str:
    return f"{t['ratio']:.2f} ({t['low']:.2f} to {t['high']:.2f})" if "ratio" in t else t.get("skipped", "")[:40]


def _say(row: dict[str, Any]) -> str:
    return " ".join([*(_ratio(row.get(e, {})) for e in ENGINES), row["status"]])


def main() -> int:
    given = options(__doc__, DEFAULT_JSON, 12).parse_args()
    if given.one:
        work(given.one, given.memory, measure)
        return 0
    chosen = [n for n in names() if re.search(given.only or "", n) and "quantized" not in n]
    rows = sweep(
        [] if given.table else chosen,
        given.json, seconds=given.seconds, gigabytes=given.memory, jobs=1, minutes=given.minutes,
        measured=partial(run, module="benchmarks.never_worse"), say=_say,
    )  # fmt: skip
    print(table(rows))
    return int(any(worse(r) for r in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
