"""Sizes stay symbolic where a model's Python makes an ``int`` of them, or takes the ``len`` of a tensor.

``int(x.shape[-2])`` and ``len(x)`` ask a symbolic size for a number, and export answers with that of the example: from there
on the program holds for this size only. The model rarely means that; ``int`` is there for a tracer that knew tensors only,
or to truncate. `asked` notes which code asks while a model is exported, and `symbolic_int` lets that code have an ``int``
that gives back what `torch.sym_int` does, and a ``len`` that gives back ``x.shape[0]``.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

Namespaces = dict[str, dict[str, Any]]


class _SymbolicInt(type):
    """What stands in for the class ``int``: it has the same instances, and symbolic sizes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], (torch.SymInt, torch.SymFloat)):
            return torch.sym_int(args[0])
        return builtins.int(*args, **kwargs)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, (builtins.int, torch.SymInt))

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, builtins.int)

    def __getattr__(cls, name: str) -> Any:
        return getattr(builtins.int, name)


class _Int(metaclass=_SymbolicInt):
    pass


def _len(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim():
        return value.shape[0]
    return builtins.len(value)


_STAND_INS = {"int": _Int, "len": _len}


@contextlib.contextmanager
def asked() -> Iterator[Namespaces]:
    """The globals, by module, of code outside torch that makes an ``int`` of a symbolic size in the meantime."""
    found: Namespaces = {}
    watched: list[tuple[Any, str]] = [(torch.SymInt, "__int__"), (torch.SymFloat, "__int__"), (torch.Tensor, "__len__")]
    plain = [getattr(kind, name) for kind, name in watched]

    def watching(convert: Any) -> Any:
        def to_int(self: Any) -> Any:
            size = self.shape[0] if isinstance(self, torch.Tensor) and self.dim() else self
            code = sys._getframe(1).f_globals
            name = str(code.get("__name__", ""))
            symbolic = isinstance(size, (torch.SymInt, torch.SymFloat)) and not size.node.is_constant()
            if symbolic and name.partition(".")[0] not in ("torch", "sympy", ""):
                found[name] = code
            return convert(self)

        return to_int

    for (kind, name), convert in zip(watched, plain, strict=True):
        setattr(kind, name, watching(convert))
    try:
        yield found
    finally:
        for (kind, name), convert in zip(watched, plain, strict=True):
            setattr(kind, name, convert)


@contextlib.contextmanager
def symbolic_int(namespaces: Namespaces) -> Iterator[None]:
    """Meanwhile ``int`` and ``len`` keep sizes symbolic in the given globals, where they are the builtins."""
    changed = [(code, name) for code in namespaces.values() for name in _STAND_INS if name not in code]
    for code, name in changed:
        code[name] = _STAND_INS[name]
    try:
        yield
    finally:
        for code, name in changed:
            del code[name]
