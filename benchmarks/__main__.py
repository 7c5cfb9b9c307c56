"""``python -m benchmarks``: fxconv against everything a user would pick instead, and on top of it.

Every comparison is paired: both sides run turn about in one process, and the ratio of each pair is taken first, then
the median of the ratios with its 95 % interval. On one thread the clock is the process's processor time, which other
programs on the machine don't take; on several it is the wall's.

Columns: *alone* is eager ÷ peer, for the original model; *on top* is peer ÷ (peer on fxconv's result): what fxconv
adds. *by hand* is what a perfect rewrite by hand was worth on the machine that the goals are from, and *by hand, here*
what it is worth in this run, for the models that come with one; where it is there, it is the goal. *result ÷ by hand*
is the time of fxconv's result over the hand rewrite's.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxconv
from benchmarks.models import MODELS, make
from benchmarks.peers import ONLY_ALONE, PEERS, NotApplicable, Runner
from fxconv.timing import paired


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparisons asked for; print tables, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: all)")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated (default: all)")
    parser.add_argument("--threads", default=f"1,{torch.get_num_threads()}", help="comma-separated (default: 1 and all)")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each comparison (default: 6)")
    parser.add_argument("--json", default="benchmarks.json", metavar="FILE", help="where the numbers go")
    arguments = parser.parse_args(argv)
    threads = list(dict.fromkeys(int(t) for t in arguments.threads.split(",")))
    rows: list[dict[str, Any]] = []
    for name in arguments.models.split(","):
        rows += _model(name, arguments.peers.split(","), threads, arguments.seconds)
        _save(Path(arguments.json), rows)
    for count in threads:
        print(f"\n{count} thread{'s' * (count > 1)}, batch 1: the first time ÷ the second, median (95 % interval)")
        print(table([r for r in rows if r["threads"] == count]))


def _model(name: str, peers: Sequence[str], threads: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """All comparisons for one model."""
    torch.set_num_threads(threads[0])
    model, args = make(name)
    start = time.perf_counter()
    result = fxconv.transform(model, args)
    by_hand = MODELS[name].by_hand
    twin = by_hand(model) if by_hand is not None else None
    if twin is not None:
        _agree(model, twin, args)
    report = fxconv.report(result)
    _say(f"{name}: transformed in {time.perf_counter() - start:.0f} s, {report.verification['status']}")
    rows: list[dict[str, Any]] = []
    for count in threads:
        torch.set_num_threads(count)
        for peer in peers:
            row: dict[str, Any] = {"model": name, "peer": peer, "threads": count, "goal": None}
            row["verified"] = report.verified
            if count == 1:
                row["goal"] = MODELS[name].goals.get(peer)
            try:
                before = PEERS[peer](model, args)
                if peer != "eager":
                    row["alone"] = _time(model, before, args, seconds)
                if peer not in ONLY_ALONE:
                    after = PEERS[peer](result, args)
                    row["on_top"] = _time(before, after, args, seconds)
                    if twin is not None:
                        hand = PEERS[peer](twin, args)
                        row["by_hand"] = _time(before, hand, args, seconds)
                        row["against_hand"] = _time(after, hand, args, seconds)
                else:
                    row["against"] = _time(before, result, args, seconds)
            except NotApplicable as why:
                row["skipped"] = str(why)
            _say(f"  {peer}, {count}: {_ratio(row.get('on_top') or row.get('against'))} {row.get('skipped', '')}")
            rows.append(row)
    return rows


def _agree(model: nn.Module, twin: nn.Module, args: tuple[Any, ...]) -> None:
    """A hand rewrite that computes something else is worth nothing."""
    with torch.no_grad():
        want, got = model(*args), twin(*args)
    if not torch.allclose(want, got, rtol=1e-4, atol=1e-5 * float(want.abs().max())):
        raise AssertionError(f"the rewrite by hand is off by {float((want - got).abs().max()):.3g}")


def _time(before: Runner, after: Runner, args: tuple[Any, ...], seconds: float) -> dict[str, Any]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, Any] = paired(before, after, args, budget_s=seconds, min_pairs=15, max_pairs=1000, clock=clock)
    return {**found, "clock": clock.__name__}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each model and peer."""
    out = []
    for row in rows:
        on_top = row.get("on_top") or row.get("against")
        hand = row.get("by_hand")
        goal = hand["ratio"] if hand else row["goal"]
        reached = ""
        if goal and on_top:
            reached = "yes" if on_top["ratio"] >= 0.93 * goal else "NO"
        versus = "peer ÷ fxconv in eager" if "against" in row else ""
        note = row.get("skipped") or versus
        here = [_ratio(hand), _ratio(row.get("against_hand"))]
        out.append([row["model"], row["peer"], _ratio(row.get("alone")), _ratio(on_top), row["goal"] or "", *here, reached, note])
    hands = ["by hand", "by hand, here", "result ÷ by hand"]
    return tabulate(out, headers=["model", "peer", "alone", "on top", *hands, "within 7 %", ""], disable_numparse=True)


def _ratio(timing: dict[str, Any] | None) -> str:
    return f"{timing['ratio']:.2f} ({timing['low']:.2f} to {timing['high']:.2f})" if timing else ""


def _save(path: Path, rows: list[dict[str, Any]]) -> None:
    about = {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
