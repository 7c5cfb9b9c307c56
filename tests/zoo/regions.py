"""The table of affine regions that must reach a stated form: chains and parallel branches.

Each entry gives layers, a program over them (see spelling.py), input shapes, and what must come out (keywords of
`helpers.check`). `max_macs_ratio` is the share of the original's multiply-adds that may be left, computed by hand in
the comment.
Sizes tell the axes apart (C_in != C_out, H != W) unless the row says that it hides them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.spelling import CAPTURES, Program, bn, build, conv, conv_transpose

Shapes = tuple[tuple[int, ...], ...]
Made = tuple[dict[str, Any], Program]
ALL = CAPTURES
ONCE = (("module", "export"),)
EXPORT = tuple(pair for pair in CAPTURES if pair[1] == "export")

_NOTHING_ELSE = (
    *("conv", "conv_transpose", "linear", "matmul", "batch_norm", "add", "sub", "mul", "div", "addcmul"),
    *("avg_pool", "mean", "interpolate", "pad", "cat", "identity", "constant"),
)


def only(**counts: int) -> dict[str, Any]:
    """Exactly these compute nodes (views aside), none of any other affine kind."""
    return {"ops": {**dict.fromkeys(_NOTHING_ELSE, 0), **counts}}


@dataclass(frozen=True)
class Row:
    """One region: how to make it, its inputs, what must come out, under which (spelling, capture) pairs."""

    name: str
    make: Callable[[], Made]
    shapes: Shapes
    want: Mapping[str, Any] = field(default_factory=dict)
    spellings: tuple[tuple[str, str], ...] = ALL

    def model(self, spelling: str = "module") -> nn.Module:
        layers, program = self.make()
        return build(layers, program, len(self.shapes), spelling)


# --- chains --------------------------------------------------------------------------------------------------------


def chain(**layers: nn.Module) -> Made:
    """Layers run one after the other."""

    def program(s: Any, x: Tensor) -> Tensor:
        for name in layers:
            x = getattr(s, name)(x)
        return x

    return dict(layers), program


def collapsible(rank: int = 2, width: int = 16, hidden: int = 256, out: int = 16, residual: bool = False) -> Made:
    """SESR's linear block: k3 expand, 1x1 project, optionally plus x."""
    layers = {"expand": conv(rank)(width, hidden, 3, padding=1), "project": conv(rank)(hidden, out, 1)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.project(s.expand(x))
        return s.add(x, y) if residual else y

    return layers, program


def conv3xc() -> Made:
    """SPAN's Conv3XC: pad the input, 1x1 (with bias, also over the border), 3x3, 1x1; plus a 1x1 skip from the
    unpadded input.
    """
    layers = {
        "a": nn.Conv2d(12, 24, 1),
        "b": nn.Conv2d(24, 40, 3),
        "c": nn.Conv2d(40, 20, 1),
        "skip": nn.Conv2d(12, 20, 1),
    }

    def program(s: Any, x: Tensor) -> Tensor:
        return s.add(s.c(s.b(s.a(s.pad(x, (1, 1, 1, 1))))), s.skip(x))

    return layers, program


def conv_avgpool(rank: int = 2, groups: int = 1) -> Made:
    layers = {"conv": conv(rank)(8, 12, 3, padding=1, groups=groups)}
    return layers, lambda s, x: s.avg_pool(s.conv(x), 2, rank)


def conv_flatten_linear(n_convs: int = 1, rank: int = 2) -> Made:
    """Padded convolutions with biases -> flatten -> dropout -> Linear, on a map of 5 x 7 (x 3)."""
    layers: dict[str, Any] = {"conv0": conv(rank)(3, 8, 3, padding=1)}
    if n_convs == 2:
        layers["conv1"] = conv(rank)(8, 8, 3, padding=1)
    positions = {1: 5, 2: 5 * 7, 3: 5 * 7 * 3}[rank]
    layers |= {"drop": nn.Dropout(0.3), "fc": nn.Linear(8 * positions, 10)}

    def program(s: Any, x: Tensor) -> Tensor:
        for i in range(n_convs):
            x = getattr(s, f"conv{i}")(x)
        return s.fc(s.drop(s.flatten(x, 1)))

    return layers, program


def linear_view_conv() -> Made:
    layers = {"fc": nn.Linear(12, 8 * 5 * 6), "conv": nn.Conv2d(8, 4, 3, padding=1)}
    return layers, lambda s, x: s.conv(s.reshape(s.fc(x), -1, 8, 5, 6))


def pointwise_gap_linear(rank: int = 2) -> Made:
    layers = {"conv": conv(rank)(16, 64, 1), "fc": nn.Linear(64, 10)}
    return layers, lambda s, x: s.fc(s.global_mean(s.conv(x), rank))


def patch_embedding(rank: int = 2) -> Made:
    layers = {"patches": conv(rank)(3, 32, 4, stride=4), "fc": nn.Linear(32, 24)}
    return layers, lambda s, x: s.fc(s.transpose(s.flatten(s.patches(x), 2), 1, 2))


CHAINS = (
    # per position 16*256*9 + 256*16 = 40,960 -> 16*16*9 = 2,304: 0.056
    Row("collapsible", collapsible, ((2, 16, 12, 20),), {"max_macs_ratio": 0.08, **only(conv=1)}),
    Row(
        "collapsible_residual",
        lambda: collapsible(residual=True),
        ((2, 16, 12, 20),),
        {"max_macs_ratio": 0.08, **only(conv=1)},
    ),
    Row(
        "collapsible_narrowing",
        lambda: collapsible(width=16, out=12),
        ((2, 16, 9, 14),),
        {"max_macs_ratio": 0.06, **only(conv=1)},
    ),
    # 16*256*3 + 4,096 = 16,384 -> 768: 0.047; 3d: 16*256*27 + 4,096 = 114,688 -> 6,912: 0.060
    Row(
        "collapsible_1d",
        lambda: collapsible(1, residual=True),
        ((2, 16, 20),),
        {"max_macs_ratio": 0.05, **only(conv=1)},
        ONCE,
    ),
    Row("collapsible_3d", lambda: collapsible(3), ((2, 16, 4, 5, 6),), {"max_macs_ratio": 0.07, **only(conv=1)}, ONCE),
    # (16*64*4 + 64*64*9 + 64*24) / 4 -> 16*24*9 / 4: 3,456 of 42,496: 0.081
    Row(
        "expandnet",
        lambda: chain(a=nn.Conv2d(16, 64, 1), b=nn.Conv2d(64, 64, 3, stride=2), c=nn.Conv2d(64, 24, 1)),
        ((2, 16, 13, 17),),
        {"max_macs_ratio": 0.1, **only(conv=1)},
    ),
    Row(
        "expandnet_padded",
        lambda: chain(a=nn.Conv2d(16, 64, 1, bias=False), b=nn.Conv2d(64, 64, 3, stride=2, padding=1), c=nn.Conv2d(64, 24, 1)),
        ((2, 16, 12, 18),),
        {"max_macs_ratio": 0.1, **only(conv=1)},
    ),
    # (12*24*(h+2)(w+2) + 24*40*9 + 40*20 + 12*20) > 9,968 per position -> 12*20*9 = 2,160: 0.22
    Row("conv3xc", conv3xc, ((2, 12, 10, 14),), {"max_macs_ratio": 0.22, **only(conv=1)}),
    # 32*256 + 2*65,536 + 4,096 = 143,360 -> 512: 0.004
    Row(
        "linear_chain",
        lambda: chain(
            a=nn.Linear(32, 256),
            i=nn.Identity(),
            b=nn.Linear(256, 256),
            d=nn.Dropout(0.5),
            c=nn.Linear(256, 256),
            e=nn.Linear(256, 16),
        ),
        ((2, 32),),
        {"max_macs_ratio": 0.1, **only(linear=1)},
    ),
    Row(
        "linear_chain_tokens",
        lambda: chain(a=nn.Linear(32, 256), d=nn.Dropout(0.5), b=nn.Linear(256, 256), c=nn.Linear(256, 16)),
        ((2, 7, 32),),
        {"max_macs_ratio": 0.1, **only(linear=1)},
    ),
    # 16*64 + 64*16*9 = 10,240 -> 2,304: 0.225
    Row(
        "pointwise_then_padded",
        lambda: chain(a=nn.Conv2d(16, 64, 1, bias=False), b=nn.Conv2d(64, 16, 3, padding=1)),
        ((2, 16, 9, 13),),
        {"max_macs_ratio": 0.23, **only(conv=1)},
    ),
    Row(
        "pointwise_then_padded_3d",
        lambda: chain(a=nn.Conv3d(16, 64, 1, bias=False), b=nn.Conv3d(64, 16, 3, padding=1)),
        ((2, 16, 4, 5, 6),),
        {"max_macs_ratio": 0.25, **only(conv=1)},
        ONCE,
    ),
    # k^d -> ((k + 1) / 2)^d: 9 -> 4; 3 -> 2; 27 -> 8
    Row("conv_avgpool", conv_avgpool, ((2, 8, 10, 14),), {"max_macs_ratio": 0.45, **only(conv=1)}),
    Row("conv_avgpool_odd", conv_avgpool, ((2, 8, 11, 15),), {"max_macs_ratio": 0.45, **only(conv=1)}, ONCE),
    Row(
        "conv_avgpool_grouped",
        lambda: conv_avgpool(groups=4),
        ((2, 8, 10, 14),),
        {"max_macs_ratio": 0.45, **only(conv=1)},
    ),
    Row("conv_avgpool_1d", lambda: conv_avgpool(1), ((2, 8, 14),), {"max_macs_ratio": 0.67, **only(conv=1)}, ONCE),
    Row("conv_avgpool_3d", lambda: conv_avgpool(3), ((2, 8, 4, 6, 8),), {"max_macs_ratio": 0.3, **only(conv=1)}, ONCE),
    # (3*8*9 + 8*10) * 35 = 10,360 -> 3*35*10 = 1,050: 0.102
    Row("conv_flatten_linear", conv_flatten_linear, ((2, 3, 5, 7),), {"max_macs_ratio": 0.11, **only(linear=1)}),
    # + 8*8*9*35 = 30,520 -> 1,050: 0.035
    Row(
        "two_convs_flatten_linear",
        lambda: conv_flatten_linear(2),
        ((2, 3, 5, 7),),
        {"max_macs_ratio": 0.035, **only(linear=1)},
    ),
    Row(
        "conv_flatten_linear_1d",
        lambda: conv_flatten_linear(1, 1),
        ((2, 3, 5),),
        {"max_macs_ratio": 0.2, **only(linear=1)},
        ONCE,
    ),
    Row(
        "conv_flatten_linear_3d",
        lambda: conv_flatten_linear(1, 3),
        ((2, 3, 5, 7, 3),),
        {"max_macs_ratio": 0.05, **only(linear=1)},
        ONCE,
    ),
    # 12*240 + 8*4*9*30 = 11,520 -> 12*120: 0.125
    Row("linear_view_conv", linear_view_conv, ((2, 12),), {"max_macs_ratio": 0.13, **only(linear=1)}),
    # 16*64*63 + 640 = 65,152 -> 160
    Row(
        "pointwise_gap_linear",
        pointwise_gap_linear,
        ((2, 16, 7, 9),),
        {"max_macs_ratio": 0.003, "ops": {"conv": 0, "linear": 1, "mean+avg_pool": 1}},
    ),
    Row(
        "pointwise_gap_linear_1d",
        lambda: pointwise_gap_linear(1),
        ((2, 16, 9),),
        {"max_macs_ratio": 0.03, "ops": {"conv": 0, "linear": 1, "mean+avg_pool": 1}},
        ONCE,
    ),
    # 3*16*32 + 32*24 = 2,304 per patch -> 3*16*24 = 1,152
    Row(
        "patch_embedding",
        patch_embedding,
        ((2, 3, 12, 20),),
        {"max_macs_ratio": 0.5, "ops": {"conv+linear": 1, "add": 0, "copy": 0}},
    ),
    # 3*64*32 + 768 = 6,912 -> 4,608
    Row(
        "patch_embedding_3d",
        lambda: patch_embedding(3),
        ((2, 3, 8, 8, 12),),
        {"max_macs_ratio": 0.67, "ops": {"conv+linear": 1}},
        ONCE,
    ),
    # 3*4*32 + 768 = 1,152 -> 288
    Row(
        "patch_embedding_1d",
        lambda: patch_embedding(1),
        ((2, 3, 20),),
        {"max_macs_ratio": 0.26, "ops": {"conv+linear": 1}},
        ONCE,
    ),
)


# --- parallel branches ---------------------------------------------------------------------------------------------


def repvgg(rank: int = 2, groups: int = 1, stride: int = 1, c_in: int = 8, c_out: int = 8) -> Made:
    """3x3 + BN, 1x1 + BN and, where the shapes allow, BN alone."""
    layers = {
        "k3": conv(rank)(c_in, c_out, 3, stride, 1, groups=groups, bias=False),
        "bn3": bn(c_out, rank),
        "k1": conv(rank)(c_in, c_out, 1, stride, groups=groups, bias=False),
        "bn1": bn(c_out, rank),
    }
    identity = stride == 1 and c_in == c_out
    if identity:
        layers["bn0"] = bn(c_in, rank)

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.add(s.bn3(s.k3(x)), s.bn1(s.k1(x)))
        return s.add(y, s.bn0(x)) if identity else y

    return layers, program


def mobileone(groups: int = 1, branches: int = 4) -> Made:
    layers: dict[str, Any] = {
        "scale": nn.Conv2d(8, 8, 1, groups=groups, bias=False),
        "bn_scale": bn(8),
        "bn_skip": bn(8),
    }
    for i in range(branches):
        layers |= {f"conv{i}": nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), f"bn{i}": bn(8)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.add(s.bn_skip(x), s.bn_scale(s.scale(x)))
        for i in range(branches):
            y = s.add(y, getattr(s, f"bn{i}")(getattr(s, f"conv{i}")(x)))
        return y

    return layers, program


def acnet(stride: int = 1) -> Made:
    layers = {
        "square": nn.Conv2d(6, 10, 3, stride, 1, bias=False),
        "bn_square": bn(10),
        "vertical": nn.Conv2d(6, 10, (3, 1), stride, (1, 0), bias=False),
        "bn_vertical": bn(10),
        "horizontal": nn.Conv2d(6, 10, (1, 3), stride, (0, 1), bias=False),
        "bn_horizontal": bn(10),
    }

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.add(s.bn_square(s.square(x)), s.bn_vertical(s.vertical(x)))
        return s.add(y, s.bn_horizontal(s.horizontal(x)))

    return layers, program


class BNAndPad(nn.Module):
    """DiverseBranchBlock's BNAndPadLayer: BatchNorm, then a border filled with what BatchNorm makes of zero."""

    def __init__(self, channels: int, pad: int = 1, in_place: bool = True) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.pad = pad
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        bn, p = self.bn, self.pad
        fill = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        fill = fill.view(1, -1, 1, 1)
        if not self.in_place:
            return nn.functional.pad(bn(x) - fill, [p] * 4) + fill
        y = nn.functional.pad(bn(x), [p] * 4)
        y[:, :, 0:p, :] = fill
        y[:, :, -p:, :] = fill
        y[:, :, :, 0:p] = fill
        y[:, :, :, -p:] = fill
        return y


class DBB(nn.Module):
    """DiverseBranchBlock as published: 3x3, 1x1, 1x1 -> 3x3 and 1x1 -> average pool branches, each with BatchNorm."""

    def __init__(self, c_in: int = 6, c_out: int = 10, in_place: bool = True, stride: int = 1) -> None:
        super().__init__()
        self.origin = nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out))
        self.point = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.average = nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, bias=False),
            BNAndPad(c_out, 1, in_place),
            nn.AvgPool2d(3, stride),
            nn.BatchNorm2d(c_out),
        )
        self.deep = nn.Sequential(
            nn.Conv2d(c_in, c_in, 1, bias=False),
            BNAndPad(c_in, 1, in_place),
            nn.Conv2d(c_in, c_out, 3, stride, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.origin(x) + self.point(x) + self.average(x) + self.deep(x)


def large_kernel(dilated: bool = True) -> Made:
    """UniRepLKNet: depthwise 7x7 + 3x3 + (dilated) 3x3, each with BatchNorm."""
    layers = {
        "large": nn.Conv2d(8, 8, 7, padding=3, groups=8, bias=False),
        "bn_large": bn(8),
        "small": nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        "bn_small": bn(8),
    }
    if dilated:
        layers |= {"holes": nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False), "bn_holes": bn(8)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.add(s.bn_large(s.large(x)), s.bn_small(s.small(x)))
        return s.add(y, s.bn_holes(s.holes(x))) if dilated else y

    return layers, program


def repmixer() -> Made:
    """FastViT's token mixer: x + gamma * (mixer(x) - norm(x)), everything depthwise."""
    layers = {
        "gamma": nn.Parameter(torch.ones(8, 1, 1)),
        "k3": nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        "bn3": bn(8),
        "skip": bn(8),
        "norm": bn(8),
    }
    return layers, lambda s, x: s.add(x, s.mul(s.gamma, s.sub(s.add(s.bn3(s.k3(x)), s.skip(x)), s.norm(x))))


def linears(program: Program, **layers: Any) -> Made:
    return dict(layers), program


def lora(n: int = 1) -> Made:
    """Linear(x) + s * B(A(dropout(x))), n adapters at once."""
    layers: dict[str, Any] = {"base": nn.Linear(32, 48), "drop": nn.Dropout(0.1)}
    for i in range(n):
        layers |= {f"down{i}": nn.Linear(32, 4 + i, bias=False), f"up{i}": nn.Linear(4 + i, 48, bias=False)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.base(x)
        for i in range(n):
            y = s.add(y, s.mul(getattr(s, f"up{i}")(getattr(s, f"down{i}")(s.drop(x))), 2.0 / (i + 1)))
        return y

    return layers, program


def diamond_in_diamond() -> Made:
    """3x3(x) + 1x1(3x3(x) + 1x1(x)): branches inside a branch."""
    layers = {
        "a": nn.Conv2d(6, 10, 3, padding=1),
        "b": nn.Conv2d(6, 12, 3, padding=1),
        "c": nn.Conv2d(6, 12, 1),
        "d": nn.Conv2d(12, 10, 1),
    }
    return layers, lambda s, x: s.add(s.a(x), s.d(s.add(s.b(x), s.c(x))))


def parallel_transposed(groups: int = 1) -> Made:
    layers = {
        "k4": nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=groups, bias=False),
        "bn4": bn(12),
        "k2": nn.ConvTranspose2d(8, 12, 2, 2, groups=groups),
        "bn2": bn(12),
    }
    return layers, lambda s, x: s.add(s.bn4(s.k4(x)), s.bn2(s.k2(x)))


X2 = ((2, 8, 9, 13),)
ONE_CONV = only(conv=1)
BRANCHES = (
    # (9 + 1) -> 9
    Row("repvgg", repvgg, X2, {"max_macs_ratio": 0.9, **ONE_CONV}),
    Row("repvgg_hidden_axes", repvgg, ((2, 8, 8, 8),), {"max_macs_ratio": 0.9, **ONE_CONV}, ONCE),
    Row("repvgg_grouped", lambda: repvgg(groups=4), X2, {"max_macs_ratio": 0.9, **ONE_CONV}),
    Row("repvgg_stride", lambda: repvgg(stride=2, c_out=12), X2, {"max_macs_ratio": 0.9, **ONE_CONV}),
    Row("repvgg_1d", lambda: repvgg(1), ((2, 8, 13),), {"max_macs_ratio": 0.75, **ONE_CONV}, ONCE),
    Row("repvgg_3d", lambda: repvgg(3, groups=2), ((2, 8, 4, 5, 6),), {"max_macs_ratio": 0.97, **ONE_CONV}, ONCE),
    Row("mobileone", mobileone, X2, {"max_macs_ratio": 9 / 37, **ONE_CONV}),
    Row("mobileone_depthwise", lambda: mobileone(groups=8), X2, {"max_macs_ratio": 9 / 37, **ONE_CONV}),
    # 9 + 3 + 3 -> 9
    Row("acnet", acnet, ((2, 6, 9, 13),), {"max_macs_ratio": 0.6, **ONE_CONV}),
    Row("acnet_stride", lambda: acnet(2), ((2, 6, 9, 13),), {"max_macs_ratio": 0.6, **ONE_CONV}, ONCE),
    Row("large_kernel", lambda: large_kernel(False), X2, {"max_macs_ratio": 0.85, **ONE_CONV}),
    # 49 + 9 + 9 -> 49
    Row("large_kernel_dilated", large_kernel, X2, {"max_macs_ratio": 0.74, **ONE_CONV}),
    Row("repmixer", repmixer, X2, {"max_macs_ratio": 1.0, **ONE_CONV}),
    Row(
        "residual_linear",
        lambda: linears(lambda s, x: s.add(x, s.a(x)), a=nn.Linear(24, 24)),
        ((2, 24),),
        only(linear=1),
    ),
    Row(
        "residual_linear_tokens",
        lambda: linears(lambda s, x: s.add(x, s.a(x)), a=nn.Linear(24, 24)),
        ((2, 24, 24),),
        only(linear=1),
    ),
    Row(
        "mean_of_two_heads",  # LeViT's: (L1(BN1 x) + L2(BN2 x)) / 2
        lambda: linears(
            lambda s, x: s.mul(s.add(s.a(s.bn_a(x)), s.b(s.bn_b(x))), 0.5),
            a=nn.Linear(24, 10),
            b=nn.Linear(24, 10),
            bn_a=bn(24, 0),
            bn_b=bn(24, 0),
        ),
        ((2, 24),),
        {"max_macs_ratio": 0.5, **only(linear=1)},
    ),
    Row(
        "scaled_sum",
        lambda: linears(
            lambda s, x, y: s.sub(s.add(s.mul(s.a(x), 0.5), s.b(y)), 1.0),
            a=nn.Linear(24, 16),
            b=nn.Linear(20, 16, bias=False),
        ),
        ((2, 24), (2, 20)),
        {"ops": {"mul": 0, "sub": 0, "div": 0, "neg": 0}, "at_most": {"linear": 2, "add": 1, "cat": 1, "add+cat": 1}},
    ),
    # 32*48 + 36*... -> 32*48
    Row("lora", lora, ((2, 5, 32),), {"max_macs_ratio": 0.83, **only(linear=1)}),
    Row("lora_three", lambda: lora(3), ((2, 5, 32),), {"max_macs_ratio": 0.57, **only(linear=1)}),
    # 6*10*9 + 6*12*9 + 6*12 + 120 = 1,380 -> 540
    Row("diamond_in_diamond", diamond_in_diamond, ((2, 6, 9, 13),), {"max_macs_ratio": 0.4, **ONE_CONV}),
    Row("parallel_transposed", parallel_transposed, X2, {"max_macs_ratio": 0.8, **only(conv_transpose=1)}),
    Row(
        "parallel_transposed_grouped",
        lambda: parallel_transposed(4),
        X2,
        {"max_macs_ratio": 0.8, **only(conv_transpose=1)},
        ONCE,
    ),
    # the same tensor in two halves: 2 * (4*6*9) = 8*6*9, and no slices
    Row(
        "convs_of_slices",
        lambda: linears(
            lambda s, x: s.add(s.a(x[:, :4]), s.b(x[:, 4:])),
            a=nn.Conv2d(4, 6, 3, padding=1),
            b=nn.Conv2d(4, 6, 3, padding=1),
        ),
        ((2, 8, 9, 13),),
        {"max_macs_ratio": 1.0, "ops": {"conv": 1, "add": 0, "slice": 0, "split": 0}},
    ),
    Row(
        # 4*32*9*63 + 32*4*99 = 85,248 -> 4*4*9*63 = 9,072: 0.106; a padded convolution has 4*4*9*99
        "transposed_stride_1",
        lambda: chain(up=conv_transpose(2)(4, 32, 3), norm=bn(32), out=nn.Conv2d(32, 4, 1)),
        ((2, 4, 7, 9),),
        {"max_macs_ratio": 0.107, **only(conv_transpose=1)},
    ),
    Row(
        "transposed_bn_pointwise",
        lambda: chain(up=conv_transpose(2)(4, 32, 4, 2, 1), norm=bn(32), out=nn.Conv2d(32, 4, 1)),
        ((2, 4, 7, 9),),
        {"max_macs_ratio": 0.1, **only(conv_transpose=1)},
    ),
)
