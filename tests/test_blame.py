"""Who is to blame for a model that fails, and the script that shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from helpers import Outputs
from torch import Tensor, nn

from fxconv.probe import InputSpec
from fxconv.verify import bisect, check_cluster, reproduction


@pytest.mark.parametrize(
    "guilty, blamed",
    [
        ([{3}], {3}),
        ([{0}, {15}], {0, 15}),
        ([{2, 9}], {9}),
        ([{1}, {4, 5}, {11}], {1, 5, 11}),
        ([], set()),
    ],
)
def test_bisect(guilty: list[set[int]], blamed: set[int]) -> None:
    calls = []

    def passes(active: frozenset[int]) -> bool:
        calls.append(active)
        return not any(g <= active for g in guilty)

    assert bisect(passes, 16) == blamed
    assert len(calls) <= 2 + 6 * (len(blamed) + 1)


def test_bisect_without_a_guilty_rewrite() -> None:
    assert bisect(lambda active: False, 5) == frozenset()
    assert bisect(lambda active: True, 0) == frozenset()


class Affine(nn.Module):
    def __init__(self, width: int, wrong: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Module()
        self.inner.register_buffer("weight", torch.randn(width, width, dtype=torch.float64))
        self.scale = nn.Parameter(torch.rand(width, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(width, dtype=torch.float64)
        self.wrong = wrong

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = torch.nn.functional.linear(x, self.inner.get_buffer("weight")) * self.scale
        return (self.norm(y) * (2 if self.wrong else 1),)


def test_reproduction_runs_and_shows_the_fault(capsys: pytest.CaptureFixture[str]) -> None:
    right_gm, wrong_gm = (torch.fx.symbolic_trace(Affine(8, w).eval()) for w in (False, True))
    n = sympy.Symbol("n")
    script = reproduction(right_gm, wrong_gm, [InputSpec("tensor", (n, 8))], seed=3, values={n: 2})
    exec(compile(script, "reproduction", "exec"), {"__name__": "reproduction"})
    assert "relative error 1.00e+00" in capsys.readouterr().out


def test_reproduction_of_large_weights_reads_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    right_gm, wrong_gm = (torch.fx.symbolic_trace(Affine(80, w).eval()) for w in (False, True))
    script = reproduction(right_gm, wrong_gm, [InputSpec("tensor", (2, 80))])
    assert len(script) < 4000 and str(tmp_path) in script
    exec(compile(script, "reproduction", "exec"), {"__name__": "reproduction"})
    assert "relative error 1.00e+00" in capsys.readouterr().out


def test_reproduction_of_very_large_weights_transforms_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxconv.blame._FILE", 0)
    gm = torch.fx.symbolic_trace(Affine(80, False).eval())
    script = reproduction(gm, gm, [InputSpec("tensor", (2, 80)), InputSpec("symint", (2,))])
    compile(script, "reproduction", "exec")
    assert "fxconv.transform(original" in script and len(script) < 4000


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: (F.relu(x).clamp(max=64.0),),  # shows far out only
        lambda x: (F.relu(x) + (x.amin() < -64),),
        lambda x: (F.relu(x) + (x.shape[2] < 8),),  # at small sizes only
        lambda x: (F.relu(x)[:, :, : x.shape[2] - x.shape[2] % 2],),
    ],
)
def test_reproduction_is_of_the_inputs_that_showed_it(wrong: Callable[[Tensor], Any], capsys: pytest.CaptureFixture[str]) -> None:
    h, w, n = sympy.symbols("h w n")
    spec = [InputSpec("tensor", (n, 3, h, w))]
    symbols = {n: (1, None, 2), h: (1, None, 28), w: (1, None, 28)}
    sides = [torch.fx.symbolic_trace(Outputs(how)) for how in (lambda x: (F.relu(x),), wrong)]
    verdict = check_cluster(sides[0], sides[1], spec, symbols=symbols, affine=False, positively_homogeneous=True)
    assert verdict.status == "failed"
    script = reproduction(sides[0], sides[1], spec, probe=verdict.probes[-1])
    exec(compile(script, "reproduction", "exec"), {"__name__": "reproduction"})
    said = capsys.readouterr().out
    assert "shapes" in said or float(said.split()[-1]) > 1e-3, said
