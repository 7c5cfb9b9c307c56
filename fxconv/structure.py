"""A second tree of module objects over the same tensors, so that tracing never touches the caller's model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxconv.errors import CaptureError


def _tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 4 and isinstance(value, dict):
        for item in list(value.values()):
            yield from _tensors_in(item, depth + 1)
    elif depth < 4 and isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors_in(item, depth + 1)


def _attributes(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from list(vars(module).values())


def structural_copy(model: nn.Module, own_buffers: bool = False) -> nn.Module:
    """A copy of every module object of ``model`` that shares its parameters and buffers (the same tensor objects).

    Hooks are copied along (the hook functions themselves are shared). With ``own_buffers`` the buffers and other plain
    tensors are cloned instead, so that the copy can be *run* without changing the state of the original.

    Raises:
        CaptureError: some attribute of a module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for value in _attributes(model):
        for tensor in _tensors_in(value):
            shared = isinstance(tensor, nn.Parameter) or not own_buffers
            memo[id(tensor)] = tensor if shared else tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # an attribute without deepcopy (a lock, a generator, a handle): share the attributes instead
        pass
    try:
        return _copy_modules_only(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): make copy.deepcopy work on it"
        ) from error


def _copy_modules_only(model: nn.Module, tensors: dict[int, Any]) -> nn.Module:
    """New module objects whose other attributes are the original's; references among modules are redirected."""
    copies: dict[int, nn.Module] = {}
    for module in model.modules():
        twin = module.__class__.__new__(module.__class__)
        copies[id(module)] = twin

    def redirect(value: Any, depth: int = 0) -> Any:
        if isinstance(value, nn.Module):
            return copies.get(id(value), value)
        if isinstance(value, torch.Tensor):
            return tensors.get(id(value), value)
        if depth < 4 and type(value) in (list, tuple, dict) or type(value).__name__ == "OrderedDict":
            if isinstance(value, (list, tuple)):
                return type(value)(redirect(v, depth + 1) for v in value)
            twin = type(value)()
            for key, item in value.items():
                twin[key] = redirect(item, depth + 1)
            return twin
        owner = getattr(value, "__self__", None)
        if isinstance(owner, nn.Module) and id(owner) in copies and hasattr(value, "__func__"):
            return type(value)(value.__func__, copies[id(owner)])
        return value

    for module in model.modules():
        copies[id(module)].__dict__ = {key: redirect(value) for key, value in vars(module).items()}
    return copies[id(model)]
