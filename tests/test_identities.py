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
