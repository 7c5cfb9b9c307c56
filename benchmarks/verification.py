"""What verifying costs, in forward passes, and how much memory a transform takes.

``python -m benchmarks.verification [--models resnet50,convnext_base] [--size 224]``

Time is processor time, in units of one pass of the original at batch 1 in float64: that of the probes of all rewrites
together, and of the bound on it, four such passes and four in the model's dtype. The passes of the whole-model check are
counted by the verifier itself. Memory is the growth of the process's peak from the end of capture to the end of the
transform, above what the result takes, in units of one float64 model; measured in a process of its own that gives
freed memory back to the system at once. Its bound is one float64 model and the largest rewritten region in float64,
weights and tensors, at the batch of two that everything is verified at.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
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
from fxconv.clusters import Cutter

MODELS = "resnet50,convnext_base"


def seconds(model: nn.Module, x: torch.Tensor, count: int = 5) -> float:
    """One forward pass: the median of a few, in processor time."""
    found = []
    with torch.no_grad():
        for _ in range(count + 1):
            start = time.process_time()
            model(x)
            found.append(time.process_time() - start)
    return statistics.median(found[1:])


def peak() -> int:
    """The most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(name: str, size: int) -> tuple[nn.Module, torch.Tensor]:
    """A model, and an input; all that is imported late has been."""
    model = sources.load(f"torchvision:{name}").model
    assert isinstance(model, nn.Module)
    fxconv.transform(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), torch.randn(1, 3, 4, 4))
    return model, torch.randn(1, 3, size, size)


def measure(name: str, size: int) -> dict[str, Any]:
    """The passes of one model."""
    model, x = load(name, size)
    wide, y = copy.deepcopy(model).double(), x.double()
    took: list[float] = []
    one: list[float] = []
    one64: list[float] = []
    stages = sys.modules["fxconv.transform"]  # the name in the package is the function
    verify_clusters = stages.verify_clusters

    def call(*args: Any) -> Any:
        for _ in range(2):
            one.append(seconds(model, x))
            one64.append(seconds(wide, y))
            if not took:
                start = time.process_time()
                out = verify_clusters(*args)
                took.append(time.process_time() - start)
        return out

    stages.verify_clusters = call
    report = fxconv.report(fxconv.transform(model, x))
    narrow, double = statistics.mean(one), statistics.mean(one64)
    return {
        "rewrites": len(report.applied),
        "verified": report.verified,
        "one pass": (narrow, double),
        "probes": took[0] / double,
        "bound": 4 + 4 * narrow / double,
        "passes": report.verification["passes"],
    }


def region(pair: Any) -> int:
    """Bytes of a rewritten region in float64: the weights of both sides, and the tensors of the one that has more."""
    weights = sum(t.numel() for side in (pair.original, pair.replacement) for t in side.state_dict().values())
    tensors = [0, 0]
    for i, side in enumerate((pair.original, pair.replacement)):
        for node in side.graph.nodes:
            val = node.meta.get("val")
            if isinstance(val, torch.Tensor) and node.op != "get_attr":
                tensors[i] += math.prod(int(n.node.hint) if isinstance(n, torch.SymInt) else n for n in val.shape)
    return 8 * (weights + max(tensors))


def memory(name: str, size: int) -> tuple[float, float]:
    """Float64 models of memory that a transform takes above the original and the result, and what its largest region is."""
    model, x = load(name, size)
    with torch.no_grad():
        model(x)
    weights = sum(p.numel() * 8 for p in (*model.parameters(), *model.buffers()))
    stages = sys.modules["fxconv.transform"]
    rewrite = stages.rewrite
    before: list[int] = []

    def call(*args: Any) -> Any:
        before.append(peak())
        return rewrite(*args)

    stages.rewrite = call
    cut, regions = Cutter.cut, list[int]()

    def measured(self: Cutter, cluster: Any) -> Any:
        pair = cut(self, cluster)
        regions.append(region(pair))
        return pair

    Cutter.cut = measured  # type: ignore[method-assign]
    result = fxconv.transform(model, x)
    old = {p.data_ptr() for p in model.parameters()}
    new = sum(p.numel() * p.element_size() for p in result.parameters() if p.data_ptr() not in old)
    return (peak() - before[0] - new) / weights, max(regions) / weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("time", "memory"), help="of one model, in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.only == "memory":
        used, largest = memory(options.models, options.size)
        print(f"  memory above both: {used:.2f} float64 models, of {1 + largest:.2f} allowed: one and the largest region")
        return
    if options.only == "time":
        found = measure(options.models, options.size)
        passes = ", ".join(f"{side} {count:g}" for side, count in found["passes"].items())
        one, one64 = found["one pass"]
        print(f"{options.models}: {found['rewrites']} rewrites, verified: {found['verified']}")
        print(f"  one pass at batch 1: {one:.3f} s, in float64 {one64:.3f} s")
        print(f"  probes of all rewrites: {found['probes']:.1f} float64 passes, of {found['bound']:.1f} allowed")
        print(f"  the whole model: {passes} samples")
        return
    for name in options.models.split(","):  # a process for each: the peak of one would hide that of the next
        command = [sys.executable, "-m", "benchmarks.verification", "--models", name, "--size", str(options.size)]
        command += ["--threads", str(options.threads)]
        subprocess.run([*command, "--only", "time"], check=True)
        subprocess.run([*command, "--only", "memory"], check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})


if __name__ == "__main__":
    main()
