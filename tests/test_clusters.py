"""What is compared when a rewrite is checked: neither a false alarm nor a bug that hides behind the choice of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check, draw, randomise
from torch import Tensor, nn

import fxconv
from fxconv.clusters import Cutter, Pair


class Twice(nn.Module):
    """The same affine value is computed by two nodes; one is read by a barrier, the other by what is rewritten."""

    def __init__(self, twice: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, groups=8)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.twice = twice

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, z = self.twice(self, x), self.twice(self, x)
        return F.gelu(y), self.norm2(self.norm1(z) * 3)


TWICE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "pool": lambda m, x: F.avg_pool2d(x, 2),
    "pool_of_relu": lambda m, x: F.avg_pool2d(F.relu(x), 2),
    "chain": lambda m, x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2).transpose(2, 3),
    "conv": lambda m, x: m.conv(x),
    "sum": lambda m, x: x + F.avg_pool2d(x, 3, 1, 1),
}


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("name", TWICE)
def test_a_value_computed_twice_is_no_false_alarm(name: str, capture: str) -> None:
    out = check(randomise(Twice(TWICE[name])), draw((2, 8, 8, 10)), capture=capture)
    assert out.report.applied and out.kinds["batch_norm"] == 0


@pytest.mark.parametrize("name", TWICE)
def test_a_bug_behind_a_value_computed_twice_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Cutter.cut

    def planted(self: Cutter, cluster: Any) -> Pair:
        pair = cut(self, cluster)
        for buffer in pair.replacement.buffers():
            buffer.mul_(1 + 1e-6)
        return pair

    monkeypatch.setattr(Cutter, "cut", planted)
    result = fxconv.transform(randomise(Twice(TWICE[name])).double().eval(), draw((2, 8, 8, 10)).double())
    report = fxconv.report(result)
    assert report.rolled_back
    assert not [n for r in report.applied for n in r.nodes if n.startswith(("batch_norm", "mul", "conv"))]


def test_what_is_left_after_a_rollback_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rewrite fails; taken back, it leaves smaller ones, more than there were at first."""
    cut = Cutter.cut

    def planted(self: Cutter, cluster: Any) -> Pair:
        pair = cut(self, cluster)
        for buffer in pair.replacement.buffers() if "norm1" not in pair.nodes[-1] and len(pair.nodes) > 1 else ():
            buffer.add_(1)
        return pair

    monkeypatch.setattr(Cutter, "cut", planted)
    model = randomise(Twice(TWICE["pool"])).double().eval()
    result = fxconv.transform(model, draw((2, 8, 8, 10)).double(), capture="symbolic")
    report = fxconv.report(result)
    assert report.rolled_back and report.verified
    assert all(r.verdict["status"] in ("proved", "confirmed") for r in report.applied)
    with torch.no_grad():
        x = draw((3, 8, 6, 6)).double()
        for a, b in zip(result(x), model(x), strict=True):
            assert torch.allclose(a, b, rtol=1e-12)


class Ramp(nn.Module):
    """A constant made of python numbers: float32 in the model, and its own self in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x) * 3 + torch.arange(8) * 0.05)


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 7, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.a(x)), torch.tanh(self.b(x))


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_a_constant_of_python_numbers_is_no_false_alarm(capture: str) -> None:
    out = check(randomise(Ramp()), draw((2, 8), dtype=torch.float32), capture=capture, tol=1e-5)
    assert not out.report.rolled_back and out.report.applied


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_siblings_are_sliced_in_either_dialect(capture: str) -> None:
    out = check(randomise(Siblings()), draw((2, 3, 8, 6)), capture=capture, objective="launches")
    assert out.kinds["conv"] == 1


def test_a_value_that_is_read_in_another_layout_is_the_same_input() -> None:
    """PoolFormer's residual stream is a permute of what the next block's scale reads, and its norm reads the stream."""
    import timm

    stage = timm.create_model("poolformerv2_s12").stages[2]
    model = randomise(nn.Sequential(stage.downsample, *stage.blocks[:2])).eval()
    report = fxconv.report(fxconv.transform(model, draw((2, 128, 12, 10)).float()))
    assert report.verified and report.applied and not report.rolled_back
