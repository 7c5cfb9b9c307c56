"""Measuring this machine: a device profile fitted to the times of some hundred operators, in under 30 seconds.

Each operator's time is the least of many runs, which a busy machine disturbs least. For each kind of kernel, launch,
rate and bandwidths are those that minimise the relative error, none of them negative.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from fxconv.cost import CostModel, Profile, Rates
from fxconv.errors import OptionError
from fxconv.garbage import collector_paused
from fxconv.kernel import Kernel
from fxconv.steps import Step


@dataclass(frozen=True)
class Sample:
    """An operator to time: the step it is priced as, and a call of it."""

    step: Step
    call: Callable[[], Any]


def _weight(*shape: int) -> Kernel:
    return Kernel(shape, ("calibrate", shape), (), lambda: torch.zeros(shape, dtype=torch.float64))


def conv(n: int, i: int, o: int, size: int, k: int, stride: int = 1, groups: int = 1, nd: int = 2) -> Sample:
    """A convolution of an n·i·sizeⁿᵈ image with padding k // 2."""
    x, w, b = torch.randn(n, i, *[size] * nd), torch.randn(o, i // groups, *[k] * nd), torch.randn(o)
    f: Callable[..., Tensor] = F.conv1d if nd == 1 else F.conv2d
    shape = tuple(f(x, w, b, stride, k // 2, 1, groups).shape)
    attrs = {"groups": groups, "stride": (stride,) * nd}
    step = Step("conv", tuple(x.shape), shape, (_weight(*w.shape),), attrs, math.prod(shape) * w[0].numel())
    return Sample(step, lambda: f(x, w, b, stride, k // 2, 1, groups))


def transposed(i: int, o: int, size: int, k: int, stride: int, padding: int) -> Sample:
    """A transposed convolution of an i·size² image."""
    x, w, b = torch.randn(1, i, size, size), torch.randn(i, o, k, k), torch.randn(o)
    shape = tuple(F.conv_transpose2d(x, w, b, stride, padding).shape)
    step = Step("conv_transpose", tuple(x.shape), shape, (_weight(*w.shape),), {"groups": 1}, x.numel() * w[0].numel())
    return Sample(step, lambda: F.conv_transpose2d(x, w, b, stride, padding))


def linear(rows: int, i: int, o: int) -> Sample:
    """A Linear of rows × i."""
    x, w, b = torch.randn(rows, i), torch.randn(o, i), torch.randn(o)
    return Sample(Step("linear", (rows, i), (rows, o), (_weight(o, i),), {}, rows * i * o), lambda: F.linear(x, w, b))


def pool(c: int, size: int, k: int, stride: int) -> Sample:
    """An average pooling of a c·size² image."""
    x = torch.randn(1, c, size, size)
    shape = tuple(F.avg_pool2d(x, k, stride).shape)
    return Sample(Step("avg_pool", tuple(x.shape), shape, (), {"kernel": (k, k)}), lambda: F.avg_pool2d(x, k, stride))


def patches(c: int, size: int, k: int, stride: int) -> Sample:
    """The k² patches of a c·size² image, written out side by side."""
    x = torch.randn(1, c, size, size)
    shape = tuple(F.unfold(x, k, 1, 0, stride).shape)
    return Sample(Step("im2col", tuple(x.shape), shape), lambda: F.unfold(x, k, 1, 0, stride))


def resampling(c: int, size: int, factor: int, mode: str) -> Sample:
    """An upsampling of a c·size² image."""
    x = torch.randn(1, c, size, size)
    kind = "nearest" if mode == "nearest" else "interpolate"
    step = Step(kind, tuple(x.shape), (1, c, factor * size, factor * size), (), {"mode": mode})
    align = None if mode == "nearest" else False
    return Sample(step, lambda: F.interpolate(x, scale_factor=float(factor), mode=mode, align_corners=align))


def elementwise(c: int, size: int) -> Iterator[Sample]:
    """What touches each entry of a c·size² image once or twice."""
    x, y, v = torch.randn(1, c, size, size), torch.randn(1, c, size, size), torch.rand(c)
    s, t = torch.randn(c, 1, 1), torch.randn(c, 1, 1)
    shape = tuple(x.shape)
    flat, halves = (1, size, size, c), (1, 2 * c, size, size)
    yield Sample(Step("add", shape, shape), lambda: x + y)
    yield Sample(Step("scale", shape, shape, (_weight(c),)), lambda: x * s)
    yield Sample(Step("scale", shape, shape, (_weight(c),) * 2, {"bias": True}), lambda: torch.addcmul(t, x, s))
    yield Sample(Step("batch_norm", shape, shape, (_weight(c),) * 2), lambda: F.batch_norm(x, v, v, v, v))
    yield Sample(Step("cat", halves, halves), lambda: torch.cat([x, y], 1))
    yield Sample(Step("slice", shape, shape), lambda: x[:, 1:])
    yield Sample(Step("expand", shape, shape), lambda: t.expand(c, size, size))
    yield Sample(Step("pad", shape, (1, c, size + 2, size + 2)), lambda: F.pad(x, (1, 1, 1, 1)))
    yield Sample(Step("permute", shape, flat), lambda: x.permute(0, 2, 3, 1).contiguous())
    yield Sample(Step("turn", shape, flat), lambda: x.permute(0, 2, 3, 1))
    z = x.permute(0, 2, 3, 1).contiguous()
    yield Sample(Step("permute", flat, shape), lambda: z.permute(0, 3, 1, 2).contiguous())
    yield Sample(Step("mean", shape, (1, c)), lambda: x.mean((2, 3)))


def samples() -> Iterator[Sample]:
    """The operators that a profile is fitted to, made one by one: small ones weigh as much as large ones."""
    for i, o, size, k in (
        (16, 16, 96, 3), (32, 32, 56, 3), (64, 64, 56, 3), (128, 128, 28, 3), (256, 256, 14, 3), (512, 512, 7, 3),
        (16, 128, 64, 3), (128, 16, 64, 3), (64, 3, 64, 3), (12, 64, 56, 3), (64, 64, 28, 5), (64, 64, 8, 5),
        (8, 8, 8, 5), (512, 512, 7, 7),
    ):  # fmt: skip
        yield conv(1, i, o, size, k)
    yield from (conv(1, 3, 32, 224, 3, 2), conv(2, 4, 4, 7, 3), conv(2, 16, 16, 14, 3), conv(1, 64, 128, 56, 3, 2))
    yield from (conv(1, 3, 64, 224, 7, 2), conv(1, 64, 128, 56, 1, 2), conv(4, 32, 32, 28, 3))
    for i, o, size in ((4, 4, 7), (8, 8, 14), (16, 16, 32), (3, 32, 64), (64, 64, 7), (128, 128, 7), (256, 256, 4)):
        yield conv(1, i, o, size, 3)
    for i, o, size in (
        (4, 4, 7), (8, 8, 14), (16, 16, 56), (16, 128, 64), (128, 16, 64), (64, 64, 56), (24, 144, 56), (256, 256, 14),
        (512, 512, 7), (256, 1024, 14), (960, 1280, 1), (128, 1000, 1),
    ):  # fmt: skip
        yield conv(1, i, o, size, 1)
    for i, o, size, k in (
        (64, 64, 3136, 3),
        (16, 16, 4096, 3),
        (128, 128, 400, 7),
        (64, 64, 1000, 1),
        (32, 64, 2000, 5),
    ):
        yield conv(1, i, o, size, k, nd=1)
    for c, size, k, stride in (
        (16, 112, 3, 1), (32, 112, 3, 2), (64, 56, 3, 1), (64, 56, 5, 1), (128, 28, 7, 1), (256, 14, 3, 1),
        (512, 7, 3, 1), (512, 7, 7, 1), (8, 8, 3, 1), (48, 14, 7, 1),
    ):  # fmt: skip
        yield conv(1, c, c, size, k, stride, c)
    for c, size, groups in (
        (64, 56, 2),
        (64, 56, 4),
        (128, 28, 32),
        (256, 14, 32),
        (32, 8, 4),
        (64, 28, 16),
        (256, 14, 4),
    ):
        yield conv(1, c, c, size, 3, 1, groups)
    for i, o, size, k, stride, padding in (
        (64, 64, 28, 2, 2, 0), (128, 64, 28, 3, 2, 1), (16, 16, 32, 4, 2, 1), (256, 256, 14, 4, 2, 1),
        (64, 64, 28, 3, 1, 1), (8, 8, 8, 4, 2, 1), (128, 3, 64, 4, 2, 1),
        (64, 64, 28, 4, 4, 0), (128, 128, 32, 4, 2, 1),
    ):  # fmt: skip
        yield transposed(i, o, size, k, stride, padding)
    for rows, i, o in (
        (1, 64, 64), (1, 512, 10), (1, 512, 1000), (1, 2048, 1000), (1, 4096, 4096),
        (2, 512, 512), (4, 1024, 1024), (8, 512, 512), (16, 128, 128), (49, 256, 256), (196, 192, 576), (196, 768, 192),
        (1024, 64, 64), (1024, 256, 256), (4096, 32, 128), (16, 32, 32), (16, 512, 1000), (4, 64, 64),
    ):  # fmt: skip
        yield linear(rows, i, o)
    for c, size, k, stride in (
        (64, 56, 2, 2),
        (64, 28, 3, 1),
        (256, 14, 2, 2),
        (512, 7, 7, 7),
        (8, 8, 2, 2),
        (64, 28, 4, 4),
    ):
        yield pool(c, size, k, stride)
    for c, size, k, stride in ((3, 64, 16, 16), (3, 224, 16, 16), (32, 56, 3, 2), (32, 28, 3, 1), (64, 56, 3, 1), (3, 16, 4, 4)):
        yield patches(c, size, k, stride)
    for mode in ("nearest", "bilinear"):
        for c, size, factor in ((8, 8, 2), (64, 28, 2), (256, 14, 2), (64, 28, 4), (128, 64, 2)):
            yield resampling(c, size, factor, mode)
    for c, size in ((8, 8), (64, 14), (64, 28), (512, 7), (64, 56), (64, 112)):
        yield from elementwise(c, size)


def seconds_of(call: Callable[[], Any], budget_s: float = 0.06) -> float:
    """The least seconds of a call among as many as fit; processor time on one thread, which other programs don't
    take."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    call(), call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    inner = max(1, int(2e-4 / once))
    best = math.inf
    for _ in range(max(4, int(budget_s / (once * inner)))):
        start = clock()
        for _ in range(inner):
            call()
        best = min(best, (clock() - start) / inner)
    return best


def measure(budget_s: float = 0.06) -> list[tuple[Step, float]]:
    """Each sample's step and seconds."""
    with collector_paused(), torch.inference_mode():
        return [(s.step, seconds_of(s.call, budget_s)) for s in samples()]


def fit(measured: list[tuple[Step, float]], name: str, block: int = 8) -> Profile:
    """The profile that fits measured seconds best."""
    blank = CostModel(Profile(name, {"add": Rates(0.0)}, block))
    rows: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    for step, seconds in measured:
        rows.setdefault(blank.kind(step), []).append((blank.amounts(step), seconds))
    rates = {kind: _fit_kind(found) for kind, found in rows.items()}
    for kind in ("conv_1x1", "conv_small"):
        # The same matrix product: where the samples leave it open, its weights are read no faster.
        if kind in rates and "linear" in rates:
            rates[kind] = replace(rates[kind], weights=min(rates[kind].weights, rates["linear"].weights))
    return Profile(name, rates, block)


_AMOUNTS = 5
"""Coefficients of a kind: launch, multiply-adds, bytes read, written, and read as constants."""


def _fit_kind(rows: list[tuple[tuple[float, ...], float]]) -> Rates:
    """Non-negative least squares of the relative error, over which of the coefficients are not zero."""
    a = torch.tensor([[1.0, *amounts] for amounts, _ in rows], dtype=torch.float64)
    a = a / torch.tensor([[s] for _, s in rows], dtype=torch.float64)
    best, coefficients = math.inf, torch.zeros(_AMOUNTS, dtype=torch.float64)
    for choice in range(1, 2**_AMOUNTS):
        columns = [c for c in range(_AMOUNTS) if choice >> c & 1 and bool(a[:, c].any())]
        if not columns or len(columns) > len(rows):
            continue
        part = a[:, columns]
        size = part.norm(dim=0)
        x = torch.linalg.lstsq(part / size, torch.ones(len(rows), 1, dtype=torch.float64), driver="gelsd").solution[:, 0] / size
        if bool((x < 0).any()):
            continue
        error = float((part @ x - 1).square().sum())
        if error < best - 1e-9:
            best = error
            coefficients = torch.zeros(_AMOUNTS, dtype=torch.float64)
            coefficients[columns] = x
    launch, *slowness = (float(c) for c in coefficients)
    return Rates(launch, *(1 / s if s > 0 else math.inf for s in slowness))


# -- The cache --------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where the profile of this machine is kept, per number of threads: $XDG_CACHE_HOME/fxconv or ~/.cache/fxconv."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "fxconv" / f"profile-{torch.get_num_threads()}-threads.json"


def calibrate(budget_s: float = 0.06) -> Profile:
    """Measure this machine with as many threads as torch uses now, and keep the profile for ``profile="local"``."""
    threads = torch.get_num_threads()
    profile = fit(measure(budget_s), f"this machine, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}")
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(to_json(profile), encoding="utf-8")
    part.replace(file)  # a reader never sees half a file
    return profile


def local_profile() -> Profile:
    """The profile that `calibrate` keeps for this machine and number of threads.

    Raises:
        OptionError: there is none, or the file does not hold one.
    """
    file = cache_file()
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OptionError(
            f"this machine was not measured with {torch.get_num_threads()} thread(s): run `fxconv calibrate`, which writes {file}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{file} does not hold a profile: run `fxconv calibrate` again") from error


def to_json(profile: Profile) -> str:
    """A profile as JSON; an infinite rate is null."""
    rates = {
        kind: {key: None if math.isinf(value) else float(f"{value:.3g}") for key, value in asdict(r).items()}
        for kind, r in profile.rates.items()
    }
    return json.dumps({"name": profile.name, "block": profile.block, "rates": rates}, indent=2) + "\n"


def from_json(text: str) -> Profile:
    """The profile that `to_json` wrote."""
    data = json.loads(text)
    rates = {
        str(kind): Rates(**{key: math.inf if value is None else float(value) for key, value in r.items()})
        for kind, r in data["rates"].items()
    }
    if "add" not in rates:
        raise ValueError("no rates for elementwise operators")
    return Profile(str(data["name"]), rates, int(data["block"]))


def table(profile: Profile) -> str:
    """A profile for a terminal."""

    def giga(rate: float) -> str:
        return "" if math.isinf(rate) else f"{rate / 1e9:.1f}"

    rows = [
        [kind, f"{r.launch * 1e6:.1f}", giga(r.macs), giga(r.read), giga(r.written), giga(r.weights)]
        for kind, r in profile.rates.items()
    ]
    headers = ["kernel", "launch, us", "GMAC/s", "read, GB/s", "written, GB/s", "weights, GB/s"]
    return f"{profile.name}\n{tabulate(rows, headers=headers, disable_numparse=True)}"
