"""Model factories for the command line: `factories:small_cnn` and friends. Small, seeded, every parameter ordinary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxconv.sources import randomise


def _ready(model: nn.Module) -> nn.Module:
    randomise(model)
    return model.eval()


def small_cnn() -> nn.Module:
    """(N, 3, H, W) → (N, 5): conv, BatchNorm, ReLU, depthwise, BatchNorm, pool, dropout, Linear."""
    torch.manual_seed(0)
    return _ready(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(8, 5),
        )
    )


def other_cnn() -> nn.Module:
    """`small_cnn` with one weight off by a thousandth."""
    model = small_cnn()
    with torch.no_grad():
        model.get_parameter("8.weight")[4, 7] += 1e-3
    return model


def head() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Flatten → Linear, with its inputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4 * 3 * 2, 6)).eval(), (torch.randn(2, 4, 3, 2),)


def two_inputs() -> nn.Module:
    """An embedding plus a float input; takes (N, T) int64 and (N, T, 4) floats."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 4)
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 3)

        def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
            return self.second(self.first(self.table(tokens) + x))

    torch.manual_seed(0)
    return Two().eval()


def training() -> nn.Module:
    """A factory that hands its model over in training mode, as most do."""
    return small_cnn().train()


def not_a_module() -> int:
    """What a factory must not give."""
    return 3


def program() -> torch.export.ExportedProgram:
    """A factory of a program, which knows its inputs."""
    return torch.export.export(small_cnn(), (torch.randn(2, 3, 9, 7),))


def broken() -> nn.Module:
    """A factory that fails."""
    raise RuntimeError("no such checkpoint")


def needs_an_argument(width: int) -> nn.Module:
    """A callable that is no factory."""
    return nn.Linear(width, width)


class Nested:
    """Holds a factory: `factories:Nested.make`."""

    @staticmethod
    def make() -> nn.Module:
        """`small_cnn` again."""
        return small_cnn()
