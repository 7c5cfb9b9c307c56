"""Models whose Python cannot be captured come out transformed in their parts, verified as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxconv


class Branching(nn.Module):
    """Branches on the data, so that it cannot be captured whole; its two blocks can be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(6, 12, 1), nn.Conv2d(12, 4, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.stem(x)
        if y.mean().item() > 1e9:
            y = y * 2
        return {"out": self.head(y)}


def model() -> Branching:
    torch.manual_seed(0)
    m = Branching().eval()
    m.stem[1].running_mean.normal_(0, 0.3)
    m.stem[1].running_var.uniform_(0.5, 2)
    return m.double()


def test_the_parts_are_rewritten_and_the_whole_is_verified() -> None:
    m, x = model(), torch.randn(2, 3, 9, 7, dtype=torch.float64)
    result = fxconv.transform(m, (x,))
    assert isinstance(result, Branching)
    record = fxconv.report(result)
    assert record.capture.how == "parts"
    assert record.verified
    assert {w.where.split(".")[0] for w in record.applied} == {"stem", "head"}
    with torch.no_grad():
        torch.testing.assert_close(result(x)["out"], m(x)["out"], rtol=1e-12, atol=1e-12)
    assert isinstance(m.stem, nn.Sequential)


def test_strict_refuses_parts() -> None:
    with pytest.raises(fxconv.CaptureError):
        fxconv.transform(model(), (torch.randn(2, 3, 9, 7, dtype=torch.float64),), options={"strict": True})
