"""Symbolic tracing that gives up on a child rather than on the model, and that sees in-place operators."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from fxconv.errors import CaptureError
from fxconv.hazards import module_hazard


class _InplaceProxy(fx.Proxy):
    """A proxy that records ``x += y`` as the mutation it is; ``fx.Proxy`` would record ``x = x + y``."""


def _record(function: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


def _set_item(self: fx.Proxy, key: Any, value: Any) -> None:
    self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


setattr(_InplaceProxy, "__setitem__", _set_item)  # noqa: B010  (mypy allows no other way)
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod"):
    setattr(_InplaceProxy, f"__{_name}__", _record(getattr(operator, _name)))


class Tracer(fx.Tracer):
    """``symbolic_trace`` with a leaf policy.

    Modules with hooks, parametrizations or computed weights stay whole, and so does every child whose forward cannot be
    traced (control flow on values, ``len()`` of a proxy). ``barriers`` maps their qualified names to the reason. A
    convolution that pads by reflection or the like is traced into, as padding and convolution.
    """

    def __init__(self) -> None:
        super().__init__(autowrap_functions=())
        self.barriers: dict[str, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InplaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        reason = module_hazard(m)
        if reason is not None:
            self.barriers[module_qualified_name] = reason
            return True
        if isinstance(m, nn.modules.conv._ConvNd) and m.padding_mode != "zeros":
            return False  # the padding is no affine operator that we know, but the convolution behind it is one
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        before = list(self.graph.nodes)[-1] if len(self.graph.nodes) else None
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if not args and not kwargs:
                raise
            self._forget_after(before)
            self.barriers[name] = f"{type(m).__name__} cannot be traced ({_first_line(error)})"
            return self.create_proxy("call_module", name, args, kwargs)

    def _forget_after(self, last: fx.Node | None) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                return
            self.graph.erase_node(node)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def trace(model: nn.Module, original: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """A module-dialect graph of ``model``, a structural copy of ``original`` with buffers of its own.

    Buffers are no proxies: what the forward writes into them happens while tracing, and is missing in the graph. So the
    copy has its own, they are compared afterwards, and then replaced by the original's.

    Returns the graph module and the barriers, node name → reason. Optional arguments of the forward keep their
    defaults as placeholders' defaults, except flags, which are fixed to them.

    Raises:
        CaptureError: tracing changed a buffer. Else whatever the top-level forward raises under tracing.
    """
    tracer = Tracer()
    graph = tracer.trace(model, concrete_args=_fixed(model))
    _share_buffers(model, original)
    gm = fx.GraphModule(model, graph, class_name=type(model).__name__)
    barriers: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and str(node.target) in tracer.barriers:
            barriers[node.name] = tracer.barriers[str(node.target)]
    return gm, barriers


def _share_buffers(model: nn.Module, original: nn.Module) -> None:
    for (name, twin), (_, module) in zip(model.named_modules(), original.named_modules(), strict=True):
        for key, buffer in module._buffers.items():
            traced = twin._buffers.get(key)
            if buffer is None or traced is buffer:
                continue
            if isinstance(traced, fx.Proxy) or traced is None or not torch.equal(traced, buffer):
                raise CaptureError(f"the forward writes the buffer {f'{name}.{key}'.lstrip('.')!r}")
            twin._buffers[key] = buffer
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor) and isinstance(vars(twin).get(key), torch.Tensor):
                setattr(twin, key, value)


def _fixed(model: nn.Module) -> dict[str, Any] | None:
    """Arguments that default to None or a flag steer control flow: they are fixed to their defaults."""
    import inspect

    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    fixed = {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, (bool, str))}
    return fixed or None


def strip_asserts(gm: fx.GraphModule) -> None:
    """Remove ``torch._assert`` calls and the comparisons that feed them."""
    for node in reversed(list(gm.graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        if node.target in (torch._assert, torch.fx._symbolic_trace._assert_is_none):
            gm.graph.erase_node(node)
    pure = (operator.eq, operator.getitem, getattr, operator.ge, operator.gt, operator.le, operator.lt, operator.mod)
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and (node.op == "call_function" and node.target in pure):
            gm.graph.erase_node(node)
        elif not node.users and node.op == "call_method" and node.target in ("size", "dim"):
            gm.graph.erase_node(node)
    gm.recompile()
