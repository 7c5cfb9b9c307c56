"""Device profiles: the shipped ones, and the one measured on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable

from fxconv.cost import CPU, Profile, Rates
from fxconv.errors import OptionError


def _guessed(name: str, launch: float, rate: float, bandwidth: float, block: int) -> Profile:
    """A plain roofline, from data sheets: nobody measured it.

    Args:
        name: for the report, which says that it is a guess.
        launch: seconds per operator.
        rate: multiply-adds per second of a dense convolution; a depthwise one is bound by memory.
        bandwidth: bytes per second.
        block: channels that are computed together.
    """
    plain = Rates(launch, math.inf, bandwidth, bandwidth, bandwidth)
    dense = Rates(launch, rate, bandwidth, bandwidth, bandwidth)
    slow = Rates(launch, rate / 8, bandwidth, bandwidth, bandwidth)
    rates = {"add": plain, "conv": dense, "linear": dense, "avg_pool": slow, "depthwise": slow}
    rates["conv_transpose"] = Rates(launch, rate / 2, bandwidth, bandwidth, bandwidth)
    # A view costs the host a call, and the device nothing.
    rates |= {kind: Rates(launch / 4) for kind in ("slice", "expand")}
    return Profile(name, rates, block, measured=False)


ARM = _guessed("Arm CPU (not measured)", 8e-6, 12e9, 12e9, 4)
"""One core of a current 64-bit Arm server or laptop: NEON, two 128-bit multiply-adds a cycle at 3 GHz, half of that
reached."""

CUDA = _guessed("CUDA GPU (not measured)", 6e-6, 5e12, 1e12, 32)
"""A data-centre GPU in float32 without tensor cores, at half its peak; a launch is what the host needs to issue it."""

PROFILES: dict[str, Profile] = {"default": CPU, "x86": CPU, "arm": ARM, "cuda": CUDA}


def _local() -> Profile:
    from fxconv.calibrate import local_profile

    return local_profile()


MEASURED: dict[str, Callable[[], Profile]] = {"local": _local}
"""Profiles that are read from this machine, and so can differ between machines: only used when asked for."""


def load_profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        OptionError: there is none of that name (the message lists those there are), or "local" was never measured.
    """
    if name in MEASURED:
        return MEASURED[name]()
    if name not in PROFILES:
        raise OptionError(f"there is no device profile {name!r}; known: {', '.join([*PROFILES, *MEASURED])}")
    return PROFILES[name]
