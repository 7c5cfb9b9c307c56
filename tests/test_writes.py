"""Slices written in place, `y[:, :, :p] = c`: lifted where the place can be named, and the same model everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import check, draw, randomise
from torch import Tensor, nn

FIXED = ({0: torch.export.Dim("n", max=64)},)


class Written(nn.Module):
    """1x1 convolution -> what `write` does to it, in place -> convolution."""

    def __init__(self, write: Callable[[Any, Tensor], None], pad: int = 0, wide: int = 24) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, wide, 1)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(wide, 5, 3)
        self.fill = nn.Parameter(torch.zeros(1, wide, 1, 1))
        self.row = nn.Parameter(torch.zeros(1, wide, 1, 1))
        self.pad = pad
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.pad(self.a(x), [self.pad] * 4)
        self.write(self, y)
        return self.b(y)


def border(s: Any, y: Tensor) -> None:
    y[:, :, :2] = s.fill
    y[:, :, -2:] = s.fill
    y[..., :2] = s.fill
    y[..., -2:] = s.fill


def uneven(s: Any, y: Tensor) -> None:
    y[:, :, :1] = s.fill
    y[:, :, -2:] = s.row
    y[..., -1:] = 0.25


def over(s: Any, y: Tensor) -> None:
    """More than the padding, and some of it twice."""
    y[:, :, :3] = s.fill
    y[:, :, :1] = s.row
    y[..., -4:] = s.row


def zeros(s: Any, y: Tensor) -> None:
    y[:, :, 0] = 0
    y[..., -1] = 0


def middle(s: Any, y: Tensor) -> None:
    y[:, :, 3:5] = s.fill
    y[:, 2:6, 1:, ::2] = 1.5


def channels(s: Any, y: Tensor) -> None:
    """FasterNet's partial convolution."""
    y[:, :4] = s.inner(y[:, :4])


def one_channel(s: Any, y: Tensor) -> None:
    y[:, 3] = y[:, 0] * 2


ONE_CONV = {"ops": {"conv": 1, "pad": 0, "add": 0}}
WRITES = {
    "border": (border, 2, {"at_most": {"conv": 2, "add": 1, "slice": 0, "pad": 1}}),
    "uneven": (uneven, 2, {}),
    "over": (over, 2, {}),
    "over_without_padding": (over, 0, {}),
    "zeros": (zeros, 1, {}),
    "middle": (middle, 1, {}),
    "channels": (channels, 0, {}),
    "one_channel": (one_channel, 0, ONE_CONV),
}


@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("name", WRITES)
def test_written_in_place(name: str, fixed: bool) -> None:
    write, pad, want = WRITES[name]
    options = {"dynamic_shapes": FIXED, "sizes": False} if fixed else {}
    check(randomise(Written(write, pad)), (draw((2, 6, 9, 13)),), **options, **want)
