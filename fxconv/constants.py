"""Constant subgraphs: what depends on parameters, buffers and python numbers only, evaluated in float64.

Weights are upcast *before* the operations run: forming ``1 / 3`` or ``1 / sigma`` in float32 would cost 1e-8 of what
the rewritten model should have. Discrete outcomes (comparisons, ``floor``, casts to integers, ``argmax``) are taken
from a run in the model's own dtype instead, because there the rounded value is what decides in the original.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._pytree import tree_any, tree_map

from fxconv.spelling import Param, base_name
from fxconv.spelling_common import attribute

__all__ = ["Constants", "default_dtype", "depends_on_inputs"]

_RANDOM = {
    "bernoulli", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "native_dropout",
    "feature_alpha_dropout", "multinomial", "normal", "poisson", "rand", "rand_like", "randint", "randint_like",
    "randn", "randn_like", "randperm", "rrelu", "uniform", "exponential", "cauchy", "geometric", "log_normal", "random",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "gumbel_softmax",
    "scaled_dot_product_attention", "fractional_max_pool2d", "fractional_max_pool3d", "Tensor.set_", "item", "tolist",
    "stochastic_depth",
}  # fmt: skip
"""Random or undefined values, and attention, which may draw dropout masks and is no weight computation."""

_DISCRETE = {
    "floor", "ceil", "round", "trunc", "frac", "sign", "fix", "floor_divide", "heaviside", "fmod", "remainder",
    "floordiv", "mod", "sgn", "sort", "topk", "max", "min", "median", "mode", "kthvalue", "unique", "bucketize",
}  # fmt: skip
"""Where an ulp in the argument can change the result by a whole unit, or which element is chosen."""

_FACTORIES = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
"""Use their first argument for its shape, dtype and device only."""


def depends_on_inputs(node: fx.Node, memo: dict[fx.Node, bool] | None = None) -> bool:
    """Whether a placeholder can be reached from ``node`` by walking backwards."""
    seen: dict[fx.Node, bool] = {} if memo is None else memo
    stack = [node]
    while stack:
        top = stack[-1]
        if top in seen:
            stack.pop()
            continue
        if top.op == "placeholder":
            seen[top] = True
            continue
        missing = [n for n in top.all_input_nodes if n not in seen]
        if missing and not any(seen.get(n) for n in top.all_input_nodes):
            stack.extend(missing)
            continue
        seen[top] = any(seen.get(n, False) for n in top.all_input_nodes)
    return seen[node]


def _widen(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().to(torch.float64)
    return value.detach() if isinstance(value, torch.Tensor) else value


_SMALL = 2**14
"""Entries up to which a value is remembered: larger ones would come to whole float64 models."""


_LONG = 1000
"""Characters of a computation in words up to which it is compared with others."""


class Constants:
    """Constant evaluation in float64; small values are memoised per node. Never changes the graph or its parameters."""

    def __init__(self, gm: fx.GraphModule, barriers: Mapping[str, str] | None = None) -> None:
        self.gm = gm
        self.barriers = barriers or {}
        self._constant: dict[fx.Node, bool] = {}
        self._wide: dict[Any, Any] = {}
        self._native: dict[Any, Any] = {}
        self._spelled: dict[fx.Node, str] = {}
        self._passing: list[tuple[dict[Any, Any], Any]] = []
        """What is forgotten once the value that was asked for is known."""

    # ------------------------------------------------------------- what is constant

    def is_constant(self, operand: Any) -> bool:
        """Whether ``operand`` has the same value for every input of the model."""
        if isinstance(operand, fx.Node):
            return self._node_is_constant(operand)
        return True

    def spelled(self, node: fx.Node) -> str:
        """A constant's computation in words: the same for two nodes of a functional graph that compute it alike.

        Two Linears of one weight written as ``x @ w.t()`` so have one weight still. Anything else is its own name.
        """
        found = self._spelled.get(node)
        if found is None:
            found, target = node.name, node.target
            if isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable and self.is_constant(node):
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.spelled)
                text = f"{target}({args}, {kwargs})"
                found = text if len(text) <= _LONG else found
            self._spelled[node] = found
        return found

    def _node_is_constant(self, node: fx.Node) -> bool:
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._constant:
                stack.pop()
                continue
            if not self._may_be_constant(top):
                self._constant[top] = False
                continue
            inputs = self._relevant_inputs(top)
            if any(self._constant.get(n) is False for n in inputs):
                self._constant[top] = False
                continue
            missing = [n for n in inputs if n not in self._constant]
            if missing:
                stack.append(missing[0])
                continue
            self._constant[top] = True
        return self._constant[node]

    def _relevant_inputs(self, node: fx.Node) -> list[fx.Node]:
        inputs = node.all_input_nodes
        if base_name(node, self.gm) in _FACTORIES and isinstance(node.target, torch._ops.OpOverload):
            first = node.args[0]
            kept = {n for arg in node.args[1:] for n in _nodes_in(arg)} | set(_nodes_in(node.kwargs))
            inputs = [n for n in inputs if n is not first or n in kept]
        return inputs

    def _may_be_constant(self, node: fx.Node) -> bool:
        """Judges the node alone, not its inputs."""
        if node.op == "get_attr":
            return isinstance(self._attribute(node), torch.Tensor)
        if node.op in ("placeholder", "output") or node.name in self.barriers:
            return False
        if node.op == "call_module":
            module = attribute(self.gm, str(node.target))
            return type(module).__module__.startswith("torch.nn") and not module.training
        name = base_name(node, self.gm)
        if name in _RANDOM:
            return False
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            if target.namespace not in ("aten", "prims") or torch.Tag.nondeterministic_seeded in target.tags:
                return False
            # An op without any tensor argument that writes (fill_ on a view, copy_) is a mutation, not a value.
            if target._schema.is_mutable and not node.users:
                return False
            if name in _FACTORIES and not _static(node.meta.get("val")):
                return False
            return not isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))
        if node.op == "call_method":
            return True
        module_name = getattr(target, "__module__", None) or ""
        return (
            module_name.split(".")[0] in ("torch", "_operator", "operator", "math")
            or target is builtins.getattr
            or target in vars(operator).values()
            or target in vars(F).values()
            or type(target).__name__ == "builtin_function_or_method"
        )

    def _attribute(self, node: fx.Node) -> Any:
        return attribute(self.gm, str(node.target))

    # ------------------------------------------------------------- what its value is

    def value(self, operand: Any) -> Any:
        """The value: floating tensors in float64, integer and bool tensors and python numbers as they are.

        Raises ValueError where ``operand`` is not constant. The result must not be written to.
        """
        if not self.is_constant(operand):
            raise ValueError(f"{operand} depends on the inputs of the model")
        return self._top(operand, wide=True)

    def native(self, operand: Any) -> Any:
        """The value as the model itself computes it, in its own dtype."""
        if not self.is_constant(operand):
            raise ValueError(f"{operand} depends on the inputs of the model")
        return self._top(operand, wide=False)

    def _top(self, operand: Any, wide: bool) -> Any:
        with torch.no_grad():
            found = self._evaluate(operand, wide)
        while self._passing:
            memo, key = self._passing.pop()
            memo.pop(key, None)
        return found

    def _remember(self, memo: dict[Any, Any], key: Any, value: Any) -> None:
        memo[key] = value
        if _large(value):
            self._passing.append((memo, key))

    def _evaluate(self, operand: Any, wide: bool) -> Any:
        memo = self._wide if wide else self._native
        if isinstance(operand, Param):
            if operand not in memo:
                found = attribute(self.gm, operand.name)
                self._remember(memo, operand, _widen(found) if wide else found.detach())
            return memo[operand]
        if not isinstance(operand, fx.Node):
            return operand
        stack = [operand]
        while stack:
            top = stack[-1]
            if top in memo:
                stack.pop()
                continue
            missing = [n for n in self._relevant_inputs(top) if n not in memo]
            if missing:
                stack.extend(missing)
                continue
            self._remember(memo, top, self._run(top, wide))
        return memo[operand]

    def _run(self, node: fx.Node, wide: bool) -> Any:
        if node.op == "get_attr":
            found = self._attribute(node)
            return _widen(found) if wide else found.detach()
        if wide and base_name(node, self.gm) in _DISCRETE:
            return tree_map(_widen, self._evaluate(node, wide=False))
        result = self._call(node, wide)
        if wide and _is_discrete(result) and any(_is_float(self._wide.get(n)) for n in node.all_input_nodes):
            return self._evaluate(node, wide=False)
        return result

    def _call(self, node: fx.Node, wide: bool) -> Any:
        memo = self._wide if wide else self._native
        relevant = set(self._relevant_inputs(node))

        def substitute(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                if argument not in relevant:  # a factory's model tensor: only its dtype and device matter
                    like = argument.meta["val"]
                    return torch.empty(like.shape if _static(like) else (), dtype=like.dtype, device=like.device)
                return memo[argument]
            if wide and isinstance(argument, torch.dtype) and argument.is_floating_point:
                return torch.float64
            return argument

        args = fx.node.map_aggregate(node.args, substitute)
        kwargs: Any = fx.node.map_aggregate(node.kwargs, substitute)
        function: Callable[..., Any]
        if node.op == "call_module":
            return self._call_module(node, args, kwargs, wide)
        if node.op == "call_method":
            name = str(node.target)
            if wide and name in ("float", "half", "bfloat16"):
                name = "double"
            function = getattr(torch.Tensor, name)
        else:
            function = node.target  # type: ignore[assignment]
        # In-place ops would write into parameters: give them a copy of what they write to.
        if base_name(node, self.gm) + "_" == _raw_name(node) and args and isinstance(args[0], torch.Tensor):
            args = (args[0].clone(), *args[1:])
        with torch.no_grad(), default_dtype(wide):
            result = function(*args, **kwargs)
        return tree_map(_widen, result) if wide else result

    def _call_module(self, node: fx.Node, args: Any, kwargs: Any, wide: bool) -> Any:
        module = attribute(self.gm, str(node.target))
        if not wide:
            return module(*args, **kwargs)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        widened = {name: _widen(tensor) for name, tensor in state.items()}
        return torch.func.functional_call(module, widened, args, kwargs)


def _large(value: Any) -> bool:
    """Whether a value, or what it is a view of, takes much memory."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.untyped_storage().nbytes() > _SMALL * 8


def _raw_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")


class default_dtype:
    """Factories without a dtype make float64 while widening, as the parameters are."""

    def __init__(self, wide: bool) -> None:
        self.wide = wide

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        if self.wide:
            torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


def _nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _static(value: Any) -> bool:
    sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else (None,)
    return all(isinstance(s, int) or (isinstance(s, torch.SymInt) and s.node.expr.is_number) for s in sizes)


def _is_float(value: Any) -> bool:
    return bool(tree_any(lambda v: isinstance(v, torch.Tensor) and v.is_floating_point(), value))


def _is_discrete(value: Any) -> bool:
    return bool(tree_any(lambda v: isinstance(v, torch.Tensor) and not v.is_floating_point(), value))
