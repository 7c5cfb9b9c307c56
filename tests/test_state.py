"""The search prices only what a step may have changed. Whatever it has done, that must equal pricing everything anew."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers import draw, randomise, relative_error, run
from torch import Tensor, nn
from zoo.moves import MOVES

import fxconv
from fxconv.capture import capture
from fxconv.options import Options
from fxconv.state import State


class PositionEncoding(nn.Module):
    """A class token set aside, the others convolved as an image, and all put together again: CoaT, CrossViT."""

    def __init__(self, c: int, h: int, w: int) -> None:
        super().__init__()
        self.size = h, w
        self.token = nn.Parameter(torch.randn(1, 1, c))
        self.patch = nn.Conv2d(3, c, 4, 4)
        self.conv = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.norm = nn.LayerNorm(c)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, 4 H, 4 W] → [N, 1 + H·W, C]."""
        x = self.norm(self.patch(image).flatten(2).transpose(1, 2))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        token, rest = x[:, :1], x[:, 1:]
        n, _, c = rest.shape
        y = rest.transpose(1, 2).view(n, c, *self.size)
        return self.norm(torch.cat([token, (self.conv(y) + y).flatten(2).transpose(1, 2)], 1))


class TokenSkip(nn.Module):
    """Class token and image tokens go their own ways and come together again beside a Linear's result: MViT."""

    def __init__(self, c: int, h: int, w: int) -> None:
        super().__init__()
        self.size = h, w
        self.norm, self.up, self.proj, self.mlp = nn.LayerNorm(c), nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1 + H·W, C], the same."""
        x = self.norm(x)
        token, rest = x[:, :1], x[:, 1:]
        n, _, c = rest.shape
        rest = self.pool(rest.transpose(1, 2).reshape(n, c, *self.size)).flatten(2).transpose(1, 2)
        x = torch.cat([token, rest], 1) + self.proj(torch.tanh(self.up(x)))
        return x + self.mlp(nn.functional.gelu(self.norm(x)))


def checked(state: State) -> None:
    """Raises where a price that the search holds differs from one worked out from nothing."""
    prices, layouts = dict(state.prices), dict(state.layouts)
    state.layouts.clear()
    try:
        for v in state.uses:
            price = state._price(v)
            assert price.seconds == pytest.approx(prices[v].seconds, rel=1e-9, abs=1e-12), v
            assert (price.macs, price.launches) == (prices[v].macs, prices[v].launches), v
        assert prices.keys() <= state.uses.keys()
    finally:
        state.layouts.clear()
        state.layouts.update(layouts)


def watched(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Make every so many steps of the search check its prices."""
    inner, count = State.redefine, iter(range(10**9))

    def redefine(self: State, *args: Any) -> bool:
        changed = inner(self, *args)
        if changed and next(count) % every == 0:
            checked(self)
        return changed

    monkeypatch.setattr(State, "redefine", redefine)


@pytest.mark.parametrize("row", MOVES, ids=lambda r: str(r.name))
def test_incremental_prices(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(row.model("module"), 1).double()
    captured = capture(model, tuple(draw(s, i) for i, s in enumerate(row.shapes)))
    watched(monkeypatch, 11)
    checked(sys.modules["fxconv.transform"].rewrite(captured, Options(verify="off")).state)


def test_a_part_of_a_concatenation_whose_neighbour_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(PositionEncoding(24, 7, 5), 2).double()
    watched(monkeypatch, 3)
    result = fxconv.transform(model, draw((2, 3, 28, 20), 3))
    assert fxconv.report(result).verified
    for batch in (1, 3):
        x = (draw((batch, 3, 28, 20), batch),)
        assert relative_error(run(result, x), run(model, x)) < 1e-12


@pytest.mark.parametrize("objective", ["latency", "launches"])
def test_a_part_of_a_concatenation_beside_a_linear(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part has the layout of what it is a part of, which is none of the sum's."""
    model = randomise(TokenSkip(24, 7, 5), 2).double()
    watched(monkeypatch, 3)
    result = fxconv.transform(model, draw((2, 36, 24), 3), objective=objective)
    assert fxconv.report(result).verified
    for batch in (1, 3):
        x = (draw((batch, 36, 24), batch),)
        assert relative_error(run(result, x), run(model, x)) < 1e-12
