"""What the search finds at one of many blocks that are alike stands for all of them, and only for those."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import check, draw, randomise
from torch import Tensor, nn

import fxconv
from fxconv.law import Law
from fxconv.passes import LAWS
from fxconv.search import Search

BLOCKS = 9


class Residual(nn.Module):
    """Two convolutions with BatchNorm, a scale that ReLU may let through, and the shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.Conv2d(c, c, 1)
        self.scale = nn.Parameter(torch.randn(c, 1, 1).abs() + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], the same."""
        return torch.relu(x + self.two(torch.relu(self.norm(self.one(x))) * self.scale))


class Tokens(nn.Module):
    """A block of a transformer, where nothing is to be gained but the norms' weights."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(3 * c, c)
        self.gamma = nn.Parameter(torch.randn(c))

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, C], the same."""
        return x + self.gamma * self.down(nn.functional.gelu(self.up(self.norm(x))))


KINDS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "convolutions": (Residual, (2, 8, 6, 9)),
    "tokens": (Tokens, (2, 7, 8)),
}


def network(kind: str) -> tuple[nn.Sequential, Tensor]:
    build, shape = KINDS[kind]
    return randomise(nn.Sequential(*(build(8) for _ in range(BLOCKS)))), draw(shape)


@pytest.fixture
def explored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes the id of every value that a search explores from, rather than repeats."""
    found: list[int] = []
    inner = Search._search

    def search(self: Search, v: object) -> object:
        found.append(v.id)  # type: ignore[attr-defined]
        return inner(self, v)  # type: ignore[arg-type]

    monkeypatch.setattr(Search, "_search", search)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_alike_blocks_cost_what_they_do_where_each_is_searched(
    kind: str, explored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network(kind)
    report = check(model, x).report
    few = len(explored)
    explored.clear()
    monkeypatch.setattr("fxconv.search.Likeness.around", lambda self, v: v)  # nothing is like anything else
    alone = check(model, x).report
    for unit in ("macs", "params", "launches"):
        assert getattr(report.cost_after, unit) == getattr(alone.cost_after, unit)
    assert report.cost_after.seconds == pytest.approx(alone.cost_after.seconds)
    assert {(r.law, r.reason) for r in report.missed} == {(r.law, r.reason) for r in alone.missed}
    assert few < 0.75 * len(explored), (few, len(explored))


def test_a_negative_scale_in_one_of_the_blocks() -> None:
    """Eight scales go on through the ReLU's other side; the ninth may not, and its number is in the reason."""
    blocks = [nn.Sequential(Scale(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid()) for _ in range(BLOCKS)]
    model = randomise(nn.Sequential(*blocks)).double()
    with torch.no_grad():
        for i, block in enumerate(blocks):
            block[0].weight.abs_().add_(0.1)
            if i == 7:
                block[0].weight[3] = -0.625
    report = check(model, draw((2, 8, 6, 9)), prepare=False, objective="macs").report
    assert len(report.applied) == BLOCKS - 1
    assert [r for r in report.missed if "-0.625" in r.reason]


class Scale(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], the same."""
        return x * self.weight


@pytest.mark.parametrize("which", [3, 8])
def test_a_structure_in_one_of_the_blocks(which: int) -> None:
    """One Linear of nine has rank 2, one convolution of nine a border of zeros: those are made smaller."""
    layers = [nn.Sequential(nn.Linear(48, 48), nn.Sigmoid()) for _ in range(BLOCKS)]
    model = randomise(nn.Sequential(*layers)).double()
    with torch.no_grad():
        layers[which][0].weight.copy_((torch.randn(48, 2) * 4).round() @ (torch.randn(2, 48) * 4).round())
    assert len(check(model, draw((5, 48)), prepare=False, objective="macs").report.applied) == 1
    convolutions = [nn.Sequential(nn.Conv2d(8, 8, 5, padding=2), nn.Sigmoid()) for _ in range(BLOCKS)]
    model = randomise(nn.Sequential(*convolutions)).double()
    with torch.no_grad():
        weight = convolutions[which][0].weight
        weight[..., 0], weight[..., 4], weight[..., 0, :], weight[..., 4, :] = 0, 0, 0, 0
    assert len(check(model, draw((2, 8, 6, 9)), prepare=False, objective="macs").report.applied) == 1


def test_anybodys_laws_are_asked_everywhere(explored: list[int]) -> None:
    """They may look at numbers, or far away."""
    model, x = network("tokens")
    x = x.float()
    asked: list[int] = []
    curious = Law("curious", lambda v, context: asked.append(v.id) or ())  # type: ignore[func-returns-value]
    fxconv.transform(model, x, laws=[*LAWS, curious])
    assert set(explored) <= set(asked)
    with_it = len(explored)
    explored.clear()
    fxconv.transform(model, x)
    assert len(explored) < 0.75 * with_it
