"""Constants: float64 before the arithmetic, discrete outcomes as in the model's dtype, and what is no constant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from fxconv.constants import Constants


class Weighted(nn.Module):
    """``x * f(w)``: the second operand of the last multiplication is the value under test."""

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor], w: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w, requires_grad=w.is_floating_point())
        self.f = f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.f(self.w)


def operand(module: nn.Module, dialect: str, x: torch.Tensor) -> tuple[Constants, fx.Node]:
    if dialect == "module":
        gm = fx.symbolic_trace(module)
    else:
        gm = torch.export.export(module.eval(), (x,), strict=False).module()
    (mul,) = [n for n in gm.graph.nodes if getattr(n.target, "__name__", "") in ("mul", "mul.Tensor")][-1:]
    return Constants(gm), mul.args[1]


W = torch.linspace(0.1, 3, 7)

VALUES = [
    ("reciprocal", lambda w: 1 / w, lambda w: 1 / w),
    ("sigmoid gate", torch.sigmoid, torch.sigmoid),
    ("standardised", lambda w: (w - w.mean()) / (w.std() + 1e-5), lambda w: (w - w.mean()) / (w.std() + 1e-5)),
    ("factory", lambda w: w + torch.arange(7) / 3, lambda w: w + torch.arange(7, dtype=torch.float64) / 3),
    ("cast", lambda w: (w / 3).to(torch.float32) / 7, lambda w: w / 3 / 7),
    ("mask", lambda w: w.masked_fill(w > 1, 0.0), lambda w: w.masked_fill(w > 1, 0.0)),
    ("linspace", lambda w: w * torch.linspace(0, 1, 7), lambda w: w * torch.linspace(0, 1, 7, dtype=torch.float64)),
]


@pytest.mark.parametrize("dialect", ["module", "aten"])
@pytest.mark.parametrize("name,f,reference", VALUES, ids=[v[0] for v in VALUES])
def test_value_is_computed_in_float64(name: str, f: Callable, reference: Callable, dialect: str) -> None:
    if dialect == "module" and name in ("factory", "linspace"):
        pytest.skip("symbolic_trace runs factories while it traces: their float32 values are the model's constants")
    x = torch.randn(2, 7)
    constants, node = operand(Weighted(f, W), dialect, x)
    assert constants.is_constant(node)
    value = constants.value(node)
    assert value.dtype is torch.float64
    assert torch.allclose(value, reference(W.double()), rtol=1e-15, atol=0)


def test_discrete_outcomes_are_those_of_the_model() -> None:
    """1/3 * 3 is 1 in float32 and, with w upcast first, 1.0000000298 in float64: the mask must be the model's."""
    w = torch.tensor([1 / 3] * 7)
    constants, node = operand(Weighted(lambda v: (v * 3 > 1).to(v.dtype) + v, w), "aten", torch.randn(2, 7))
    assert torch.equal(constants.value(node), w.double())


def test_parameters_are_not_written() -> None:
    constants, node = operand(Weighted(lambda w: w.clone().add_(1), W.clone()), "aten", torch.randn(2, 7))
    assert torch.equal(constants.value(node), W.double() + 1)
    assert torch.equal(constants.gm.w, W)


@pytest.mark.parametrize(
    "f",
    [lambda w: w * torch.rand(7), lambda w: torch.nn.functional.dropout(w, 0.5, True)],
    ids=["rand", "dropout"],
)
def test_random_is_not_constant(f: Callable) -> None:
    constants, node = operand(Weighted(f, W), "aten", torch.randn(2, 7))
    assert not constants.is_constant(node)
    with pytest.raises(ValueError, match="depends on the inputs"):
        constants.value(node)


def test_what_depends_on_the_input_is_not_constant() -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x)

    constants, node = operand(Gate(), "module", torch.randn(2, 7))
    assert not constants.is_constant(node)


def test_factories_that_read_only_dtype_of_an_input_are_constant() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (x.new_zeros(7) + 0.1)

    constants, node = operand(Masked(), "aten", torch.randn(2, 7))
    assert constants.is_constant(node)
    assert torch.equal(constants.value(node), torch.full((7,), 0.1, dtype=torch.float64))
