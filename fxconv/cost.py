"""What a step costs on a device: a roofline of multiply-adds, bytes moved, and a launch.

``seconds = launch + max(MACs / rate(kind), bytes / bandwidth)`` (Williams, Waterman and Patterson, *Roofline*, 2009). Sizes
that are dynamic are taken at the example's values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from fxconv.axes import Size, evaluate
from fxconv.kernel import Kernel
from fxconv.plan import Step

FREE = frozenset(("reshape", "permute"))
"""Steps that only make another view; a permute is charged to whoever needs it contiguous, as a copy (`Profile.copy`)."""


@dataclass(frozen=True)
class Profile:
    """A device, as the cost model sees it.

    Attributes:
        name: for the report.
        rates: multiply-adds per second by kernel kind.
        bandwidth: bytes per second from memory.
        launch: seconds per operator, by kernel kind ("" is the default).
        measured: whether the numbers were measured on such a device.
    """

    name: str
    rates: Mapping[str, float]
    bandwidth: float
    launch: Mapping[str, float]
    measured: bool = True

    def rate(self, kind: str) -> float:
        return self.rates.get(kind, self.rates[""])

    def launch_of(self, kind: str) -> float:
        return self.launch.get(kind, self.launch[""])


CPU = Profile(
    "x86-64 CPU",
    {"": 20e9, "conv": 35e9, "conv_1x1": 35e9, "depthwise": 6e9, "grouped": 12e9, "conv_transpose": 20e9, "linear": 35e9},
    10e9,
    {"": 4e-6, "conv": 14e-6, "conv_1x1": 14e-6, "depthwise": 14e-6, "grouped": 16e-6, "conv_transpose": 18e-6,
     "linear": 7e-6, "slice": 2e-6, "reshape": 1e-6, "permute": 1e-6, "expand": 2e-6},
)


@dataclass(frozen=True)
class Price:
    """Seconds, multiply-adds, parameters (entries), bytes moved and launches."""

    seconds: float = 0.0
    macs: float = 0.0
    params: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Price) -> Price:
        return Price(
            self.seconds + other.seconds,
            self.macs + other.macs,
            self.params + other.params,
            self.bytes + other.bytes,
            self.launches + other.launches,
        )

    def __sub__(self, other: Price) -> Price:
        return self + other.times(-1.0)

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

    def price(self, step: Step) -> Price:
        """The price of one step."""
        if step.kind == "reshape":
            return Price()
        size_in, size_out = self.count(step.in_shape), self.count(step.shape)
        if step.kind == "permute":
            # The next operator wants it contiguous.
            moved = (size_in + size_out) * self.itemsize
            return Price(self.profile.launch_of("permute") + 2 * moved / self.profile.bandwidth, bytes=moved)
        if step.kind == "expand":
            return Price(self.profile.launch_of("expand"), launches=0)
        params = sum(self.count(w.shape) for w in step.weights)
        touched = size_in + size_out + params
        if step.kind in ("add", "mul"):
            touched = 3 * size_out
        elif step.kind == "slice":
            # A view; the copy is made by whoever reads it.
            touched = size_out
        elif step.kind == "cat":
            touched = 2 * size_out
        kind = self.kind(step)
        moved = touched * self.itemsize
        macs = self.number(step.macs) if not isinstance(step.macs, int) else step.macs
        seconds = self.profile.launch_of(kind) + max(macs / self.profile.rate(kind), moved / self.profile.bandwidth)
        return Price(seconds, macs, params, moved, 1)

    def reading(self, k: Kernel) -> Price:
        """The price of reading a constant along with something else: a bias."""
        entries = self.count(k.shape)
        moved = entries * self.itemsize
        return Price(moved / self.profile.bandwidth, params=entries, bytes=moved)

    def kind(self, step: Step) -> str:
        """The kernel kind of a step, by which rates are listed."""
        if step.kind == "conv":
            groups = step.attrs["groups"]
            weight = step.weights[0].shape
            if groups > 1:
                return "depthwise" if weight[1] == 1 else "grouped"
            return "conv_1x1" if all(s == 1 for s in weight[2:]) else "conv"
        return step.kind
