"""How many of a graph's affine operators were lifted, and why the others were not.

Counted is every operator whose result is an affine function of the model's inputs, by what it means and not by whether
fxconv knows it: convolutions, Linear and products with constants; BatchNorm; sums, and products and quotients with
constants; average pools, means and sums over dims; resampling, padding, slicing, selecting, gathering at constant places,
concatenating, rolling, flipping; views, permutes and the like. Not counted: what is computed from parameters alone, sizes,
what does nothing (dropout, ``contiguous``), and nonlinear functions, also the ones that are lifted (ReLU, max-pool and
the norms, to which only scales and shifts pass). A child module that stays opaque counts once per layer inside it.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from fxconv.lift import Lifter
from fxconv.spelling import base_name

NONLINEAR = {"relu", "leaky_relu", "prelu", "max_pool", "norm_affine"}
LINEAR = {
    "add", "sub", "rsub", "neg", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum", "cumsum",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "interpolate",
    "pad", "constant_pad_nd", "slice", "select", "narrow", "index", "index_select", "gather", "getitem", "roll", "flip",
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "movedim", "expand", "expand_as", "repeat", "tile", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold",
    "im2col", "col2im", "fold", "diagonal", "tril", "triu", "repeat_interleave", "slice_scatter", "select_scatter",
    "numpy_T", "mT", "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "view_as", "reshape_as", "rot90", "swapaxes",
}  # fmt: skip
"""Linear in all tensor operands together."""
BILINEAR = {
    "mul", "multiply", "truediv", "div", "divide", "matmul", "bmm", "mm", "baddbmm", "addmm", "einsum", "linear", "conv1d",
    "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "addcmul", "where",
    "masked_fill", "addcdiv", "batch_norm", "_native_batch_norm_legit_no_training", "instance_norm", "lerp", "scaled_dot_product",
}  # fmt: skip
"""Linear in one tensor operand, where the others are constants."""
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)


class Tally:
    """Affine operators over the captured graphs of one model."""

    def __init__(self) -> None:
        self.lifted = 0
        self.missed: Counter[str] = Counter()

    @property
    def share(self) -> float:
        """Lifted ÷ counted; 1 where nothing is affine."""
        total = self.lifted + sum(self.missed.values())
        return self.lifted / total if total else 1.0

    def graph(self, gm: fx.GraphModule, lifter: Lifter) -> None:
        """Add one captured graph that ``lifter`` has lifted."""
        for node in gm.graph.nodes:
            if node.op not in ("call_function", "call_method", "call_module") or lifter.is_constant(node):
                continue
            op = lifter.lifted.ops.get(node)
            if op is not None:
                self.lifted += op.name not in NONLINEAR and op.name != "identity"
            elif node.op == "call_module":
                self.opaque(gm.get_submodule(str(node.target)), lifter.lifted.barriers.get(node, "not lifted"))
            elif _is_affine(node, gm, lifter):
                self.missed[_reason(lifter.lifted.barriers.get(node, "not lifted"))] += 1

    def opaque(self, module: nn.Module, reason: str) -> None:
        """Add a child that nothing sees into."""
        count = sum(isinstance(m, LAYERS) for m in module.modules())
        if count:
            self.missed[_reason(reason)] += count


def _is_affine(node: fx.Node, gm: fx.GraphModule, lifter: Lifter) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return False
    name = base_name(node, gm)
    variable = [n for n in node.all_input_nodes if _varies(n, lifter)]
    floating = [n for n in variable if n.meta["val"].dtype.is_floating_point]
    if len(floating) != len(variable):
        return False  # places or conditions that depend on the input
    if name == "getitem":
        return bool(floating) and isinstance(node.args[0], fx.Node) and isinstance(node.args[0].meta.get("val"), torch.Tensor)
    if name in ("div", "truediv", "divide") and len(node.args) > 1 and node.args[1] in floating:
        return False
    if name in ("batch_norm", "instance_norm") and (True in node.args):
        return False
    return bool(floating) and (name in LINEAR or name in BILINEAR and len(floating) == 1)


def _varies(node: fx.Node, lifter: Lifter) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and not lifter.is_constant(node)


def _reason(text: str) -> str:
    """Without the names and sizes in it, so that alike reasons count as one."""
    words = ["N" if re.search(r"[\d()*/]", word) else word for word in str(text).split(":")[0].split()]
    kept = [w for i, w in enumerate(words) if w not in ("N", "+") or i == 0 or words[i - 1] not in ("N", "+")]
    return " ".join(kept)[:80] or "not lifted"


def recording(rewrite: Any, tally: Tally) -> Any:
    """``fxconv.transform.rewrite``, counting what it lifted."""

    def wrapper(captured: Any, *rest: Any, **named: Any) -> Any:
        outcome = rewrite(captured, *rest, **named)
        tally.graph(captured.gm, outcome.state.lifter)
        return outcome

    return wrapper
