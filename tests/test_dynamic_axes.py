"""Fixed numbers of elements of an axis of dynamic size: class tokens, the first and last tokens, a token put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check, draw, randomise, relative_error, run
from torch import Tensor, nn

import fxconv

Program = Callable[[Any, Tensor], Any]


class Tokens(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(96, 128), nn.Linear(128, 75), nn.Linear(96, 128), nn.LayerNorm(128)
        self.program = program
        self.register_buffer("places", torch.tensor([0, 3, 1]))

    def forward(self, x: Tensor) -> Any:
        return self.program(self, x)


TOKEN = 3 * 96 * 75
"""Multiply-adds of both Linears composed, for one token of three images."""
PROGRAMS: dict[str, tuple[Program, int]] = {
    "first": (lambda m, x: m.b(m.a(x)[:, 0]), TOKEN),
    "third": (lambda m, x: m.b(m.a(x)[:, 2]), TOKEN),
    "last": (lambda m, x: m.b(m.a(x)[:, -1]), TOKEN),
    "first_kept": (lambda m, x: m.b(m.a(x)[:, :1]), TOKEN),
    "two_from_the_second": (lambda m, x: m.b(m.a(x)[:, 1:3]), 2 * TOKEN),
    "first_two": (lambda m, x: m.b(m.a(x)[:, :2]), 2 * TOKEN),
    "last_two": (lambda m, x: m.b(m.a(x)[:, -2:]), 2 * TOKEN),
    "every_other_of_four": (lambda m, x: m.b(m.a(x)[:, 0:4:2]), 2 * TOKEN),
    "narrow": (lambda m, x: m.b(m.a(x).narrow(1, 1, 2)), 2 * TOKEN),
    "by_index": (lambda m, x: m.b(m.a(x).index_select(1, m.places)), 3 * TOKEN),
    "first_of_the_rest": (lambda m, x: m.b(m.a(x)[:, 1:][:, 0]), TOKEN),
    "last_but_one": (lambda m, x: m.b(m.a(x)[:, :-1][:, -1]), TOKEN),
    "of_the_first_three": (lambda m, x: m.b(m.a(x)[:, :3][:, 1]), 3 * TOKEN),
    "behind_padding": (lambda m, x: m.b(F.pad(m.a(x), (0, 0, 1, 0))[:, 1]), TOKEN),
    "before_padding": (lambda m, x: m.b(F.pad(m.a(x), (0, 0, 1, 2))[:, -3]), TOKEN),
    "two_branches": (lambda m, x: m.b(m.a(x)[:, 0] + m.c(x)[:, 0]), TOKEN),
    "sum_of_two": (lambda m, x: m.b(m.a(x)[:, 0] + m.a(x)[:, 1]), TOKEN),
    "alone": (lambda m, x: m.a(x)[:, 0], 3 * 96 * 128),
    "beside_the_rest": (lambda m, x: (m.a(x)[:, 0], m.a(x)[:, 1:]), 70 * 3 * 96 * 128 + 3 * 96 * 128),
}


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_elements_of_a_dynamic_axis_are_taken_before_the_linears(name: str, capture: str) -> None:
    program, most = PROGRAMS[name]
    out = check(randomise(Tokens(program)), draw((3, 70, 96)), capture=capture)
    assert out.macs_after <= most
    assert not out.report.barriers


KEPT: dict[str, Program] = {
    "padding_between": lambda m, x: m.b(F.pad(m.a(x), (0, 0, 1, 0))[:, :2]),
    "behind_a_barrier": lambda m, x: m.b(F.relu(m.a(x))[:, 0]),
    "behind_a_norm": lambda m, x: m.b(m.norm(m.a(x))[:, 0]),
    "put_back": lambda m, x: m.b(torch.cat([m.a(x)[:, :1], m.a(x)[:, 1:]], 1)),
    "mean_of_the_rest": lambda m, x: m.b(m.a(x)[:, 1:].mean(1)),
    "beside_the_mean": lambda m, x: m.b(torch.cat([m.a(x)[:, 0], m.a(x)[:, 1:].mean(1)], 1)[:, 64:192]),
    "from_both_ends": lambda m, x: m.b(m.a(x).index_select(1, torch.tensor([1, 0, 4]))[:, 1:]),
}


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("name", KEPT)
def test_elements_of_a_dynamic_axis(name: str, capture: str) -> None:
    check(randomise(Tokens(KEPT[name])), draw((3, 7, 96)), capture=capture)


def test_a_place_that_is_padding_is_zero() -> None:
    model = randomise(Tokens(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 1, 0))[:, 0]))).double()
    x = draw((3, 70, 96))
    result = fxconv.transform(model, x)
    assert fxconv.report(result).verified and not fxconv.report(result).rolled_back
    for n in (70, 9):
        assert relative_error(run(result, (x[:, :n],)), run(model, (x[:, :n],))) < 1e-12


class Cut(nn.Module):
    """The rows up to the greatest index: how many they are is known to nobody before it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        n = index.max().item()
        torch._check(n >= 2)
        torch._check(n <= x.shape[0])
        return self.b(self.a(x[:n]))


def test_a_size_that_the_values_of_a_tensor_decide() -> None:
    model = randomise(Cut()).double()
    result = fxconv.transform(model, (draw((9, 6)), torch.tensor([3, 5])), dynamic_shapes=({}, {}))
    report = fxconv.report(result)
    assert report.capture.how == "export" and report.verified and len(report.applied) == 1
    for index in (torch.tensor([3, 5]), torch.tensor([2, 8])):
        args = (draw((9, 6), 4), index)
        assert relative_error(run(result, args), run(model, args)) < 1e-12
