"""Wrong laws, passed by a user: each is rolled back, alone, and the model still comes out right."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from lies import LIES, SPOT
from torch import Tensor, nn

import fxconv
from fxconv import rollback
from fxconv.errors import VerificationError
from fxconv.report import Rewrite
from fxconv.verify_cluster import Verdict


def folded(ci: int, co: int, k: int, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ci, co, k, **options), nn.BatchNorm2d(co))


class Net(nn.Module):
    """Two of everything; one has `SPOT` channels somewhere, of which the laws lie."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.stem = folded(3, c, 3, padding=1, bias=False)
        self.wide = nn.ModuleList([folded(c, c, 3, padding=1), folded(c, c, 1), nn.BatchNorm2d(c)])
        self.down = folded(c, c, 5, stride=2, padding=2)
        self.norm, self.linear = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1)
        self.pooled, self.gamma = nn.BatchNorm2d(c), nn.Parameter(torch.ones(c, 1, 1))
        self.q, self.k = nn.Linear(c, c), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(sum(branch(x) for branch in self.wide))
        x = F.gelu(self.linear(F.relu(F.gelu(x) * self.gamma)))
        x = torch.tanh(self.linear(self.norm(x)))
        x = F.relu(self.down(x))
        x = F.gelu(self.pooled(F.max_pool2d(F.relu(self.pooled(x)), 2)))
        x = F.gelu(x + F.avg_pool2d(x, 3, 1, 1))
        x = x.flatten(2).transpose(1, 2)
        return torch.sigmoid(self.q(x)) * torch.tanh(self.k(x))


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.honest, self.spot = Net(6), Net(SPOT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.honest(x), self.spot(x.cos())  # not both of x: siblings would be merged across


def model() -> nn.Module:
    """The scale before a ReLU has either sign."""
    net = randomise(Twins(), seed=3).double()
    with torch.no_grad():
        for part in (net.honest, net.spot):
            part.gamma.copy_(torch.linspace(-1.5, 1.7, part.gamma.numel())[:, None, None])
    return net


X = (2, 3, 13, 10)


OBJECTIVE = {"siblings swapped": "launches", "the border of a constant forgotten": "launches"}


@cache
def honest(objective: str, capture: str) -> fxconv.Report:
    """The report without a lie: nothing is taken back."""
    report = fxconv.report(fxconv.transform(model(), torch.randn(X).double(), capture=capture, objective=objective))
    assert report.verified and not report.rolled_back and len(report.applied) >= 8
    return report


def of(part: str, rewrite: Rewrite) -> bool:
    return rewrite.where.startswith(part) or any(n.startswith(part) for n in rewrite.nodes)


@pytest.mark.parametrize(("name", "capture"), [(n, "symbolic") for n in LIES] + [(n, "export") for n in list(LIES)[::8]])
def test_a_lie_is_rolled_back_alone(name: str, capture: str) -> None:
    objective = OBJECTIVE.get(name, "latency")
    net, x = model(), torch.randn(X).double()
    result = fxconv.transform(net, x, laws=LIES[name], capture=capture, objective=objective)
    report = fxconv.report(result)
    caught = report.rolled_back
    assert any(name in r.laws for r in caught), "nobody was tempted"
    for r in caught:
        assert not of("honest", r), f"an honest rewrite was taken back: {r}"
        assert "instead of" in r.verdict["reason"], "its own check has to see it, not that of the whole model"
    kept = {r.nodes for r in honest(objective, capture).applied if of("honest", r)}
    assert kept and kept <= {r.nodes for r in report.applied}, "what does not lie stays"
    assert report.verified
    with torch.no_grad():
        for size in (X, (1, 3, 13, 10)):
            y = torch.randn(size).double()
            for got, want in zip(result(y), net(y), strict=True):
                assert torch.allclose(got, want, rtol=0, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("name", list(LIES)[::5])
def test_a_lie_is_raised_with_a_reproduction(name: str, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="is not what it replaced") as caught:
        objective = OBJECTIVE.get(name, "latency")
        fxconv.transform(model(), torch.randn(X).double(), laws=LIES[name], verify="raise", objective=objective, capture="symbolic")
    assert shown(str(caught.value), tmp_path) > 1e-11


def test_a_lie_that_only_the_whole_model_shows_is_raised_with_a_reproduction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it not for the check of each rewrite: the guilty one is found by bisection, and its script shows it."""
    monkeypatch.setattr(rollback, "check_cluster", lambda *_, **__: Verdict("confirmed"))
    with pytest.raises(VerificationError, match="the rewrite to blame: spot") as caught:
        fxconv.transform(model(), torch.randn(X).double(), laws=LIES[next(iter(LIES))], verify="raise", capture="symbolic")
    assert shown(str(caught.value), tmp_path) > 1e-11


def shown(message: str, where: Path) -> float:
    """The relative error that the script in a message prints, pasted into a fresh interpreter."""
    script = where / "pasted.py"
    script.write_text(message.split("\n\n", 1)[1])
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=where, check=True).stdout
    return max(float(line.split()[-1]) for line in said.splitlines())
