"""Dense prediction: a classifier slid over a larger image gives what it gives on each window."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise
from torch import nn

import fxconv
from fxconv.densify import window_scores


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 5), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(4 * 2 * 3, 7), nn.BatchNorm1d(7), nn.ReLU(),
        nn.Linear(7, 5), nn.Softmax(1),
    )  # fmt: skip


def pooled(size: int | tuple[int, int]) -> nn.Module:
    count = size * size if isinstance(size, int) else size[0] * size[1]
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(4 * count, 5),
        nn.LogSoftmax(-1),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.head((y + self.b(y.relu())).mean((2, 3)))


class Squeezed(nn.Module):
    """A global maximum, squeezed dim by dim."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.head(y.amax((2, 3), keepdim=True).squeeze(-1).squeeze(-1) + y.amax((2, 3)))


def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 5), stride=(1, 3), dilation=(2, 1), groups=2), nn.Hardswish(), nn.MaxPool2d(3, 2),
        nn.Flatten(), nn.Linear(6 * 2 * 3, 5),
    )  # fmt: skip


UNPADDED = {
    "strided": (strided, (2, 4, 10, 26), (2, 6)),
    "global_maximum": (Squeezed, (2, 2, 5, 6), (1, 1)),
    "largest_of_parts": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)),
        (2, 3, 8, 10),
        (1, 1),
    ),
    "3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 3), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(24, 4)),
        (2, 2, 6, 6, 6),
        (2, 2, 2),
    ),
    "lenet": (lenet, (2, 1, 16, 20), (4, 4)),
    "global_pool": (lambda: pooled(1), (2, 3, 20, 24), (2, 2)),
    "even_pool": (lambda: pooled((3, 2)), (2, 3, 19, 21), (2, 2)),
    "uneven_pool": (lambda: pooled((4, 3)), (2, 3, 19, 21), (2, 2)),
    "1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)), (2, 3, 20), (2,)),
    "residual": (Residual, (2, 2, 5, 6), (1, 1)),
}


@pytest.mark.parametrize("name", UNPADDED)
def test_each_window_is_scored_as_by_itself(name: str) -> None:
    build, shape, stride = UNPADDED[name]
    model = randomise(build()).double()
    x = torch.randn(shape, dtype=torch.float64)
    dense = fxconv.densify(model, x)
    assert dense.window == shape[2:] and dense.window_stride == stride
    assert fxconv.report(dense).verified and not fxconv.report(dense).advice
    torch.testing.assert_close(dense(x).flatten(1), model(x), rtol=1e-12, atol=1e-12)
    image = torch.randn(3, shape[1], *(n + 3 * s + 1 for n, s in zip(shape[2:], stride, strict=True)), dtype=torch.float64)
    expected = window_scores(model, image, shape[2:], stride)
    # One more where a window hangs over the edge by pixels that the original does not read.
    got = dense(image)[tuple(slice(0, n) for n in expected.shape)]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_padding_is_measured_and_explained() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(64, 5)))
    x = torch.randn(2, 3, 16, 16)
    dense = fxconv.densify(model, x)
    report = fxconv.report(dense)
    torch.testing.assert_close(dense(x).flatten(1), model(x))
    (remark,) = report.advice
    image = torch.randn(1, 3, 24, 20)
    expected = window_scores(model, image, (16, 16), (4, 4))
    assert not torch.allclose(dense(image), expected, rtol=1e-3) and 1e-3 < report.verification["windows"] < 10
    assert f"{report.verification['windows']:.1e}" in remark.reason
    assert "1 layer pads" in remark.reason and "zeros at the border" in remark.reason


@pytest.mark.parametrize("name", ["alexnet"])
def test_torchvision(name: str) -> None:
    """Narrow heads: the real ones only take longer."""
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models, name)(num_classes=3)
    for i, m in enumerate(model.classifier):
        if isinstance(m, nn.Linear):
            width = m.in_features if i < 3 and m.in_features > 4096 else 32
            model.classifier[i] = nn.Linear(width, 3 if i == 6 else 32)
    model = randomise(model)
    x = torch.randn(1, 3, 224, 224)
    dense = fxconv.densify(model, x)
    assert dense.window_stride == (32, 32)
    torch.testing.assert_close(dense(x).flatten(1), model(x), rtol=1e-4, atol=1e-4)
    (remark,) = fxconv.report(dense).advice
    assert "layers pad" in remark.reason


def test_what_it_costs_is_reported() -> None:
    """At the training size: a Linear over the window is as dear as the convolution in its place."""
    model = randomise(lenet())
    report = fxconv.report(fxconv.densify(model, torch.randn(2, 1, 16, 20)))
    counts = [(r.before.macs, r.after.macs, r.before.params, r.after.params) for r in report.rewrites]
    assert counts == [(2 * 24 * 7, 2 * 24 * 7, 24 * 7 + 7, 24 * 7 + 7), (2 * 7 * 5, 2 * 7 * 5, 7 * 5 + 5, 7 * 5 + 5)]
    assert report.cost_before.macs == report.cost_after.macs == 2 * (12 * 16 * 3 * 25 + 4 * 6 * 4 * 27) + 2 * 203
    assert report.cost_before.launches == report.cost_after.launches > 0


def test_what_does_not_slide() -> None:
    attention = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Softmax(-1))
    with pytest.raises(fxconv.DensifyError, match="does not slide"):
        fxconv.densify(attention.eval(), torch.randn(2, 3, 8, 8))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x.flatten(1)), x


def test_several_outputs_are_refused() -> None:
    with pytest.raises(fxconv.DensifyError, match="several"):
        fxconv.densify(Two().eval(), torch.randn(2, 3, 2, 2))
