"""Who writes in place, and who shares storage with whom, in a graph of either dialect."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from fxconv.spelling import base_name
from fxconv.spelling_common import attribute

_VIEWS = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "numpy_T", "mT", "T", "H", "mH", "adjoint", "movedim", "moveaxis", "swapaxes", "swapdims", "expand", "expand_as",
    "broadcast_to", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unbind",
    "getitem", "getattr", "detach", "alias", "contiguous", "to", "float", "double", "half", "bfloat16", "type_as",
    "type", "cpu", "cuda", "lift_fresh", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_dropout", "feature_alpha_dropout", "einsum", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d", "unfold", "as_strided", "diagonal",
    "view_as", "reshape_as", "ravel", "real", "imag", "view_as_real", "view_as_complex", "resolve_conj", "resolve_neg",
    "hsplit", "vsplit", "dsplit", "data", "requires_grad", "swap_dims", "unsafe_chunk", "unsafe_split",
    "_reshape_alias", "iter", "next", "stochastic_depth", "pin_memory", "tuple", "list",
}  # fmt: skip
"""Names whose result may share storage with an argument. Erring on the side of sharing only costs a barrier."""

_VIEW_MODULES = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle,
)  # fmt: skip
MUTATING_METHODS = {"__setitem__", "copy_", "fill_", "zero_"}
OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
    operator.imod: operator.mod,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.imatmul: operator.matmul,
}


def may_alias(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether the result of ``node`` may share storage with one of its arguments."""
    target: Any = node.target
    if isinstance(node.meta.get("val"), (torch.Size, int, float, torch.SymInt)):
        return False
    if node.op == "call_module":
        module = attribute(gm, str(target))
        if type(module).__module__.startswith("torch.nn.") and not isinstance(module, _VIEW_MODULES):
            return bool(getattr(module, "inplace", False))
        return True
    if isinstance(target, torch._ops.OpOverload):
        if any(r.alias_info is not None for r in target._schema.returns):
            return True
        return base_name(node, gm) in _VIEWS
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    name = base_name(node, gm)
    if node.op == "call_function" and _is_unknown(target):
        return True
    return name in _VIEWS or mutated_argument(node, gm) is not None


def mutated_argument(node: fx.Node, gm: fx.GraphModule) -> fx.Node | None:
    """The node whose value ``node`` overwrites, or None."""
    target: Any = node.target
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if isinstance(target, torch._ops.OpOverload):
        if not target._schema.is_mutable:
            return None
        for index, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
                if isinstance(value, fx.Node):
                    return value
        return None
    mutates = False
    if isinstance(out := node.kwargs.get("out"), fx.Node):
        return out
    if node.op == "call_method":
        name = str(target)
        mutates = name in MUTATING_METHODS or (name.endswith("_") and not name.endswith("__"))
        mutates = mutates and name != "requires_grad_"
    elif node.op == "call_module":
        mutates = bool(getattr(attribute(gm, str(target)), "inplace", False))
    elif node.op == "call_function":
        name = getattr(target, "__name__", "")
        mutates = (
            target in OPERATORS
            or target is operator.setitem
            or getattr(torch.Tensor, name, None) is target
            and name.endswith("_")
            and not name.endswith("__")
            or bool(node.kwargs.get("inplace", False))
            or (name.endswith("_") and not name.endswith("__") and hasattr(torch, name))
        )
    if not mutates or not isinstance(first, fx.Node):
        return None
    if target in OPERATORS and not isinstance(first.meta.get("val", torch.empty(0)), torch.Tensor):
        return None  # h += 1 on a size
    return first


def has_effect(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether ``node`` must stay although nothing reads its result: it writes, or nobody knows what it does.

    Unknown are hooked modules (the hook may record) and Python functions that were wrapped for tracing.
    """
    if node.op == "call_module":
        module = attribute(gm, str(node.target))
        if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
            return True
    elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    elif node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload) and _is_unknown(node.target):
        return True
    return mutated_argument(node, gm) is not None


def _is_unknown(function: Any) -> bool:
    module_name = getattr(function, "__module__", None) or "torch"
    return str(module_name).split(".")[0] not in ("torch", "_operator", "operator", "math", "builtins")


def aliased_arguments(node: fx.Node, gm: fx.GraphModule) -> list[fx.Node]:
    """The arguments whose storage the result of ``node`` may share."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        annotated = [
            node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            for i, argument in enumerate(target._schema.arguments)
            if argument.alias_info is not None
        ]
        if annotated:
            return [a for a in annotated if isinstance(a, fx.Node)]
    mutated = mutated_argument(node, gm)
    if mutated is not None:
        return [mutated]
    name = base_name(node, gm)
    if name in _VIEWS and name != "einsum" and node.args and isinstance(node.args[0], fx.Node):
        return [node.args[0]]
    return node.all_input_nodes


class Storages:
    """Which nodes may share storage, by union-find over the graph in order, and where each node stands."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}
        self.order: dict[fx.Node, int] = {}
        for i, node in enumerate(gm.graph.nodes):
            self.parent[node] = node
            self.order[node] = i
            if node.op in ("call_function", "call_method", "call_module") and may_alias(node, gm):
                for source in aliased_arguments(node, gm):
                    if isinstance(source.meta.get("val", torch.empty(0)), (torch.Tensor, tuple, list)):
                        self.parent[self.find(source)] = self.find(node)
        self.members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.parent:
            self.members.setdefault(self.find(node), []).append(node)

    def find(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def of(self, node: fx.Node) -> list[fx.Node]:
        return self.members[self.find(node)]

    def join(self, a: fx.Node, b: fx.Node) -> None:
        """Two nodes turn out to share storage."""
        a, b = self.find(a), self.find(b)
        if a is not b:
            self.parent[b] = a
            self.members[a] += self.members.pop(b)

    def add(self, node: fx.Node, like: fx.Node, at: fx.Node) -> None:
        """A node made during the pass: it takes the place of ``like`` and stands where ``at`` does."""
        self.parent[node] = self.find(like)
        self.members[self.find(like)].append(node)
        self.order[node] = self.order[at]

    def after(self, user: fx.Node, node: fx.Node) -> bool:
        return self.order.get(user, -1) > self.order[node]
