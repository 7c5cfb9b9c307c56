"""``python -m benchmarks.structure_tests``: what it costs to find that an ordinary dense weight has no structure.

A Linear of each size with Gaussian weights is transformed; the second transform is timed, since the first one of a
process imports what it needs. "search" is the stage that holds the structure tests (`fxconv.structures`).
"""

from __future__ import annotations

import argparse
import time

import torch
from tabulate import tabulate
from torch import nn

import fxconv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="512,1024,2048,4096")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fxconv.transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(2, 8))
    rows = []
    for size in map(int, options.sizes.split(",")):
        model = nn.Sequential(nn.Linear(size, size)).eval()
        start = time.perf_counter()
        report = fxconv.report(fxconv.transform(model, torch.randn(2, size)))
        took = time.perf_counter() - start
        rows.append([f"{size}×{size}", report.timings["search"], took, len(report.applied)])
    print(tabulate(rows, headers=["weight", "search, s", "whole transform, s", "rewrites"], floatfmt=".3f"))


if __name__ == "__main__":
    main()
