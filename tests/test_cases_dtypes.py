"""CASES.md, wrong results, dtypes: half precision (W23) and tensors that are no plain floats (W24)."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from graphs import kinds
from helpers import check, draw, randomise, relative_error, run, said, with_batch
from torch import Tensor, nn

import fxconv

both_captures = pytest.mark.parametrize("capture", ["export", "symbolic"])
X = (2, 6, 7, 9)


def net() -> nn.Sequential:
    layers = [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)]
    return nn.Sequential(*layers)


# --- W23: half precision --------------------------------------------------------------------------------------------


def _extreme(variance: float, gamma: float) -> nn.Module:
    model = randomise(
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))
    )
    with torch.no_grad():
        model[1].running_var[::3] = variance
        model[1].weight[::3] = gamma
        model[1].running_mean[::3] = 0
        model[0].weight[::3] *= max(variance, 1e-5) ** 0.5
    return model


@both_captures
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("variance", "gamma"), [(1.0, 1.0), (1e-8, 1.0), (1e-8, 80.0), (1.0, 3000.0), (1e4, 1e-3)])
def test_W23_folding_loses_no_accuracy(dtype: torch.dtype, variance: float, gamma: float, capture: str) -> None:
    """In the model's own dtype the result is as accurate as the original was, both against the original in float64."""
    model = _extreme(variance, gamma).to(dtype)
    x = draw((2, 16, 9, 11), dtype=dtype)
    result = fxconv.transform(model, x, capture=capture)
    want = run(copy.deepcopy(model).double(), (x.double(),))
    got, had = run(result, (x,)), run(model, (x,))
    assert got.dtype == dtype and got.isfinite().all() or not had.isfinite().all()
    allowed = 3 * relative_error(had.double(), want) + torch.finfo(dtype).eps
    assert relative_error(got.double(), want) <= allowed
    assert fxconv.report(result).verified


@both_captures
@pytest.mark.parametrize("verify", ["off", "rollback", "raise"])
@pytest.mark.parametrize(
    ("gamma", "gain", "words"),
    [(40000.0, 1.0, "overflows torch.float16: it holds"), (1e-5, 1e-3, "too small for torch.float16: a row loses")],
)
def test_W23_weights_that_half_cannot_hold_are_refused_with_the_reason(
    gamma: float, gain: float, words: str, verify: str, capture: str
) -> None:
    """gamma / sigma = 40,000 / .003: the folded weight exceeds 65,504. Or it is below 6e-5, where half has few digits."""
    model = randomise(
        nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
    )
    with torch.no_grad():
        model[1].running_var.fill_(1e-8 if gamma > 1 else 1.0)
        model[1].weight.fill_(gamma)
        model[0].weight.mul_(gain)
    x = draw((2, 16, 5, 7), dtype=torch.float16) * (1e-6 if gamma > 1 else 1)
    result = fxconv.transform(model.half(), x, verify=verify, capture=capture)
    assert all(p.isfinite().all() for p in result.parameters())
    report = fxconv.report(result)
    refused = [r for r in report.missed if r.kind == "refused" and words in r.reason]
    assert len(refused) == 1 and "compose" in refused[0].law
    assert not report.rolled_back and kinds(result)["batch_norm"] == 1, "the other fold stays"
    assert report.verified or verify == "off"


# --- W24: tensors that are no plain floats --------------------------------------------------------------------------


def refuses_or_agrees(model: nn.Module, args: tuple[Any, ...], reason: str, tol: float = 1e-5, **options: Any) -> None:
    """Either an FxconvError, or a result that agrees; the reason is said in both cases."""
    try:
        result = fxconv.transform(model, args, **options)
    except fxconv.FxconvError as error:
        assert re.search(reason, str(error), re.IGNORECASE), str(error)
        return
    assert said(result, reason), f"no remark matches {reason!r}"
    for batch in (1, 3):
        trial = with_batch(args, batch)
        assert relative_error(run(result, trial), run(model, trial)) <= tol


@both_captures
def test_W24_dynamically_quantised(capture: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval(), {nn.Linear})
    refuses_or_agrees(quantised, (draw((2, 8), dtype=torch.float32),), "quanti", capture=capture)


@both_captures
def test_W24_observed(capture: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = net().eval()
        model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
        observed = torch.ao.quantization.prepare(model)
        x = draw(X, dtype=torch.float32)
        observed(x)
    refuses_or_agrees(observed, (x,), "observ|quanti|hook", capture=capture)


@both_captures
def test_W24_complex(capture: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16, dtype=torch.complex64), nn.Linear(16, 4, dtype=torch.complex64)).eval()
    refuses_or_agrees(model, (torch.randn(2, 8, dtype=torch.complex64),), "complex", capture=capture)


@both_captures
def test_W24_sparse(capture: str) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.eye(8).to_sparse())
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.sparse.mm(self.w, x.t()).t())

    refuses_or_agrees(Sparse().eval(), (draw((2, 8), dtype=torch.float32),), "sparse", capture=capture)


@both_captures
def test_W24_meta(capture: str) -> None:
    with torch.device("meta"):
        model = net().eval()
    with pytest.raises(fxconv.FxconvError, match="(?i)meta"):
        fxconv.transform(model, torch.empty(X, device="meta"), capture=capture)


@both_captures
def test_W24_mixed_dtypes(capture: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 16)
            self.b = nn.Linear(16, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).double())

    model, x = randomise(Mixed()), draw((2, 8), dtype=torch.float32)
    check(model, x, capture=capture, prepare=False, tol=1e-5, ops={"linear": 2})


@both_captures
def test_W24_integer_inputs_and_outputs(capture: str) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 10)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.b(self.a(self.embed(ids + 1)))
            return logits, logits.argmax(-1)

    check(randomise(Tokens()), torch.tensor([[1, 2, 3], [4, 5, 6]]), capture=capture, at_most={"linear": 1})


def test_W24_autocast_region() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.b(self.a(x)).float()

    refuses_or_agrees(randomise(Cast()), (draw((2, 8), dtype=torch.float32),), "autocast|bfloat16|dtype", tol=0.05)
