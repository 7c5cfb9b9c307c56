"""Means and sums over several dims at once, of which a map in front of them made, scales or keeps some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers import check, draw, randomise
from torch import Tensor, nn
from torch.export import Dim

Program = Callable[[Any, Tensor], Tensor]


class Image(nn.Module):
    """Shapes are (3, 6, 400, 7)."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.rows, self.columns, self.out = nn.Conv2d(6, 10, 1), nn.Linear(7, 9), nn.Linear(7, 5)
        self.bn = nn.BatchNorm2d(6)
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        return self.program(self, x)


PROGRAMS: dict[str, tuple[Program, int]] = {
    "a_row_and_a_kept_dim": (lambda m, x: m.columns(x).mean((2, 3)), 3 * 6 * 7),
    "kept_dims_of_one": (lambda m, x: m.columns(x).mean((2, 3), keepdim=True), 3 * 6 * 7),
    "flattened": (lambda m, x: m.columns(x).flatten(2).mean(2), 3 * 6 * 7),
    "a_part_of_the_rows": (lambda m, x: m.columns(x).unflatten(3, (3, 3)).mean((2, 4)), 3 * 6 * 7 * 3),
    "channels_and_both": (lambda m, x: m.rows(x).mean((1, 2, 3)), 3 * 6),
    "channels_and_height": (lambda m, x: m.rows(x).mean((1, 2)), 3 * 6 * 7),
    "between_maps": (lambda m, x: m.out(m.rows(x).mean((1, 2))), 3 * 6 * 7 + 3 * 7 * 5),
    "scaled_channels": (lambda m, x: m.bn(x).mean((1, 2)), 3 * 6 * 7),
    "all_made": (lambda m, x: m.columns(m.rows(x)).mean((1, 3)), 3 * 400 * 6 * 7),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_mean_over_dims_that_a_map_made_and_dims_that_it_kept(name: str) -> None:
    program, most = PROGRAMS[name]
    out = check(randomise(Image(program)), draw((3, 6, 400, 7)))
    assert out.macs_after <= most


@pytest.mark.parametrize("dims", [(2, 3), (2,), (3,)])
def test_sum_over_dims_of_fixed_size(dims: tuple[int, ...]) -> None:
    model = randomise(Image(lambda m, x: m.columns(x).sum(dims)))
    check(model, draw((3, 6, 400, 7)), sizes=False, dynamic_shapes=({0: Dim.AUTO},), max_macs_ratio=0.12)
