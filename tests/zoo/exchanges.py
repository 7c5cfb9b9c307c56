"""The table of affine regions, continued: windows that change places with means, differences of one weight's results, rows and
columns that a roll or a zero padding of the channels rearranges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.regions import ALL, EXPORT, ONCE, Made, Row, only
from zoo.spelling import bn, conv, conv_transpose

STATIC: dict[str, Any] = {"sizes": False, "dynamic_shapes": ({0: torch.export.Dim("n", max=64)},)}
"""Everything but the batch has one size."""


# --- windows change places with what sums their outputs ------------------------------------------------------------


def conv_mean_linear(layer: nn.Module, rank: int = 2, norm: str = "") -> Made:
    """A convolution, a global mean and a Linear, with a BatchNorm in front of the mean or behind it."""
    layers: dict[str, Any] = {"conv": layer, "fc": nn.Linear(32, 10)}
    if norm:
        layers["norm"] = bn(32, rank if norm == "before" else 0)

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        y = s.global_mean(s.norm(y) if norm == "before" else y, rank)
        return s.fc(s.norm(y) if norm == "after" else y)

    return layers, program


def mean_row(name: str, make: Callable[[], Made], shape: tuple[int, ...], ratio: float, spellings: Any = ONCE) -> Row:
    # The sums that each tap sees, as a Linear on the image; then one on channels and taps: 10 rows of 9 · 16 columns.
    want = {"max_macs_ratio": ratio, "at_most": {"linear": 2, "conv+mean+avg_pool+add+mul+batch_norm": 0}, **STATIC}
    return Row(name, make, (shape,), want, spellings)


def conv_pool(first: nn.Module, kernel: int, stride: int, rank: int = 2) -> Made:
    return {"conv": first}, lambda s, x: s.avg_pool(s.conv(x), kernel, rank, stride)


def conv_row_mean() -> Made:
    return {"conv": nn.Conv2d(16, 32, 3, padding=1)}, lambda s, x: s.conv(x).mean(-1)


def conv_adaptive_pool() -> Made:
    return {"conv": nn.Conv2d(16, 32, 3, padding=1)}, lambda s, x: F.adaptive_avg_pool2d(s.conv(x), 3)


IMAGE = (2, 16, 14, 17)
SWAPPED = (
    # (238 · 9 · 16 + 10 · 144) of 238 · 144 · 32 + 320
    mean_row("conv_mean_linear", lambda: conv_mean_linear(nn.Conv2d(16, 32, 3, padding=1)), IMAGE, 0.04, EXPORT),
    mean_row("unpadded_conv_mean_linear", lambda: conv_mean_linear(nn.Conv2d(16, 32, 3)), IMAGE, 0.05),
    mean_row("strided_conv_mean_linear", lambda: conv_mean_linear(nn.Conv2d(16, 32, 3, 2, 1)), IMAGE, 0.13),
    mean_row("grouped_conv_mean_linear", lambda: conv_mean_linear(nn.Conv2d(16, 32, 3, 1, 1, groups=4)), IMAGE, 0.15),
    mean_row(
        "uneven_conv_mean_linear",
        lambda: conv_mean_linear(nn.Conv2d(16, 32, (3, 2), (2, 1), (2, 0), (1, 3), bias=False)),
        IMAGE,
        0.16,
    ),
    mean_row("conv_bn_mean_linear", lambda: conv_mean_linear(nn.Conv2d(16, 32, 3), norm="before"), IMAGE, 0.05, EXPORT),
    mean_row("conv_mean_bn_linear", lambda: conv_mean_linear(nn.Conv2d(16, 32, 3, 1, 1), norm="after"), IMAGE, 0.04, EXPORT),
    mean_row("conv_mean_linear_1d", lambda: conv_mean_linear(nn.Conv1d(16, 32, 9, padding=4), 1), (2, 16, 65), 0.05),
    mean_row("conv_mean_linear_3d", lambda: conv_mean_linear(nn.Conv3d(4, 32, 3, padding=1), 3), (2, 4, 6, 8, 9), 0.05),
    mean_row("conv_transpose_mean_linear", lambda: conv_mean_linear(conv_transpose(2)(16, 32, 4, 2, 1)), IMAGE, 0.04),
    Row("conv_row_mean", conv_row_mean, (IMAGE,), {"max_macs_ratio": 0.1, **STATIC}, EXPORT),
    Row("conv_adaptive_pool", conv_adaptive_pool, (IMAGE,), {"max_macs_ratio": 0.33, **STATIC}, ONCE),
    # 9 products per pooled output rather than the 16 of one 4×4 convolution, or 36.
    Row(
        "conv_avgpool_in_fewest_macs",
        lambda: conv_pool(nn.Conv2d(64, 48, 3, padding=1), 2, 2),
        ((2, 64, 14, 18),),
        {"max_macs_ratio": 0.25, "objective": "macs", **only(conv=1, avg_pool=1)},
        ALL,
    ),
    Row(
        "wide_conv_avgpool",
        lambda: conv_pool(nn.Conv2d(64, 512, 3, padding=1), 2, 2),
        ((2, 64, 14, 18),),
        {"max_macs_ratio": 0.25, **only(conv=1, avg_pool=1)},
        ONCE,
    ),
    Row(
        "dilated_conv_avgpool",
        lambda: conv_pool(nn.Conv2d(64, 48, 3, dilation=2), 3, 2),
        ((2, 64, 15, 18),),
        {"max_macs_ratio": 0.27, "objective": "macs"},
        ONCE,
    ),
    Row(
        "strided_conv_avgpool_1d",
        lambda: conv_pool(nn.Conv1d(64, 48, 9, 2, 4), 4, 2, 1),
        ((2, 64, 66),),
        {"max_macs_ratio": 0.55, "objective": "macs"},
        ONCE,
    ),
)


# --- multiples of one weight's results ------------------------------------------------------------------------------


def difference(layer: Callable[[], nn.Module], factor: float = 1.0) -> Made:
    """One layer applied to two tensors, one result less a multiple of the other."""
    scaled = lambda s, y: s.mul(y, factor) if factor != 1.0 else y  # noqa: E731
    return {"a": layer()}, lambda s, x, y: s.sub(s.a(x), scaled(s, s.a(y)))


def upsampled_difference() -> Made:
    return {}, lambda s, x, y: s.sub(s.upsample(x, 2, "bilinear"), s.upsample(y, 2, "bilinear"))


TOKENS = ((20, 64), (20, 64))
DIFFERENCES = (
    Row("difference_of_linears", lambda: difference(lambda: nn.Linear(64, 64)), TOKENS, only(linear=1, sub=1), ALL),
    Row("linear_less_half_linear", lambda: difference(lambda: nn.Linear(64, 64), 0.5), TOKENS, only(linear=1, add=1), ALL),
    Row(
        "difference_of_convs",
        lambda: difference(lambda: conv(2)(16, 20, 3, padding=1)),
        ((2, 16, 9, 11),) * 2,
        only(conv=1, sub=1),
        EXPORT,
    ),
    Row(
        "difference_of_grouped_convs_1d",
        lambda: difference(lambda: conv(1)(16, 24, 5, groups=4, bias=False), -3.0),
        ((2, 16, 31),) * 2,
        only(conv=1, add=1),
        ONCE,
    ),
    Row(
        "difference_of_upsamplings",
        upsampled_difference,
        ((2, 16, 14, 18),) * 2,
        {**only(interpolate=1, sub=1), "sizes": "spatial"},
        ONCE,
    ),
)


# --- rows and columns in another order ------------------------------------------------------------------------------


def rolled(layer: nn.Module, where: str, dim: int = 1) -> Made:
    if where == "before":
        return {"a": layer}, lambda s, x: s.a(torch.roll(x, 3, dim))
    return {"a": layer}, lambda s, x: torch.roll(s.a(x), 3, dim)


def chunks_reversed(where: str) -> Made:
    layers = {"a": nn.Conv2d(16, 16, 3, padding=1)}
    if where == "before":
        return layers, lambda s, x: s.a(s.cat([s.narrow(x, 1, 4 * i, 4) for i in (3, 2, 1, 0)]))

    def behind(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        return s.cat([s.narrow(y, 1, 4 * i, 4) for i in (3, 2, 1, 0)])

    return layers, behind


def twice_the_same() -> Made:
    return {"a": nn.Linear(32, 20)}, lambda s, x: s.a(s.cat([x, x], 1))


def rolled_norm() -> Made:
    return {"a": nn.Conv2d(16, 20, 3, 2), "norm": bn(20)}, lambda s, x: s.relu(torch.roll(s.norm(s.a(x)), 7, 1))


SMALL = ((2, 16, 9, 11),)
ROLLED = (
    Row("roll_conv", lambda: rolled(nn.Conv2d(16, 20, 3, padding=1), "before"), SMALL, only(conv=1), ALL),
    Row("conv_roll", lambda: rolled(nn.Conv2d(16, 20, 3, padding=1), "behind"), SMALL, only(conv=1), ALL),
    Row("roll_grouped_conv", lambda: rolled(nn.Conv1d(16, 20, 3, groups=2), "behind"), ((2, 16, 31),), {}, ONCE),
    Row("roll_linear", lambda: rolled(nn.Linear(16, 20), "before", -1), ((2, 5, 16),), only(linear=1), ALL),
    Row("linear_roll", lambda: rolled(nn.Linear(16, 20), "behind", -1), ((2, 5, 16),), only(linear=1), ALL),
    Row("conv_norm_roll", rolled_norm, SMALL, only(conv=1), EXPORT),
    Row("conv_transpose_roll", lambda: rolled(conv_transpose(2)(16, 20, 4, 2, 1), "behind"), SMALL, only(conv_transpose=1), ONCE),
    Row("chunks_reversed_conv", lambda: chunks_reversed("before"), SMALL, {**only(conv=1), "sizes": "spatial"}, ALL),
    Row("conv_chunks_reversed", lambda: chunks_reversed("behind"), SMALL, only(conv=1), ALL),
    Row("the_same_twice_linear", twice_the_same, ((8, 16),), {"max_macs_ratio": 0.5, **only(linear=1)}, ALL),
)


# --- channels of zeros ----------------------------------------------------------------------------------------------


def shortcut(kind: str) -> Made:
    """The parameter-free shortcut of CIFAR ResNets (He et al., 2015, option A): every other pixel, channels of zeros around."""
    layers = {"conv": nn.Conv2d(16, 32, 3, 2, 1, bias=False), "norm": bn(32)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.avg_pool(x, 2) if kind == "pooled" else s.step(x, (2, 3), 2)
        if kind == "zeros":
            y = s.cat([y, torch.zeros_like(y)])
        elif kind == "multiplied":
            y = s.cat([y, s.mul(y, 0)])
        else:
            y = s.pad(y, (0, 0, 0, 0, 8, 8))
        return s.relu(s.add(s.norm(s.conv(x)), y))

    return layers, program


def padded_skip(rank: int) -> Made:
    layers = {"conv": conv(rank)(8, 12, 3, padding=1)}
    return layers, lambda s, x: s.add(s.conv(x), s.pad(x, (*(0, 0) * rank, 1, 3)))


def zeros_conv(kernel: int, filled: str) -> Made:
    layers = {"conv": nn.Conv2d(32, 20, kernel, padding=kernel // 2)}
    if filled == "pad":
        return layers, lambda s, x: s.conv(s.pad(x, (0, 0, 0, 0, 6, 10)))
    if filled == "new_zeros":
        return layers, lambda s, x: s.conv(s.cat([x, x.new_zeros(x.shape[0], 16, x.shape[2], x.shape[3])]))
    return layers, lambda s, x: s.conv(s.cat([torch.zeros_like(x), x]))


HALF = {"max_macs_ratio": 0.5, **only(conv=1)}
ZEROS = (
    Row("shortcut_of_zeros", lambda: shortcut("padded"), ((2, 16, 14, 18),), only(conv=1), ALL),
    Row("shortcut_of_zeros_cat", lambda: shortcut("zeros"), ((2, 16, 14, 18),), only(conv=1), EXPORT),
    Row("shortcut_of_zeros_multiplied", lambda: shortcut("multiplied"), ((2, 16, 14, 18),), only(conv=1), ONCE),
    Row("shortcut_of_zeros_pooled", lambda: shortcut("pooled"), ((2, 16, 14, 18),), {**only(conv=1), **STATIC}, ONCE),
    *(
        Row(f"padded_skip_{rank}d", lambda rank=rank: padded_skip(rank), ((2, 8, *(9, 8, 7)[:rank]),), only(conv=1), ONCE)
        for rank in (1, 2, 3)
    ),
    Row("pad_channels_conv", lambda: zeros_conv(1, "pad"), SMALL, HALF, ALL),
    Row("zeros_conv", lambda: zeros_conv(3, "zeros_like"), SMALL, HALF, EXPORT),
    Row("new_zeros_conv", lambda: zeros_conv(3, "new_zeros"), SMALL, HALF, EXPORT),
)

# --- other variants that were missed once -----------------------------------------------------------------------------


def pools(first: int, second: int) -> Made:
    return {}, lambda s, x: s.avg_pool(s.avg_pool(x, first), second)


def resized_linear(size: int | None) -> Made:
    """An image made larger, then flattened into a Linear."""
    if size is not None:
        return {"fc": nn.Linear(8 * size * size, 24)}, lambda s, x: s.fc(s.flatten(F.adaptive_avg_pool2d(x, size)))
    return {"fc": nn.Linear(8 * 72, 24)}, lambda s, x: s.fc(s.flatten(s.upsample(x, 2, "bilinear")))


def tokens_side_by_side() -> Made:
    layers = {"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 48)}
    return layers, lambda s, x, y: s.c(s.cat([s.a(x), s.b(y)]))


BOTH_STATIC = {"sizes": False, "dynamic_shapes": ({0: torch.export.Dim("n", max=64)},) * 2}
OTHERS = (
    Row("pool_of_a_pool", lambda: pools(2, 2), ((2, 8, 12, 16),), only(avg_pool=1), EXPORT),
    Row("pool_of_an_upsampling", lambda: ({}, lambda s, x: s.avg_pool(s.upsample(x, 2), 2)), ((2, 8, 6, 7),), only(), ONCE),
    # 4 places of 7 · 7 are read, or 18 of 72.
    *(
        Row(name, lambda size=size: resized_linear(size), (shape,), {"max_macs_ratio": ratio, **STATIC, **only(linear=1)}, ONCE)
        for name, size, shape, ratio in (
            ("small_image_linear", 7, (2, 8, 2, 2), 0.09),
            ("upsampled_linear", None, (2, 8, 3, 6), 0.26),
        )
    ),
    # 30 + 20 tokens of 64 · 48 for 64 · 64 + 64 · 48
    Row("tokens_side_by_side", tokens_side_by_side, ((2, 30, 64), (2, 20, 64)), {"max_macs_ratio": 0.43, **BOTH_STATIC}, EXPORT),
)

TABLES: dict[str, tuple[Row, ...]] = {
    "swapped": SWAPPED,
    "differences": DIFFERENCES,
    "rolled": ROLLED,
    "zeros": ZEROS,
    "others": OTHERS,
}
