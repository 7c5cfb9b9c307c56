"""Structures of dense weights are found, proved and taken where they pay; ordinary weights cost next to nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxconv
from fxconv import kernel, structures
from fxconv.capture import capture
from fxconv.options import Options
from fxconv.passes.recover import _rearranged, without_zeros
from fxconv.report import Report
from fxconv.transform import rewrite


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw(*shape: int, whole: bool = False) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randint(-4, 5, shape, generator=g).float() if whole else torch.randn(shape, generator=g)


def matrix(f: Callable[[torch.Tensor], torch.Tensor], *shape: int) -> torch.Tensor:
    """A linear function of one sample as a matrix."""
    n = torch.Size(shape).numel()
    return f(torch.eye(n).reshape(n, *shape)).flatten(1).T.contiguous()


def permuted(n: int) -> torch.Tensor:
    return torch.eye(n)[torch.randperm(n, generator=generator())]


def interleaved() -> torch.Tensor:
    order = torch.arange(64).reshape(8, 8).T.reshape(-1)
    return torch.block_diag(*draw(8, 8, 8))[order][:, order]


LINEAR: dict[str, tuple[Callable[[], torch.Tensor], set[str], int]] = {
    # weight, operators that must be there (and no Linear unless listed), multiply-adds per sample
    "identity": (lambda: torch.eye(64), set(), 0),
    "scalar": (lambda: 2.5 * torch.eye(64), set(), 0),
    "diagonal": (lambda: torch.diag(draw(64)), set(), 0),
    "zero": (lambda: torch.zeros(48, 64), set(), 0),
    "permutation": (lambda: permuted(64), {"index_select"}, 0),
    "slice": (lambda: torch.eye(64)[8:40], {"slice"}, 0),
    "blocks": (lambda: torch.block_diag(*draw(8, 8, 16)), {"conv1d"}, 64 * 16),
    "interleaved_blocks": (interleaved, {"conv1d"}, 64 * 8),
    "equal_blocks": (lambda: torch.kron(torch.eye(8), draw(6, 10)), {"linear"}, 8 * 60),
    "mixed_tokens": (lambda: torch.kron(draw(6, 10), torch.eye(8)), {"conv1d"}, 8 * 60),
    "conv1d": (lambda: matrix(lambda x: F.conv1d(x, draw(1, 1, 5), padding=2), 1, 60), {"conv1d"}, 300),
    "conv1d_channels": (
        lambda: matrix(lambda x: F.conv1d(x, draw(4, 3, 5), stride=2, padding=2), 3, 30), {"conv1d"}, 4 * 15 * 15,
    ),
    "conv1d_dilated": (
        lambda: matrix(lambda x: F.conv1d(x, draw(2, 2, 3), padding=3, dilation=3), 2, 30), {"conv1d"}, 2 * 30 * 6,
    ),
    "conv2d": (lambda: matrix(lambda x: F.conv2d(x, draw(1, 1, 3, 3), padding=1), 1, 10, 12), {"conv2d"}, 120 * 9),
    "conv2d_channels": (
        lambda: matrix(lambda x: F.conv2d(x, draw(4, 3, 3, 3), stride=2, padding=1), 3, 8, 6), {"conv2d"}, 4 * 12 * 27,
    ),
    "scaled_permutation": (lambda: torch.diag(draw(64)) @ permuted(64), {"index_select", "addcmul"}, 0),
    "conv1d_depthwise": (
        lambda: matrix(lambda x: F.conv1d(x, draw(6, 1, 3), padding=1, groups=6), 6, 20), {"conv1d"}, 120 * 3,
    ),
    "conv1d_by_channels_last": (
        lambda: matrix(lambda x: F.conv1d(x.mT, draw(5, 3, 3), padding=1).mT, 16, 3), {"conv1d"}, 5 * 16 * 9,
    ),
    "conv2d_unpadded": (lambda: matrix(lambda x: F.conv2d(x, draw(4, 3, 3, 3)), 3, 9, 7), {"conv2d"}, 4 * 35 * 27),
    "conv2d_groups": (
        lambda: matrix(lambda x: F.conv2d(x, draw(6, 2, 3, 3), stride=2, padding=1, groups=2), 4, 8, 8), {"conv2d"},
        6 * 16 * 18,
    ),
    "conv2d_dilated": (
        lambda: matrix(lambda x: F.conv2d(x, draw(2, 2, 3, 3), padding=2, dilation=2), 2, 9, 9), {"conv2d"}, 162 * 18,
    ),
    "conv2d_uneven": (
        lambda: matrix(lambda x: F.conv2d(x, draw(3, 2, 1, 5), stride=(2, 1), padding=(0, 2)), 2, 8, 10), {"conv2d"},
        120 * 10,
    ),
    "patches2d": (lambda: matrix(lambda x: F.conv2d(x, draw(4, 3, 4, 4), stride=4), 3, 8, 12), {"linear"}, 24 * 48),
    "pooling": (lambda: matrix(lambda x: F.avg_pool2d(x, 2), 3, 8, 8), {"linear"}, 48 * 4),
    "zero_rows_and_columns": (
        lambda: draw(40, 32) * (torch.arange(32) < 8) * (torch.arange(40) < 10)[:, None], {"slice", "linear", "index_select"},
        11 * 8,
    ),
    "live_columns": (lambda: draw(64, 64) * (torch.arange(64) % 3 == 1), {"linear"}, 64 * 21),
    "repeated_rows": (lambda: draw(5, 64)[torch.arange(60) % 5], {"linear", "index_select"}, 5 * 64),
    "low_rank": (lambda: (8 * draw(64, 3)).round() @ (8 * draw(3, 48)).round(), {"linear"}, 3 * 112),
}  # fmt: skip


def linear(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(draw(len(layer.bias)))
    return nn.Sequential(layer).eval()


def operators(result: nn.Module) -> set[str]:
    return {str(n.target).split(".")[1] for n in result.graph.nodes if str(n.target).startswith("aten.")}


def checked(model: nn.Module, x: torch.Tensor, **keywords: object) -> tuple[nn.Module, Report]:
    result = fxconv.transform(model, x, **keywords)
    report = fxconv.report(result)
    assert report.verified, report.to_table()
    torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-4)
    return result, report


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str) -> None:
    build, wanted, macs = LINEAR[name]
    model = linear(build())
    x = torch.randn(3, model[0].in_features, generator=generator())
    result, report = checked(model, x, objective="macs")
    heavy = {"linear", "conv1d", "conv2d", "addmm"}
    assert wanted <= operators(result) and operators(result) & heavy <= wanted, operators(result)
    assert report.cost_after.macs == macs * report.cost_before.macs // (model[0].weight.numel())
    assert {r.exactness for r in report.applied} == {"exact"}
    assert any("recover" in r.laws for r in report.applied) or name == "zero"


def with_bias(name: str) -> nn.Module:
    """A Linear whose bias is that of the convolution it is: one value a channel."""
    model = linear(LINEAR[name][0]())
    channels = {"blocks": 64, "conv1d_channels": 4, "conv2d_channels": 4, "conv1d_depthwise": 6}.get(name, 1)
    with torch.no_grad():
        model[0].bias.copy_(draw(channels).repeat_interleave(model[0].out_features // channels))
    return model


@pytest.mark.parametrize("name", ["blocks", "conv1d_channels", "conv2d_channels", "conv1d_depthwise", "conv1d", "conv2d"])
def test_the_bias_of_a_recovered_convolution_is_its_own(name: str) -> None:
    model = with_bias(name)
    x = torch.randn(3, model[0].in_features, generator=generator())
    result, _ = checked(model, x, objective="macs")
    assert "add" not in operators(result)
    convolution = next(n for n in result.graph.nodes if "conv" in str(n.target))
    assert convolution.args[2] is not None


def blurred() -> nn.Module:
    g = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    conv = nn.Conv2d(6, 6, 5, padding=2, groups=6)
    with torch.no_grad():
        conv.weight.copy_(torch.outer(g, g).expand(6, 1, 5, 5) * torch.tensor([1.0, 2, 4, 1, 2, 8])[:, None, None, None])
    return conv


def filled(weight: torch.Tensor, **options: object) -> nn.Module:
    conv = nn.Conv2d(weight.shape[1] * int(options.get("groups", 1)), weight.shape[0], tuple(weight.shape[2:]), **options)  # type: ignore[arg-type]
    with torch.no_grad():
        conv.weight.copy_(weight)
    return conv


def separable() -> torch.Tensor:
    return torch.einsum("ora,rcb->ocab", draw(8, 2, 5, whole=True), draw(2, 6, 5, whole=True))


def grouped() -> torch.Tensor:
    weight = torch.zeros(8, 6, 3, 3)
    weight[:4, :3], weight[4:, 3:] = draw(4, 3, 3, 3), draw(4, 3, 3, 3)
    return weight


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "separable_depthwise": (blurred, 10 / 25),
    "separable": (lambda: filled(separable(), padding=2, stride=(1, 2)), 0.4),
    "grouped": (lambda: filled(grouped(), padding=1), 0.5),
    "narrow": (
        lambda: filled(torch.einsum("or,rcab->ocab", draw(16, 2, whole=True), draw(2, 6, 3, 3, whole=True))),
        0.2,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    build, share = CONVOLUTIONS[name]
    model = nn.Sequential(build()).eval()
    _, report = checked(model, torch.randn(2, 6, 14, 12, generator=generator()), objective="macs")
    assert report.cost_after.macs <= share * report.cost_before.macs
    assert [set(r.laws) for r in report.applied] == [{"recover"}]


def normalised(conv: nn.Module, live: int) -> nn.Module:
    """A convolution behind which a BatchNorm scales all but the first ``live`` channels by zero."""
    norm = nn.BatchNorm2d(conv.weight.shape[0]).eval()  # type: ignore[union-attr, index]
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.uniform_(0.5, 2.0, generator=generator())
        norm.weight[live:] = 0.0
    return nn.Sequential(conv, norm).eval()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_scaled_convolution_has_the_structure_that_it_has(name: str) -> None:
    """The scale in front of it, and behind it, is no reason to look at the numbers again, nor to overlook them."""
    build, share = CONVOLUTIONS[name]
    model = normalised(build(), 1000)
    _, report = checked(model, torch.randn(2, 6, 14, 12, generator=generator()), objective="macs")
    assert report.cost_after.macs <= share * report.cost_before.macs


@pytest.mark.parametrize(("live", "share"), [(16, 1.0), (3, 0.25)])
def test_a_scale_of_zeros_makes_a_structure_of_its_own(live: int, share: float) -> None:
    model = normalised(nn.Conv2d(6, 16, 3), live)
    _, report = checked(model, torch.randn(2, 6, 14, 12, generator=generator()), objective="macs")
    assert report.cost_after.macs <= share * report.cost_before.macs
    assert live < 16 or report.cost_after.macs == report.cost_before.macs


def test_a_scaled_kernel_is_not_computed_to_be_looked_at() -> None:
    blocks = [normalised(nn.Conv2d(8, 8, 3, padding=1), 8) for _ in range(3)]
    captured = capture(nn.Sequential(*blocks), (torch.randn(2, 8, 6, 5),), {}, dynamic_shapes=None, mode="auto")
    outcome = rewrite(captured, Options(verify="off"))
    weights = [k for name, k in outcome.emitted.parameters.items() if name.endswith("weight")]
    assert len(weights) == 3
    for k in weights:
        while _rearranged(k):
            k = k.parents[0]
        assert k.scaling is not None and without_zeros(k)


def test_a_long_chain_of_scales_is_looked_through() -> None:
    scale = kernel.literal(torch.tensor([2.0, -1.0, 0.5]))
    chain = scale
    for i in range(3000):
        longer = kernel.derive((3,), ("times", i), (chain, scale), lambda: torch.ones(3))
        longer.note_scale(scale, chain)
        chain = longer
    assert without_zeros(chain)
    last = kernel.derive((3,), ("times", "zero"), (chain,), lambda: torch.ones(3))
    last.note_scale(kernel.literal(torch.tensor([1.0, 0.0, 1.0])), chain)
    assert not without_zeros(last)


@pytest.mark.parametrize("name", ["gaussian", "one_off", "almost_toeplitz", "sparse", "signs", "float_product"])
def test_ordinary_weights_stay(name: str) -> None:
    weight = draw(48, 48)
    if name == "one_off":
        weight = torch.block_diag(*draw(6, 8, 8))
        weight[3, 40] = 1e-3
    elif name == "almost_toeplitz":
        weight = matrix(lambda x: F.conv1d(x, draw(1, 1, 5), padding=2), 1, 48)
        weight[20, 21] *= 1.001
    elif name == "sparse":
        weight = weight * (torch.rand(48, 48, generator=generator()) < 0.3)
    elif name == "signs":
        weight = weight.sign()
    elif name == "float_product":  # its sums were rounded several times: low rank within a few ulps only
        weight = draw(48, 6) @ draw(6, 48)
    _, report = checked(linear(weight), torch.randn(2, 48), objective="macs")
    assert not any("recover" in r.laws for r in report.applied), report.to_table()


def test_within_half_an_ulp_is_exact_to_rounding() -> None:
    """Three in ten weights are moved to the next number: Toeplitz to rounding, and the report says so."""
    weight = matrix(lambda x: F.conv1d(x, draw(1, 1, 5), padding=2), 1, 60)
    moved = (torch.rand(weight.shape, generator=generator()) < 0.3) & (weight != 0)
    weight = torch.where(moved, torch.nextafter(weight, torch.tensor(10.0)), weight)
    result, report = checked(linear(weight), torch.randn(2, 60), objective="macs")
    (rewrite,) = report.applied
    assert rewrite.exactness == "exact to rounding" and "recover" in rewrite.laws
    assert "exact to" in report.to_table() and "rounding" in report.to_table()
    further = torch.where(moved, weight * (1 + 1e-5), weight)
    _, report = checked(linear(further), torch.randn(2, 60), objective="macs")
    assert not any("recover" in r.laws for r in report.applied)


def gaussian(size: int) -> torch.Tensor:
    g = torch.exp(-((torch.arange(size) - size // 2) ** 2) / size)
    return torch.outer(g, g) / g.sum() ** 2


ROUNDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    # Products that were rounded to float32 when they were stored.
    "blur": (lambda: filled(gaussian(7).expand(4, 1, 7, 7), padding=3, groups=4), (2, 4, 16, 16), 2 / 7),
    "blur_of_one_channel": (lambda: filled(gaussian(5)[None, None]), (2, 1, 16, 16), 0.55),
    "rank_one": (lambda: linear(draw(64, 1) * draw(48)), (2, 48), 112 / (64 * 48)),
    "rank_three": (lambda: linear((draw(32, 3).double() @ draw(3, 24).double()).float()), (2, 24), 3 * 56 / (32 * 24)),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_a_product_that_was_rounded_is_found(name: str) -> None:
    build, shape, share = ROUNDED[name]
    model = nn.Sequential(build()).eval()
    _, report = checked(model, torch.randn(shape, generator=generator()), objective="macs")
    assert report.cost_after.macs <= share * report.cost_before.macs
    assert {r.exactness for r in report.applied} == {"exact to rounding"}


class Entries(TorchDispatchMode):
    """Counts the entries of everything that is computed, and the multiply-adds of products and decompositions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.count += max((t.numel() for t in tensors), default=0)
            if "mm" in str(func) or "linalg" in str(func):
                self.count += math.prod(max((t.shape for t in tensors), key=len)) * max(max(t.shape) for t in tensors if t.dim())
        return out


def test_a_large_dense_layer_is_rejected_with_little_work() -> None:
    # benchmarks/structure_tests.py has the seconds.
    model = nn.Sequential(nn.Linear(4096, 4096)).eval()
    captured = capture(model, (torch.randn(2, 4096),), {}, dynamic_shapes=None, mode="auto")
    with Entries() as work:
        outcome = rewrite(captured, Options(verify="off"))
    # A decomposition of the weight, or a product of it with another of its size, would be 4,096 passes over it.
    assert work.count < 400 * 4096**2, f"{work.count / 4096**2:.2f} passes over the weight"
    assert not outcome.emitted.clusters


@pytest.mark.parametrize("name", ["conv1d", "strided", "identity"])
def test_a_large_structured_layer_is_found_with_little_work(name: str) -> None:
    weight = {
        "conv1d": lambda: matrix(lambda x: F.conv1d(x, draw(1, 1, 5), padding=2), 1, 1024),
        "strided": lambda: matrix(lambda x: F.conv1d(x, draw(8, 3, 7), stride=4, padding=3), 3, 512),
        "identity": lambda: torch.eye(1024),
    }[name]()
    with Entries() as work:
        assert structures.toeplitz_sets(weight, structures.toeplitz_axes(weight, slack=True))
    assert work.count < 100 * weight.numel(), f"{work.count / weight.numel():.1f} passes over the weight"


def test_toeplitz_kernel_is_the_convolutions() -> None:
    weight = draw(4, 3, 3, 3)
    w = matrix(lambda x: F.conv2d(x, weight, stride=2, padding=1), 3, 8, 6)
    best = structures.toeplitz_sets(w, structures.toeplitz_axes(w))[0]
    taps = structures.taps(w, best)
    assert taps is not None and taps.exact and taps.first == (-1, -1) and taps.step == (1, 1)
    found = taps.values.squeeze().permute(0, 3, 1, 2)
    assert torch.equal(found, weight.double())


# -- Targets ----------------------------------------------------------------------------------------------------------


class Function(nn.Module):
    """A forward made of one layer and a function of it."""

    def __init__(self, layer: nn.Module, function: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer, x)


def on_patches(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return layer(x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


RESHAPED = {
    "patches": (nn.Linear(48, 10), on_patches, (2, 3, 16, 24)),
    "unfold": (nn.Linear(48, 10), lambda f, x: f(F.unfold(x, 4, stride=4).transpose(1, 2)), (2, 3, 16, 24)),
    "tensor_unfold": (nn.Linear(4, 10), lambda f, x: f(x.unfold(2, 4, 4)), (2, 3, 16)),
    "space_to_depth": (nn.Conv2d(12, 10, 1), lambda f, x: f(F.pixel_unshuffle(x, 2)), (2, 3, 16, 24)),
    "mixer": (nn.Linear(12, 10), lambda f, x: f(x.transpose(1, 2)).transpose(1, 2), (2, 12, 16)),
    "channels_last": (nn.Linear(12, 10), lambda f, x: f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), (2, 12, 6, 8)),
    "conv1d": (nn.Conv1d(3, 5, 3, padding=1, stride=2), lambda f, x: f(x), (2, 3, 17)),
    "full_length": (nn.Conv1d(3, 5, 16), lambda f, x: f(x).flatten(1), (2, 3, 16)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=2, stride=2, dilation=2, groups=2), lambda f, x: f(x), (2, 4, 9, 8)),
    "transposed": (nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1), lambda f, x: f(x), (2, 3, 5, 6)),
}
NEVER = {
    "conv": {"linear", "addmm", "matmul"},
    "conv2d": {"linear", "addmm", "matmul", "conv1d", "conv3d"},
    "linear": {"conv1d", "conv2d", "conv3d", "conv_transpose2d"},
}


@pytest.mark.parametrize("target", NEVER)
@pytest.mark.parametrize("name", RESHAPED)
def test_target(name: str, target: str) -> None:
    layer, function, shape = RESHAPED[name]
    static = {"x": {0: torch.export.Dim.AUTO}}  # a Linear in place of a convolution has one size
    shapes = static if target == "linear" or name == "patches" else None
    result, _ = checked(Function(layer, function).eval(), torch.randn(shape), target=target, dynamic_shapes=shapes)
    assert not operators(result) & NEVER[target]


def test_a_linear_of_too_many_weights_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)).eval()
    x = torch.randn(2, 1, 96, 96)
    shapes = ({0: torch.export.Dim.AUTO},)
    result = fxconv.transform(model, x, target="linear", dynamic_shapes=shapes)
    assert "conv2d" in operators(result)
    assert any(str(96**4) in m.reason for m in fxconv.report(result).missed)
    dynamic = fxconv.transform(model, x, target="linear")
    assert any("dynamic size" in m.reason for m in fxconv.report(dynamic).missed)
