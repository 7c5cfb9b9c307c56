"""Random weights of ordinary size for any model, so that no bug can hide behind a zero."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["randomise", "settle"]

_SCALES = re.compile(r"gamma|scale|weight|alpha|gain|ls\d?$")
_TABLES = re.compile(r"embed|token|pos|bias|table|query")


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and the statistics of every BatchNorm anew, in place; returns the model in eval mode.

    BatchNorm: mean ~ N(0, .3), var ~ U(.5, 2), weight ~ U(.5, 1.5), bias ~ N(0, .3), the affine of other norms
    likewise; per-channel scales (LayerScale) ~ U(.5, 1.5); biases, tokens and position tables ~ N(0, .3); weights
    ~ N(0, 1.5 / fan_in). Untouched, a zero-initialised head or a LayerScale of 1e-6 hides any mistake before it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(p: Tensor, std: float) -> Tensor:
        return torch.randn(p.shape, generator=generator).to(p) * std

    def uniform(p: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(p.shape, generator=generator) * (high - low) + low).to(p)

    def parameter(module: nn.Module, name: str, p: Tensor) -> Tensor:
        if (isinstance(module, _BatchNorm) or "Norm" in type(module).__name__) and p.ndim <= 1:
            return normal(p, 0.3) if "bias" in name else uniform(p, 0.5, 1.5)
        if sum(size != 1 for size in p.shape) <= 1:
            return uniform(p, 0.5, 1.5) if _SCALES.search(name) else normal(p, 0.3)
        if _TABLES.search(name) or isinstance(module, nn.Embedding):
            return normal(p, 0.3)
        return normal(p, math.sqrt(1.5 / max(math.prod(p.shape[1:]), 1)))

    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                p.copy_(parameter(module, name, p))
            for name, b in module.named_buffers(recurse=False):
                if name.endswith("running_mean"):
                    b.copy_(normal(b, 0.3))
                elif name.endswith("running_var"):
                    b.copy_(uniform(b, 0.5, 2.0))
    return model.eval()


def settle(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Rescale each convolution's and Linear's weight, in the order of execution, so that what it adds to its bias has a
    deviation of 1: networks that sum many branches would otherwise reach 1e14, where biases drown."""

    def rescale(module: Any, inputs: Any, output: Tensor) -> Tensor:
        shape = [1, -1, *[1] * (output.ndim - 2)] if module.weight.ndim > 2 else [-1]
        shift = module.bias.view(shape) if isinstance(module.bias, Tensor) else 0.0
        scale = (output - shift).std()
        if not scale > 0 or not scale.isfinite():
            return output
        module.weight.div_(scale)
        scaled: Tensor = (output - shift) / scale + shift
        return scaled

    layers = [m for m in model.modules() if type(m) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)]
    handles = [m.register_forward_hook(rescale) for m in layers if not hasattr(m, "parametrizations")]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return model
