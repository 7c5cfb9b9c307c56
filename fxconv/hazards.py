"""What makes a model or a module unfit for capture, or a module opaque, and the words for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxconv.errors import CaptureError, NotAModuleError, TrainingModeError

_MODE_DEPENDENT = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
)
_DROP_NAMES = ("DropPath", "StochasticDepth", "DropBlock", "DropBlock2d", "DropBlock3d", "FractionalMaxPool2d")


def unwrap(model: Any) -> Any:
    """The module inside wrappers that only change how it runs (``torch.compile``, ``DataParallel``)."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def check_model(model: Any) -> None:
    """Refuse what cannot be captured, and models in training mode.

    Raises:
        NotAModuleError: not a module, or a ScriptModule.
        TrainingModeError: BatchNorm or dropout is active.
        CaptureError: quantised or meta parameters.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise NotAModuleError(
            f"{model.original_name} is a ScriptModule, which has no Python forward to capture: "
            "pass the nn.Module that it was scripted or traced from"
        )
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        raise CaptureError(
            "torch.autocast is active, and would bake its casts into the graph: transform outside of it, and run the result inside"
        )
    if not isinstance(model, nn.Module):
        raise NotAModuleError(
            f"expected an nn.Module, a GraphModule or an ExportedProgram, got {type(model).__name__}; "
            "wrap a function in an nn.Module whose forward calls it"
        )
    _check_training(model)
    if isinstance(model, torch.fx.GraphModule):
        check_not_quantised(model)
    for name, module in model.named_modules():
        if _is_quantised(module):
            raise CaptureError(
                f"{name or type(model).__name__} is quantised ({type(module).__module__}.{type(module).__name__}): "
                "integer arithmetic rounds in between, so nothing is affine; transform the float model, then quantise"
            )
    _check_not_observed(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, torch.nn.parameter.UninitializedParameter):
            raise CaptureError(f"{name} is not initialised: run the model once before transforming it")
        if tensor.is_meta:
            raise CaptureError(f"{name} is on the meta device and has no values: load the weights first")
        if tensor.is_quantized:
            raise CaptureError(f"{name} is a quantised tensor ({tensor.dtype}): transform the float model instead")
        check_plain(name, tensor)


def check_plain(name: str, tensor: torch.Tensor) -> None:
    """Refuse a weight that is a tensor subclass around others, such as torchao's quantised ones.

    Raises:
        CaptureError: it is.
    """
    if is_traceable_wrapper_subclass(tensor):
        kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
        raise CaptureError(f"{name} is no plain tensor but a {kind}: transform the float model, then quantise or distribute it")


_QUANTISED = ("quantized_decomposed", "quantized", "torchao", "pt2e_quant")
_OBSERVERS = {"ObserverBase", "AffineQuantizedObserverBase", "FakeQuantizeBase"}


def check_not_quantised(gm: torch.fx.GraphModule) -> None:
    """Refuse a graph that a quantiser has been at.

    Raises:
        CaptureError: the graph has observers (``prepare_pt2e``) or quantised operators (``convert_pt2e``).
    """
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in _QUANTISED:
            raise CaptureError(
                f"the graph is quantised ({node.name}: {node.target}): it rounds between operators, so nothing is "
                "affine across them; transform the float model, then quantise"
            )
    for name, tensor in [*gm.named_parameters(), *gm.named_buffers()]:
        check_plain(name, tensor)
    _check_not_observed(gm)


def _check_not_observed(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(base.__name__ in _OBSERVERS for base in type(module).__mro__):
            raise CaptureError(
                f"the model is prepared for quantisation ({name}: {type(module).__name__}): what its observers have "
                "seen would not hold for rewritten operators; transform the float model, then prepare it"
            )


def _is_quantised(module: nn.Module) -> bool:
    place = type(module).__module__
    if "quantized" in place and place.startswith("torch.") and not place.endswith("stubs"):
        return True
    return type(module).__name__ in ("FakeQuantize", "FusedMovingAvgObsFakeQuantize", "LinearPackedParams")


def mode_dependent(module: nn.Module) -> bool:
    """Whether ``module`` computes something else in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if isinstance(module, (nn.RNNBase,)):
        return module.dropout > 0
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, _MODE_DEPENDENT) or type(module).__name__ in _DROP_NAMES


def _check_training(model: nn.Module) -> None:
    active = [name for name, module in model.named_modules() if module.training and mode_dependent(module)]
    if active:
        more = f" and {len(active) - 1} more" if len(active) > 1 else ""
        module = model.get_submodule(active[0])
        raise TrainingModeError(
            f"{type(module).__name__} {active[0]!r}{more} is in training mode, so the model is random or updates its "
            "statistics: call model.eval() first"
        )


def training_ops(graph: torch.fx.Graph) -> str | None:
    """The name of a node of an ATen graph that only runs in training, or None.

    ``batch_norm(training=True)`` without running statistics is no training mode: it standardises weights (BiT).
    """
    aten = torch.ops.aten
    for node in graph.nodes:
        if node.target in (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default):
            if node.args[2] and node.args[1]:
                return str(node.name)
        elif node.target is aten.batch_norm.default and node.args[5] and node.args[3] is not None:
            return str(node.name)
    return None


def module_hazard(module: nn.Module) -> str | None:
    """Why a module must be kept whole and opaque, or None: hooks and weights that are computed at each call.

    Subclasses with their own forward are no hazard here: they are traced into, or refused by ``spelling_modules``.
    """
    names = [getattr(hook, "__name__", type(hook).__name__) for hook in module._forward_hooks.values()]
    names_pre = [getattr(hook, "__name__", type(hook).__name__) for hook in module._forward_pre_hooks.values()]
    pre_hooks = module._forward_pre_hooks.values()
    computed = [type(h).__name__ for h in pre_hooks if hasattr(h, "name") and hasattr(h, "dim")]
    if computed:
        return f"its weight is computed by {computed[0]} at each call"
    if names or names_pre:
        kind = "forward hook" if names else "forward pre-hook"
        return f"it has a {kind} ({(names or names_pre)[0]})"
    if getattr(module, "parametrizations", None):
        parametrized = ", ".join(module.parametrizations.keys())  # type: ignore[union-attr, operator]
        return f"it has a parametrization ({parametrized})"
    if module._backward_hooks or module._backward_pre_hooks:
        return "it has a backward hook"
    return None


def hooked_modules(model: nn.Module) -> list[str]:
    """Qualified names of modules with forward hooks that a user registered ("" is the model itself).

    ``weight_norm`` and ``spectral_norm`` of old are hooks too, but pure functions of the weights.
    """
    found = []
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(not type(h).__module__.startswith("torch.nn.utils") for h in hooks):
            found.append(name)
    return found
