"""``python -m benchmarks.never_worse``: is any model of the sweep slower after fxconv than before?

    python -m benchmarks.never_worse                    # every model that its JSON does not have yet
    python -m benchmarks.never_worse --only 'timm:res'  # names that match
    python -m benchmarks.never_worse --table            # what is there

Original ÷ result on one thread, paired and interleaved, in eager PyTorch, ONNX Runtime and OpenVINO, at the sweep's inputs
with a batch of 1; the median over the pairs and its 95 % interval. A model is worse on an engine where the whole interval
lies below 0.98: such a ratio is measured once more, three times as long, before it counts. Each model runs in a process of
its own. What is timed is not verified here: `benchmarks.sweep` does that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.peers import PEERS, NotApplicable, Runner
from benchmarks.sweep import DETECTION, make, names, run, settle, work
from fxconv.timing import paired

DEFAULT_JSON = Path("benchmarks/results/never_worse.json")
ENGINES = ("eager", "onnxruntime", "openvino")
LEAST = 0.98
"""Where the upper end of the interval may not lie below."""

SECONDS = 2.0


def measure(name: str) -> dict[str, Any]:
    """Per engine, the ratio and its interval, or why there is none."""
    import fxconv

    row: dict[str, Any] = {"model": name}
    try:
        model, inputs = make(name)
        settle(model, *inputs(2))
        args = inputs(1)
        result = fxconv.transform(model, args, verify="off")
    except Exception as error:  # whatever a model raises: the sweep has it as a row
        return row | {"status": f"not transformed: {type(error).__name__}"}
    for engine in ENGINES:
        try:
            with torch.no_grad():
                sides = PEERS[engine](model, args), PEERS[engine](result, args)
                row[engine] = _time(*sides, args, SECONDS)
                if row[engine]["high"] < LEAST:
                    row[engine] = _time(*sides, args, 3 * SECONDS)
        except NotApplicable as why:
            row[engine] = {"skipped": str(why)[:200]}
        except Exception as error:  # an engine that does not run the model
            row[engine] = {"skipped": f"{type(error).__name__}: {error}"[:200]}
    return row | {"status": "measured", "rewrites": len(fxconv.report(result).applied)}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a regular expression on names")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, help="rows are read from here and written to it")
    parser.add_argument("--seconds", type=float, default=600, help="limit per model")
    parser.add_argument("--memory", type=float, default=12, help="limit per model in GiB")
    parser.add_argument("--minutes", type=float, default=360, help="no model is started after this")
    parser.add_argument("--table", action="store_true", help="print what is there and measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        work(given.one, given.memory, measure)
        return 0
    rows: dict[str, dict[str, Any]] = json.loads(given.json.read_text()) if given.json.exists() else {}
    end = time.monotonic() + 60 * given.minutes
    for name in [] if given.table else names():
        skip = "quantized" in name or re.search(DETECTION, name) or not re.search(given.only or "", name)
        if skip or name in rows or time.monotonic() > end:
            continue
        rows[name] = run(name, given.seconds, given.memory, "benchmarks.never_worse")
        said = " ".join(_ratio(rows[name].get(e, {})) for e in ENGINES)
        print(f"{name}: {said} {rows[name]['status']}", file=sys.stderr, flush=True)
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(dict(sorted(rows.items())), indent=1))
    print(table(rows))
    return int(any(worse(r) for r in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
