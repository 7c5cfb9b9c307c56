"""Weights both ways: checkpoints load into the result and back, and training goes on as it would have."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import randomise
from torch import nn

import fxconv


class Patches(nn.Module):
    """Patch embedding as a Linear on patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.embed(x)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).tanh())


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(4 * 4 * 5, 7), nn.Tanh(), nn.Linear(7, 2),
    )  # fmt: skip


BATCH = ({0: torch.export.Dim.AUTO},)
"""Only the batch is dynamic."""

CASES = {
    "vgg": (vgg, (3, 3, 8, 10), "conv"),
    "vgg2d": (vgg, (3, 3, 8, 10), "conv2d"),
    "patches": (Patches, (2, 3, 8, 12), "conv"),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv1d(5, 2, 9)),
        (2, 3, 9),
        "conv2d",
    ),
    "full_length": (lambda: nn.Sequential(nn.Conv1d(3, 5, 9), nn.Flatten(), nn.Tanh()), (2, 3, 9), "linear"),
    "full_kernel": (lambda: nn.Sequential(nn.Conv2d(3, 5, (4, 6)), nn.Tanh()), (2, 3, 4, 6), "linear"),
    "patch_embedding": (lambda: nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.Tanh()), (2, 3, 8, 12), "linear"),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh()),
        (2, 4, 9),
        "conv2d",
    ),
    "tied": (lambda: Tied(), (4, 6), "conv"),
    "full": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), (4, 6), "conv"),
}


def transformed(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    build, shape, target = CASES[name]
    model = randomise(build()).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = fxconv.transform(model, x, target=target, dynamic_shapes=BATCH, options={"trainable": True})
    assert fxconv.report(result).applied and fxconv.report(result).verified
    return model, result, x


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_both_ways(name: str) -> None:
    model, result, x = transformed(name)
    weights = fxconv.weight_map(result)
    assert weights.entries and not weights.merged
    other = randomise(copy.deepcopy(model), seed=5)
    result.load_state_dict(weights.to_result(other.state_dict()))
    torch.testing.assert_close(result(x), other(x), rtol=1e-12, atol=1e-12)
    back = weights.to_original(result.state_dict())
    for key, value in other.state_dict().items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_is_the_same(name: str) -> None:
    model, result, x = transformed(name)
    weights = fxconv.weight_map(result)
    for side in (model, result):
        side.requires_grad_(True)
        side(x).square().sum().backward()
    grads = weights.to_original({n: p.grad for n, p in result.named_parameters() if p.grad is not None})
    for key, p in model.named_parameters():
        torch.testing.assert_close(grads[key], p.grad, rtol=1e-10, atol=1e-10)
    for side in (model, result):
        torch.optim.SGD(side.parameters(), lr=1e-3).step()
    torch.testing.assert_close(result(x), model(x), rtol=1e-10, atol=1e-10)
    tuned = weights.to_original(result.state_dict())
    assert set(tuned) == set(model.state_dict())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(tuned[key], value, rtol=1e-10, atol=1e-10)


def test_a_checkpoint_of_the_original_survives_pickling() -> None:
    model, result, _ = transformed("vgg")
    again = pickle.loads(pickle.dumps(result))
    assert fxconv.weight_map(again) == fxconv.weight_map(result)


def test_merged_weights_have_no_way_back() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    result = fxconv.transform(model, torch.randn(2, 3, 8, 8))
    weights = fxconv.weight_map(result)
    assert weights.merged
    with pytest.raises(fxconv.ArgsError, match="trainable"):
        weights.to_original(result.state_dict())
    kept = fxconv.transform(model, torch.randn(2, 3, 8, 8), options={"trainable": True})
    assert not fxconv.weight_map(kept).merged


def test_untransformed() -> None:
    with pytest.raises(fxconv.ArgsError, match="fxconv.transform"):
        fxconv.weight_map(nn.Linear(2, 2))
