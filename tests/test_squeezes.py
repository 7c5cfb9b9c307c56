"""Bare squeezes: what depends on the size moves behind what it commutes with, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check, draw, randomise
from torch import Tensor, nn

import fxconv

Program = Callable[[Any, Tensor], Any]


class Squeezed(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 1)
        self.wide = nn.Conv2d(6, 8, (1, 7))
        self.fc, self.fc1, self.mix = nn.Linear(8, 5), nn.Linear(8, 1), nn.Linear(5, 8)
        self.row = nn.Parameter(torch.zeros(8))
        self.rows = nn.Parameter(torch.zeros(2, 8))
        self.norm = nn.BatchNorm1d(5)
        self.program = program

    def forward(self, x: Tensor) -> Any:
        return self.program(self, x)


def pooled(m: Any, x: Tensor) -> Tensor:
    return m.conv(F.adaptive_avg_pool2d(x, 1))


FUSED: dict[str, Program] = {
    "linear": lambda m, x: m.fc(pooled(m, x).squeeze()),
    "torch_squeeze": lambda m, x: m.fc(torch.squeeze(pooled(m, x))),
    "one_feature": lambda m, x: m.fc1(pooled(m, x).squeeze()),
    "two_linears": lambda m, x: m.mix(m.fc(pooled(m, x).squeeze())),
    "arithmetic": lambda m, x: m.fc(pooled(m, x).squeeze() * 2 + m.row),
    "residual": lambda m, x: (lambda y: m.mix(m.fc(y)) + y)(pooled(m, x).squeeze()),
    "then_sigmoid": lambda m, x: m.fc(pooled(m, x).squeeze()).sigmoid(),
    "then_norm": lambda m, x: m.norm(m.fc(pooled(m, x).squeeze())),
}
LEFT: dict[str, Program] = {
    "softmax": lambda m, x: m.fc(pooled(m, x).squeeze().softmax(-1)),
    "transposed": lambda m, x: pooled(m, x).squeeze().mT @ m.rows.mT[:2],
    "also_an_output": lambda m, x: (lambda y: (m.fc(y), y))(pooled(m, x).squeeze()),
}


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("name", FUSED)
def test_affine_work_meets_across_a_bare_squeeze(name: str, capture: str) -> None:
    out = check(randomise(Squeezed(FUSED[name])), draw((2, 6, 5, 7)), capture=capture, batches=(1, 2, 7))
    assert out.kinds["conv"] + out.kinds["linear"] == 1
    assert any("bare squeeze" in note and "moved" in note for note in out.report.warnings)


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_commute_stays(name: str, capture: str) -> None:
    try:
        check(randomise(Squeezed(LEFT[name])), draw((2, 6, 5, 7)), capture=capture, batches=(1, 2, 7))
    except fxconv.CaptureError:
        assert name == "transposed"


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_a_size_that_holds_from_batch_two_on(capture: str) -> None:
    """``x[:2]`` has two rows where the batch has, so a rewrite that counts on them fails at 1 and is taken back."""
    model = randomise(Squeezed(lambda m, x: pooled(m, x)[:2].squeeze() * m.rows[:1])).double()
    result = fxconv.transform(model, draw((2, 6, 5, 7)), capture=capture)
    assert fxconv.report(result).verified
    with torch.no_grad():
        for batch in (1, 2, 7):
            x = draw((batch, 6, 5, 7))
            assert torch.allclose(result(x), model(x), rtol=1e-12) and result(x).shape == model(x).shape


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_a_squeeze_of_several_dynamic_dims(capture: str) -> None:
    """[N, H, 1, 8]: the height may be 1 as well as the batch, and the width need not be."""
    model = randomise(Squeezed(lambda m, x: m.fc(m.wide(x).permute(0, 2, 3, 1).squeeze()))).double()
    out = check(model, draw((2, 6, 5, 7)), capture=capture, batches=(1, 2, 7))
    assert out.kinds["conv"] + out.kinds["linear"] == 1
    with torch.no_grad():
        for height, width in ((1, 7), (2, 7), (9, 7), (1, 9), (3, 8)):
            x = draw((2, 6, height, width)).double()
            mine, theirs = out.result(x), model(x)
            assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-12)


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_a_size_of_one_in_the_example_is_no_size_of_one_everywhere(capture: str) -> None:
    """A map of one element broadcasts, and a larger one does not: the result refuses it."""
    model = Squeezed(lambda m, x: m.conv(m.conv(x).squeeze(-1)[..., None].expand(-1, -1, 4, 4)[:, :6]))
    model.conv = nn.Conv2d(6, 8, 4)
    result = fxconv.transform(randomise(model).double().eval(), draw((2, 6, 4, 4)).double(), capture=capture)
    assert fxconv.report(result).verified
    with torch.no_grad(), pytest.raises((AssertionError, RuntimeError)):
        result(draw((2, 6, 5, 7)))


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_a_full_size_kernel_does_not_fix_the_size(capture: str) -> None:
    out = check(randomise(nn.Sequential(nn.Conv2d(6, 10, (5, 7)), nn.BatchNorm2d(10))), draw((2, 6, 5, 7)), capture=capture)
    assert tuple(out.result(draw((3, 6, 10, 11)).double()).shape) == (3, 10, 6, 5)


def test_nothing_is_moved_where_nothing_is_won() -> None:
    model = randomise(Squeezed(lambda m, x: m.fc(pooled(m, x).sigmoid().squeeze())))
    out = check(model, draw((2, 6, 5, 7)), batches=(1, 2, 7))
    assert not any("moved" in note for note in out.report.warnings)
    assert [str(n.target) for n in out.result.graph.nodes if "squeeze" in str(n.target)] == ["aten.squeeze.default"]
