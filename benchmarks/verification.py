"""What verifying costs, in forward passes, and how much memory it takes.

``python -m benchmarks.verification [--models resnet50,convnext_base] [--size 224]``

Time is in units of one pass of the original at batch 1 in the dtype of the check: the probes of all rewrites together
run in float64, the whole-model check in both. Passes are counted by the verifier itself. Memory is the growth of the
process's peak above what the original and the result take, in units of one float64 model.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn

import fxconv
from fxconv import sources

MODELS = "resnet50,convnext_base"


def seconds(model: nn.Module, x: torch.Tensor, count: int = 5) -> float:
    """One forward pass: the median of a few."""
    found = []
    with torch.no_grad():
        for _ in range(count + 1):
            start = time.perf_counter()
            model(x)
            found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def peak() -> int:
    """The most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, size: int) -> dict[str, Any]:
    """The shares of one model."""
    model = sources.load(f"torchvision:{name}").model
    assert isinstance(model, nn.Module)
    x = torch.randn(1, 3, size, size)
    fxconv.transform(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), torch.randn(1, 3, 4, 4))  # imports
    weights = sum(p.numel() * 8 for p in (*model.parameters(), *model.buffers()))
    one = seconds(model, x)
    one64 = seconds(model.double(), x.double())
    model.float()
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    module = sys.modules["fxconv.transform"]  # the name in the package is the function
    for stage in ("verify_clusters", "verify_model"):
        inner = getattr(module, stage)

        def call(*args: Any, inner: Any = inner, stage: str = stage) -> Any:
            before[stage] = peak()
            out = inner(*args)
            after[stage] = peak()
            return out

        setattr(module, stage, call)
    report = fxconv.report(fxconv.transform(model, x))
    passes = report.verification["passes"]
    return {
        "model": name,
        "rewrites": len(report.applied),
        "probes": report.timings["verify rewrites"] / one64,
        "passes": passes,
        "memory of probes": (after["verify_clusters"] - before["verify_clusters"]) / weights,
        "memory of the model's check": (after["verify_model"] - before["verify_model"]) / weights,
        "one pass": (one, one64),
        "verified": report.verified,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    names = options.models.split(",")
    if len(names) > 1:  # a process for each: the peak of one would hide that of the next
        for name in names:
            command = [sys.executable, "-m", "benchmarks.verification", "--models", name, "--size", str(options.size)]
            subprocess.run([*command, "--threads", str(options.threads)], check=True)
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = measure(names[0], options.size)
    passes = ", ".join(f"{side} {count:g}" for side, count in found["passes"].items())
    one, one64 = found["one pass"]
    print(f"{found['model']}: {found['rewrites']} rewrites, verified: {found['verified']}")
    print(f"  one pass at batch 1: {one:.3f} s, in float64 {one64:.3f} s")
    memory = [f"{found[key]:.2f} float64 models of memory" for key in ("memory of probes", "memory of the model's check")]
    print(f"  probes of all rewrites: {found['probes']:.1f} float64 passes, {memory[0]}")
    print(f"  the whole model: {passes} samples; {memory[1]}")


if __name__ == "__main__":
    main()
