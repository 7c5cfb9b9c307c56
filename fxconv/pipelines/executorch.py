"""`ExecuTorchPass`: the transform for ``to_edge_transform_and_lower(transform_passes=…)``.

At that point the program is in the edge dialect: core ATen operators in wrappers of ExecuTorch's own, views that copy,
weights as placeholders. The pass reads the wrappers as what they wrap, rewrites, and puts what was rewritten in their
place; everything else stays the very node that it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from executorch.backends.transforms.utils import create_constant_placeholder, delete_constant_placeholder
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch import fx
from torch._export.verifier import SpecViolationError
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx

from fxconv.capture import Captured
from fxconv.functional import functionalise
from fxconv.hazards import check_not_quantised
from fxconv.options import Options
from fxconv.pipelines.bound import concrete, placeholders
from fxconv.program import unlift
from fxconv.report import Report

_EDGE = "fxconv_edge"
"""Key of a node's meta under which the edge operator is kept that it stands for."""

_SOURCES = ("source_fn_stack", "torch_fn", "from_node")
"""Metadata by which partitioners take nodes for parts of one original call; those of new nodes are of another call."""


class ExecuTorchPass(ExportedProgramPassBase):
    """Rewrites a program in the edge dialect, before it is partitioned. ``report`` says what the latest run did.

    Args:
        **keywords: those of `fxconv.Options`, or ``options=``.
    """

    def __init__(self, **keywords: Any) -> None:
        self.options = Options.of(keywords.pop("options", None), **keywords)
        self.report: Report | None = None

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Rewrite in place, as the other passes of ExecuTorch do.

        Raises:
            CaptureError: the program is quantised.
        """
        from fxconv.transform import run_captured

        gm, _ = unlift(exported_program)
        _read_edge(gm)
        check_not_quantised(gm)
        barriers = functionalise(gm)
        reference = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        args = tuple(concrete(n.meta["val"]) for n in placeholders(gm.graph))
        captured = Captured(gm, "aten", "edge", args, {}, rebuild=lambda g: fx.GraphModule(g, g.graph), barriers=barriers)
        result, self.report = run_captured(reference, captured, self.options)
        if not self.report.applied:
            return ExportedProgramPassResult(exported_program, False)
        _to_core(result, _keeps(exported_program))
        _Splice(exported_program, result).run()
        return ExportedProgramPassResult(exported_program, True)


def _read_edge(gm: fx.GraphModule) -> None:
    """Edge operators become the ATen operators that they wrap, and copying views become views, of equal value."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, EdgeOpOverload):
            continue
        node.meta[_EDGE] = node.target
        wrapped: Any = node.target._op
        name, overload = wrapped._schema.name.split("::")[-1], wrapped._overloadname
        packet = getattr(torch.ops.aten, name.removesuffix("_copy"), None)
        copies = wrapped.namespace == "aten" and name.endswith("_copy")
        if copies and packet is not None and overload in packet.overloads():
            wrapped = getattr(packet, overload)
        elif wrapped.namespace == "dim_order_ops" and name == "_clone_dim_order":
            wrapped = torch.ops.aten.clone.default
            node.kwargs = {}
        node.target = wrapped


def _to_core(gm: fx.GraphModule, keeps: Callable[[Any], bool]) -> None:
    """Write the new nodes in core ATen, views as copies: what the edge dialect holds.

    ``keeps`` says which operators beyond core ATen the program may hold: a partitioner asks for some to be kept whole.
    """
    table = torch.export.default_decompositions()
    for node in list(gm.graph.nodes):
        if not node.meta.get("fxconv_new"):
            continue
        for key in _SOURCES:
            node.meta.pop(key, None)
        if node.target is torch.ops.aten.linear.default:
            _with_rows(gm.graph, node)
    for node in list(gm.graph.nodes):
        target = node.target
        if not node.meta.get("fxconv_new") or not isinstance(target, torch._ops.OpOverload):
            continue
        if target.namespace != "aten" or str(target).startswith("aten.sym_") or keeps(target):
            continue
        # Tracing would go past an operator that is core but made of others (upsample_bilinear2d.vec), and end outside.
        if torch.Tag.core not in target.tags or _copying(target) is not target:
            _decompose(gm.graph, node, table)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _with_rows(graph: fx.Graph, node: fx.Node) -> None:
    """Linear on a vector, as Linear on one row: backends know no other."""
    x, weight = node.args[0], node.args[1]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or x.meta["val"].dim() != 1:
        return
    val = node.meta["val"]
    with graph.inserting_before(node):
        row = graph.call_function(torch.ops.aten.view.default, (x, [1, x.meta["val"].shape[0]]))
    row.meta = {**node.meta, "val": x.meta["val"].unsqueeze(0)}
    with graph.inserting_after(node):
        back = graph.call_function(torch.ops.aten.view.default, (node, [val.shape[0]]))
    back.meta = dict(node.meta)
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    node.args = (row, *node.args[1:])
    node.meta = {**node.meta, "val": val.unsqueeze(0)}


def _keeps(program: ExportedProgram) -> Callable[[Any], bool]:
    """Whether the program's verifier lets an operator outside core ATen stand."""

    def keeps(target: Any) -> bool:
        if target is not torch.ops.aten.linear.default:
            return False
        try:
            program.verifier().check_valid_op(_edge(target))
        except SpecViolationError:
            return False
        return True

    return keeps


def _decompose(graph: fx.Graph, node: fx.Node, table: Any) -> None:
    flat, spec = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    places = [i for i, v in enumerate(flat) if isinstance(v, fx.Node)]

    def call(*values: Any) -> Any:
        filled = list(flat)
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        args, kwargs = torch.utils._pytree.tree_unflatten(filled, spec)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    fakes = [flat[i].meta["val"] for i in places]
    mode = next(v.fake_mode for v in fakes if isinstance(v, torch._subclasses.FakeTensor))
    with mode, torch.no_grad():
        traced = make_fx(call, decomposition_table=table, tracing_mode="real")(*fakes)
    env: dict[fx.Node, Any] = dict(zip(placeholders(traced.graph), [flat[i] for i in places], strict=True))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.target is torch.ops.aten.clone.default:
                env[inner] = env[inner.args[0]]  # all views copy in this dialect
            elif inner.op == "call_function":
                env[inner] = graph.node_copy(inner, lambda n: env[n])
                env[inner].target = _copying(inner.target)
                env[inner].meta = {**node.meta, "val": inner.meta["val"]}
            elif inner.op == "output":
                node.replace_all_uses_with(env[inner.args[0]])
    graph.erase_node(node)


def _copying(target: Any) -> Any:
    """The form of an operator that neither writes in place nor returns a view: both were applied to fresh values."""
    name = target._schema.name.split("::")[-1]
    if target._schema.is_mutable and name.endswith("_"):
        name = name[:-1]
    packet = getattr(torch.ops.aten, f"{name}_copy", None)
    if packet is None or target._overloadname not in packet.overloads():
        packet = getattr(torch.ops.aten, name)
    return getattr(packet, target._overloadname)


class _Splice:
    """Puts the new nodes of a rewritten graph into the program that it came from."""

    def __init__(self, program: ExportedProgram, gm: fx.GraphModule) -> None:
        self.program, self.gm, self.graph = program, gm, program.graph
        self.mutations: list[fx.Node] = []

    def run(self) -> None:
        old = {n.name: n for n in self.graph.nodes}
        env: dict[fx.Node, Any] = {}
        specs = {str(s.target): s.arg.name for s in self.program.graph_signature.input_specs if s.target is not None}
        user = [n for n in placeholders(self.graph) if n.name in self.program.graph_signature.user_inputs]
        env.update(zip(placeholders(self.gm.graph), user, strict=True))
        place = next(n for n in self.graph.nodes if n.op == "placeholder")
        point = next(n for n in self.graph.nodes if n.op != "placeholder")
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                env[node] = self._weight(node, old, specs, place)
        for node in self.gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            if node.op == "output":
                self._finish(node, env)
                continue
            if node.meta.get("fxconv_mutation"):  # a new value of a buffer is an output, in the order of the signature
                env[node] = env[node.args[1]]
                self.mutations.append(env[node])
                continue
            original = old.get(node.name) if _EDGE in node.meta or not node.meta.get("fxconv_new") else None
            if original is not None and node.op == "call_function":
                point.prepend(original) if original is not point else None
                original.args = fx.map_arg(node.args, lambda n: env[n])
                if _EDGE not in node.meta or original.kwargs == node.kwargs:
                    original.kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
                env[node] = original
                point = original.next
                continue
            with self.graph.inserting_before(point):
                env[node] = self.graph.create_node(
                    node.op, _edge(node.target), fx.map_arg(node.args, lambda n: env[n]),
                    fx.map_arg(node.kwargs, lambda n: env[n]), name=node.name,
                )  # fmt: skip
                env[node].meta = {k: v for k, v in node.meta.items() if k != _EDGE}

    def _weight(self, node: fx.Node, old: dict[str, fx.Node], specs: dict[str, str], place: fx.Node) -> fx.Node:
        name = str(node.target)
        if name in specs:
            return old[specs[name]]
        value = self.gm.get_parameter(name).detach() if name in self.gm._parameters else getattr(self.gm, name)
        with self.graph.inserting_before(place):
            return create_constant_placeholder(self.program, self.graph, name.replace(".", "_"), InputKind.PARAMETER, value)

    def _finish(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        output, results = self.graph.output_node(), cast("tuple[Any, ...]", node.args[0])
        fresh = [*self.mutations, *(env[v] if isinstance(v, fx.Node) else v for v in results)]
        output.args = (tuple(fresh),)
        for spec, value in zip(self.program.graph_signature.output_specs, fresh, strict=True):
            if isinstance(value, fx.Node):
                spec.arg.name = value.name
        self.graph.eliminate_dead_code()
        for weight in placeholders(self.graph):
            if not weight.users and weight.name not in self.program.graph_signature.user_inputs:
                delete_constant_placeholder(self.program, weight)
        self.graph.lint()
        self.program.graph_module.recompile()


def _edge(target: Any) -> Any:
    """The edge operator for an ATen one; other targets (size arithmetic) as they are."""
    if not isinstance(target, torch._ops.OpOverload) or str(target).startswith("aten.sym_"):
        return target
    return getattr(getattr(exir_ops.edge.aten, target._schema.name.split("::")[-1]), target._overloadname)
