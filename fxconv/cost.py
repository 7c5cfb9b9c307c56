"""What a step costs on a device: a launch, multiply-adds, and bytes read, written and read as weights.

``seconds = launch + MACs / rate + read / bandwidth + written / bandwidth + weights / bandwidth``, with a rate and
bandwidths for each kind of kernel. A roofline (Williams, Waterman and Patterson, *Roofline*, 2009) would take the
larger of arithmetic and memory; the sum predicts PyTorch better, whose convolutions copy their operands into a blocked
layout before they compute, and back after. Sizes that are dynamic are taken at the example's values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import sympy

from fxconv.axes import Size, evaluate
from fxconv.kernel import Kernel
from fxconv.steps import Step

KINDS = (
    "conv",
    "conv_small",
    "conv_1x1",
    "conv_1d",
    "depthwise",
    "grouped",
    "conv_transpose",
    "linear",
    "row",
    "im2col",
    "avg_pool",
    "mean",
    "nearest",
    "interpolate",
    "pad",
    "permute",
    "turn",
    "cat",
    "add",
    "mul",
    "addcmul",
    "batch_norm",
    "slice",
    "expand",
)
"""Kinds of kernels with speeds of their own; anything else is priced as "add" (an elementwise operator).

"row" is a Linear of one row, which only reads its weight. "conv_small" is what torch computes itself, as im2col and a
matrix product, because oneDNN's overhead of 60 µs a call would be most of it. "conv_1x1" is an ungrouped 1×1
convolution, a matrix product likewise, and one of a single pixel is a "row". "permute" is a copy into another order of
dims; "turn" is a permutation that torch takes as a view, whose reader takes the strides: a runtime whose tensors have
none copies there too. "batch_norm" is also a product or a sum with a constant for each channel of images: eager torch
does those faster, but for one of them ONNX Runtime gives up its blocks of channels. The multiply-adds of "avg_pool" are
its taps, one by one."""

SMALL_CONV = 20480
"""A single image of at most this many entries is convolved by torch itself (`use_mkldnn` in ATen's Convolution.cpp)."""


NARROW = 32
"""Multiply-adds that loading and storing an entry of a matrix product comes to: with 32 columns it runs at half speed."""


@dataclass(frozen=True)
class Rates:
    """Speeds of one kind of kernel.

    Attributes:
        launch: seconds per call, whatever the size.
        macs: multiply-adds per second.
        read, written, weights: bytes per second of input, output and constants.
    """

    launch: float
    macs: float = math.inf
    read: float = math.inf
    written: float = math.inf
    weights: float = math.inf

    def seconds(self, macs: float, read: float, written: float, weights: float) -> float:
        """Seconds for one call: the multiply-adds, and bytes by where they go."""
        return self.launch + macs / self.macs + read / self.read + written / self.written + weights / self.weights


@dataclass(frozen=True)
class Profile:
    """A device, as the cost model sees it.

    Attributes:
        name: for the report.
        rates: speeds by kernel kind; "add" must be among them, and stands for kinds that are not.
        block: convolutions compute this many output channels at a time, and waste what is left of a block.
        measured: whether the numbers were measured on such a device.
    """

    name: str
    rates: Mapping[str, Rates]
    block: int = 1
    measured: bool = True

    def of(self, kind: str) -> Rates:
        """Speeds of a kind of kernel."""
        found = self.rates.get(kind)
        if found is None:
            found = self.rates.get(_NEAREST.get(kind, "add"), self.rates["add"])
        return found


_NEAREST = {"conv_small": "conv", "conv_1d": "conv", "grouped": "conv", "conv_1x1": "conv", "row": "linear", "turn": "expand"}
"""What stands for a kind that a profile does not list, where it is not "add"."""


def _rates(us: float, gmacs: float = 0, read: float = 0, written: float = 0, weights: float = 0) -> Rates:
    """Rates in µs, GMAC/s and GB/s; 0 is what costs nothing."""
    return Rates(us * 1e-6, *(x * 1e9 if x else math.inf for x in (gmacs, read, written, weights)))


CPU = Profile(
    "x86-64 CPU",
    {
        "conv": _rates(20, 46, 6.9, 0, 6.5),
        "conv_small": _rates(8.4, 33, 1.6, 0, 25),
        "conv_1x1": _rates(4.5, 46, 38, 52, 25),
        "conv_1d": _rates(20, 46, 4.8, 0, 6.5),
        "depthwise": _rates(25, 41, 22, 16, 11),
        "grouped": _rates(25, 84, 1.3, 0, 3.5),
        "conv_transpose": _rates(25, 43, 2.3, 2.3, 3.1),
        "linear": _rates(4.5, 46, 38, 52, 25),
        "row": _rates(2.9, 0, 0, 0, 35),
        "im2col": _rates(6.4, 0, 13, 2.5),
        "avg_pool": _rates(6, 190, 72, 64),
        "mean": _rates(5.4, 0, 68),
        "nearest": _rates(8.8, 0, 3.1, 9.2),
        "interpolate": _rates(7.6, 0, 4.3, 2.2),
        "pad": _rates(5.9, 0, 0, 18),
        "permute": _rates(5, 0, 5),
        "turn": _rates(1, 0, 9),
        "cat": _rates(1.5, 0, 34),
        "add": _rates(1.2, 0, 48),
        "mul": _rates(1.5, 0, 37, 0, 8.9),
        "addcmul": _rates(1.9, 0, 7.2, 0, 1.8),
        "batch_norm": _rates(4.9, 0, 19, 0, 0.74),
        "slice": _rates(1.7),
        "expand": _rates(0.9),
    },
    block=8,
)
"""Measured by `fxconv calibrate` on one thread of an AMD EPYC 7003 (Zen 3, AVX2, 2 cores), torch 2.14.1; but a launch
of a oneDNN convolution, which takes 60 to 80 µs in eager torch (transposed or not), is entered as 20 to 25: ONNX
Runtime and OpenVINO, which run what is exported, pay less, and a rewrite that pays only for its launches shall not
lose there. For the same reason a Linear and a 1×1 convolution are entered alike: eager torch computes a Linear about a
tenth faster, and those two a convolution, by up to a quarter, because they keep images in blocks of channels and do the
activation or the addition behind it in passing. A "turn" is entered at their speed. Eager torch averages a window in
11 ns an output, ONNX Runtime and OpenVINO a hundred times faster: "avg_pool" is entered at their speed too, with a launch
of 6 µs, so that a rewrite does not pay only for its smaller pool."""


class Price(NamedTuple):
    """Seconds, multiply-adds, parameters (entries), bytes moved and launches; a tuple, since a search makes a million."""

    seconds: float = 0.0
    macs: float = 0.0
    params: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Price) -> Price:  # type: ignore[override]
        return Price(
            self.seconds + other.seconds,
            self.macs + other.macs,
            self.params + other.params,
            self.bytes + other.bytes,
            self.launches + other.launches,
        )

    def __sub__(self, other: Price) -> Price:
        return Price(
            self.seconds - other.seconds,
            self.macs - other.macs,
            self.params - other.params,
            self.bytes - other.bytes,
            self.launches - other.launches,
        )

    def times(self, factor: float) -> Price:
        return Price(
            self.seconds * factor,
            self.macs * factor,
            self.params * factor,
            self.bytes * factor,
            self.launches * factor,
        )


OBJECTIVES = ("latency", "macs", "params", "launches")


TIE_BREAK = 1e-3
"""Under the other objectives, a microsecond counts as this many multiply-adds, parameters or launches: enough to prefer
the faster of two equal forms, too little to outweigh one unit of what was asked for in any ordinary model."""


def score(p: Price, objective: str) -> float:
    """What the search minimises: microseconds, or the objective with time as a tie-break."""
    microseconds = p.seconds * 1e6
    if objective == "latency":
        return microseconds
    unit = {"macs": p.macs, "params": p.params, "launches": p.launches}[objective]
    return unit + TIE_BREAK * microseconds


def smallest_gain(objective: str) -> float:
    """The least improvement of the score that counts: 0.05 µs; less is the noise of the model itself."""
    return 0.05 if objective == "latency" else 0.05 * TIE_BREAK


@dataclass
class CostModel:
    """Prices steps at given values of the dynamic sizes.

    Attributes:
        profile: the device.
        symbols: a value for each symbol of a dynamic size.
        itemsize: bytes per element of the model's dtype.
    """

    profile: Profile
    symbols: Mapping[sympy.Symbol, int] = field(default_factory=dict)
    itemsize: int = 4
    _cache: dict[Size, float] = field(default_factory=dict)

    def number(self, size: Size) -> float:
        if isinstance(size, int):
            return size
        found = self._cache.get(size)
        if found is None:
            found = self._cache[size] = float(evaluate(size, self.symbols))
        return found

    def count(self, shape: tuple[Size, ...]) -> float:
        return math.prod(self.number(s) for s in shape)

    def price(self, step: Step, readers: Callable[[Kernel], int] | None = None) -> Price:
        """The price of one step; of a constant that has several readers, each pays its share."""
        if step.kind == "reshape" or step.attrs.get("free"):
            return Price()
        kind = self.kind(step)
        work, read, written, constants = self.amounts(step)
        # A number is written as such, and stored nowhere.
        entries = [0.0 if not w.shape and w.uniform is not None else self.count(w.shape) for w in step.weights]
        params = sum(entries)
        if readers is not None and params:
            shared = sum(n / readers(w) for n, w in zip(entries, step.weights, strict=True))
            params, constants = shared, constants * shared / params
        seconds = self.profile.of(kind).seconds(work, read, written, constants)
        if step.kind == "gather" and len(step.shape) > 3 and step.attrs.get("dim") == 1:
            # Runtimes keep images in blocks of channels: out of those, and into them.
            seconds += 2 * self.profile.of("permute").seconds(0.0, written, written, 0.0)
        if kind == "permute":
            return Price(seconds, bytes=read + written)
        if kind == "turn":
            return Price(seconds)
        if kind in ("expand", "slice"):
            return Price(seconds, bytes=self.count(step.shape) * self.itemsize, launches=0)
        macs = self.number(step.macs)
        return Price(seconds, macs, params, read + written + constants, 1)

    def amounts(self, step: Step) -> tuple[float, float, float, float]:
        """What the seconds of a step are linear in: multiply-adds, and bytes read, written and read as constants."""
        kind = self.kind(step)
        read, written = self.count(step.in_shape) * self.itemsize, self.count(step.shape) * self.itemsize
        if kind in ("expand", "slice"):
            # A view; the copy is made by whoever reads it. A permute is charged with the copy itself.
            return 0.0, 0.0, 0.0, 0.0
        if step.kind == "add":
            read = 2 * written
        elif kind == "cat":
            read = written
        constants = sum(self.count(w.shape) for w in step.weights) * self.itemsize
        if kind == "batch_norm" and len(step.weights) == 1:
            constants *= 2
        if step.kind in ("add_const", "scale") and 2 * constants > written:
            # Not broadcast along the tensor but read side by side with it.
            read, constants = read + constants, 0.0
        if kind == "conv_1x1" and len(step.in_shape) == len(step.weights[0].shape):
            constants *= self.number(step.in_shape[0])  # image by image
        return self._work(step, kind, self.number(step.macs)), read, written, constants

    def kind(self, step: Step) -> str:
        """The kernel kind of a step, by which rates are listed."""
        if step.kind == "conv":
            return self._conv_kind(step)
        if step.kind == "linear":
            return "row" if self.count(step.in_shape[:-1]) <= 1 else "linear"
        if step.kind in ("scale", "add_const") and len(step.weights) == 1 and _along_channels(step):
            return "batch_norm"
        if step.kind == "scale":
            return "addcmul" if step.attrs.get("bias") else "mul"
        if step.kind == "interpolate":
            return "nearest" if str(step.attrs.get("mode", "")).startswith("nearest") else "interpolate"
        return {"add_const": "mul", "adaptive_avg": "mean"}.get(step.kind, step.kind)

    def _conv_kind(self, step: Step) -> str:
        groups, weight = step.attrs["groups"], step.weights[0].shape
        taps = [self.number(s) for s in weight[2:]]
        if groups > 1:
            return "depthwise" if weight[1] == 1 else "grouped"
        if self.count(step.shape) == weight[0] and all(s == 1 for s in taps):
            return "row"
        batch = self.number(step.in_shape[0]) if len(step.in_shape) == len(weight) else 1
        if all(s == 1 for s in taps) and all(s == 1 for s in step.attrs.get("stride", ())) and batch < 16:
            return "conv_1x1"
        if batch == 1 and self.count(step.in_shape) <= SMALL_CONV and not (len(taps) > 1 and min(taps) > 3):
            return "conv_small"
        return "conv_1d" if len(taps) == 1 else "conv"

    def _work(self, step: Step, kind: str, macs: float) -> float:
        """Multiply-adds with those that fill up blocks of channels."""
        if kind in ("conv_1x1", "linear", "conv_small"):
            return macs + NARROW * self.count(step.shape)
        if kind == "avg_pool":
            return self.count(step.shape) * math.prod(step.attrs.get("kernel", ()))
        if kind not in ("conv", "conv_1d", "grouped", "conv_transpose"):
            return macs
        block, groups, weight = self.profile.block, step.attrs["groups"], step.weights[0].shape
        inner, outer = self.number(weight[1]), self.number(weight[0]) / groups
        if kind == "conv_transpose":
            inner, outer = outer, inner
        if inner > 4 or groups > 1:
            macs *= _filled(inner, block)
        return macs * _filled(outer, block) + (NARROW * self.count(step.shape) if kind in ("conv", "conv_1d") else 0)


def _along_channels(step: Step) -> bool:
    """Whether a constant varies along the channels of images alone."""
    shape = step.weights[0].shape
    return len(step.shape) == 4 and len(shape) == 3 and shape[0] != 1 and shape[1:] == (1, 1)


def _filled(channels: float, block: int) -> float:
    """How many times the work it takes to fill the last block of channels."""
    return math.ceil(channels / block) * block / channels
