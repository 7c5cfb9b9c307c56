"""Approximation under a budget: fits are best, budgets hold, and scikit-learn's digits are still read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxconv
from fxconv import cli
from fxconv.approximate import pareto
from fxconv.approximate_fit import Moments, linear_candidates
from fxconv.approximate_plot import plot

Batches = list[torch.Tensor]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return (torch.tensor(data.images, dtype=torch.float32)[:, None] / 16)[order], torch.tensor(data.target)[order]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Batches, torch.Tensor, torch.Tensor]:
    """A small CNN trained on the digits; calibration batches, test images and labels."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operators: more threads only wait for one another
    x, y = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for batch in torch.randperm(1300).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    torch.set_num_threads(threads)
    return model.eval(), list(x[:1300].split(64)), x[1300:], y[1300:]


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("budget", [1e-2, 1e-1])
def test_digits(trained: tuple[nn.Module, Batches, torch.Tensor, torch.Tensor], budget: float, tmp_path: Path) -> None:
    model, batches, x, y = trained
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = fxconv.approximate(model, calibration=batches, max_error=budget)
    report = fxconv.report(result)
    print(
        f"budget {budget}: accuracy {accuracy(model, x, y):.3f} → {accuracy(result, x, y):.3f}, "
        f"multiply-adds {report.cost_before.macs} → {report.cost_after.macs}"
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert report.cost_after.macs < (0.9 if budget < 0.1 else 0.8) * report.cost_before.macs
    assert accuracy(result, x, y) > accuracy(model, x, y) - 0.02
    with torch.no_grad():
        held = torch.cat(batches[3::4])
        error = (result(held) - model(held)).norm() / model(held).norm()
        assert result(x).shape == model(x).shape
    assert float(error) <= budget * 1.01 and report.verification["error"] <= budget
    assert not report.verified and {r.exactness for r in report.rewrites} == {"approximate"}
    table = report.to_table(verbose=True)
    assert "approximate" in table and "0 s" not in table
    for r in pareto(result):
        assert r["detail"].split(",")[0] in table and r["detail"].split(",")[0] in report.to_html()
    assert all(r["error"] >= 0 and r["macs"] < r["macs_before"] for r in pareto(result))
    assert sum(r["chosen"] for r in pareto(result)) == len(report.rewrites)
    plot(result, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_beyond_the_budget_a_layer_is_left_alone(
    trained: tuple[nn.Module, Batches, torch.Tensor, torch.Tensor],
) -> None:
    model, batches, _, _ = trained
    result = fxconv.approximate(model, calibration=batches, max_error=1e-7, layers=["8"])
    report = fxconv.report(result)
    assert not report.rewrites
    (missed,) = report.missed
    assert "over the budget" in missed.reason and missed.would_fire_if


def convolution_matrix(weight: torch.Tensor, n: int, stride: int, padding: int) -> torch.Tensor:
    channels = weight.shape[1]
    eye = torch.eye(channels * n, dtype=torch.float64).reshape(-1, channels, n)
    return F.conv1d(eye, weight, stride=stride, padding=padding).flatten(1).T


def moments(size: int, seed: int = 0) -> tuple[Moments, torch.Tensor]:
    """Of correlated inputs with a mean, and the inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64) @ mix / size**0.5 + 0.5
    m = Moments(size)
    for part in rows.split(50):
        m.add(part)
    return m, rows


def structured(family: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if family == "low rank":
        return draw(24, 3) @ draw(3, 48)
    if family == "blocks":
        return torch.block_diag(*(draw(6, 12) for _ in range(4)))
    if family == "toeplitz":
        return convolution_matrix(draw(2, 3, 5), 16, 2, 2)
    last, first = draw(24, 2 * 12), convolution_matrix(draw(2, 1, 4), 48, 4, 0)
    return last @ first


@pytest.mark.parametrize("family", ["low rank", "blocks", "toeplitz", "filters"])
def test_a_layer_that_has_the_form_is_found(family: str) -> None:
    """Where the form holds, its fit has no error; every module computes the matrix that the fit says."""
    w = structured(family)
    layer = nn.Linear(w.shape[1], w.shape[0]).double()
    with torch.no_grad():
        layer.weight.copy_(w)
    m, rows = moments(w.shape[1])
    weight, bias = layer.weight.detach(), layer.bias.detach()
    best = 1.0
    for c in linear_candidates(layer, m):
        error = c.error(weight, bias, m)
        with torch.no_grad():
            got = c.build()(rows.reshape(4, -1, w.shape[1]))
            expected = rows.reshape(4, -1, w.shape[1]) @ c.weight.T + c.bias
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
            measured = float((got - layer(rows.reshape(4, -1, w.shape[1]))).norm() / layer(rows).norm())
        assert measured == pytest.approx(error, rel=1e-4, abs=1e-6)
        if c.family == family:
            best = min(best, error)
    assert best < 1e-6


CONVOLUTIONS = {
    "5×5": (nn.Conv2d(3, 4, 5, padding=2, stride=2, dilation=1), (3, 12, 10), (3, 3)),
    "4×4": (nn.Conv2d(3, 4, 4, padding=3, dilation=2), (3, 12, 10), (2, 2)),
    "1×7": (nn.Conv2d(3, 4, (1, 7), padding=(0, 3)), (3, 6, 10), (1, 3)),
    "sequence": (nn.Conv1d(3, 4, 7, padding=3, stride=2), (3, 21), (5,)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_kernel_with_dead_taps_around_it_becomes_small(name: str) -> None:
    layer, shape, kept = CONVOLUTIONS[name]
    layer = layer.double()
    with torch.no_grad():
        live = torch.zeros_like(layer.weight)
        live[(..., *(slice((n - k) // 2, (n + k) // 2) for n, k in zip(layer.kernel_size, kept, strict=True)))] = 1
        layer.weight.mul_(live)
    model = nn.Sequential(layer).eval()
    batches = list(torch.randn(64, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).split(8))
    result = fxconv.approximate(model, calibration=batches, max_error=1e-6)
    (rewrite,) = fxconv.report(result).rewrites
    assert "small kernel" in rewrite.laws[0] and result[0].kernel_size == kept
    with torch.no_grad():
        torch.testing.assert_close(result(batches[0]), model(batches[0]), rtol=1e-6, atol=1e-6)


class Twice(nn.Module):
    """A layer with two names, called twice, in a model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 24)
        self.b = self.a

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).tanh()) + y


def test_a_layer_in_two_places_is_replaced_in_both() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    batches = [(torch.randn(16, 24), torch.randn(16, 24)) for _ in range(8)]
    result = fxconv.approximate(model, calibration=batches, max_error=0.9)
    report = fxconv.report(result)
    assert len(report.rewrites) == 1 and result.a is result.b and not isinstance(result.a, nn.Linear)
    assert report.cost_before.macs == 2 * 24 * 24 and report.cost_before.launches == 1
    single = fxconv.approximate(model, calibration=[tuple(torch.cat(part) for part in zip(*batches, strict=True))], max_error=0.9)
    assert fxconv.report(single).rewrites


def test_misuse() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(fxconv.TrainingModeError):
        fxconv.approximate(model, calibration=[torch.randn(8, 4)])
    model.eval()
    with pytest.raises(fxconv.ArgsError, match="empty"):
        fxconv.approximate(model, calibration=[])
    with pytest.raises(fxconv.ArgsError, match="wants 2 inputs"):
        fxconv.approximate(Twice().eval(), calibration=[torch.randn(8, 24)])
    with pytest.raises(fxconv.ArgsError, match="positive"):
        fxconv.approximate(model, calibration=[torch.randn(8, 4)], max_error=0)
    with pytest.raises(fxconv.ArgsError, match="no layer"):
        fxconv.approximate(model, calibration=[torch.randn(8, 4)], layers=["head"])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.randn(64, 20), tmp_path / "x.pt")
    picture = tmp_path / "out.png"
    source = "test_approximate:small"
    code = cli.main(["approximate", source, "--input", "2x20", "--calibration", str(tmp_path / "x.pt"),
                     "--max-error", "0.5", "--plot", str(picture)])  # fmt: skip
    assert code == 0 and picture.exists()
    assert "approximate" in capsys.readouterr().out


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)).eval()
