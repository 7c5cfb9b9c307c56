"""Every torchvision model and a small variant of every timm family: captured how, transformed, verified, at what cost.

    python -m benchmarks.sweep                          # everything that its JSON does not have yet
    python -m benchmarks.sweep --only 'resnet|swin'     # names that match
    python -m benchmarks.sweep --subset ci --jobs 2     # some that differ
    python -m benchmarks.sweep --table                  # the table of what is there

Each model runs in a process of its own under a limit of time and of memory, so that a crash or a hang is one row.
Weights are random, every parameter and statistic (`benchmarks.randomise`). Columns: how it was captured (export,
symbolic, parts, or the refusal of a quantised model); the verdict on the whole; whether the result is right at batch 3;
multiply-adds and launches before → after; the share of affine operators that were lifted (`benchmarks.lifted` says what
counts); seconds of capture, and of everything else that `transform` does, verification included.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.families import CI, TIMM
from benchmarks.lifted import Tally, recording
from benchmarks.randomise import randomise, settle

DEFAULT_JSON = Path("benchmarks/results/sweep.json")
MARK = "SWEEP-ROW "
Inputs = tuple[Any, ...]
STARVED = r"allocate memory|MemoryError"
"""How torch and Python say that there was not enough of it."""

DETECTION = r"rcnn|retinanet|fcos|ssd"
"""These run in float64: which boxes they keep hangs on rounding, so that in float32 no two runs can be compared."""


# ----------------------------------------------------------------- models and inputs


def names() -> list[str]:
    """Every model of the sweep, as ``library:name``."""
    import torchvision

    found = [f"torchvision:{n}" for n in torchvision.models.list_models()]
    return found + [f"timm:{n}" for n in TIMM]


def make(name: str) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """The model in eval mode with random weights, and its inputs at a batch size."""
    library, _, short = name.partition(":")
    torch.manual_seed(0)
    model, inputs = _torchvision(short) if library == "torchvision" else _timm(short)
    if "quantized" in short and library == "torchvision":
        return model.eval(), inputs
    model = randomise(model)
    return (model.double() if re.search(DETECTION, name) else model), inputs


def _torchvision(name: str) -> tuple[nn.Module, Callable[[int], Inputs]]:
    import torchvision

    keywords: dict[str, Any] = {"weights": None}
    side = 64
    if name.startswith("quantized_"):
        keywords["quantize"] = True
    if re.match(r"googlenet|inception", name):
        keywords |= {"init_weights": False, "aux_logits": False}
        side = 96 if name.startswith("inception") else 64
    if name.startswith("vit_"):
        side = keywords["image_size"] = {"vit_b_32": 64, "vit_l_32": 64, "vit_h_14": 42}.get(name, 48)
    if name == "maxvit_t":
        keywords["input_size"], side = (224, 224), 224
    if re.search(r"deeplab|fcn_|lraspp|rcnn|retinanet|fcos|ssd", name):
        keywords["weights_backbone"] = None
    if re.search(DETECTION, name):
        if not name.startswith("ssd"):
            keywords |= {"min_size": 96, "max_size": 128}
        if "rcnn" in name:  # with random weights every proposal looks like an object, and is cut out a mask for
            keywords |= {"rpn_post_nms_top_n_test": 64, "box_detections_per_img": 4}
        return torchvision.models.get_model(name, **keywords), _images((3, 96, 128))
    model = torchvision.models.get_model(name, **keywords)
    if name.startswith("raft"):
        return model, lambda n: (torch.rand(n, 3, 128, 136) * 2 - 1, torch.rand(n, 3, 128, 136) * 2 - 1)
    if re.match(r"r3d|mc3|r2plus1d|s3d|swin3d|mvit", name):
        frames, side = (16, 224) if name.startswith(("mvit", "s3d")) else (4, 64)
        return model, lambda n: (torch.randn(n, 3, frames, side, side),)
    return model, lambda n: (torch.randn(n, 3, side, side),)


def _images(shape: tuple[int, ...]) -> Callable[[int], Inputs]:
    return lambda n: ([torch.rand(shape, dtype=torch.float64) for _ in range(n)],)


def _timm(name: str) -> tuple[nn.Module, Callable[[int], Inputs]]:
    import timm

    model = timm.create_model(name)
    channels, default, _ = model.default_cfg["input_size"]
    fixed = model.default_cfg.get("fixed_input_size", False)
    floor = (model.default_cfg.get("min_input_size") or (3, 32, 32))[1]
    sides = [default] if fixed else [s for s in (96, 128, 160, 192, 224) if floor <= s < default] + [default]
    for side in sides:
        try:
            with torch.no_grad():
                model.eval()(torch.randn(2, channels, side, side))
        except Exception:
            continue
        return model, lambda n, side=side: (torch.randn(n, channels, side, side),)  # type: ignore[misc]
    raise RuntimeError(f"{name} runs at none of {sides}")


# ----------------------------------------------------------------- one model


def measure(name: str) -> dict[str, Any]:
    """The row of one model. Refusals and failures are rows as well."""
    import fxconv

    transform_module = sys.modules["fxconv.transform"]
    row: dict[str, Any] = {"model": name}
    try:
        model, inputs = make(name)
    except Exception as error:
        return row | {"status": "not made", "reason": _line(error)}
    example = inputs(1) if _is_list(inputs) else inputs(2)
    if not isinstance(model, torch.jit.ScriptModule) and "quantized" not in name:
        settle(model, *inputs(2))
    tally = Tally()
    plain = transform_module.rewrite
    transform_module.rewrite = recording(plain, tally)  # type: ignore[attr-defined]
    clock = time.perf_counter()
    try:
        result = fxconv.transform(model, example)
    except fxconv.CaptureError as error:
        return row | {"status": "refused", "reason": _line(error)}
    except Exception as error:
        return row | {"status": "crash", "reason": _line(error), "trace": traceback.format_exc()[-2000:]}
    finally:
        transform_module.rewrite = plain  # type: ignore[attr-defined]
    total = time.perf_counter() - clock
    report = fxconv.report(result)
    for note in report.capture.notes if report.capture.how == "parts" else ():
        if found := re.match(r"(\S+) stays as it is: (.*)", note):
            tally.opaque(model.get_submodule(found[1]), found[2])
    verification = report.verification
    batch = _verify(model, result, inputs(3))
    return row | {
        "status": "transformed",
        "captured": report.capture.how,
        "verified": bool(report.verified),
        "verdict": verification["status"],
        "reason": verification.get("reason", ""),
        "rewrites": len(report.applied),
        "rolled_back": [f"{'+'.join(r.nodes)[:80]}: {r.verdict.get('reason', '')[:160]}" for r in report.rolled_back],
        "batch3": batch,
        "macs": [report.cost_before.macs, report.cost_after.macs],
        "launches": [report.cost_before.launches, report.cost_after.launches],
        "lifted": tally.lifted,
        "not_lifted": dict(tally.missed.most_common()),
        "share": tally.share,
        "capture_seconds": report.capture.seconds,
        "other_seconds": total - report.capture.seconds,
        "timings": dict(report.timings),
        "notes": [n for n in report.capture.notes if "attempt failed" in n or "fixed" in n][:3],
    }


def _is_list(inputs: Callable[[int], Inputs]) -> bool:
    return isinstance(inputs(1)[0], list)


def _verify(model: nn.Module, result: Any, args: Inputs) -> str:
    import fxconv

    try:
        verdict = fxconv.verify(model, result, args)
    except Exception as error:
        return f"raised {_line(error)}"
    return "right" if verdict else f"{verdict.status}: {verdict.reason}"[:200]


def _line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:300]}"


def work(name: str, gigabytes: float, measure: Callable[[str], dict[str, Any]]) -> None:
    """Print the row of one model: what a process of its own does."""
    size = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(MARK + json.dumps(measure(name)), flush=True)


# ----------------------------------------------------------------- all models


def run(name: str, seconds: float, gigabytes: float, module: str = "benchmarks.sweep") -> dict[str, Any]:
    """The row of one model, measured in a process of its own by the module's ``--one``, which prints it behind `MARK`."""
    command = [sys.executable, "-m", module, "--one", name, "--memory", str(gigabytes)]
    clock = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"model": name, "status": "timeout", "reason": f"more than {seconds:.0f} s", "wall": seconds}
    wall = time.perf_counter() - clock
    rows = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not rows:
        tail = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
        return {"model": name, "status": "crash", "reason": f"exit code {done.returncode}: {tail}", "wall": wall}
    row: dict[str, Any] = json.loads(rows[-1][len(MARK) :])
    return row | {"wall": wall}


def sweep(
    chosen: Iterable[str],
    path: Path | None,
    *,
    seconds: float,
    gigabytes: float,
    jobs: int,
    minutes: float,
    measured: Callable[[str, float, float], dict[str, Any]] | None = None,
    say: Callable[[dict[str, Any]], str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Rows of the chosen models by name: those in the file at ``path``, and new ones, written to it one by one.

    No model is started after ``minutes``. ``measured`` gives a row, as `run` does, of which ``say`` makes a word. A model for
    which ``gigabytes`` were not enough is measured again at the end, by itself, with nine tenths of the machine's.
    """
    measured, say = measured or run, say or outcome
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    end = time.monotonic() + 60 * minutes

    def one(name: str, most: float = gigabytes) -> None:
        if time.monotonic() > end:
            return
        row = measured(name, seconds, most)
        rows[name] = row
        print(f"{name}: {say(row)}, {row.get('wall', 0):.0f} s", file=sys.stderr, flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dict(sorted(rows.items())), indent=1))

    todo = [n for n in chosen if n not in rows]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, todo))
    whole = 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    for name in todo:
        if name in rows and re.search(STARVED, json.dumps(rows[name])) and whole > gigabytes:
            one(name, whole)
    return rows


def outcome(row: dict[str, Any]) -> str:
    """One word on a row: "ok", "refused", or what is wrong with it."""
    if row["status"] != "transformed":
        expected = row["status"] == "refused" and "quantised" in row["reason"]
        return "refused" if expected else f"{row['status']} ({row.get('reason', '')})"
    if not row["verified"]:
        return f"{row['verdict']} ({row['reason']})"
    if row["batch3"] != "right":
        if row["batch3"].startswith("not verifiable"):
            return row["batch3"]
        return f"wrong at batch 3 ({row['batch3']})"
    return "rolled back" if row["rolled_back"] else "ok"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Rows as text, with the totals."""
    lines = []
    for name, r in sorted(rows.items()):
        if r["status"] != "transformed":
            lines.append([name, r["status"], r.get("reason", "")[:60]])
            continue
        (m0, m1), (l0, l1) = r["macs"], r["launches"]
        macs, launches = f"{m0 / 1e6:.1f} -> {m1 / 1e6:.1f}", f"{l0:.0f} -> {l1:.0f}"
        took = [r["capture_seconds"], r["other_seconds"]]
        lines.append([name, r["captured"], outcome(r)[:60], macs, launches, f"{100 * r['share']:.1f}", *took])
    heads = ["model", "captured", "outcome", "M multiply-adds", "launches", "lifted %", "capture s", "other s"]
    return tabulate(lines, heads, floatfmt=".1f") + "\n\n" + summary(rows)


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """Totals: outcomes, the share of affine operators lifted, and the reasons for the rest."""
    done = [r for r in rows.values() if r["status"] == "transformed"]
    kinds = Counter(outcome(r).split(" (")[0] for r in rows.values())
    how = Counter(r["captured"] for r in done)
    lifted = sum(r["lifted"] for r in done)
    missed: Counter[str] = Counter()
    for r in done:
        missed.update(r["not_lifted"])
    total = lifted + sum(missed.values())
    ratios = sorted(r["other_seconds"] / max(r["capture_seconds"], 1e-9) for r in done)
    lines = [
        f"{len(rows)} models: " + ", ".join(f"{n} {k}" for k, n in kinds.most_common()),
        "captured: " + ", ".join(f"{n} {k}" for k, n in how.most_common()),
        f"affine operators lifted: {lifted} of {total} ({100 * lifted / max(total, 1):.2f} %)",
        *(f"    not lifted: {n} {reason}" for reason, n in missed.most_common(15)),
    ]
    if ratios:
        lines.append(f"transform without capture ÷ capture, median: {ratios[len(ratios) // 2]:.2f}")
    return "\n".join(lines)


def options(description: str | None, path: Path, gigabytes: float) -> argparse.ArgumentParser:
    """The options of everything that measures all models, each in a process of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a regular expression on names")
    parser.add_argument("--json", type=Path, default=path, help="rows are read from here and written to it")
    parser.add_argument("--seconds", type=float, default=600, help="limit per model")
    parser.add_argument("--memory", type=float, default=gigabytes, help="limit per model in GiB")
    parser.add_argument("--minutes", type=float, default=360, help="no model is started after this")
    parser.add_argument("--table", action="store_true", help="print what is there and measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = options(__doc__, DEFAULT_JSON, 8)
    parser.add_argument("--subset", choices=["all", "ci"], default="all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure the chosen models anew")
    given = parser.parse_args()
    if given.one:
        work(given.one, given.memory, measure)
        return 0
    chosen = [n for n in (CI if given.subset == "ci" else names()) if re.search(given.only or "", n)]
    if given.again and given.json.exists():
        kept = {k: v for k, v in json.loads(given.json.read_text()).items() if k not in chosen}
        given.json.write_text(json.dumps(kept, indent=1))
    rows = sweep(
        [] if given.table else chosen,
        given.json, seconds=given.seconds, gigabytes=given.memory, jobs=given.jobs, minutes=given.minutes,
    )  # fmt: skip
    print(table(rows))
    return 0 if all(outcome(rows[n]) in ("ok", "refused") for n in chosen if n in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
