"""What the spelling files share: the canonical operator, the registry of spellings, and how arguments are read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx


@dataclass(frozen=True)
class Param:
    """A parameter or buffer, by its qualified name in the graph module (the weight of a ``call_module``)."""

    name: str


Operand: TypeAlias = "fx.Node | Param | float | int | None"


@dataclass(frozen=True)
class Op:
    """A canonical operator. Dims in ``attrs`` are non-negative and sizes are explicit tuples."""

    name: str
    inputs: tuple[Operand, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Barrier:
    """A node that is not lifted. ``reason`` is for the report, with the offending value; "" is a silent barrier."""

    reason: str


SILENT = Barrier("")


class Unspellable(Exception):
    """Raised inside a spelling when an argument rules the op out; becomes a :class:`Barrier` with this reason."""


@dataclass(frozen=True)
class Context:
    """One node being spelled: access to shapes, dtypes and modules, with fx details hidden from the handlers."""

    node: fx.Node
    gm: fx.GraphModule
    opname: str

    @property
    def out(self) -> torch.Tensor:
        """The (fake) value of the node itself."""
        return self.node.meta["val"]

    def tensor(self, operand: Any) -> torch.Tensor:
        """The (fake or real) tensor behind an operand; only its shape, dtype and device mean anything."""
        value = self.value(operand)
        if not isinstance(value, torch.Tensor):
            raise Unspellable(f"{self.opname} of {type(value).__name__}, not of a tensor")
        return value

    def value(self, operand: Any) -> Any:
        if isinstance(operand, Param):
            return attribute(self.gm, operand.name)
        if isinstance(operand, fx.Node):
            if "val" in operand.meta:
                return operand.meta["val"]
            if operand.op == "get_attr":
                return attribute(self.gm, str(operand.target))
            raise Unspellable("needs args: the shape is not known")
        return operand

    def rank(self, operand: Any) -> int:
        return self.tensor(operand).dim()

    def dim(self, operand: Any, dim: Any) -> int:
        """A non-negative dim of ``operand``."""
        rank = self.rank(operand)
        dim = self.integer(dim)
        return dim + rank if dim < 0 else dim

    def dims(self, operand: Any, dims: Any) -> tuple[int, ...]:
        items = dims if isinstance(dims, (list, tuple)) else (dims,)
        return tuple(self.dim(operand, d) for d in items)

    def integer(self, value: Any) -> int:
        """A python int that is the same at every input size, else the op is refused."""
        size = self.size(value)
        if isinstance(size, int):
            return int(size)
        raise Unspellable(f"{self.opname} has an argument that depends on the input size ({size})")

    def integers(self, value: Any, count: int) -> tuple[int, ...]:
        """``value`` repeated to ``count`` ints (``stride=2`` → ``(2, 2)``)."""
        if isinstance(value, (list, tuple)):
            items = tuple(self.integer(v) for v in value)
            return items * count if len(items) == 1 else items
        return (self.integer(value),) * count

    def size(self, value: Any) -> int | torch.SymInt:
        """An int or SymInt, with nodes replaced by the sizes that they stand for."""
        if isinstance(value, fx.Node):
            value = self.value(value)
        if isinstance(value, torch.SymInt):
            expr = value.node.expr
            return int(expr) if expr.is_number else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise Unspellable(f"{self.opname} has an argument {value!r} that is not an integer")
        return value

    def boolean(self, value: Any) -> bool:
        if isinstance(value, (bool, int)):
            return bool(value)
        raise Unspellable(f"{self.opname} has a flag {value!r} that is not constant")

    def number(self, value: Any) -> float | int:
        if isinstance(value, bool):
            return int(value)
        if isinstance(value, (int, float)):
            return value
        raise Unspellable(f"{self.opname} has a factor {value!r} that is not a number")

    def operand(self, value: Any) -> Operand:
        """A tensor or number as an operand of an :class:`Op`."""
        if isinstance(value, fx.Node):
            inner = self.value(value)
            if isinstance(inner, (torch.SymInt, torch.SymFloat)):
                if inner.node.expr.is_number:
                    number = inner.node.expr
                    return int(number) if number.is_integer else float(number)
                raise Unspellable(f"{self.opname} by a number that depends on the input size ({inner})")
            if isinstance(inner, bool):
                return int(inner)
            if isinstance(inner, (int, float)):
                return inner
            if not isinstance(inner, torch.Tensor):
                raise Unspellable(f"{self.opname} of {type(inner).__name__}")
            return value
        if isinstance(value, Param) or value is None:
            return value
        return self.number(value)

    def make(self, name: str, inputs: Sequence[Any], /, **attrs: Any) -> Op:
        return Op(name, tuple(self.operand(i) for i in inputs), attrs)


Handler: TypeAlias = Callable[..., "Op | Barrier"]
FUNCTIONS: dict[Any, tuple[Handler, str]] = {}
METHODS: dict[str, tuple[Handler, str]] = {}
ATEN: dict[str, tuple[Handler, str]] = {}

_NAMESPACES = {
    "torch": (torch,),
    "F": (F,),
    "": (torch, F, torch.linalg, torch.special, getattr(torch._C, "_nn", torch)),
    "operator": (operator,),
}


def spelling(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for these spellings.

    ``"conv2d"`` means every place where that name exists: ``torch.conv2d``, ``F.conv2d``, ``Tensor.conv2d``,
    ``aten.conv2d`` (any overload), each with its in-place twin. ``"F.x"``, ``"torch.x"``, ``"operator.x"``,
    ``"method.x"`` and ``"aten.x"`` mean that place only. A handler is called with the arguments as written, so that
    its Python signature is the signature of the spelling; ``self`` is renamed to ``input``.
    """

    def register(handler: Handler) -> Handler:
        for full in names:
            space, _, name = full.rpartition(".")
            for variant in (name, name + "_"):
                if space in ("", "aten"):
                    ATEN[variant] = (handler, name)
                if space in ("", "method"):
                    METHODS[variant] = (handler, name)
                for namespace in _NAMESPACES.get(space, ()):
                    function = getattr(namespace, variant, None)
                    if callable(function):
                        FUNCTIONS[function] = (handler, name)
        return handler

    return register


def attribute(module: torch.nn.Module, name: str) -> Any:
    """``module.a.b.c`` for ``"a.b.c"``; raises AttributeError."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def module_params(module: torch.nn.Module, prefix: str, *names: str) -> Iterator[Param | None]:
    """A :class:`Param` per name, or None where the module has None there."""
    for name in names:
        yield None if getattr(module, name, None) is None else Param(f"{prefix}.{name}")
