"""What does nothing in eval mode is gone from every result, also where nothing around it is rewritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import check, draw, randomise
from torch import Tensor, nn

import fxconv


class Idle(nn.Module):
    """Dropouts and identities between barriers, at the input and at an output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop, self.alpha, self.idle = nn.Dropout(0.5), nn.AlphaDropout(0.2), nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.drop(F.gelu(self.idle(self.a(self.drop(x)))))
        z = F.dropout(torch.softmax(F.dropout(y, 0.1, self.training), -1), 0.3, self.training)
        return self.alpha(torch.sigmoid(self.b(z @ z.mT))), self.idle(x)


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.idle = Idle()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.idle(x)


def idle_nodes(result: nn.Module) -> list[str]:
    assert isinstance(result, torch.fx.GraphModule)
    kinds = (nn.Identity, nn.Dropout, nn.AlphaDropout)
    return [
        n.name
        for n in result.graph.nodes
        if "dropout" in str(n.target) or n.op == "call_module" and isinstance(result.get_submodule(str(n.target)), kinds)
    ]


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_nothing_idle_is_left(capture: str) -> None:
    out = check(randomise(Row()), draw((3, 8, 8)), capture=capture, sizes=False)
    assert not idle_nodes(out.result)
    assert out.kinds["linear"] == 2 and out.kinds["identity"] == 0
    with pytest.raises(fxconv.TrainingModeError, match="Dropout"):
        out.result.train()


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_a_hooked_identity_stays(capture: str) -> None:
    model = randomise(Row())
    model.idle.idle.register_forward_hook(lambda module, args, output: output * 2)
    check(model, draw((3, 8, 8)), capture=capture, sizes=False)


def test_without_shapes() -> None:
    result = fxconv.transform(randomise(Row()).eval(), capture="symbolic")
    assert not idle_nodes(result)


class Neutral(nn.Module):
    """Sums that begin with the number 0, as Python's own ``sum`` does, and products with 1, in several spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "sum":
            y = sum([torch.sigmoid(x)]) * 1.0
        elif self.spelling == "in place":
            y = 0
            y += torch.sigmoid(x)
        elif self.spelling == "functions":
            y = torch.add(torch.sigmoid(x), 0).div(1).sub(0)
        else:
            y = (torch.sigmoid(x) - 0) / 1
        z = 0
        z += torch.tanh(self.a(y))
        return self.b(torch.sin(z))


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("spelling", ["sum", "in place", "functions", "operators"])
def test_numbers_that_change_nothing_are_gone(spelling: str, capture: str) -> None:
    out = check(randomise(Neutral(spelling)), draw((2, 3, 7, 8)), capture=capture)
    assert {k: v for k, v in out.kinds.items() if k in ("add", "mul", "div", "sub")} == {}


def test_zero_added_to_what_the_caller_gets_stays() -> None:
    """Without it, input and output would be one tensor, or two outputs."""

    class Outputs(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = torch.tanh(x)
            return y, y + 0, x * 1

    x = draw((2, 3))
    result = fxconv.transform(Outputs(), x)
    y, z, same = result(x)
    assert y.data_ptr() != z.data_ptr() and same.data_ptr() != x.data_ptr()
