"""Spellings as ``nn.Module``: exact types, or subclasses that inherit the forward unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from fxconv.spelling_common import Barrier, Context, Op, module_params
from fxconv.spelling_layout import make_pad, make_reshape
from fxconv.spelling_math import (
    adaptive_avg_pool,
    avg_pool,
    interpolate,
    make_batch_norm,
    make_conv,
    make_norm,
    max_pool,
)

ModuleHandler: TypeAlias = Callable[[Context, Any, str, Any], "Op | Barrier"]
"""``handler(context, module, qualified name, input)``."""


def _conv(c: Context, m: Any, name: str, x: Any) -> Op | Barrier:
    if m.padding_mode != "zeros":
        return Barrier(f"padding_mode={m.padding_mode!r}")
    weight, bias = module_params(m, name, "weight", "bias")
    return make_conv(c, x, weight, bias, m.stride, m.padding, m.dilation, m.groups)


def _conv_transpose(c: Context, m: Any, name: str, x: Any) -> Op:
    weight, bias = module_params(m, name, "weight", "bias")
    return make_conv(c, x, weight, bias, m.stride, m.padding, m.dilation, m.groups, True, m.output_padding)


def _linear(c: Context, m: Any, name: str, x: Any) -> Op:
    return c.make("linear", (x, *module_params(m, name, "weight", "bias")))


def _batch_norm(c: Context, m: Any, name: str, x: Any) -> Op | Barrier:
    weight, bias, mean, var = module_params(m, name, "weight", "bias", "running_mean", "running_var")
    return make_batch_norm(c, x, weight, bias, mean, var, m.training, m.eps)


def _instance_norm(c: Context, m: Any, name: str, x: Any) -> Op | Barrier:
    weight, bias, mean, var = module_params(m, name, "weight", "bias", "running_mean", "running_var")
    if mean is not None and not m.training:
        return make_batch_norm(c, x, weight, bias, mean, var, False, m.eps)
    return make_norm(c, "instance_norm", x, weight, bias, m.eps)


def _layer_norm(c: Context, m: Any, name: str, x: Any) -> Op:
    weight, bias = module_params(m, name, "weight", "bias")
    return make_norm(c, "layer_norm", x, weight, bias, m.eps, normalized_shape=tuple(m.normalized_shape))


def _rms_norm(c: Context, m: Any, name: str, x: Any) -> Op:
    (weight,) = module_params(m, name, "weight")
    return make_norm(c, "rms_norm", x, weight, None, m.eps, normalized_shape=tuple(m.normalized_shape))


def _group_norm(c: Context, m: Any, name: str, x: Any) -> Op:
    weight, bias = module_params(m, name, "weight", "bias")
    return make_norm(c, "group_norm", x, weight, bias, m.eps, groups=m.num_groups)


def _avg_pool(c: Context, m: Any, name: str, x: Any) -> Op | Barrier:
    return avg_pool(
        c, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, getattr(m, "divisor_override", None)
    )


def _max_pool(c: Context, m: Any, name: str, x: Any) -> Op | Barrier:
    return max_pool(c, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


def _adaptive_avg_pool(c: Context, m: Any, name: str, x: Any) -> Op | Barrier:
    return adaptive_avg_pool(c, x, m.output_size)


def _upsample(c: Context, m: Any, name: str, x: Any) -> Op | Barrier:
    return interpolate(c, x, m.size, m.scale_factor, m.mode, m.align_corners, getattr(m, "recompute_scale_factor", None))


def _pad(mode: str) -> ModuleHandler:
    def handler(c: Context, m: Any, name: str, x: Any) -> Op:
        return make_pad(c, x, m.padding, mode, getattr(m, "value", None))

    return handler


def _dropout(c: Context, m: Any, name: str, x: Any) -> Op | Barrier:
    if m.training and m.p:
        return Barrier(f"{type(m).__name__} in training mode is random")
    return c.make("identity", (x,))


def _unfold(c: Context, m: Any, name: str, x: Any) -> Op | Barrier:
    from fxconv.spelling_layout import im2col

    return im2col(c, x, m.kernel_size, m.dilation, m.padding, m.stride)


def _fold(c: Context, m: Any, name: str, x: Any) -> Op | Barrier:
    from fxconv.spelling_layout import col2im

    return col2im(c, x, m.output_size, m.kernel_size, m.dilation, m.padding, m.stride)


def _prelu(c: Context, m: Any, name: str, x: Any) -> Op:
    return c.make("prelu", (x, *module_params(m, name, "weight")))


_TABLE: dict[type[nn.Module], ModuleHandler] = {
    nn.Identity: lambda c, m, name, x: c.make("identity", (x,)),
    nn.ReLU: lambda c, m, name, x: c.make("relu", (x,)),
    nn.LeakyReLU: lambda c, m, name, x: c.make("leaky_relu", (x,), slope=float(m.negative_slope)),
    nn.PReLU: _prelu,
    nn.Linear: _linear,
    nn.Flatten: lambda c, m, name, x: make_reshape(c, x),
    nn.Unflatten: lambda c, m, name, x: make_reshape(c, x),
    nn.PixelShuffle: lambda c, m, name, x: c.make("pixel_shuffle", (x,), factor=m.upscale_factor),
    nn.PixelUnshuffle: lambda c, m, name, x: c.make("pixel_unshuffle", (x,), factor=m.downscale_factor),
    nn.ChannelShuffle: lambda c, m, name, x: c.make("channel_shuffle", (x,), groups=m.groups),
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Upsample: _upsample,
    nn.Unfold: _unfold,
    nn.Fold: _fold,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _conv_transpose),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_norm),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _avg_pool),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _max_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _adaptive_avg_pool),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), _pad("constant")),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), _pad("constant")),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), _pad("reflect")),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), _pad("replicate")),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), _pad("circular")),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), _dropout),
}
if hasattr(nn, "RMSNorm"):
    _TABLE[nn.RMSNorm] = _rms_norm

_FORWARD_PARTS = ("forward", "_conv_forward", "__call__", "_check_input_dim")


def base_type(module: nn.Module) -> type[nn.Module] | None:
    """The known type whose computation ``module`` inherits unchanged, or None.

    A subclass with its own forward (weight standardisation, "same" padding, LoRA, timm's BatchNormAct2d, which has an
    activation inside) is not its base class; one that only changes ``__init__`` or adds methods is.
    """
    for known in type(module).__mro__:
        if known in _TABLE:
            same = all(
                getattr(type(module), part, None) is getattr(known, part, None)
                for part in _FORWARD_PARTS
                if part != "_check_input_dim"
            )
            overridden = any(part in vars(module) for part in _FORWARD_PARTS)
            return known if same and not overridden else None
    return None


def canonical_module(c: Context, module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    known = base_type(module)
    kind = type(module).__name__
    if known is None:
        for ancestor in type(module).__mro__:
            if ancestor in _TABLE:
                return Barrier(f"{kind} has its own forward, unlike {ancestor.__name__}")
        return Barrier(f"{kind} is not affine")
    values = [*args, *kwargs.values()]
    if len(values) != 1:
        return Barrier(f"{kind} called with {len(values)} arguments")
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return Barrier(f"{kind} is not initialised yet")
    return _TABLE[known](c, module, name, values[0])
