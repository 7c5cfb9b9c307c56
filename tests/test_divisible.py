"""What views say of sizes: patches become strided convolutions at every size that the model runs at."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from helpers import check, draw, randomise
from torch import Tensor, nn
from torch.utils._sympy.functions import FloorDiv

import fxconv
from fxconv.divisible import divisors_said, rewritten, slices_said
from fxconv.window import remainder

H, W, N = (sympy.Symbol(s, integer=True, positive=True) for s in "hwn")


def over(a: sympy.Expr, b: int) -> sympy.Expr:
    return FloorDiv(a, b)


SAID = [
    ([N, 3, H, W], [N, 3, over(H, 4), 4, over(W, 4), 4], {(H, 4), (W, 4)}),
    ([N, 3, H, W], [N, 3, over(H, 4), 4, over(W, 2), 2], {(H, 4), (W, 2)}),
    ([N, 3, over(H, 2), 8], [N, 3, over(H, 8), 4, 8], {(over(H, 2), 4)}),
    ([N, H, 6], [N, H, 2, 3], set()),
    ([N, H, W], [N, H * W], set()),
    ([N, H, W], [N, over(H, 4), 4, over(W, 4), 8], set()),  # 4·8 is no product of the divisors
    ([H], [over(H, 3), 2], set()),
]


@pytest.mark.parametrize("before, after, facts", SAID)
def test_divisors_said(before: list[sympy.Expr], after: list[sympy.Expr], facts: set[tuple[sympy.Expr, int]]) -> None:
    assert set(divisors_said(before, after)) == facts


def test_slices_said() -> None:
    even, odd = (N, 3, over(H + 1, 2), over(W, 2)), (N, 3, over(H, 2), over(W + 1, 2))
    assert set(slices_said([even, odd], 1)) == {(H, 2), (W, 2)}
    assert slices_said([even, even], 1) == [] and set(slices_said([even, odd], 3)) == {(H, 2)}
    assert slices_said([(over(H + 2, 3),), (over(H, 3),)], None) == [(H, 3)]
    assert slices_said([(over(H + 1, 3),), (over(H, 3),)], None) == []  # 3 may divide H − 1


def test_remainder() -> None:
    sizes = {H: (1, 0), 2 * over(H, 2): (2, 0), 4 * over(H, 4) + 3: (4, 3), 6 * H + 4 * over(W, 3) - 1: (2, 1), 7: (1, 0)}
    assert {size: remainder(size) for size in sizes} == sizes


def test_sizes_as_multiples() -> None:
    facts = [(H, 4)]
    assert rewritten(H, facts) == 4 * over(H, 4) and rewritten(W, facts) == W and rewritten(7, facts) == 7
    assert rewritten(FloorDiv(H, FloorDiv(H, 4)), facts) == 4
    assert rewritten(FloorDiv(H, 8), facts).subs(H, 24) == 3
    assert rewritten(FloorDiv(H, 2 * FloorDiv(H, 8)), [(over(H, 2), 4)]) == 4


class Patches(nn.Module):
    """A Linear on patches, whose sizes the forward computes."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, self.embed = spelling, nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if self.spelling == "unshuffle":
            return self.embed(F.pixel_unshuffle(x, 4).permute(0, 2, 3, 1))
        if self.spelling == "windows":
            x = x.permute(0, 2, 3, 1).reshape(n, h // 4, 4, w // 4, 4, c)
            return self.embed(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16 * c))
        x = x.reshape(n, c, h // 4, 4, w // 4, 4)
        if self.spelling == "channels_last":
            return self.embed(x.permute(0, 2, 4, 3, 5, 1).flatten(3))
        if self.spelling == "rest":
            return self.embed(x.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * 16))
        return self.embed(x.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // 4) * (w // 4), c * 16))


@pytest.mark.parametrize("spelling", ["plain", "channels_last", "rest", "windows", "unshuffle"])
def test_patches_of_any_size(spelling: str) -> None:
    check(randomise(Patches(spelling)), draw((2, 3, 8, 12)), target="conv2d", ops={"conv": 1, "linear": 0})


def test_a_program_keeps_its_sizes() -> None:
    auto = torch.export.Dim.AUTO
    model, x = randomise(Patches("plain")).double(), draw((2, 3, 8, 12))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    result = fxconv.transform(program, (x,), target="conv")
    assert fxconv.report(result).verified
    assert "conv2d" in str(result.graph) and "linear" not in str(result.graph)
    for shape in ((1, 3, 16, 8), (3, 3, 8, 20)):
        torch.testing.assert_close(result.module()(draw(shape)), model(draw(shape)))


class Tokens(nn.Module):
    """Behind patches of 4 by 4, a map of h // 8 from tokens, whose number says nothing of h."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.fc = nn.Linear(48, 10), nn.LayerNorm(10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 4, 4, w // 4, 4)
        x = self.embed(x.permute(0, 2, 4, 1, 3, 5).reshape(n, h // 4, w // 4, c * 16))
        x = F.max_pool2d(x.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
        return self.fc(self.norm(x)).transpose(1, 2).reshape(n, 6, h // 8, w // 8)


def test_other_quotients_of_a_size_are_of_that_size() -> None:
    out = check(randomise(Tokens()), draw((2, 3, 16, 24)), target="conv2d", ops={"conv": 2, "linear": 0})
    assert not [m for m in fxconv.report(out.result).missed if "writing it raised" in m.reason]


class Focus(nn.Module):
    """YOLOv5's first layer: every second pixel of an image, four times side by side, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 20, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1))


def test_every_second_pixel_of_any_even_size() -> None:
    out = check(randomise(Focus()), (draw((2, 3, 12, 16)),), ops={"conv": 1, "cat": 0, "slice": 0})
    with pytest.raises(RuntimeError):
        out.original(draw((1, 3, 9, 12)))
    with pytest.raises(AssertionError, match="must be a multiple of 2"):
        out.result(draw((1, 3, 9, 12)))


@pytest.mark.parametrize("spelling", ["plain", "unshuffle"])
@pytest.mark.parametrize("shape", [(1, 3, 10, 12), (1, 3, 8, 13)])
def test_sizes_that_the_model_refuses_are_refused(spelling: str, shape: tuple[int, ...]) -> None:
    """The convolution would take them, and drop what is left over."""
    model, x = randomise(Patches(spelling)).eval(), draw((2, 3, 8, 12), dtype=torch.float32)
    result = fxconv.transform(model, x, target="conv2d")
    with pytest.raises(RuntimeError):
        model(draw(shape, dtype=torch.float32))
    with pytest.raises(AssertionError, match="must be a multiple of 4"):
        result(draw(shape, dtype=torch.float32))
