"""Capture in parts: the largest children that can be captured, with inputs from a real run; and the model around them.

For models whose own forward is Python that no tracer follows (detection models: loops over images, boxes by count). The
parent's Python stays as it is; each captured child is rewritten and put back into a copy of the parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxconv import shapes
from fxconv.capture import Captured, capture
from fxconv.errors import ArgsError, CaptureError, FxconvError, TrainingModeError
from fxconv.hazards import check_model, unwrap
from fxconv.structure import structural_copy

MAX_CALLS = 4
"""Distinct calls of a child that are kept for checking: one that is called at many sizes must work at all of them."""


@dataclass
class Part:
    """A child that was captured on its own."""

    name: str
    """Qualified name in the model."""
    module: nn.Module
    """The caller's own child (not a copy)."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """Inputs of its first call in a real forward pass."""
    captured: Captured


@dataclass
class Parts:
    parts: list[Part] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    """Qualified names of children with parameters that stay as they are → why."""


@dataclass
class _Calls:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    signatures: list[Any] = field(default_factory=list)


def capture_parts(model: nn.Module, args: Any, kwargs: dict[str, Any] | None = None, *, mode: str = "auto") -> Parts:
    """The maximal children of ``model`` that can be captured, in the order in which they are defined.

    Args:
        args, kwargs: example inputs of the whole model, which is run once on a copy.

    Raises:
        ArgsError: the model does not run on these inputs.
    """
    model = unwrap(model)
    check_model(model)
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args or ())
    recorded = _record(model, args, dict(kwargs or {}))
    found = Parts()
    _descend(model, "", recorded, found, mode, set())
    return found


def _record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, _Calls]:
    """Inputs of every submodule in one forward pass of a copy (the caller's modules get no hooks)."""
    runner = structural_copy(model, own_buffers=True)
    recorded: dict[str, _Calls] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, call_args: Any, call_kwargs: Any) -> None:
            calls = recorded.setdefault(name, _Calls())
            signature = _signature(call_args, call_kwargs)
            if signature not in calls.signatures and len(calls.calls) < MAX_CALLS:
                calls.signatures.append(signature)
                calls.calls.append((shapes.cloned(call_args), shapes.cloned(call_kwargs)))

        return record

    for name, module in runner.named_modules():
        if name:
            module.register_forward_pre_hook(hook(name), with_kwargs=True)
    try:
        with torch.no_grad():
            runner(*shapes.cloned(args), **shapes.cloned(kwargs))
    except Exception as error:
        raise ArgsError(f"{type(model).__name__} does not run on the given args ({error})") from error
    return recorded


def _signature(args: Any, kwargs: Any) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    described = [(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf)[:100] for leaf in leaves]
    return str(spec), tuple(described)


def _descend(parent: nn.Module, prefix: str, recorded: Mapping[str, _Calls], found: Parts, mode: str, seen: set[int]) -> None:
    for child_name, child in parent.named_children():
        name = f"{prefix}.{child_name}" if prefix else child_name
        if id(child) in seen or not any(True for _ in child.parameters()):
            continue
        seen.add(id(child))
        calls = recorded.get(name)
        if calls is None:
            # Not called by itself: a container (ModuleList, a Sequential that is indexed) or a method call.
            _descend_or_refuse(child, name, recorded, found, mode, seen, "it is not called as a module")
            continue
        part, reason = _try(child, name, calls, mode)
        if part is not None:
            found.parts.append(part)
        else:
            _descend_or_refuse(child, name, recorded, found, mode, seen, reason)


def _descend_or_refuse(
    child: nn.Module, name: str, recorded: Mapping[str, _Calls], found: Parts, mode: str, seen: set[int], reason: str
) -> None:
    before = len(found.parts)
    _descend(child, name, recorded, found, mode, seen)
    own = any(True for _ in child.parameters(recurse=False))
    if len(found.parts) == before or own:
        inner = [key for key in found.opaque if key.startswith(f"{name}.")]
        if not inner or own:
            found.opaque[name] = reason


def _try(child: nn.Module, name: str, calls: _Calls, mode: str) -> tuple[Part | None, str]:
    args, kwargs = calls.calls[0]
    try:
        captured = capture(child, args, kwargs, mode=mode)
        rebuilt = captured.rebuild(_private(captured))
    except TrainingModeError:
        raise
    except FxconvError as error:
        return None, str(error)
    for more_args, more_kwargs in calls.calls[1:]:
        problem = _disagree(child, rebuilt, more_args, more_kwargs)
        if problem:
            return None, f"{type(child).__name__} is called at several sizes, and its graph holds for one ({problem})"
    return Part(name, child, args, kwargs, captured), ""


def _private(captured: Captured) -> Any:
    """A copy of the captured graph module: ``rebuild`` may only be called once on each."""
    return structural_copy(captured.gm)


def _disagree(child: nn.Module, rebuilt: nn.Module, args: Any, kwargs: Any) -> str:
    try:
        with torch.no_grad():
            expected = structural_copy(child, own_buffers=True)(*shapes.cloned(args), **shapes.cloned(kwargs))
            actual = structural_copy(rebuilt, own_buffers=True)(*shapes.cloned(args), **shapes.cloned(kwargs))
    except Exception as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(actual)
    same = len(left) == len(right) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(left, right, strict=True)
        if isinstance(a, torch.Tensor)
    )
    return "" if same else "other values"


def assemble(model: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the module tree of ``model`` with the named children replaced; everything else shares its tensors.

    A child that the model holds under several names is replaced under all of them. Plain attributes of a replaced child
    that the parent may read (``out_channels``) are copied to its replacement.
    """
    model = unwrap(model)
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    result = structural_copy(model)
    for name, replacement in parts.items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise CaptureError(f"{type(model).__name__} has no child {name!r}") from error
        for key, value in vars(old).items():
            if not hasattr(replacement, key) and isinstance(value, (int, float, str, bool, tuple, type(None))):
                setattr(replacement, key, value)
        for place in names[id(old)]:
            path, _, leaf = place.rpartition(".")
            owner = result.get_submodule(path) if path else result
            owner._modules[leaf] = replacement
    return result
