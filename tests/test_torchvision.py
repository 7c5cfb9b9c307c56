"""Real networks from torchvision, every parameter and buffer random, in float64: exact, verified, never more work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphs import absorbable_affines, channel_affines, graph_of, kind_of, kinds, new_weights
from helpers import Snapshot, assert_shared, draw, macs, relative_error, run, tensors_of
from torch import fx, nn
from zoo.networks import TORCHVISION, torchvision_model

import fxconv

SQUARE = ("vit_b_16",)
"""Position embeddings for square images only."""


def example(name: str, batch: int = 2) -> torch.Tensor:
    size = TORCHVISION[name]
    return draw((batch, 3, size, size if name in SQUARE else size + 32), batch)


def moved_by(result: fx.GraphModule, weight: torch.Tensor, x: torch.Tensor, want: Any) -> float:
    """How far the output moves, relative to its size, when one weight is zeroed."""
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        try:
            return relative_error(run(result, (x,)), want)
        finally:
            weight.copy_(kept)


def problems(name: str, model: nn.Module, result: Any) -> Iterator[str]:
    """Everything that is wrong with a transformed network, so that one run tells all."""
    for batch in (2, 1, 3):
        x = example(name, batch)
        error = relative_error(run(result, (x,)), run(model, (x,)))
        if not error < 1e-12:
            yield f"batch {batch}: relative error {error:.3g}"

    report = fxconv.report(result)
    if not report.verified:
        yield f"not verified: {report.verification}"
    if report.rolled_back:
        yield f"rolled back: {[(r.name, r.laws, r.verdict) for r in report.rolled_back]}"

    x = example(name, 1)
    before, after = macs(model, (x,)), macs(result, (x,))
    if after > before:
        yield f"multiply-adds {before:,} -> {after:,}"
    for affine in absorbable_affines(result, (x,)):
        yield f"per-channel affine left: {affine}"
    if kinds(result)["identity"]:
        yield f"{kinds(result)['identity']} dropouts or identities left"

    want = run(result, (x,))
    for weight_name, weight in new_weights(result, model):
        moved = moved_by(result, weight, x, want)
        if not moved > 1e-4:
            yield f"zeroing {weight_name} moves the output by {moved:.3g} only"


def densenet(result: Any) -> Iterator[str]:
    """Exactly the 62 BatchNorms between cat and ReLU stay, and each transition pools before its 1x1 convolution."""
    gm = graph_of(result)
    left = kinds(result)["batch_norm"]
    others = [a for a in channel_affines(result, (example("densenet121", 1),)) if "batch_norm" not in a]
    if left != 62 or others:
        yield f"{left} BatchNorms and {others} left, not the 62 between cat and ReLU"

    def multiplies(node: fx.Node) -> bool:
        """Whether a node is the 1x1 convolution, also where it is written as a Linear on permuted images."""
        if kind_of(node, gm) == "permute":
            return all(multiplies(u) for u in node.users)
        return kind_of(node, gm) in ("conv", "linear")

    pools = [n for n in gm.graph.nodes if kind_of(n, gm) == "avg_pool"]
    if len(pools) != 3:
        yield f"{len(pools)} average pools, not 3"
    for pool in pools:
        if kind_of(pool.args[0], gm) != "relu" or not all(multiplies(u) for u in pool.users):
            yield f"{pool.name} pools {pool.args[0]}, not before its convolution"


def lraspp(result: Any) -> Iterator[str]:
    """Both upsamplings see the 21 classes, not the 128 channels before the classifier."""
    gm = graph_of(result)
    upsamplings = [n for n in gm.graph.nodes if kind_of(n, gm) == "interpolate"]
    channels = [tuple(n.meta["val"].shape)[1] for n in upsamplings]
    if channels != [21, 21]:
        yield f"upsamplings of {channels} channels, not [21, 21]"


MORE = {"densenet121": densenet, "lraspp_mobilenet_v3_large": lraspp}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    model = torchvision_model(name).double()
    before = Snapshot(model)
    result = fxconv.transform(model, example(name))
    before.assert_unchanged()
    assert_shared(result, model)
    found = [*problems(name, model, result), *(MORE[name](result) if name in MORE else ())]
    before.assert_unchanged()
    assert not found, "\n".join([f"{len(found)} problems:", *found])


@pytest.mark.parametrize("name", ["vgg11", "alexnet"])
def test_target_conv_leaves_no_linear(name: str) -> None:
    model = torchvision_model(name).double()
    before = Snapshot(model)
    result = fxconv.transform(model, example(name), target="conv")
    before.assert_unchanged()
    assert_shared(result, model)
    assert kinds(result)["linear"] == 0 and kinds(result)["matmul"] == 0
    assert fxconv.report(result).verified
    for batch in (1, 5):
        got, want = run(result, (example(name, batch),)), run(model, (example(name, batch),))
        assert tuple(got.shape) == (batch, 1000)
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_own_dtype_and_a_gradient(name: str) -> None:
    """In float32, as users run it: verified, of the same dtype, and differentiable."""
    model = torchvision_model(name)
    x = example(name).float().requires_grad_()
    result = fxconv.transform(model, x.detach())
    assert fxconv.report(result).verified
    out = result(x)
    assert out.dtype == torch.float32
    assert relative_error(out.detach(), run(model, (x.detach(),))) < 1e-4
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "mobilenet_v2"])
def test_an_untransformed_capture_would_not_pass(name: str) -> None:
    """The checks above have teeth: the original's own graph has absorbable affines, or identities."""
    model = torchvision_model(name).double()
    with torch.no_grad():
        graph = torch.export.export(model, (example(name),), strict=False).module()
    assert tensors_of(run(graph, (example(name),)))
    assert absorbable_affines(graph, (example(name),)) or kinds(graph)["identity"]
