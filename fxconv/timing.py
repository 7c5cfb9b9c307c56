"""Before against after on this machine: paired, interleaved, with an interval for the ratio."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxconv.garbage import collector_paused


def paired(
    before: Callable[..., Any],
    after: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    budget_s: float = 4.0,
    min_pairs: int = 7,
    max_pairs: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float | int]:
    """Time both callables on the same inputs, turn about, for about `budget_s` seconds.

    Returns before_s and after_s (median seconds of a call), ratio (median of before ÷ after over the pairs; above 1 is
    faster), low and high (95 % interval of that median, from order statistics: no distribution is assumed), pairs, and
    threads. A pair runs both back to back, in alternating order, so that clock changes and noisy neighbours hit both.
    ``clock`` is what times are taken by; `time.process_time` does not count what other programs take, and is right only
    where one thread does all the work.
    """
    kwargs = kwargs or {}
    calls = (before, after)

    def run(which: int) -> float:
        start = clock()
        calls[which](*args, **kwargs)
        _synchronise(args)
        return clock() - start

    with collector_paused(), torch.no_grad():
        run(0), run(1)  # caches, lazy initialisation, thread pools
        once = max(run(0) + run(1), 1e-6)
        pairs = max(min_pairs, min(max_pairs, int(budget_s / once)))
        times: list[tuple[float, float]] = []
        for i in range(pairs):
            if i % 2:
                second, first = run(1), run(0)
            else:
                first, second = run(0), run(1)
            times.append((first, second))
    ratios = sorted(b / a for b, a in times)
    low, high = median_interval(len(ratios))
    return {
        "before_s": statistics.median(b for b, _ in times),
        "after_s": statistics.median(a for _, a in times),
        "ratio": statistics.median(ratios),
        "low": ratios[low],
        "high": ratios[high],
        "pairs": pairs,
        "threads": torch.get_num_threads(),
    }


def median_interval(n: int, confidence: float = 0.95) -> tuple[int, int]:
    """Indices of two order statistics of `n` samples that enclose the median with at least `confidence`.

    The number of samples below the median is Binomial(n, 1/2). Below six samples no pair suffices: the extremes then.
    """
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if tail > (1 - confidence) / 2:
            break
        k += 1
    k = max(k - 1, 0)
    return k, n - 1 - k


def _synchronise(args: Sequence[Any]) -> None:
    if any(isinstance(a, torch.Tensor) and a.is_cuda for a in args):
        torch.cuda.synchronize()
