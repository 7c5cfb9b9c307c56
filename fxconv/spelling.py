"""Any node, in any spelling, as one canonical operator with normalised arguments.

The only place that knows spellings: ``nn`` modules, ``F.*``, ``torch.*``, Tensor methods, ``operator.*`` and ATen
overloads (before and after decomposition). The operators and their attributes are listed in :data:`OPERATORS`.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxconv import spelling_composite, spelling_layout, spelling_math  # noqa: F401  (importing them fills the registry)
from fxconv.spelling_common import (
    ATEN,
    FUNCTIONS,
    METHODS,
    SILENT,
    Barrier,
    Context,
    Op,
    Operand,
    Param,
    Unspellable,
    attribute,
)
from fxconv.spelling_modules import base_type, canonical_module

__all__ = ["OPERATORS", "Barrier", "Op", "Operand", "Param", "base_name", "base_type", "canonical", "elementwise", "user_name"]

OPERATORS: Mapping[str, str] = {
    "conv": "x, weight, bias; stride, padding ((lo, hi)…), dilation, groups, transposed, output_padding",
    "linear": "x, weight, bias",
    "matmul": "a, b (torch.matmul)",
    "addmm": "c, a, b; beta, alpha (beta·c + alpha·matmul(a, b))",
    "addcmul": "c, a, b; value (c + value·a·b)",
    "addcdiv": "c, a, b; value (c + value·a/b)",
    "lerp": "a, b, weight (a + weight·(b - a))",
    "where": "condition, a, b",
    "einsum": "operands…; equation",
    "batch_norm": "x, weight, bias, mean, var; eps",
    "norm_affine": "x, weight, bias; kind, eps, normalized_shape or groups",
    "add": "a, b; alpha",
    "sub": "a, b; alpha",
    "mul": "a, b",
    "div": "a, b",
    "neg": "x",
    "avg_pool": "x; kernel, stride, padding, ceil_mode, count_include_pad, divisor",
    "adaptive_avg_pool": "x; output_size",
    "max_pool": "x; kernel, stride, padding, dilation, ceil_mode",
    "mean": "x; dims, keepdim",
    "sum": "x; dims, keepdim",
    "interpolate": "x; mode, align_corners, scales",
    "pad": "x; pads, mode, value",
    "cat": "x…; dim",
    "stack": "x…; dim",
    "slice": "x; dim, start, end, step",
    "index": "x; items",
    "select": "x; dim, index",
    "write": "x, src; dim, start, step, select",
    "reshape": "x; shape (as written, or None), bare_squeeze",
    "permute": "x; dims",
    "expand": "x; shape",
    "full": "; value (of every entry; the shape is the result's)",
    "roll": "x; shifts, dims",
    "repeat": "x; counts",
    "repeat_interleave": "x; dim, count",
    "rot90": "x; k, dims",
    "cumsum": "x; dim",
    "flip": "x; dims",
    "pixel_shuffle": "x; factor",
    "pixel_unshuffle": "x; factor",
    "channel_shuffle": "x; groups",
    "im2col": "x; kernel, dilation, padding, stride",
    "col2im": "x; kernel, dilation, padding, stride",
    "tensor_unfold": "x; dim, size, step",
    "identity": "x",
    "relu": "x",
    "leaky_relu": "x; slope",
    "prelu": "x, weight",
    "elementwise": "x; function, more (GELU, tanh, …: lifted for its layout alone, and only where asked for)",
}

_USER_NAMES = {
    "sigmoid": "Sigmoid",
    "softmax": "Softmax",
    "_softmax": "Softmax",
    "log_softmax": "LogSoftmax",
    "_log_softmax": "LogSoftmax",
    "gelu": "GELU",
    "silu": "SiLU",
    "hardswish": "Hardswish",
    "hardsigmoid": "Hardsigmoid",
    "relu6": "ReLU6",
    "hardtanh": "Hardtanh",
    "tanh": "Tanh",
    "elu": "ELU",
    "selu": "SELU",
    "celu": "CELU",
    "mish": "Mish",
    "softplus": "Softplus",
    "logsigmoid": "LogSigmoid",
    "log_sigmoid": "LogSigmoid",
    "glu": "GLU",
    "_adaptive_max_pool2d": "adaptive_max_pool2d",
}

_LINEAR_NOT_LIFTED = {
    "index", "gather", "take_along_dim", "fold", "col2im", "scatter",
    "scatter_add", "index_add", "index_copy", "index_put", "diagonal", "tril",
    "triu", "grid_sampler", "grid_sampler_2d", "grid_sample", "fft_fft2", "kron",
    "as_strided", "block_diag", "outer", "meshgrid",
}  # fmt: skip


def base_name(node: fx.Node, gm: fx.GraphModule) -> str:
    """The operator's name without namespace, overload and in-place underscore: ``aten.relu_.default`` → ``relu``."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.split("::")[-1]
        elif target in FUNCTIONS:
            name = FUNCTIONS[target][1]
        else:
            name = getattr(target, "__name__", str(target))
    elif node.op == "call_module":
        return type(attribute(gm, str(node.target))).__name__
    else:
        return node.op
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def user_name(node: fx.Node, gm: fx.GraphModule) -> str:
    """The operator's name as a user writes it: ``aten.silu_.default`` → ``SiLU``."""
    name = base_name(node, gm)
    return _USER_NAMES.get(name, name)


def canonical(node: fx.Node, gm: fx.GraphModule, barriers: Mapping[str, str] | None = None) -> Op | Barrier:
    """The canonical operator of ``node``, or why it is not lifted.

    ``barriers`` maps node names to reasons found by capture (a hook, a parametrization, …). Needs ``meta["val"]`` on
    the node and its inputs; where it is missing the answer is a barrier "needs args …".
    """
    if barriers and node.name in barriers:
        return Barrier(barriers[node.name])
    if node.op in ("placeholder", "get_attr", "output"):
        return SILENT
    value = node.meta.get("val")
    if value is not None and not isinstance(value, (torch.Tensor, tuple, list)):
        return SILENT  # a size, a flag: not a value of the network
    reason = _dtype_hazard(node, value)
    if reason is not None:
        return Barrier(reason)
    try:
        found = _dispatch(node, gm)
    except Unspellable as refusal:
        return Barrier(str(refusal))
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        # An argument that this spelling does not know: refusing is always right, and the report shows what it was.
        return Barrier(f"{user_name(node, gm)} in a form that is not known ({error})")
    if isinstance(found, Op) and value is None:
        return Barrier("needs args: the shape is not known")
    if isinstance(found, Op):
        reason = _mixed_dtypes(node, gm, found)
        if reason is not None:
            return Barrier(reason)
    return found


def _dispatch(node: fx.Node, gm: fx.GraphModule) -> Op | Barrier:
    args, kwargs = node.args, {("input" if k == "self" else k): v for k, v in node.kwargs.items()}
    if node.op == "call_module":
        module = attribute(gm, str(node.target))
        context = Context(node, gm, type(module).__name__)
        found: Any = canonical_module(context, module, str(node.target), args, kwargs)
        return found
    target: Any = node.target
    entry: Any = None
    if node.op == "call_method":
        entry = METHODS.get(target)
    elif isinstance(target, torch._ops.OpOverload):
        if target.namespace in ("aten", "prims"):
            entry = ATEN.get(target._schema.name.split("::")[-1])
    elif target is builtins.getattr:
        entry = (spelling_layout.getattribute, "getattr")
    elif getattr(target, "__name__", "") == "stochastic_depth":  # torchvision's, kept whole by fx.wrap
        entry = (_stochastic_depth, "stochastic_depth")
    elif callable(target):
        entry = FUNCTIONS.get(target)
    if entry is None:
        return _not_lifted(node, gm)
    handler, name = entry
    return handler(Context(node, gm, name), *args, **kwargs)


def _not_lifted(node: fx.Node, gm: fx.GraphModule) -> Barrier:
    name = base_name(node, gm)
    if name in _LINEAR_NOT_LIFTED:
        return Barrier(f"{user_name(node, gm)} is not lifted")
    if name.startswith(("_assert", "sym_constrain")):
        return SILENT
    if name in ("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "size", "dim", "numel"):
        return SILENT
    return Barrier(f"{user_name(node, gm)} is not affine")


ELEMENTWISE = frozenset(
    """gelu silu tanh sigmoid hardswish hardsigmoid hardtanh relu6 elu selu celu softplus mish logsigmoid log_sigmoid softsign
    erf exp log1p sin cos square abs sqrt rsqrt reciprocal""".split()
)
"""Functions of one tensor, entry by entry, by the name that their module and their operator have in common."""


def elementwise(node: fx.Node, gm: fx.GraphModule) -> Op | None:
    """A function of one tensor, entry by entry, in any spelling; None for anything else."""
    value, operands = node.meta.get("val"), node.all_input_nodes
    if len(operands) != 1 or not isinstance(value, torch.Tensor) or base_name(node, gm).lower() not in ELEMENTWISE:
        return None
    if node.op == "call_module" and not type(attribute(gm, str(node.target))).__module__.startswith("torch.nn."):
        return None  # anybody's class of that name
    given = operands[0].meta.get("val")
    alike = isinstance(given, torch.Tensor) and given.shape == value.shape and given.dtype == value.dtype
    if not alike or _dtype_hazard(node, value) is not None:
        return None
    more = str([a for a in (*node.args, *node.kwargs.items()) if not isinstance(a, fx.Node)])
    return Op("elementwise", (operands[0],), {"function": user_name(node, gm), "more": more})


def _stochastic_depth(c: Context, input: Any, p: Any, mode: Any, training: Any = True) -> Op | Barrier:
    if training and p:
        return Barrier("stochastic_depth with training=True is random")
    return c.make("identity", (input,))


def _dtype_hazard(node: fx.Node, value: Any) -> str | None:
    """Why a result of this kind is never lifted."""
    if not isinstance(value, torch.Tensor):
        return None
    if value.is_quantized:
        return f"a quantised result ({str(value.dtype).removeprefix('torch.')})"
    if value.layout is not torch.strided:
        return f"a result of layout {str(value.layout).removeprefix('torch.')}"
    if not value.dtype.is_floating_point:
        return f"a result of dtype {str(value.dtype).removeprefix('torch.')}"
    if value.device.type == "meta":
        return "a result on the meta device: there are no values"
    return None


def _mixed_dtypes(node: fx.Node, gm: fx.GraphModule, op: Op) -> str | None:
    """Operands of several floating dtypes (type promotion, autocast); a 0-dim tensor does not promote."""
    context = Context(node, gm, op.name)
    dtype = node.meta["val"].dtype
    for operand in op.inputs:
        if isinstance(operand, (fx.Node, Param)):
            tensor = context.tensor(operand)
            if tensor.dtype.is_complex or tensor.is_quantized:
                return f"an operand of dtype {str(tensor.dtype).removeprefix('torch.')}"
            if tensor.dtype.is_floating_point and tensor.dtype != dtype and tensor.dim() > 0:
                kinds = [str(d).removeprefix("torch.") for d in (tensor.dtype, dtype)]
                return f"mixed dtypes: {kinds[0]} and {kinds[1]}"
    return None
