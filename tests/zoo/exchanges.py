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

# --- padding with values --------------------------------------------------------------------------------------------


def padded_with_values(mode: str, rank: int, where: str) -> Made:
    """A 1x1 convolution, whose bias padding leaves as it is, in front of a convolution that pads its input, or behind it."""
    if where == "before":
        layers = {"a": conv(rank)(8, 64, 1), "b": conv(rank)(64, 6, 3, padding=1, padding_mode=mode)}
    else:
        layers = {"a": conv(rank)(8, 64, 3, padding=1, padding_mode=mode), "b": conv(rank)(64, 6, 1)}
    return layers, lambda s, x: s.b(s.a(x))


def padded_norm(mode: str) -> Made:
    layers = {"norm": bn(8), "a": nn.Conv2d(8, 12, 3, 2)}
    return layers, lambda s, x: s.a(F.pad(s.norm(x), (2, 0, 1, 2), mode))


VALUES = ("reflect", "replicate", "circular")
PADDED = (
    # Per position 64 · (8 + 27 · 6) or 64 · (27 · 8 + 6) → 27 · 8 · 6, and less of 1 and 2 dims.
    *(
        Row(
            f"{mode}_padding_{where}_pointwise_{rank}d",
            lambda mode=mode, rank=rank, where=where: padded_with_values(mode, rank, where),
            ((2, 8, *(9, 11, 7)[:rank]),),
            {"max_macs_ratio": 0.13, **only(conv=1, pad=1)},
            EXPORT if rank == 2 and where == "before" else ONCE,
        )
        for mode, where, rank in [
            *((m, w, 2) for m in VALUES for w in ("before", "behind")),
            *(("circular", "before", r) for r in (1, 3)),
        ]
    ),
    *(
        Row(f"norm_{mode}_padding", lambda mode=mode: padded_norm(mode), ((2, 8, 9, 11),), only(conv=1, pad=1), ONCE)
        for mode in VALUES
    ),
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


def patches(rank: int = 2) -> Made:
    """Two Linears on patches cut out by views."""
    layers = {"a": nn.Linear(3 * 4**rank, 64), "b": nn.Linear(64, 10)}

    def program(s: Any, x: Tensor) -> Tensor:
        n, c, *image = x.shape
        y = s.reshape(x, n, c, *(part for size in image for part in (size // 4, 4)))
        y = s.permute(y, (0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)))
        return s.b(s.a(s.reshape(y, n, -1, c * 4**rank)))

    return layers, program


def folded(stride: int) -> Made:
    """A Linear on unfolded patches, folded again: of patches that touch or overlap."""
    layers = {"a": nn.Linear(8 * 4, 64), "b": nn.Linear(64, 6 * 4)}

    def program(s: Any, x: Tensor) -> Tensor:
        patches = s.transpose(F.unfold(x, 2, stride=stride), 1, 2)
        return F.fold(s.transpose(s.b(s.a(patches)), 1, 2), (6, 10), 2, stride=stride)

    return layers, program


def unshuffled() -> Made:
    """Two 1x1 convolutions at half the resolution, between a pixel_unshuffle and its inverse."""
    layers = {"a": nn.Conv2d(12, 64, 1), "b": nn.Conv2d(64, 12, 1)}
    return layers, lambda s, x: F.pixel_shuffle(s.b(s.a(F.pixel_unshuffle(x, 2))), 2)


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
    # 48 · 64 + 64 · 10 → 48 · 10; 192 · 64 + 640 → 192 · 10; 12 · 64 · 2 → 12 · 12
    *(
        Row(
            f"patches_{rank}d",
            lambda rank=rank: patches(rank),
            (shape,),
            {"max_macs_ratio": ratio, **STATIC, **only(linear=1)},
            ONCE,
        )
        for rank, shape, ratio in ((1, (2, 3, 20), 0.09), (2, (2, 3, 8, 12), 0.13), (3, (2, 3, 4, 8, 12), 0.15))
    ),
    # 64 · (32 + 24) → 32 · 24 for each of 15 patches; 9 taps of 8 · 6 at 60 places for 45 patches
    Row("folded_patches", lambda: folded(2), ((2, 8, 6, 10),), {"max_macs_ratio": 0.22, **STATIC, **only(linear=1)}, ONCE),
    Row("folded_overlapping", lambda: folded(1), ((2, 8, 6, 10),), {"max_macs_ratio": 0.22, **STATIC}, ONCE),
    Row("unshuffled", unshuffled, ((2, 3, 8, 12),), {"max_macs_ratio": 0.1, **only(linear=1)}, ONCE),
)

# --- paths that part and meet again, no step of which pays alone --------------------------------------------------------


def decomposed(padding: str) -> Made:
    """DLinear's: a moving average of the series and what is left of it, each with a Linear over time."""
    layers = {"season": nn.Linear(30, 12), "trend": nn.Linear(30, 12)}

    def program(s: Any, x: Tensor) -> Tensor:
        if padding == "zero":
            trend = F.avg_pool1d(x, 7, 1, 3)
        else:
            longer = torch.cat([x[:, :, :1].repeat(1, 1, 3), x, x[:, :, -1:].repeat(1, 1, 3)], -1)
            trend = F.avg_pool1d(longer, 7, 1)
        return s.add(s.season(s.sub(x, trend)), s.trend(trend))

    return layers, program


def less_its_last() -> Made:
    """NLinear's: the series less its last step, which is added again behind the Linear."""

    def program(s: Any, x: Tensor) -> Tensor:
        last = x[:, :, -1:]
        return s.add(s.a(s.sub(x, last)), last)

    return {"a": nn.Linear(30, 12)}, program


def fused_qkv_lora(in_place: bool) -> Made:
    """Adapters on Q and V of a fused projection, as they are written for SAM and CLIP."""
    layers = {"qkv": nn.Linear(16, 48)}
    layers |= {f"{t}_{end}": nn.Linear(*shape, bias=False) for t in "qv" for end, shape in (("a", (16, 2)), ("b", (2, 16)))}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.qkv(x)
        q, v = s.q_b(s.q_a(x)), s.v_b(s.v_a(x))
        if not in_place:
            return torch.cat([y[..., :16] + q, y[..., 16:32], y[..., 32:] + v], -1)
        y[..., :16] += q
        y[..., -16:] += v
        return y

    return layers, program


def fused_convs() -> Made:
    """The same with convolutions of images whose size is dynamic."""
    layers = {"a": nn.Conv2d(8, 24, 3, padding=1), "d": nn.Conv2d(8, 2, 3, padding=1, bias=False), "u": nn.Conv2d(2, 8, 1)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        return s.cat([s.narrow(y, 1, 0, 16), s.add(s.narrow(y, 1, 16, 8), s.u(s.d(x)))])

    return layers, program


def gated_experts() -> Made:
    """Experts stacked behind the features, and mixed by gates that are parameters."""
    layers: dict[str, Any] = {"gates": nn.Parameter(torch.zeros(4))}
    layers |= {f"expert{i}": nn.Linear(16, 12) for i in range(4)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = torch.stack([getattr(s, f"expert{i}")(x) for i in range(4)], -1)
        return (y * torch.softmax(s.gates, 0)).sum(-1)

    return layers, program


def haar_of_slices() -> Made:
    """The Haar wavelet of an image, by adding its even and odd pixels, and a 1x1 convolution."""

    def program(s: Any, x: Tensor) -> Tensor:
        p, q, r, t = (x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        return s.a(s.cat([p + q + r + t, p - q + r - t, p + q - r - t, p - q - r + t]))

    return {"a": nn.Conv2d(24, 10, 1)}, program


def mixed_series() -> Made:
    """TSMixer's without activations: mixed along time, then along channels, both with residuals, and a Linear over time."""
    layers = {"time": nn.Linear(20, 20), "channels": nn.Linear(6, 6), "out": nn.Linear(20, 8)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.add(x, s.transpose(s.time(s.transpose(x, 1, 2)), 1, 2))
        return s.out(s.transpose(s.add(y, s.channels(y)), 1, 2))

    return layers, program


def pyramid_pooling() -> Made:
    """PSPNet's head: an image beside what it is at two smaller sizes, made as large again, and a 1x1 convolution of all."""
    layers = {"a": nn.Conv2d(128, 64, 1), "b": nn.Conv2d(128, 64, 1), "out": nn.Conv2d(256, 96, 1)}

    def program(s: Any, x: Tensor) -> Tensor:
        small = s.a(F.adaptive_avg_pool2d(x, 2)), s.b(F.adaptive_avg_pool2d(x, 4))
        return s.out(s.cat([x, *(s.resize(y, x) for y in small)]))

    return layers, program


def edge_oriented() -> Made:
    """ECBSR's block: a 3x3, a 1x1 and a 3x3, and 1x1s with edge filters for each channel, over borders filled with biases."""
    layers: dict[str, Any] = {"k3": nn.Conv2d(8, 10, 3, padding=1), "wide": nn.Conv2d(8, 16, 1), "back": nn.Conv2d(16, 10, 3)}
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    edges = {"down": sobel.T, "right": sobel, "round": torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])}
    for name, edge in edges.items():
        layers |= {name: nn.Conv2d(8, 10, 1), f"{name}_edge": edge.expand(10, 1, 3, 3).contiguous()}
        layers |= {f"{name}_scale": nn.Parameter(torch.ones(10, 1, 1, 1)), f"{name}_bias": nn.Parameter(torch.zeros(10))}

    def bordered(layer: nn.Conv2d, x: Tensor) -> Tensor:
        assert layer.bias is not None
        y, fill = F.pad(layer(x), (1, 1, 1, 1)), layer.bias.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = fill
        y[:, :, -1:, :] = fill
        y[:, :, :, 0:1] = fill
        y[:, :, :, -1:] = fill
        return y

    def program(s: Any, x: Tensor) -> Tensor:
        out = s.add(s.k3(x), s.back(bordered(s.wide, x)))
        for name in edges:
            kernel = getattr(s, f"{name}_scale") * getattr(s, f"{name}_edge")
            out = s.add(out, F.conv2d(bordered(getattr(s, name), x), kernel, getattr(s, f"{name}_bias"), groups=10))
        return out

    return layers, program


SERIES = ((2, 5, 30),)
COLLAPSED = (
    Row("decomposed_series", lambda: decomposed("zero"), SERIES, {"max_macs_ratio": 0.5, **STATIC, **only(linear=1)}, EXPORT),
    Row(
        "decomposed_series_repeated", lambda: decomposed("ends"), SERIES, {"max_macs_ratio": 0.5, **STATIC, **only(linear=1)}, ONCE
    ),
    Row("series_less_its_last", less_its_last, SERIES, {**STATIC, **only(linear=1)}, EXPORT),
    # 16 · 48 of 16 · 48 + 2 · (32 + 32)
    Row("fused_qkv_lora", lambda: fused_qkv_lora(False), ((2, 5, 16),), {"max_macs_ratio": 0.86, **only(linear=1)}, EXPORT),
    Row("fused_qkv_lora_in_place", lambda: fused_qkv_lora(True), ((2, 5, 16),), {"max_macs_ratio": 0.86, **only(linear=1)}, ONCE),
    # 24 · 72 of 24 · 72 + 2 · 72 + 16
    Row("fused_convs_lora", fused_convs, ((2, 8, 7, 9),), {"max_macs_ratio": 0.92, **only(conv=1)}, EXPORT),
    Row("gated_experts", gated_experts, ((2, 5, 16),), {"max_macs_ratio": 0.25, **only(linear=1)}, ONCE),
    # 20 · 8 · 6 + 6 · 6 · 8 of 20 · 20 · 6 + 6 · 6 · 20 + 20 · 8 · 6
    Row("mixed_series", mixed_series, ((2, 20, 6),), {"max_macs_ratio": 0.31, "at_most": {"conv+linear": 2}}, ONCE),
    # 768 · 128 · 96 + 20 · 128 · 96 of 768 · 256 · 96 + 20 · 128 · 64
    Row("pyramid_pooling", pyramid_pooling, ((2, 128, 24, 32),), {"max_macs_ratio": 0.52, **STATIC}, ONCE),
    # 720 of 720 + 128 + 1,440 + 3 · 170
    Row("edge_oriented_block", edge_oriented, ((2, 8, 9, 11),), {"max_macs_ratio": 0.26, **only(conv=1)}, ONCE),
    Row("haar_of_slices", haar_of_slices, ((2, 6, 8, 12),), {**STATIC, "at_most": {"conv+linear": 1, "add+sub+cat": 0}}, ONCE),
)

TABLES: dict[str, tuple[Row, ...]] = {
    "swapped": SWAPPED,
    "differences": DIFFERENCES,
    "rolled": ROLLED,
    "zeros": ZEROS,
    "others": OTHERS,
    "padded": PADDED,
    "collapsed": COLLAPSED,
}
