"""Operators that are made of others, between two convolutions: whatever they are called, one convolution is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import kinds, launches
from helpers import draw, randomise, relative_error, run
from torch import Tensor, nn

import fxconv


class Between(nn.Module):
    """Two convolutions with a step between them, and constants for it to use."""

    def __init__(self, step: Callable[[Between, Tensor], Tensor], second: int = 8) -> None:
        super().__init__()
        self.step = step
        self.first, self.second = nn.Conv2d(6, 8, (3, 2)), nn.Conv2d(second, 5, 1)
        self.shift, self.factor = (nn.Parameter(torch.randn(8, 1, 1)) for _ in range(2))
        self.square = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("mask", torch.rand(8, 1, 1) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 6, H, W] → [N, 5, H - 2, W - 1], where the step leaves the image alone."""
        return self.second(self.step(self, self.first(x)))


LAST = (0, 2, 3, 1)
BACK = (0, 3, 1, 2)
STEPS: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "addcmul_factor": lambda s, x: torch.addcmul(s.shift, s.factor, x),
    "addcmul_shift": lambda s, x: torch.addcmul(x, s.factor, s.shift, value=0.3),
    "addcmul_method": lambda s, x: x.addcmul(x, s.shift, value=-0.7),
    "addcdiv": lambda s, x: torch.addcdiv(s.shift, x, s.factor.exp(), value=0.3),
    "lerp_number": lambda s, x: torch.lerp(x, s.shift, 0.3),
    "lerp_tensor": lambda s, x: x.lerp(2 * x, s.factor),
    "where": lambda s, x: torch.where(s.mask, x, s.shift),
    "where_two": lambda s, x: torch.where(s.mask, x, s.factor * x),
    "where_method": lambda s, x: x.where(s.mask, 0.5 * x),
    "masked_fill": lambda s, x: x.masked_fill(s.mask, 0.25),
    "bool_mask": lambda s, x: x * s.mask,
    "tensordot": lambda s, x: torch.tensordot(x, s.square, dims=([1], [1])).permute(BACK),
    "tensordot_1": lambda s, x: torch.tensordot(x.permute(LAST), s.square, 1).permute(BACK),
    "inner": lambda s, x: torch.inner(x.permute(LAST), s.square).permute(BACK),
    "cumsum": lambda s, x: x.cumsum(1),
    "hstack": lambda s, x: torch.hstack([x[:, :3], x[:, 3:] * s.factor[3:]]),
    "repeat_channels": lambda s, x: x.repeat(1, 2, 1, 1)[:, 3:11],
    "tile": lambda s, x: torch.tile(x, (3, 1, 1))[:, ::3],
    "repeat_interleave": lambda s, x: x.repeat_interleave(3, 1)[:, 2:10],
    "stacked_mean": lambda s, x: torch.stack([x, s.factor * x]).mean(0),
    "mean_expanded": lambda s, x: x.mean(1, keepdim=True).expand(-1, 8, -1, -1),
}


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("step", STEPS)
def test_one_convolution(step: str, capture: str) -> None:
    model = randomise(Between(STEPS[step]), 1).double()
    result = fxconv.transform(model, draw((2, 6, 9, 11), 1), capture=capture)
    report = fxconv.report(result)
    assert report.verified
    assert not report.rolled_back
    left = kinds(result)
    assert left["conv"] == 1, left
    if (step, capture) != ("inner", "symbolic"):  # which keeps its checks of sizes
        assert launches(result) == left["conv"], left
    for shape in ((1, 6, 9, 11), (3, 6, 8, 5)):
        x = (draw(shape, 2),)
        assert relative_error(run(result, x), run(model, x)) < 1e-12


def test_repeat_interleave_of_an_image_is_nearest_upsampling() -> None:
    model = nn.Sequential(Between(lambda s, x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    model = randomise(model, 1).double()
    result = fxconv.transform(model, draw((2, 6, 9, 11), 1))
    assert fxconv.report(result).verified
    assert kinds(result)["conv"] == 1
    x = (draw((3, 6, 8, 12), 2),)
    assert relative_error(run(result, x), run(model, x)) < 1e-12


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda s, x: torch.where(x > 0, x, s.shift), "torch.bool"),
        (lambda s, x: torch.lerp(x, s.shift, x.sigmoid()), "weight"),
        (lambda s, x: torch.addcdiv(x, s.shift, x.exp()), "quotient"),
        (lambda s, x: torch.addcmul(x, x, x), "product of two activations"),
        (lambda s, x: x.masked_fill(s.mask, float("inf")).clamp(-1, 1), "infinities"),
    ],
)
def test_what_is_not_affine_is_named(step: Callable[[Between, Tensor], Tensor], reason: str) -> None:
    model = randomise(Between(step), 1).double()
    result = fxconv.transform(model, draw((2, 6, 9, 11), 1))
    report = fxconv.report(result)
    assert report.verified
    assert any(reason in str(barrier) for barrier in report.barriers), report.barriers
    x = (draw((2, 6, 9, 11), 2),)
    assert relative_error(run(result, x), run(model, x)) < 1e-12


def test_a_rewrite_that_reads_parts_and_a_dtype() -> None:
    def step(s: Between, x: Tensor) -> Tensor:
        first, second = torch.unbind(x.unflatten(1, (2, 4)), 1)
        return torch.cat([second * s.factor[:4], first], 1).to(x.dtype)

    model = randomise(Between(step), 1).double()
    for capture in ("export", "symbolic"):
        result = fxconv.transform(model, draw((2, 6, 9, 11), 1), capture=capture)
        report = fxconv.report(result)
        assert report.verified
        assert not report.rolled_back
        assert kinds(result)["conv"] == 1
        x = (draw((3, 6, 8, 12), 2),)
        assert relative_error(run(result, x), run(model, x)) < 1e-12


class PooledImage(nn.Module):
    """The image-wide branch of DeepLab's pyramid: one pixel, spread over an image of whatever size."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.everywhere = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1, bias=False)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 6, H, W] → [N, 5, H, W]."""
        pooled = torch.relu(self.norm(self.everywhere(nn.functional.adaptive_avg_pool2d(x, 1))))
        spread = nn.functional.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(torch.cat([self.here(x), spread], 1))


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_one_pixel_spread_over_a_dynamic_size(capture: str) -> None:
    model = randomise(PooledImage(), 1).double()
    result = fxconv.transform(model, draw((2, 6, 9, 11), 1), capture=capture)
    report = fxconv.report(result)
    assert report.verified
    assert not report.rolled_back
    assert kinds(result)["batch_norm"] == kinds(result)["cat"] == 0
    for shape in ((1, 6, 9, 11), (3, 6, 8, 5)):
        x = (draw(shape, 2),)
        assert relative_error(run(result, x), run(model, x)) < 1e-12
