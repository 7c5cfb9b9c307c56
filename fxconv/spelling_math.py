"""Spellings of operators that compute: convolutions, matrix products, norms, pools, resampling, arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxconv.spelling_common import SILENT, Barrier, Context, Op, Unspellable, spelling

# ----------------------------------------------------------------- convolution and matrix products


def spatial_padding(c: Context, padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[Any, ...]:
    """((lo, hi), …) per spatial dim; ``"same"`` puts the odd element at the end, as torch does."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    return tuple((p, p) for p in c.integers(padding, len(kernel)))


def make_conv(
    c: Context,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    transposed: bool = False,
    output_padding: Any = 0,
) -> Op:
    kernel = tuple(c.integer(k) for k in c.tensor(weight).shape[2:])
    n = len(kernel)
    if c.rank(x) != n + 2:
        raise Unspellable(f"unbatched convolution input of rank {c.rank(x)} (a batch dim is needed)")
    dilation = c.integers(dilation, n)
    return c.make(
        "conv",
        (x, weight, bias),
        stride=c.integers(stride, n),
        padding=spatial_padding(c, padding, kernel, dilation),
        dilation=dilation,
        groups=c.integer(groups),
        transposed=transposed,
        output_padding=c.integers(output_padding, n),
    )


@spelling("conv1d", "conv2d", "conv3d")
def conv(
    c: Context, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: Any = 1,
) -> Op:  # fmt: skip
    return make_conv(c, input, weight, bias, stride, padding, dilation, groups)


@spelling("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    c: Context, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: Any = 1, dilation: Any = 1,
) -> Op:  # fmt: skip
    return make_conv(c, input, weight, bias, stride, padding, dilation, groups, True, output_padding)


@spelling("convolution")
def convolution(
    c: Context, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: Any,
    output_padding: Any, groups: Any,
) -> Op:  # fmt: skip
    return make_conv(c, input, weight, bias, stride, padding, dilation, groups, c.boolean(transposed), output_padding)


@spelling("linear")
def linear(c: Context, input: Any, weight: Any, bias: Any = None) -> Op | Barrier:
    if c.rank(weight) != 2:
        return Barrier(f"linear with a weight of rank {c.rank(weight)}")
    return c.make("linear", (input, weight, bias))


@spelling("matmul", "mm", "bmm", "mv", "dot", "operator.matmul")
def matmul(c: Context, input: Any, other: Any = None, *, mat2: Any = None, vec: Any = None, tensor: Any = None) -> Op:
    return c.make("matmul", (input, next(b for b in (other, mat2, vec, tensor) if b is not None)))


@spelling("addmm", "addmv", "baddbmm")
def addmm(c: Context, input: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Op:
    return c.make("addmm", (input, a, b), beta=c.number(beta), alpha=c.number(alpha))


@spelling("einsum")
def einsum(c: Context, equation: Any, *operands: Any, path: Any = None, tensors: Any = None) -> Op | Barrier:
    if not isinstance(equation, str):
        return Barrier("einsum in its sublist form")
    items = tensors if tensors is not None else operands
    if len(items) == 1 and isinstance(items[0], (list, tuple)):
        items = items[0]
    return c.make("einsum", items, equation=equation.replace(" ", ""))


# ----------------------------------------------------------------- norms


def make_batch_norm(c: Context, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, eps: float) -> Op | Barrier:
    if c.boolean(training) or mean is None or var is None:
        return Barrier("BatchNorm on batch statistics (training=True or track_running_stats=False)")
    return c.make("batch_norm", (x, weight, bias, mean, var), eps=float(eps))


@spelling("F.batch_norm")
def f_batch_norm(
    c: Context, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: Any = False, momentum: Any = 0.1, eps: float = 1e-5,
) -> Op | Barrier:  # fmt: skip
    return make_batch_norm(c, input, weight, bias, running_mean, running_var, training, eps)


@spelling("torch.batch_norm", "aten.batch_norm")
def batch_norm(
    c: Context, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: Any,
    momentum: Any, eps: float, cudnn_enabled: Any = True,
) -> Op | Barrier:  # fmt: skip
    return make_batch_norm(c, input, weight, bias, running_mean, running_var, training, eps)


@spelling("aten.native_batch_norm", "aten._native_batch_norm_legit", "aten._native_batch_norm_legit_no_training")
@spelling("aten.native_layer_norm", "aten.native_group_norm", "aten.max_pool2d_with_indices", "aten.native_dropout")
@spelling("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk")
@spelling("F.max_pool1d_with_indices", "F.max_pool2d_with_indices", "F.max_pool3d_with_indices")
@spelling("hsplit", "vsplit", "dsplit", "aten.max_pool3d_with_indices", "aten.unsafe_split_with_sizes")
def several_outputs(c: Context, *args: Any, **kwargs: Any) -> Barrier:
    """Silent: the ``getitem`` of each output carries the meaning (see ``spelling_layout.getitem``)."""
    return SILENT


def make_norm(c: Context, kind: str, x: Any, weight: Any, bias: Any, eps: Any, **attrs: Any) -> Op:
    if eps is None:  # rms_norm's default
        eps = torch.finfo(c.tensor(x).dtype).eps
    return c.make("norm_affine", (x, weight, bias), kind=kind, eps=float(eps), **attrs)


@spelling("layer_norm")
def layer_norm(
    c: Context, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: Any = True,
) -> Op:  # fmt: skip
    shape = tuple(c.integer(s) for s in normalized_shape)
    return make_norm(c, "layer_norm", input, weight, bias, eps, normalized_shape=shape)


@spelling("rms_norm")
def rms_norm(c: Context, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Op:
    shape = tuple(c.integer(s) for s in normalized_shape)
    return make_norm(c, "rms_norm", input, weight, None, eps, normalized_shape=shape)


@spelling("group_norm")
def group_norm(
    c: Context, input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enabled: Any = True,
) -> Op:  # fmt: skip
    return make_norm(c, "group_norm", input, weight, bias, eps, groups=c.integer(num_groups))


@spelling("F.instance_norm")
def f_instance_norm(
    c: Context, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: Any = True, momentum: Any = 0.1, eps: float = 1e-5,
) -> Op | Barrier:  # fmt: skip
    return instance_norm(c, input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps)


@spelling("torch.instance_norm", "aten.instance_norm")
def instance_norm(
    c: Context, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, use_input_stats: Any,
    momentum: Any, eps: float, cudnn_enabled: Any = True,
) -> Op | Barrier:  # fmt: skip
    if not c.boolean(use_input_stats):  # with running statistics it is a per-channel affine, the same as BatchNorm
        return make_batch_norm(c, input, weight, bias, running_mean, running_var, False, eps)
    return make_norm(c, "instance_norm", input, weight, bias, eps)


# ----------------------------------------------------------------- pools and reductions


@spelling("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    c: Context, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: Any = False,
    count_include_pad: Any = True, divisor_override: Any = None,
) -> Op | Barrier:  # fmt: skip
    n = _pool_dims(c)
    if c.rank(input) != n + 2:
        return Barrier(f"unbatched pooling input of rank {c.rank(input)}")
    kernel = c.integers(kernel_size, n)
    return c.make(
        "avg_pool",
        (input,),
        kernel=kernel,
        stride=kernel if stride is None or stride == [] or stride == () else c.integers(stride, n),
        padding=c.integers(padding, n),
        ceil_mode=c.boolean(ceil_mode),
        count_include_pad=c.boolean(count_include_pad),
        divisor=None if divisor_override is None else c.integer(divisor_override),
    )


@spelling("max_pool1d", "max_pool2d", "max_pool3d")
def max_pool(
    c: Context, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: Any = False, return_indices: Any = False,
) -> Op | Barrier:  # fmt: skip
    if c.boolean(return_indices):
        return SILENT
    n = _pool_dims(c)
    if c.rank(input) != n + 2:
        return Barrier(f"unbatched pooling input of rank {c.rank(input)}")
    kernel = c.integers(kernel_size, n)
    return c.make(
        "max_pool",
        (input,),
        kernel=kernel,
        stride=kernel if stride is None or stride == [] or stride == () else c.integers(stride, n),
        padding=c.integers(padding, n),
        dilation=c.integers(dilation, n),
        ceil_mode=c.boolean(ceil_mode),
    )


@spelling("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
@spelling("aten._adaptive_avg_pool2d", "aten._adaptive_avg_pool3d")
def adaptive_avg_pool(c: Context, input: Any, output_size: Any) -> Op | Barrier:
    n = _pool_dims(c)
    if c.rank(input) != n + 2:
        return Barrier(f"unbatched pooling input of rank {c.rank(input)}")
    sizes = list(output_size) if isinstance(output_size, (list, tuple)) else [output_size] * n
    sizes = sizes * n if len(sizes) == 1 else sizes
    for i, size in enumerate(sizes):
        if size is None:  # "as large as the input"
            sizes[i] = c.tensor(input).shape[2 + i]
    return c.make("adaptive_avg_pool", (input,), output_size=tuple(c.integer(s) for s in sizes))


def _pool_dims(c: Context) -> int:
    """2 for ``avg_pool2d``, ``AvgPool2d``, ``max_pool2d_with_indices``."""
    return int(next(ch for ch in c.opname if ch.isdigit()))


def make_reduction(c: Context, kind: str, x: Any, dim: Any, keepdim: Any) -> Op:
    dims = tuple(range(c.rank(x))) if dim is None or dim == [] or dim == () else c.dims(x, dim)
    return c.make(kind, (x,), dims=dims, keepdim=c.boolean(keepdim))


@spelling("mean")
def mean(c: Context, input: Any, dim: Any = None, keepdim: Any = False, *, dtype: Any = None, axis: Any = None) -> Op:
    return make_reduction(c, "mean", input, axis if dim is None else dim, keepdim)


@spelling("sum")
def sum_(c: Context, input: Any, dim: Any = None, keepdim: Any = False, *, dtype: Any = None, axis: Any = None) -> Op:
    return make_reduction(c, "sum", input, axis if dim is None else dim, keepdim)


# ----------------------------------------------------------------- resampling

_MODES = {
    "upsample_nearest": "nearest",
    "_upsample_nearest_exact": "nearest-exact",
    "upsample_linear": "linear",
    "upsample_bilinear": "bilinear",
    "upsample_bicubic": "bicubic",
    "upsample_trilinear": "trilinear",
}


def make_interpolate(c: Context, x: Any, mode: str, align_corners: Any, scales: Any) -> Op:
    n = c.rank(x) - 2
    scales = list(scales) if isinstance(scales, (list, tuple)) else [scales] * n
    values = tuple(None if s is None else float(c.number(s)) for s in scales)
    return c.make("interpolate", (x,), mode=mode, align_corners=bool(align_corners), scales=values)


@spelling("F.interpolate", "F.upsample")
def interpolate(
    c: Context, input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: Any = False,
) -> Op | Barrier:  # fmt: skip
    if antialias:
        return Barrier("interpolate with antialias=True")
    scales = None if size is not None or recompute_scale_factor or mode == "area" else scale_factor
    return make_interpolate(c, input, mode, align_corners, scales)


@spelling("aten.upsample_nearest1d", "aten.upsample_nearest2d", "aten.upsample_nearest3d")
@spelling("aten._upsample_nearest_exact1d", "aten._upsample_nearest_exact2d", "aten._upsample_nearest_exact3d")
def upsample_nearest(
    c: Context, input: Any, output_size: Any = None, *scales: Any, scale_factors: Any = None,
    scales_d: Any = None, scales_h: Any = None, scales_w: Any = None,
) -> Op:  # fmt: skip
    return make_interpolate(c, input, _MODES[c.opname[:-2]], False, _scales(c, scales, scale_factors, scales_d, scales_h, scales_w))


@spelling("aten.upsample_linear1d", "aten.upsample_bilinear2d", "aten.upsample_bicubic2d", "aten.upsample_trilinear3d")
def upsample_linear(
    c: Context, input: Any, output_size: Any = None, align_corners: Any = False, *scales: Any,
    scale_factors: Any = None, scales_d: Any = None, scales_h: Any = None, scales_w: Any = None,
) -> Op:  # fmt: skip
    return make_interpolate(
        c, input, _MODES[c.opname[:-2]], align_corners, _scales(c, scales, scale_factors, scales_d, scales_h, scales_w)
    )


def _scales(c: Context, positional: tuple[Any, ...], factors: Any, *named: Any) -> Any:
    """The ``.vec`` overloads pass one list, the others one number per dim, positional or by name."""
    if len(positional) == 1 and isinstance(positional[0], (list, tuple)):
        factors, positional = positional[0], ()
    if factors is not None:
        return factors
    n = c.rank(c.node.args[0]) - 2
    given = list(positional) + [s for s in named if s is not None]
    return given if len(given) == n else [None] * n


# ----------------------------------------------------------------- arithmetic


def make_sum(c: Context, kind: str, a: Any, b: Any, alpha: Any) -> Op:
    return c.make(kind, (a, b), alpha=c.number(alpha))


@spelling("add", "operator.add", "operator.iadd", "__add__", "__radd__", "__iadd__")
def add(c: Context, input: Any, other: Any, alpha: Any = 1) -> Op:
    return make_sum(c, "add", input, other, alpha)


@spelling("sub", "subtract", "operator.sub", "operator.isub", "__sub__", "__isub__")
def sub(c: Context, input: Any, other: Any, alpha: Any = 1) -> Op:
    return make_sum(c, "sub", input, other, alpha)


@spelling("rsub", "__rsub__")
def rsub(c: Context, input: Any, other: Any, alpha: Any = 1) -> Op:
    return make_sum(c, "sub", other, input, alpha)


@spelling("mul", "multiply", "operator.mul", "operator.imul", "__mul__", "__rmul__", "__imul__")
def mul(c: Context, input: Any, other: Any) -> Op:
    return c.make("mul", (input, other))


@spelling("div", "divide", "true_divide", "operator.truediv", "operator.itruediv", "__truediv__", "__itruediv__")
def div(c: Context, input: Any, other: Any, *, rounding_mode: Any = None) -> Op | Barrier:
    if rounding_mode is not None:
        return Barrier(f"div with rounding_mode={rounding_mode!r} is not affine")
    return c.make("div", (input, other))


@spelling("neg", "negative", "operator.neg", "__neg__")
def neg(c: Context, input: Any) -> Op:
    return c.make("neg", (input,))


@spelling("operator.pos", "positive", "__pos__")
def positive(c: Context, input: Any) -> Op:
    return c.make("identity", (input,))


# ----------------------------------------------------------------- homogeneous activations


@spelling("relu")
def relu(c: Context, input: Any, inplace: Any = False) -> Op:
    return c.make("relu", (input,))


@spelling("leaky_relu")
def leaky_relu(c: Context, input: Any, negative_slope: Any = 0.01, inplace: Any = False) -> Op | Barrier:
    slope = float(c.number(negative_slope))
    if not math.isfinite(slope):
        return Barrier(f"LeakyReLU with negative_slope={slope}")
    return c.make("leaky_relu", (input,), slope=slope)


@spelling("prelu", "aten._prelu_kernel")
def prelu(c: Context, input: Any, weight: Any) -> Op:
    return c.make("prelu", (input, weight))
