"""``python -m benchmarks.compile_time``: what a transform costs, stage by stage, against nodes and against parameters.

The models are stacks of residual blocks (two convolutions and two BatchNorms each, 14 nodes), and stacks of Linears
with one activation between them for the parameters. Each size runs in a process of its own, whose peak memory is the
process's, less what it held before the transform. "But capture and verify" is all the rest of a transform: lift, search,
emit, and what hands the result back and reports. "Collecting" is what Python's garbage collector takes to free what the
transform made, at some time after it.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

STAGES = ("capture", "lift", "search", "emit", "verify rewrites", "verify model")
NODES = (10, 30, 100, 300, 1000, 3000, 10000)
PARAMETERS = (1_000_000, 10_000_000, 100_000_000, 500_000_000)


class Block(nn.Module):
    """A residual block of 8 channels: 6 operators."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8, H, W] → the same."""
        y = torch.relu(self.norm_a(self.a(x)))
        return torch.relu(self.norm_b(self.b(y)) + x)


def stack(nodes: int) -> tuple[nn.Module, Tensor]:
    """A stack of blocks with about as many operators."""
    return nn.Sequential(*(Block() for _ in range(max(1, round(nodes / 7))))), torch.randn(1, 8, 8, 8)


def wide(parameters: int) -> tuple[nn.Module, Tensor]:
    """Eight Linears with about as many parameters, and BatchNorms to fold into them."""
    n = round((parameters / 8) ** 0.5)
    layers = [layer for _ in range(8) for layer in (nn.Linear(n, n), nn.BatchNorm1d(n), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(2, n)


def measure(model: nn.Module, x: Tensor, verify: str) -> dict[str, Any]:
    """Seconds of each stage, nodes, parameters, and peak MiB above what was held before."""
    import fxconv

    torch.set_num_threads(1)
    fxconv.transform(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), torch.randn(1, 3, 4, 4))  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = fxconv.transform(model.eval(), x, verify=verify)
    took = time.perf_counter() - start
    report = fxconv.report(result)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    start = time.perf_counter()
    gc.collect()
    collecting = time.perf_counter() - start
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "launches": report.cost_before.launches,
        "seconds": took,
        "stages": {name: report.timings.get(name, 0.0) for name in STAGES},
        "collecting": collecting,
        "peak_mib": peak / 1024,
        "status": report.verification["status"],
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    parser.add_argument("--nodes", default=",".join(map(str, NODES)), help="comma-separated sizes; '' for none")
    parser.add_argument("--parameters", default=",".join(map(str, PARAMETERS)), help="likewise")
    parser.add_argument("--verify", default="rollback", choices=("rollback", "off"))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, size = arguments.one
        model, x = (stack if kind == "nodes" else wide)(int(size))
        print(json.dumps(measure(model, x, arguments.verify)))
        return
    rows: list[dict[str, Any]] = []
    for kind in ("nodes", "parameters"):
        for size in filter(None, getattr(arguments, kind).split(",")):
            command = [sys.executable, "-m", "benchmarks.compile_time", "--verify", arguments.verify]
            command += ["--one", kind, size]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sys.stderr.write(f"{kind} {size}: {run.stderr.strip().splitlines()[-1]}\n")
                continue
            rows.append({"kind": kind, "size": int(size), **json.loads(run.stdout.strip().splitlines()[-1])})
            sys.stderr.write(f"{kind} {size}: {rows[-1]['seconds']:.1f} s\n")
    for kind in ("nodes", "parameters"):
        _print(kind, [r for r in rows if r["kind"] == kind])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _print(kind: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    table = []
    for r in rows:
        others = sum(r["stages"][name] for name in ("capture", "verify rewrites", "verify model"))
        table.append(
            [f"{r['size']:,}", f"{r['launches']:,}", f"{r['parameters'] / 1e6:.1f} M"]
            + [f"{r['stages'][name]:.2f}" for name in STAGES]
            + [f"{r['seconds'] - others:.2f}", f"{r['collecting']:.2f}", f"{r['peak_mib']:.0f}", r["status"]]
        )
    headers = [kind, "launches", "parameters", *STAGES, "but capture and verify", "collecting", "peak, MiB", ""]
    print(tabulate(table, headers=headers, disable_numparse=True), "\n")


if __name__ == "__main__":
    main()
