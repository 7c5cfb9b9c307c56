"""A rewrite cut out of the graph: the nodes that it replaced and the new ones, as two float64 functions of one input list.

The inputs are what the new nodes read. Where one of them is itself computed from another (``x`` and ``f(x)``), only the
independent ones are inputs and the others are computed, by the original nodes on both sides. So is what only one side
reads: where the model computes ``f(x)`` twice, the original reads ``x`` and the replacement the other ``f(x)``, and taken
for independent inputs the two would differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxconv.axes import as_size, shape_of
from fxconv.captured import Uncompiled
from fxconv.constants import Constants, default_dtype
from fxconv.emit import Cluster, Emitted
from fxconv.expr import Apply
from fxconv.kernel import Kernel
from fxconv.probe import InputSpec
from fxconv.state import State


class Side(Uncompiled):
    """A graph module that interprets its graph: a check calls it three times, which is not worth generating code for.

    What is made of python numbers alone (``arange(n) % 2 * 0.05``) is made in float64, as `Constants` makes it.
    """

    def forward(self, *args: Any) -> Any:
        with default_dtype(True):
            return fx.Interpreter(self, graph=self.graph).run(*args)


@dataclass(frozen=True)
class Pair:
    """The two sides of a rewrite, in float64, and their inputs; ``nodes`` are those replaced, in graph order."""

    original: fx.GraphModule
    replacement: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    nodes: tuple[str, ...]
    homogeneous: bool

    def let_go(self) -> None:
        """Drop the weights: a graph module is freed by the garbage collector, at some time."""
        for side in (self.original, self.replacement):
            side._buffers.clear()
            side._modules.clear()


class Cutter:
    """Cuts the clusters of one emitted graph."""

    def __init__(self, state: State, captured: fx.GraphModule, emitted: Emitted) -> None:
        self.state, self.captured, self.emitted = state, captured, emitted
        self.lifted = state.lifter.lifted
        self.constants: Constants = state.lifter.constants
        self.before = {n.name: n for n in captured.graph.nodes}
        self.order = {name: i for i, name in enumerate(self.before)}
        self.after = {n.name: n for n in emitted.gm.graph.nodes}
        self.renamed = {c.result: c.node for c in emitted.clusters}
        self.permuted = dict(filter(None, map(self._before_its_permute, emitted.clusters)))
        self.norms = False

    def _before_its_permute(self, cluster: Cluster) -> tuple[str, tuple[str, list[int]]] | None:
        """The node that a result is a permute of, which other rewrites may read: (its name, (the value, the dims of it))."""
        result = self.after[cluster.result]
        if result.target not in (torch.ops.aten.permute.default, torch.permute):
            return None
        operand, dims = result.args
        if not isinstance(operand, fx.Node) or operand.name not in cluster.new_nodes:
            return None
        return operand.name, (cluster.node, sorted(range(len(dims)), key=lambda i: dims[i]))

    def cut(self, cluster: Cluster) -> Pair:
        """The two sides of one cluster."""
        reads = {self.state.originals[v].node.name for v in cluster.reads}
        target = self.before[cluster.node]
        self.norms = any(n in self.after and self.after[n].meta.get("fxconv_apply") for n in cluster.new_nodes)
        free = {name for name in reads if not self._reaches(self.before[name], reads)}
        result = self.after[cluster.result]
        while True:
            original_nodes, original_inputs, aliases = self._upstream(target, free, self._stops_before)
            new_nodes, new_inputs, new_aliases = self._upstream(result, free, self._stops_after)
            one_sided = {n for n in {*original_inputs} ^ {*new_inputs} if n in free and not self._stops_before(self.before[n])}
            if not one_sided:
                break
            free -= one_sided
        inputs = list(dict.fromkeys([*original_inputs, *new_inputs]))
        inputs.sort(key=lambda name: self.order.get(name, len(self.order)))
        replaced = tuple(
            n.name
            for n in original_nodes
            if n.op not in ("get_attr", "placeholder") and n not in self.lifted.barriers and n.name not in inputs
        )
        specs = tuple(self._spec(self.before.get(name) or self.after[name]) for name in inputs)
        homogeneous = any(
            isinstance(self.lifted.refs[n].value.node, Apply) for n in original_nodes if n in self.lifted.refs
        ) or any(n.op.startswith("call") and n.meta.get("fxconv_apply") for n in new_nodes)
        return Pair(
            self._module(self.captured, original_nodes, inputs, aliases, target, {}),
            self._module(self.emitted.gm, new_nodes, inputs, new_aliases, result, self.emitted.parameters),
            specs,
            replaced,
            homogeneous,
        )

    def _reaches(self, node: fx.Node, reads: set[str]) -> bool:
        """Whether a value is computed from another one in ``reads`` by affine operators alone."""
        stack = list(node.all_input_nodes)
        if self._stops_before(node) or node in self.lifted.ops and self._is_function(node):
            return False
        seen: set[fx.Node] = set()
        while stack:
            n = stack.pop()
            if n in seen:
                continue
            seen.add(n)
            if n.name in reads:
                return True
            if n in self.lifted.ops and not self._is_function(n):
                stack.extend(n.all_input_nodes)
        return False

    def _is_function(self, node: fx.Node) -> bool:
        """Whether a lifted node is nonlinear; a norm whose affine tail this cluster absorbed is looked through."""
        if isinstance(self.lifted.refs[node].value.node, Apply):
            return True
        return self.lifted.ops[node].name == "norm_affine" and not self.norms

    def _stops_before(self, node: fx.Node) -> bool:
        val = node.meta.get("val")
        if node.op == "placeholder" or isinstance(val, (int, float, torch.SymInt, torch.SymFloat)):
            return True
        if isinstance(val, (tuple, list)):
            # split, chunk: their parts are what is lifted.
            return bool(self.lifted.barriers.get(node))
        if isinstance(val, (torch.dtype, torch.device, torch.layout)):
            return False  # asked of a tensor, and no input of a check
        return node not in self.lifted.ops and not self._is_constant(node)

    def _stops_after(self, node: fx.Node) -> bool:
        twin = self.before.get(node.name)
        if node.meta.get("fxconv_new"):
            return not isinstance(node.meta.get("val"), torch.Tensor)
        return twin is not None and self._stops_before(twin)

    def _is_constant(self, node: fx.Node) -> bool:
        return self.constants.is_constant(node)

    def _upstream(self, target: fx.Node, free: set[str], stops: object) -> tuple[list[fx.Node], list[str], dict[str, str]]:
        """Nodes that compute ``target``, in graph order, and the names of the inputs they stop at."""
        nodes: list[fx.Node] = []
        inputs: list[str] = []
        aliases: dict[str, str] = {}
        seen: set[fx.Node] = set()
        stack: list[tuple[fx.Node, bool]] = [(target, False)]
        while stack:
            node, done = stack.pop()
            if done:
                nodes.append(node)
                continue
            if node in seen:
                continue
            seen.add(node)
            name = self.renamed.get(node.name, node.name)
            if node is not target and (name in free or stops(node)):  # type: ignore[operator]
                inputs.append(name)
                aliases[node.name] = name
                continue
            if node.name in self.permuted and self.permuted[node.name][0] in free:
                inputs.append(self.permuted[node.name][0])
                aliases[node.name] = inputs[-1]
                continue
            stack.append((node, True))
            stack.extend((n, False) for n in reversed(node.all_input_nodes))
        return nodes, inputs, aliases

    def _spec(self, node: fx.Node) -> InputSpec:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            return InputSpec("tensor", shape_of(val), val.dtype)
        return InputSpec("symint", (as_size(val),))

    def _module(
        self,
        source: fx.GraphModule,
        nodes: Iterable[fx.Node],
        inputs: list[str],
        aliases: dict[str, str],
        target: fx.Node,
        exact: dict[str, Kernel],
    ) -> fx.GraphModule:
        graph = fx.Graph()
        root = nn.Module()
        given = {name: graph.placeholder(name) for name in inputs}
        env: dict[str, fx.Node] = {}
        for node_name, name in aliases.items():
            whole = given[name]
            if node_name in self.permuted and node_name != name:
                whole = graph.call_function(torch.ops.aten.permute.default, (whole, self.permuted[node_name][1]))
            env[node_name] = whole
        for node in nodes:
            if node.name in env:
                continue
            if node.op == "get_attr":
                name = f"constant_{len(env)}"
                kernel = exact.get(str(node.target))
                # Contiguous as the emitted one is: a convolution's output has its weight's order of dims.
                value = kernel.tensor().contiguous() if kernel is not None else _attribute(source, str(node.target))
                value = value.detach()
                root.register_buffer(name, value.double() if value.is_floating_point() else value)
                env[node.name] = graph.get_attr(name)
            elif node.op == "call_module":
                name = f"module_{len(env)}"
                root.add_module(name, self._double(source, str(node.target), exact))
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n.name])
                env[node.name] = graph.call_module(name, args, kwargs)
            else:
                env[node.name] = graph.node_copy(node, lambda n: env[n.name])
                _widen_dtypes(env[node.name])
        graph.output((env[target.name],))
        return Side(root, graph)

    def _double(self, source: fx.GraphModule, name: str, exact: dict[str, Kernel]) -> nn.Module:
        module = source.get_submodule(name)
        memo: dict[int, Any] = {}
        for role in ("weight", "bias"):
            kernel = exact.get(f"{name}.{role}")
            if kernel is not None:
                memo[id(getattr(module, role))] = nn.Parameter(kernel.tensor().contiguous().detach(), requires_grad=False)
        module = copy.deepcopy(module, memo).double()
        return module.eval()


def _widen_dtypes(node: fx.Node) -> None:
    """Dtypes that tracing baked into arguments are those of the model, not of the check."""

    def wide(x: object) -> object:
        return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x

    node.args = tuple(wide(a) for a in node.args)  # type: ignore[misc]
    node.kwargs = {k: wide(a) for k, a in node.kwargs.items()}  # type: ignore[misc]


def _attribute(root: nn.Module, path: str) -> torch.Tensor:
    value: object = root
    for part in path.split("."):
        value = getattr(value, part)
    assert isinstance(value, torch.Tensor)
    return value
