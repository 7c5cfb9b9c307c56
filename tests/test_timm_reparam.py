"""Against hand-written re-parameterisation: at most as many convolutions and Linears as timm's own, and no BatchNorm
left.

timm's `reparameterize_model` calls the fuse() or reparameterize() that each family's author wrote; fxconv knows none
of these models.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from graphs import absorbable_affines, channel_affines, kinds
from helpers import Snapshot, assert_shared, draw, macs, relative_error, run
from torch.overrides import TorchFunctionMode
from zoo.networks import TIMM, timm_model

import fxconv

# (convolutions, Linears) after timm, as counted by hand and checked below; fewer Linears where two heads average.
COUNTS = {
    "repvgg_a0": (22, 1),
    "repvgg_b1g4": (28, 1),
    "mobileone_s0": (43, 1),
    "fastvit_t8": (52, 1),
    "repvit_m0_9": (103, 1),
    "repghostnet_050": (95, 1),
    "ghostnetv3_050": (137, 1),
    "lcnetv2_small": (36, 1),
    "efficientvit_m0": (116, 1),
    "levit_128s": (4, 48),
}
# (1 - alpha) * x on a stream that a nonlinear branch reads too: no BatchNorm's spelling, and nothing absorbs it. And
# x + depthwise 3x3 of a map of one pixel: that convolution is a scale of such a stream (by hand it is a convolution).
OWN_SCALES = {"efficientvim_m1": 30, "efficientvit_m0": 6}
REACHABLE_LINEARS = {"levit_128s": 47, "levit_conv_128s": 1}


class Calls(TorchFunctionMode):
    """Counts calls of convolutions and Linears, however the model is written."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("conv1d", "conv2d", "conv_transpose2d"):
            self.seen["conv"] += 1
        elif name == "linear":
            self.seen["linear"] += 1
        return func(*args, **(kwargs or {}))


def example(name: str, batch: int = 2) -> torch.Tensor:
    return draw((batch, 3, TIMM[name], TIMM[name]), batch)


@pytest.mark.parametrize("name", TIMM)
def test_timm_reparameterisation(name: str) -> None:
    from timm.models import reparameterize_model

    model = timm_model(name)
    with Calls() as by_hand:
        run(reparameterize_model(model), (example(name, 1).float(),))
    conv, linear = by_hand.seen["conv"], by_hand.seen["linear"]
    assert COUNTS.get(name, (conv, linear)) == (conv, linear)
    linear = min(linear, REACHABLE_LINEARS.get(name, linear))

    model = model.double()
    before = Snapshot(model)
    result = fxconv.transform(model, example(name))
    before.assert_unchanged()
    assert_shared(result, model)

    found = []
    for batch in (2, 1, 3):
        error = relative_error(run(result, (example(name, batch),)), run(model, (example(name, batch),)))
        if not error < 1e-12:
            found.append(f"batch {batch}: relative error {error:.3g}")
    report = fxconv.report(result)
    if not report.verified or report.rolled_back:
        found.append(f"verification {report.verification}, rolled back {[r.name for r in report.rolled_back]}")
    left = kinds(result)
    # A 1x1 convolution is written as a Linear where that is faster, and a Linear on tokens that are an image before and after
    # as a convolution: those count together.
    if left["conv"] + left["conv_transpose"] + left["linear"] > conv + linear:
        found.append(f"{left['conv']} convolutions and {left['linear']} Linears, by hand {conv} and {linear}")
    if left["batch_norm"]:
        found.append(f"{left['batch_norm']} BatchNorms left")
    x = example(name, 1)
    found += [f"absorbable: {affine}" for affine in absorbable_affines(result, (x,))]
    if len(vectors := channel_affines(result, (x,))) > OWN_SCALES.get(name, 0):
        found += [f"a BatchNorm's mul or add: {affine}" for affine in vectors]
    if (after := macs(result, (x,))) > (had := macs(model, (x,))):
        found.append(f"multiply-adds {had:,} -> {after:,}")
    assert not found, "\n".join([f"{len(found)} problems:", *found])
