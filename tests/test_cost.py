"""The cost model: what is known to be faster must be priced lower, and measured rewrites must win."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxconv
from fxconv import measure
from fxconv.cost import CPU, CostModel
from fxconv.kernel import Kernel
from fxconv.steps import Step


def _weight(*shape: int) -> Kernel:
    return Kernel(shape, ("test", shape), (), lambda: torch.zeros(shape))


def _conv(n: int, i: int, o: int, size: int, k: int, out: int, groups: int = 1) -> Step:
    macs = n * o * out * out * i // groups * k * k
    attrs = {"groups": groups, "stride": (1, 1)}
    return Step("conv", (n, i, size, size), (n, o, out, out), (_weight(o, i // groups, k, k),), attrs, macs)


def _linear(rows: int, i: int, o: int) -> Step:
    return Step("linear", (rows, i), (rows, o), (_weight(o, i),), {}, rows * i * o)


def _transposed(i: int, o: int, size: int, k: int, stride: int) -> Step:
    shape = (1, i, size, size)
    weight = _weight(i, o, k, k)
    return Step("conv_transpose", shape, (1, o, size * stride, size * stride), (weight,), {"groups": 1}, size**2 * i * o * k**2)


def _nearest(c: int, size: int) -> Step:
    return Step("nearest", (1, c, size, size), (1, c, 2 * size, 2 * size), (), {"scales": (2, 2)})


def _permute(rows: int, c: int) -> Step:
    return Step("permute", (1, c, rows), (1, rows, c))


@pytest.mark.parametrize(
    ("faster", "slower"),
    [
        pytest.param([_linear(1, 25088, 4096)], [_conv(1, 512, 4096, 7, 7, 1)], id="VGG's head is a Linear"),
        pytest.param([_linear(2, 512, 10)], [_conv(2, 512, 10, 1, 1, 1)], id="so is a small one"),
        pytest.param([_transposed(128, 128, 64, 4, 2)], [_nearest(128, 64), _conv(1, 128, 128, 128, 3, 128)], id="nearest, 3x3"),
        pytest.param(
            [_conv(1, 64, 64, 56, 1, 56)],
            [_permute(3136, 64), _linear(3136, 64, 64), _permute(3136, 64)],
            id="a 1x1 convolution is not permute, Linear, permute",
        ),
        pytest.param([_conv(1, 16, 16, 96, 3, 96)], [_conv(1, 16, 256, 96, 3, 96), _conv(1, 256, 16, 96, 1, 96)], id="SESR"),
        pytest.param([_conv(1, 64, 64, 56, 3, 56, 64)], [_conv(1, 64, 64, 56, 3, 56)], id="depthwise is not dense"),
        pytest.param([_conv(1, 48, 48, 56, 3, 56, 48)], [_conv(1, 48, 48, 56, 3, 56, 48)] * 3, id="branches"),
    ],
)
def test_order(faster: list[Step], slower: list[Step]) -> None:
    model = CostModel(CPU)
    assert sum(model.price(s).seconds for s in faster) < sum(model.price(s).seconds for s in slower)


def test_launches_are_most_of_a_tiny_model() -> None:
    model = CostModel(CPU)
    step = _conv(1, 4, 4, 7, 3, 7)
    assert model.kind(step) == "conv_small"
    assert CPU.of("conv_small").launch > model.price(step).seconds / 2


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (_conv(1, 64, 64, 56, 3, 56), "conv"),
        (_conv(1, 8, 8, 8, 3, 8), "conv_small"),
        (_conv(2, 8, 8, 8, 3, 8), "conv"),
        (_conv(1, 64, 64, 56, 1, 56), "conv_1x1"),
        (_conv(1, 8, 8, 8, 3, 8, 8), "depthwise"),
        (_conv(1, 8, 8, 8, 3, 8, 2), "grouped"),
        (_linear(1, 8, 8), "row"),
        (_linear(2, 8, 8), "linear"),
    ],
)
def test_kinds(step: Step, kind: str) -> None:
    assert CostModel(CPU).kind(step) == kind


def test_unfilled_blocks_of_channels_cost_like_filled_ones() -> None:
    model = CostModel(CPU)
    assert model.price(_conv(1, 64, 3, 96, 3, 96)).seconds > 0.8 * model.price(_conv(1, 64, 8, 96, 3, 96)).seconds


class _Collapsible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(8, 128, 3, padding=1, bias=False), nn.Conv2d(128, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x)).relu()


def test_measure_keeps_what_wins() -> None:
    model, x = _Collapsible().eval(), torch.randn(1, 8, 40, 40)
    result = fxconv.transform(model, x, measure=True)
    report = fxconv.report(result)
    assert report.cost_after.macs < report.cost_before.macs
    assert report.measured["low"] > 1.0


def test_measure_takes_back_what_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(*_: Any, **__: Any) -> dict[str, float]:
        return {"before_s": 1.0, "after_s": 1.1, "ratio": 0.91, "low": 0.9, "high": 0.92, "pairs": 9, "threads": 1}

    monkeypatch.setattr(measure, "paired", clock)
    model, x = _Collapsible().eval(), torch.randn(1, 8, 40, 40)
    result = fxconv.transform(model, x, measure=True)
    report = fxconv.report(result)
    assert not report.rewrites
    assert any("measured original ÷ rewritten 0.91" in remark.reason for remark in report.missed)
    torch.testing.assert_close(result(x), model(x))


def test_measure_does_not_undo_what_the_target_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(*_: Any, **__: Any) -> dict[str, float]:
        return {"before_s": 1.0, "after_s": 1.0, "ratio": 1.0, "low": 0.99, "high": 1.01, "pairs": 9, "threads": 1}

    monkeypatch.setattr(measure, "paired", clock)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval(), torch.randn(2, 6)
    result = fxconv.transform(model, x, target="conv", measure=True)
    assert not any("linear" in str(n.target) for n in result.graph.nodes)
