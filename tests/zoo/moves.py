"""The table of affine regions, continued: work that moves, layouts and constants that are absorbed, concatenations,
siblings.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.regions import ALL, EXPORT, ONCE, Made, Row, chain, linears, only
from zoo.spelling import Program, bn, conv

PARAMETER = nn.Parameter


# Sizes are such that multiply-adds decide, not launches: at a few thousand of them one strided convolution would be
# quicker than
# a pool and a pointwise convolution.

# --- work moves to where it is cheap -------------------------------------------------------------------------------


def pointwise_avgpool(rank: int = 2, width: int = 96) -> Made:
    layers = {"conv": conv(rank)(64, width, 1)}
    return layers, lambda s, x: s.avg_pool(s.conv(x), 2, rank)


def upsample_pointwise(mode: str, align_corners: bool | None = None, rank: int = 2, factor: int = 2) -> Made:
    layers = {"conv": conv(rank)(64, 96, 1)}
    return layers, lambda s, x: s.conv(s.upsample(x, factor, mode, align_corners))


def nearest_conv(rank: int = 2, bias: bool = True, groups: int = 1) -> Made:
    layers = {"conv": conv(rank)(8, 12, 3, padding=1, bias=bias, groups=groups)}
    return layers, lambda s, x: s.conv(s.upsample(x, 2, "nearest"))


def segformer_head() -> Made:
    """Four Linears on tokens -> upsample to the first -> cat -> 1x1 -> BN -> ReLU (64 channels each)."""
    layers: dict[str, Any] = {f"fc{i}": nn.Linear(c, 64) for i, c in enumerate((16, 32, 80, 128))}
    layers |= {"fuse": nn.Conv2d(256, 64, 1, bias=False), "norm": bn(64)}

    def program(s: Any, *xs: Tensor) -> Tensor:
        maps = []
        for i, x in enumerate(xs):
            y = s.transpose(getattr(s, f"fc{i}")(s.transpose(s.flatten(x, 2), 1, 2)), 1, 2)
            maps.append(s.resize(y.reshape(x.shape[0], -1, x.shape[2], x.shape[3]), xs[0]))
        return s.relu(s.norm(s.fuse(s.cat(maps[::-1]))))

    return layers, program


def yolo_neck() -> Made:
    layers = {"conv": nn.Conv2d(384, 128, 1, bias=False), "norm": bn(128)}
    return layers, lambda s, x, y: F.silu(s.norm(s.conv(s.cat([s.upsample(x, 2), y]))))


def two_upsamplings(shared: bool = True) -> Made:
    """A pyramid's two paths, each a 1x1 and an upsampling, added; of one tensor or of two."""
    layers = {"a": nn.Conv2d(16, 20, 1), "b": nn.Conv2d(16, 20, 1)}
    if shared:
        return layers, lambda s, x: s.add(s.upsample(s.a(x), 2, "bilinear"), s.upsample(s.b(x), 2, "bilinear"))
    return layers, lambda s, x, y: s.add(s.upsample(s.a(x), 2, "bilinear"), s.upsample(s.b(y), 2, "bilinear"))


def one_weight_twice(kind: str) -> Made:
    """One layer applied to two tensors, added."""
    layers = {"a": nn.Conv2d(16, 20, 3, padding=1) if kind == "conv" else nn.Linear(9, 12)}
    return layers, lambda s, x, y: s.add(s.a(x), s.a(y))


def dpt_fusion() -> Made:
    """Depth-Anything's fusion: x + y, upsample with align_corners, 1x1."""
    layers = {"out": nn.Conv2d(64, 48, 1)}
    return layers, lambda s, x, y: s.out(s.upsample(s.add(x, y), 2, "bilinear", True))


MOVES = (
    Row(
        "pointwise_avgpool",
        pointwise_avgpool,
        ((2, 64, 28, 36),),
        {"max_macs_ratio": 0.25, "before": ("avg_pool", "conv|linear")},
    ),
    Row("pointwise_avgpool_1d", lambda: pointwise_avgpool(1, 1024), ((2, 64, 512),), {"max_macs_ratio": 0.5}, ONCE),
    Row("pointwise_avgpool_3d", lambda: pointwise_avgpool(3), ((2, 64, 6, 8, 10),), {"max_macs_ratio": 0.125}, ONCE),
    Row(
        "transition",  # DenseNet's
        lambda: chain(norm=bn(256), act=nn.ReLU(), conv=nn.Conv2d(256, 128, 1, bias=False), pool=nn.AvgPool2d(2, 2)),
        ((2, 256, 28, 36),),
        {"max_macs_ratio": 0.25, "ops": {"batch_norm": 1}, "before": ("avg_pool", "conv|linear")},
        (("module", "export"), ("functional", "export"), ("module", "symbolic")),
    ),
    Row(
        "nearest_pointwise",
        lambda: upsample_pointwise("nearest"),
        ((2, 64, 14, 18),),
        {"max_macs_ratio": 0.25, "before": ("conv|linear", "interpolate")},
    ),
    Row(
        "bilinear_pointwise",
        lambda: upsample_pointwise("bilinear"),
        ((2, 64, 14, 18),),
        {"max_macs_ratio": 0.25, "before": ("conv|linear", "interpolate")},
    ),
    Row(
        "bilinear_aligned_pointwise",
        lambda: upsample_pointwise("bilinear", True),
        ((2, 64, 14, 18),),
        {"max_macs_ratio": 0.25},
        ONCE,
    ),
    Row("bicubic_pointwise", lambda: upsample_pointwise("bicubic"), ((2, 64, 14, 18),), {"max_macs_ratio": 0.25}, ONCE),
    Row(
        "nearest3_pointwise",
        lambda: upsample_pointwise("nearest", factor=3),
        ((2, 64, 14, 18),),
        {"max_macs_ratio": 0.12},
        ONCE,
    ),
    Row(
        "linear_pointwise_1d",
        lambda: upsample_pointwise("linear", rank=1),
        ((2, 64, 256),),
        {"max_macs_ratio": 0.5},
        ONCE,
    ),
    Row(
        "trilinear_pointwise_3d",
        lambda: upsample_pointwise("trilinear", rank=3),
        ((2, 64, 3, 4, 5),),
        {"max_macs_ratio": 0.125},
        ONCE,
    ),
    Row("two_upsamplings_of_one", two_upsamplings, ((2, 16, 7, 9),), {"max_macs_ratio": 0.51, **only(conv=1, interpolate=1)}),
    Row(
        "two_upsamplings",
        lambda: two_upsamplings(shared=False),
        ((2, 16, 7, 9), (2, 16, 7, 9)),
        {"max_macs_ratio": 1.0, "ops": {"interpolate": 1}},
    ),
    # 2 * 16*20*9 -> 16*20*9
    Row("one_conv_twice", lambda: one_weight_twice("conv"), ((2, 16, 7, 9),) * 2, {"max_macs_ratio": 0.5, "ops": {"conv": 1}}),
    Row("one_linear_twice", lambda: one_weight_twice("linear"), ((2, 5, 9),) * 2, {"max_macs_ratio": 0.5, "ops": {"linear": 1}}),
    Row(
        "dpt_fusion",
        dpt_fusion,
        ((2, 64, 14, 18), (2, 64, 14, 18)),
        {"max_macs_ratio": 0.25, "before": ("conv|linear", "interpolate")},
        ALL,
    ),
    # 2,539,520 + 256*64*1,280 -> 2,539,520 per image: 0.108
    Row(
        "segformer_head",
        segformer_head,
        ((2, 16, 32, 40), (2, 32, 16, 20), (2, 80, 8, 10), (2, 128, 4, 5)),
        {
            "max_macs_ratio": 0.15,
            "ops": {"batch_norm": 0, "cat": 0},
            "at_most": {"conv+linear": 4, "add": 3, "interpolate": 3},
        },
        (("module", "export"), ("functional", "export"), ("aten", "export"), ("module", "symbolic")),
    ),
    # 384*128*480 -> 256*128*120 + 128*128*480: 0.5
    Row(
        "yolo_neck",
        yolo_neck,
        ((2, 256, 10, 12), (2, 128, 20, 24)),
        {"max_macs_ratio": 0.5, "ops": {"conv": 2, "batch_norm": 0, "cat": 0, "interpolate": 1, "add": 1, "mul": 0}},
    ),
    # 4 * 9 -> 16 per input position; the 1d and 3d shares are 2/3 and 8/27
    Row("nearest_conv", nearest_conv, ((2, 8, 16, 19),), {"max_macs_ratio": 0.45, **only(conv_transpose=1)}),
    Row(
        "nearest_conv_no_bias_grouped",
        lambda: nearest_conv(2, False, 4),
        ((2, 8, 6, 9),),
        {"max_macs_ratio": 0.45, **only(conv_transpose=1)},
        ONCE,
    ),
    Row(
        "nearest_conv_1d",
        lambda: nearest_conv(1),
        ((2, 8, 9),),
        {"max_macs_ratio": 0.67, **only(conv_transpose=1)},
        ONCE,
    ),
    Row(
        "nearest_conv_3d",
        lambda: nearest_conv(3),
        ((2, 8, 3, 4, 5),),
        {"max_macs_ratio": 0.3, **only(conv_transpose=1)},
        ONCE,
    ),
    # 32*64 + 24*64 + 128*16 = 5,632 -> 56*16 = 896: 0.16
    Row(
        "linear_of_cat",
        lambda: linears(
            lambda s, x, y: s.out(s.cat([s.a(x), s.b(y)])),
            a=nn.Linear(32, 64),
            b=nn.Linear(24, 64),
            out=nn.Linear(128, 16),
        ),
        ((2, 32), (2, 24)),
        {"max_macs_ratio": 0.16, "at_most": {"linear": 2, "add+cat": 1}},
    ),
    Row(
        "conv_of_cat_tokens",  # the same over a cat on the last axis
        lambda: linears(
            lambda s, x, y: s.out(s.cat([s.a(x), s.b(y)], -1)),
            a=nn.Linear(32, 64),
            b=nn.Linear(24, 64),
            out=nn.Linear(128, 16),
        ),
        ((2, 5, 32), (2, 5, 24)),
        {"max_macs_ratio": 0.16, "at_most": {"linear": 2, "add+cat": 1}},
        EXPORT,
    ),
)


# --- layouts next to a convolution ---------------------------------------------------------------------------------


def sliced_convs(read: int = 8) -> Made:
    """conv 16 -> 32, only `read` channels used by the next one: the others need not be computed."""
    layers = {"a": nn.Conv2d(12, 32, 3, padding=1), "b": nn.Conv2d(read, 40, 3, padding=1)}
    return layers, lambda s, x: s.b(s.relu(s.narrow(s.a(x), 1, 4, read)))


def permuted(index: str) -> Made:
    layers = {"conv": nn.Conv2d(12, 8, 1), "order": torch.tensor([3, 1, 0, 2, 11, 10, 8, 9, 5, 4, 7, 6])}

    def program(s: Any, x: Tensor) -> Tensor:
        x = torch.index_select(x, 1, s.order) if index == "select" else x[:, s.order] if index == "index" else torch.flip(x, [1])
        return s.conv(x)

    return layers, program


def dead_taps(side: int, kernel: int) -> Made:
    layers = {"pool": nn.AdaptiveAvgPool2d(side), "conv": nn.Conv2d(8, 12, kernel, padding=kernel // 2)}
    return layers, lambda s, x: s.conv(s.pool(x))


NO_VIEWS = {"slice": 0, "permute": 0, "reshape": 0, "channel_shuffle": 0, "flip": 0, "copy": 0}
LAYOUTS = (
    Row(
        "shuffle_then_pointwise",
        lambda: linears(lambda s, x: s.conv(s.shuffle(x, 3, 12)), conv=nn.Conv2d(12, 8, 1)),
        ((2, 12, 5, 7),),
        {"ops": {"conv": 1, **NO_VIEWS}},
    ),
    Row(
        "pointwise_then_shuffle",
        lambda: linears(lambda s, x: s.relu(s.shuffle(s.conv(x), 3, 12)), conv=nn.Conv2d(8, 12, 1)),
        ((2, 8, 5, 7),),
        {"ops": {"conv": 1, **NO_VIEWS}},
    ),
    Row(
        "depthwise_shuffle_pointwise",
        lambda: linears(
            lambda s, x: s.b(s.shuffle(s.relu(s.a(x)), 3, 12)), a=nn.Conv2d(12, 12, 3, groups=12), b=nn.Conv2d(12, 8, 1)
        ),
        ((2, 12, 5, 7),),
        {"ops": {"conv": 2, **NO_VIEWS}},
    ),
    # An index would take some of any larger number of channels; the convolution's weight fixes it to these.
    Row("flip_channels", lambda: permuted("flip"), ((2, 12, 5, 7),), {"ops": {"conv": 1, **NO_VIEWS}}, ONCE),
    *(
        Row(
            f"index{suffix}_channels",
            lambda index=index: permuted(index),  # type: ignore[misc]
            ((2, 12, 5, 7),),
            {"sizes": "spatial", "ops": {"conv": 1, **NO_VIEWS}},
            ONCE,
        )
        for suffix, index in (("_select", "select"), ("", "index"))
    ),
    # 12*32*9 + 8*40*9 -> 12*8*9 + 8*40*9: 0.591
    Row("unread_channels", sliced_convs, ((2, 12, 6, 8),), {"max_macs_ratio": 0.591, "ops": {"conv": 2, "slice": 0}}),
    Row("dead_taps_1", lambda: dead_taps(1, 3), ((2, 8, 6, 9),), {"max_macs_ratio": 0.112, "ops": {"conv+linear": 1}}),
    Row("dead_taps_2", lambda: dead_taps(2, 5), ((2, 8, 6, 9),), {"max_macs_ratio": 0.36, "ops": {"conv+linear": 1}}),
    Row(
        "pad_then_conv",
        lambda: linears(lambda s, x: s.conv(s.pad(x, (1, 1, 2, 2))), conv=nn.Conv2d(8, 12, (5, 3))),
        ((2, 8, 6, 9),),
        only(conv=1),
    ),
    Row(
        "pad_then_padded_conv",
        lambda: linears(lambda s, x: s.conv(s.pad(x, (1, 1, 1, 1))), conv=nn.Conv2d(8, 12, 5, padding=1, stride=2)),
        ((2, 8, 6, 9),),
        only(conv=1),
    ),
    Row(
        "conv_then_crop",
        lambda: linears(lambda s, x: s.conv(x)[:, :, 1:-1, 1:-1], conv=nn.Conv2d(8, 12, 3, padding=1)),
        ((2, 8, 6, 9),),
        {"max_macs_ratio": 28 / 54, "ops": {"conv": 1, "slice": 0, "pad": 0}},
        (("module", "export"), ("aten", "export"), ("module", "symbolic")),
    ),
    Row(
        "conv_then_negative_pad",
        lambda: linears(lambda s, x: s.pad(s.conv(x), (-1, -1, -1, -1)), conv=nn.Conv2d(8, 12, 3, padding=1)),
        ((2, 8, 6, 9),),
        {"max_macs_ratio": 28 / 54, "ops": {"conv": 1, "slice": 0, "pad": 0}},
        EXPORT,
    ),
    Row(
        "conv_then_strided_slice",
        lambda: linears(lambda s, x: s.step(s.conv(x), (2, 3), 2), conv=nn.Conv2d(8, 12, 3, padding=1)),
        ((2, 8, 6, 10),),
        {"max_macs_ratio": 0.25, "ops": {"conv": 1, "slice": 0}},
    ),
    Row(
        "pixel_unshuffle_pointwise",
        lambda: linears(lambda s, x: s.conv(F.pixel_unshuffle(x, 2)), conv=nn.Conv2d(32, 12, 1)),
        ((2, 8, 6, 10),),
        {"at_most": {"conv": 1, "linear": 0}},
        ONCE,
    ),
    Row(
        "pointwise_pixel_shuffle",
        lambda: linears(lambda s, x: F.pixel_shuffle(s.conv(x), 2), conv=nn.Conv2d(8, 48, 1)),
        ((2, 8, 6, 10),),
        {"at_most": {"conv+conv_transpose": 1, "linear": 0}},
        ONCE,
    ),
)


# --- affines that a neighbour absorbs ------------------------------------------------------------------------------


def attention_logits() -> Made:
    """q k^T / sqrt(d), the scale on q after the heads are split off."""
    layers = {"q": nn.Linear(24, 24), "k": nn.Linear(24, 24)}

    def program(s: Any, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = s.transpose(s.reshape(s.q(x), n, length, 4, 6), 1, 2)
        k = s.transpose(s.reshape(s.k(x), n, length, 4, 6), 1, 2)
        return torch.softmax(torch.matmul(s.mul(q, 6**-0.5), k.transpose(2, 3)), dim=-1)

    return layers, program


def layer_scale() -> Made:
    layers = {"gamma": PARAMETER(torch.full((24,), 1e-6)), "a": nn.Linear(24, 48), "b": nn.Linear(48, 24)}
    return layers, lambda s, x: s.add(x, s.mul(s.gamma, s.b(F.gelu(s.a(x)))))


def normalised(padding: int = 0) -> Made:
    """(x - mean) / std, as torchvision's transforms write it, before a convolution."""
    layers = {
        "mean": torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
        "std": torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1),
        "conv": nn.Conv2d(3, 8, 3, padding=padding, stride=2),
    }
    return layers, lambda s, x: s.conv((x - s.mean) / s.std)


def relu_bn_pool_conv(padding: int = 0, pool_padding: int = 0) -> Made:
    """The order that CREPE uses."""
    layers = {
        "norm": bn(8),
        "pool": nn.MaxPool2d(2, padding=pool_padding),
        "conv": nn.Conv2d(8, 12, 3, padding=padding),
    }
    return layers, lambda s, x: s.conv(s.pool(s.norm(s.relu(x))))


def norm_plain_and_pooled() -> Made:
    """NextViT's attention: Q reads a norm's tokens, K and V read them pooled and normalised once more."""
    layers = {"norm": bn(24), "q": nn.Linear(24, 24), "k": nn.Linear(24, 24), "v": nn.Linear(24, 24), "again": bn(24, 1)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.flatten(s.norm(s.relu(x)), 2)
        pooled = s.transpose(s.again(s.avg_pool(y, 4, 1)), 1, 2)
        return F.scaled_dot_product_attention(s.q(s.transpose(y, 1, 2)), s.k(pooled), s.v(pooled))

    return layers, program


def bias_through_view() -> Made:
    """A Linear with BatchNorm adds to a stream of tokens that is seen as an image and strided: LeViT's."""
    layers = {"a": nn.Linear(16, 16, bias=False), "norm": bn(16, 0), "q": nn.Linear(16, 8), "k": nn.Linear(16, 8)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.a(s.relu(x))
        y = s.add(x, s.norm(y.flatten(0, 1)).reshape(y.shape))
        z = y.view(y.shape[0], 6, 4, 16)[:, ::2, ::2].reshape(y.shape[0], 6, 16)
        return torch.matmul(s.q(z), s.transpose(s.k(F.gelu(y)), 1, 2))

    return layers, program


RELU = (
    ("module", "export"),
    ("functional", "export"),
    ("method", "export"),
    ("aten", "export"),
    ("module", "symbolic"),
)
ABSORBED = (
    Row(
        "relu_bn_maxpool_conv",
        relu_bn_pool_conv,
        ((2, 8, 10, 13),),
        {"ops": {**only(conv=1)["ops"], "max_pool": 1, "relu": 1}},
        RELU,
    ),
    Row(
        "relu_bn_padded_maxpool_conv",
        lambda: relu_bn_pool_conv(0, 1),
        ((2, 8, 10, 13),),
        {"ops": {"batch_norm": 0, "mul": 0, "add": 0}},
        ONCE,
    ),
    Row(
        "add_bn_gap_linear",
        lambda: linears(
            lambda s, x, y: s.fc(s.global_mean(s.norm(s.add(s.relu(x), s.relu(y))))), norm=bn(16), fc=nn.Linear(16, 10)
        ),
        ((2, 16, 5, 7), (2, 16, 5, 7)),
        {"ops": {"add": 1, "mul": 0, "sub": 0, "batch_norm": 0, "linear": 1, "mean+avg_pool": 1}},
    ),
    Row(
        "bn_flatten_linear",
        lambda: linears(lambda s, x: s.fc(s.flatten(s.norm(s.relu(x)))), norm=bn(6), fc=nn.Linear(6 * 35, 10)),
        ((2, 6, 5, 7),),
        only(linear=1),
    ),
    Row(
        "bn_tokens_linear",
        lambda: linears(lambda s, x: s.fc(s.transpose(s.flatten(s.norm(s.relu(x)), 2), 1, 2)), norm=bn(6), fc=nn.Linear(6, 10)),
        ((2, 6, 5, 7),),
        {"ops": {"batch_norm": 0, "mul": 0, "conv+linear": 1}, "at_most": {"add": 0}},
    ),
    Row(
        "norm_plain_and_pooled",
        norm_plain_and_pooled,
        ((2, 24, 8, 10),),
        {"ops": {"batch_norm": 0, "mul": 0, "add": 0, "linear": 3, "avg_pool": 1}},
    ),
    Row("bias_through_view", bias_through_view, ((2, 24, 16),), {"ops": {"linear": 3, "add": 1, "batch_norm": 0}}),
    Row("layer_scale", layer_scale, ((2, 5, 24),), {"ops": {"linear": 2, "add": 1, "mul": 0}}),
    Row("attention_logits", attention_logits, ((2, 5, 24),), {"ops": {"mul": 0, "matmul": 1}, "at_most": {"linear": 2}}),
    Row("normalised", normalised, ((2, 3, 9, 13),), only(conv=1)),
    Row(
        "scalars_between_convs",
        lambda: linears(lambda s, x: s.b(s.add(s.mul(s.a(x), 2.0) / 3, 1)), a=nn.Conv2d(6, 64, 1), b=nn.Conv2d(64, 8, 3)),
        ((2, 6, 8, 11),),
        only(conv=1),
    ),
    Row(
        "bn_before_unpadded",
        lambda: linears(lambda s, x: s.conv(s.norm(s.relu(x))), norm=bn(8), conv=nn.Conv2d(8, 12, 3, groups=4)),
        ((2, 8, 9, 13),),
        {"ops": {**only(conv=1)["ops"], "relu": 1}},
    ),
    Row(
        "bn_before_unpadded_1d",
        lambda: linears(lambda s, x: s.conv(s.norm(s.relu(x))), norm=bn(8, 1), conv=nn.Conv1d(8, 12, 3, dilation=2)),
        ((2, 8, 13),),
        {"ops": {**only(conv=1)["ops"], "relu": 1}},
        ONCE,
    ),
    Row(
        "bn_before_linear",
        lambda: linears(lambda s, x: s.fc(s.norm(s.relu(x))), norm=bn(24, 0), fc=nn.Linear(24, 10, bias=False)),
        ((3, 24),),
        {"ops": {**only(linear=1)["ops"], "relu": 1}},
    ),
)


# --- weights computed from parameters ------------------------------------------------------------------------------


def masked() -> Made:
    layers = {
        "w": PARAMETER(torch.randn(8, 6, 3, 3)),
        "b": PARAMETER(torch.randn(8)),
        "mask": (torch.rand(8, 6, 3, 3) > 0.5).float(),
    }
    return layers, lambda s, x: F.conv2d(x, s.w * s.mask, s.b, padding=1)


def standardised() -> Made:
    layers = {"w": PARAMETER(torch.randn(8, 6, 3, 3)), "g": PARAMETER(torch.rand(8, 1, 1, 1))}

    def program(s: Any, x: Tensor) -> Tensor:
        w = s.w - s.w.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, s.g * w / (w.std(dim=(1, 2, 3), keepdim=True) + 1e-5), padding=1)

    return layers, program


def orepa() -> Made:
    """Online re-parameterisation: the kernel is a sum of products of parameters."""
    layers = {
        "origin": PARAMETER(torch.randn(8, 6, 3, 3)),
        "point": PARAMETER(torch.randn(12, 6, 1, 1)),
        "deep": PARAMETER(torch.randn(8, 12, 3, 3)),
        "scale": PARAMETER(torch.rand(2, 8)),
    }

    def program(s: Any, x: Tensor) -> Tensor:
        deep = torch.einsum("omhw,mi->oihw", s.deep, s.point[:, :, 0, 0])
        weight = torch.einsum("oihw,o->oihw", s.origin, s.scale[0]) + torch.einsum("oihw,o->oihw", deep, s.scale[1])
        return F.conv2d(x, weight, padding=1)

    return layers, program


def gated() -> Made:
    layers = {"gate_scale": PARAMETER(torch.tensor(0.3)), "a": nn.Conv2d(6, 8, 3, padding=1), "b": nn.Conv2d(6, 8, 1)}

    def program(s: Any, x: Tensor) -> Tensor:
        gate = torch.sigmoid(s.gate_scale)
        return s.add(s.mul(s.a(x), gate), s.mul(s.b(x), 1 - gate))

    return layers, program


FUNCTIONAL = (("functional", "export"), ("functional", "symbolic"))
COMPUTED = (
    Row("masked_weight", masked, ((2, 6, 5, 7),), only(conv=1), FUNCTIONAL),
    Row("standardised_weight", standardised, ((2, 6, 5, 7),), {"ops": {"conv": 1, "constant": 0, "mul": 0}}, FUNCTIONAL),
    Row("orepa", orepa, ((2, 6, 5, 7),), only(conv=1), FUNCTIONAL),
    # 9 + 1 -> 9
    Row("gated_branches", gated, ((2, 6, 5, 7),), {"max_macs_ratio": 0.9, **only(conv=1)}, ALL),
)


# --- siblings ------------------------------------------------------------------------------------------------------


def qkv(merge_back: bool = False) -> Made:
    layers = {"q": nn.Linear(24, 24), "k": nn.Linear(24, 24), "v": nn.Linear(24, 24, bias=False)}

    def program(s: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x))

    return layers, program


def inception() -> Made:
    """Sibling 1x1 convolutions, one of them behind an average pool that commutes with it."""
    layers: dict[str, Any] = {f"conv{i}": nn.Conv2d(16, 8 + 4 * i, 1, bias=False) for i in range(4)}
    layers |= {f"norm{i}": bn(8 + 4 * i) for i in range(4)}
    layers |= {"wide": nn.Conv2d(12, 8, 3, padding=1), "wider": nn.Conv2d(16, 8, 5, padding=2)}

    def program(s: Any, x: Tensor) -> Tensor:
        a, b, c = (s.relu(getattr(s, f"norm{i}")(getattr(s, f"conv{i}")(x))) for i in range(3))
        d = s.relu(s.norm3(s.conv3(s.avg_pool(x, 3, 2, 1, 1))))
        return s.cat([a, s.wide(b), s.wider(c), d])

    return layers, program


FEWEST = {"objective": "launches"}
SIBLINGS = (
    Row("qkv", qkv, ((2, 5, 24),), {"at_most": {"linear": 3}}, EXPORT),
    Row("qkv_launches", qkv, ((2, 5, 24),), {**FEWEST, "ops": {"linear": 1}}, EXPORT),
    Row("inception", inception, ((2, 16, 6, 9),), {"ops": {"batch_norm": 0}}, EXPORT),
    Row(
        "inception_launches",
        inception,
        ((2, 16, 6, 9),),
        {**FEWEST, "ops": {"batch_norm": 0}, "at_most": {"conv": 4}, "more_macs": True},
        ONCE,
    ),
)
TABLES: dict[str, tuple[Row, ...]] = {
    "moves": MOVES,
    "layouts": LAYOUTS,
    "absorbed": ABSORBED,
    "computed": COMPUTED,
    "siblings": SIBLINGS,
}
__all__ = ["TABLES", "Program", "normalised", "relu_bn_pool_conv"]
