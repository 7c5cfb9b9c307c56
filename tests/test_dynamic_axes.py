"""Fixed numbers of elements of an axis of dynamic size: class tokens, the first tokens, a token put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check, draw, randomise
from torch import Tensor, nn

Program = Callable[[Any, Tensor], Tensor]


class Tokens(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        return self.program(self, x)


PROGRAMS: dict[str, Program] = {
    "first": lambda m, x: m.b(m.a(x)[:, 0]),
    "third": lambda m, x: m.b(m.a(x)[:, 2]),
    "two_from_the_second": lambda m, x: m.b(m.a(x)[:, 1:3]),
    "first_two": lambda m, x: m.b(m.a(x)[:, :2]),
    "behind_a_barrier": lambda m, x: m.b(F.relu(m.a(x))[:, 0]),
    "sum_of_two": lambda m, x: m.b(m.a(x)[:, 0] + m.a(x)[:, 1]),
    "put_back": lambda m, x: m.b(torch.cat([m.a(x)[:, :1], m.a(x)[:, 1:]], 1)),
    "mean_of_the_rest": lambda m, x: m.b(m.a(x)[:, 1:].mean(1)),
}


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_elements_of_a_dynamic_axis(name: str, capture: str) -> None:
    check(randomise(Tokens(PROGRAMS[name])), draw((3, 7, 6)), capture=capture)
