"""ExportedProgram → plain graph module with ``get_attr`` parameters (unlift), and back (relift)."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from fxconv.errors import CaptureError
from fxconv.spelling_common import attribute

aten = torch.ops.aten
_RESERVED = set(dir(fx.GraphModule)) | {"graph", "code", "meta", "training", "_modules", "_parameters", "_buffers"}


@dataclass
class Layout:
    """How the flat placeholders and outputs of an unlifted graph relate to the program that they came from."""

    in_spec: Any
    out_spec: Any
    argument_names: list[str]
    """Of the user's arguments, in the order of the placeholders."""
    constants: dict[int, Any]
    """Placeholder index → the Python value (int, bool, str, None) that was captured for it."""
    state: dict[str, str]
    """Attribute name in the graph module → qualified name in the program (they differ where a name is reserved)."""
    tensors: set[str] = field(default_factory=set)
    """Attribute names that are lifted constants: no part of any state_dict."""
    non_persistent: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    """Attribute names that the captured graph read."""


def set_attribute(root: nn.Module, name: str, value: Any, persistent: bool = True) -> None:
    """Set ``root.a.b.c`` to a parameter, buffer or module, making empty modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        child = getattr(root, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            root.add_module(part, child)
        root = child
    if isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    elif isinstance(value, torch.Tensor):
        root.register_buffer(leaf, value, persistent=persistent)
    elif isinstance(value, nn.Module):
        root.add_module(leaf, value)
    else:
        setattr(root, leaf, value)


def _safe_name(name: str) -> str:
    head, _, tail = name.partition(".")
    head = head + "_" if head in _RESERVED else head
    return f"{head}.{tail}" if tail else head


_ASSERTS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range",
            "sym_constrain_range_for_size", "_check_is_size"}  # fmt: skip


def is_guard(node: fx.Node) -> bool:
    """Whether a node only checks something about sizes or dtypes."""
    if node.op != "call_function":
        return False
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1] in _ASSERTS
    return target in (torch._assert, torch._check, torch._check_is_size, torch.fx._symbolic_trace._assert_is_none)


def drop_guards(graph: fx.Graph) -> None:
    """Remove asserts, and what only they read."""
    for node in reversed(list(graph.nodes)):
        if is_guard(node) and not node.users:
            graph.erase_node(node)
        elif node.op == "call_function" and not node.users and _is_size_arithmetic(node):
            graph.erase_node(node)


def _is_size_arithmetic(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)) and (
        getattr(node.target, "__module__", "") in ("_operator", "math")
        or str(node.target).startswith(("aten.sym_", "aten.eq", "aten.ge"))
    )


def unlift(program: ExportedProgram) -> tuple[fx.GraphModule, Layout]:
    """The program's graph with parameters, buffers and constants as ``get_attr`` nodes over the very same tensors.

    Mutations that the signature lists as extra outputs become ``copy_`` nodes at the end. Placeholders are the user's
    inputs only, flat; the output is the flat tuple of the user's outputs.
    """
    signature = program.graph_signature
    root = nn.Module()
    graph = fx.Graph()
    layout = Layout(program.call_spec.in_spec, program.call_spec.out_spec, [], {}, {})
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    _fill_state(program, root, layout)
    env: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node in placeholders:
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            env[node] = graph.node_copy(node)
            if not isinstance(spec.arg, TensorArgument) and hasattr(spec.arg, "value"):
                layout.constants[len(layout.argument_names)] = spec.arg.value
            layout.argument_names.append(node.name)
        elif spec.kind == InputKind.TOKEN:
            raise CaptureError("the program has effect tokens, which fxconv does not know: export it without them")
    for node in placeholders:
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            continue
        name = _safe_name(str(spec.target))
        copied = graph.create_node("get_attr", name, name=name.replace(".", "_"))
        copied.meta = dict(node.meta)
        if node.users:
            layout.used.add(name)
        env[node] = copied
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr" and not hasattr(root, str(node.target).split(".")[0]):
            set_attribute(root, str(node.target), attribute(program.graph_module, str(node.target)))
        env[node] = graph.node_copy(node, lambda n: env[n])
    _finish_outputs(program, graph, env, layout)
    gm = fx.GraphModule(root, graph)
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    _inline_blocks(gm)
    drop_guards(gm.graph)
    gm.recompile()
    return gm, layout


def _fill_state(program: ExportedProgram, root: nn.Module, layout: Layout) -> None:
    """Parameters and buffers in the order of the program's state_dict, then non-persistent buffers and constants."""
    signature = program.graph_signature
    kinds = {spec.target: spec for spec in signature.input_specs if spec.target is not None}
    for name, tensor in program.state_dict.items():
        safe = _safe_name(name)
        layout.state[safe] = name
        set_attribute(root, safe, tensor)
    for name, value in program.constants.items():
        safe = _safe_name(name)
        layout.state[safe] = name
        spec = kinds.get(name)
        if spec is not None and spec.kind == InputKind.BUFFER:
            layout.non_persistent.add(safe)
        else:
            layout.tensors.add(safe)
        set_attribute(root, safe, value, persistent=False)


def _finish_outputs(program: ExportedProgram, graph: fx.Graph, env: dict[fx.Node, fx.Node], layout: Layout) -> None:
    (output,) = [n for n in program.graph.nodes if n.op == "output"]
    results: list[Any] = []
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    specs = {spec.target: spec.arg.name for spec in program.graph_signature.input_specs if spec.target is not None}
    for value, spec in zip(output.args[0], program.graph_signature.output_specs, strict=True):
        result = env[value] if isinstance(value, fx.Node) else value
        if spec.kind == OutputKind.USER_OUTPUT:
            results.append(result)
        elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            written = specs[spec.target] if spec.kind != OutputKind.USER_INPUT_MUTATION else str(spec.target)
            source = env[placeholders[written]]
            copied = graph.call_function(aten.copy_.default, (source, result))
            copied.meta = {**source.meta, "fxconv_mutation": True}
        else:
            raise CaptureError(f"the program has a {spec.kind.name} output, which fxconv does not know")
    graph.output(tuple(results))


def _block_of(node: fx.Node) -> int | None:
    """Which argument of a block that can be inlined holds its graph: ``no_grad()``, ``autocast(enabled=False)``."""
    higher = torch.ops.higher_order
    if node.op != "call_function":
        return None
    if node.target is getattr(higher, "wrap_with_set_grad_enabled", None) and node.args[0] is False:
        return 1
    if node.target is getattr(higher, "wrap_with_autocast", None) and node.args[2] is False:
        return 4
    return None


def _inline_blocks(gm: fx.GraphModule) -> None:
    """``with torch.no_grad():`` blocks become ordinary nodes whose results are detached, so that they can be lifted;
    ``with torch.autocast(enabled=False):`` ordinary nodes."""
    for node in list(gm.graph.nodes):
        place = _block_of(node)
        if place is None:
            continue
        block = node.args[place]
        inner: fx.GraphModule = attribute(gm, str(block.target))
        if any(n.op == "get_attr" for n in inner.graph.nodes):
            continue
        operands = iter(node.args[place + 1 :])
        env: dict[fx.Node, Any] = {}
        with gm.graph.inserting_before(node):
            for source in inner.graph.nodes:
                if source.op == "placeholder":
                    env[source] = next(operands)
                elif source.op != "output":
                    env[source] = gm.graph.node_copy(source, env.__getitem__)
            (result,) = [n for n in inner.graph.nodes if n.op == "output"]
            outputs = []
            for value in result.args[0]:
                if isinstance(value, fx.Node) and place == 4:
                    outputs.append(env[value])
                elif isinstance(value, fx.Node):
                    detached = gm.graph.call_function(aten.detach.default, (env[value],))
                    detached.meta = dict(env[value].meta)
                    outputs.append(detached)
                else:
                    outputs.append(value)
        if any(user.target is not operator.getitem for user in node.users):
            continue
        for user in list(node.users):
            replacement = outputs[user.args[1]]
            user.replace_all_uses_with(replacement)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        if not block.users:
            gm.graph.erase_node(block)
            gm.delete_submodule(str(block.target))


# ----------------------------------------------------------------- back to an ExportedProgram


def still_held(layout: Layout, reads: Collection[str], source: fx.GraphModule) -> list[str]:
    """The names of the state that a rewritten graph keeps: those that it reads, and those of which the captured graph
    read nothing. A tensor of several names is read under any of them."""
    tensors = {name: id(attribute(source, name)) for name in layout.state}
    now = {tensors[name] for name in reads if name in tensors}
    before = {tensors[name] for name in layout.used if name in tensors}
    return [name for name in layout.state if name in reads or tensors[name] in now or tensors[name] not in before]


def relift(gm: fx.GraphModule, program: ExportedProgram, source: fx.GraphModule, layout: Layout) -> ExportedProgram:
    """An ExportedProgram that computes ``gm``, with the call signature and the dynamic shapes of ``program``.

    ``source`` is the graph module as it was unlifted: what its graph did not read is taken from it.

    Parameters that the rewriting added (plain attributes of ``gm``) become PARAMETER inputs; those that the captured
    graph read and ``gm`` no longer reads are dropped.
    """
    old = program.graph_signature
    kinds = {spec.target: spec for spec in old.input_specs if spec.target is not None}
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    state: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    inputs: list[InputSpec] = []
    reads: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and not isinstance(attribute(gm, str(node.target)), nn.Module):
            reads.setdefault(str(node.target), []).append(node)
    kept = still_held(layout, reads, source)
    added = [name for name in reads if name not in layout.state]
    for group in (_parameters, _buffers, _others):
        for name in [*kept, *added]:
            value = attribute(gm if name in reads else source, name)
            if not group(value, name, layout):
                continue
            target = layout.state.get(name, name)
            spec = kinds.get(target)
            if spec is None and name in layout.state and name not in reads:
                (constants if name in layout.tensors | layout.non_persistent else state)[target] = value
                continue
            kind = (
                spec.kind
                if spec is not None
                else (InputKind.PARAMETER if isinstance(value, nn.Parameter) else InputKind.CONSTANT_TENSOR)
            )
            prefix = {InputKind.PARAMETER: "p", InputKind.BUFFER: "b"}.get(kind, "c")
            placeholder_name = spec.arg.name if spec is not None else f"{prefix}_{target.replace('.', '_')}"
            node = graph.placeholder(placeholder_name)
            first = reads[name][0] if name in reads else None
            node.meta = dict(first.meta) if first is not None else {}
            if "val" not in node.meta:
                node.meta["val"] = _fake_like(gm, value)
            persistent = name not in layout.non_persistent if kind == InputKind.BUFFER else None
            argument = _renamed(spec.arg, node.name) if spec is not None else TensorArgument(node.name)
            inputs.append(InputSpec(kind, argument, target, persistent))
            for read in reads.get(name, ()):
                env[read] = node
            in_state = kind == InputKind.PARAMETER or (kind == InputKind.BUFFER and persistent)
            (state if in_state else constants)[target] = value
    user_specs = [spec for spec in old.input_specs if spec.kind == InputKind.USER_INPUT]
    new_names: dict[str, str] = {}
    own = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for node, spec in zip([n for n in gm.graph.nodes if n.op == "placeholder"], user_specs, strict=True):
        env[node] = graph.node_copy(node)
        # The sizes that its range constraints are about, and not what else is known of them.
        env[node].meta["val"] = own[spec.arg.name].meta["val"]
        new_names[spec.arg.name] = env[node].name
        inputs.append(InputSpec(spec.kind, _renamed(spec.arg, env[node].name), spec.target, spec.persistent))
    mutations: list[tuple[fx.Node, fx.Node]] = []
    root = nn.Module()
    outputs: list[Any] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in env:
            continue
        if node.op == "output":
            outputs = [env[v] if isinstance(v, fx.Node) else v for v in node.args[0]]
        elif node.meta.get("fxconv_mutation"):
            env[node] = env[node.args[1]]
            mutations.append((env[node.args[0]], env[node.args[1]]))
        else:
            if node.op == "get_attr":
                set_attribute(root, str(node.target), attribute(gm, str(node.target)))
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta.pop("fxconv_inplace", None)
    graph.output((*(value for _, value in mutations), *outputs))
    signature = ExportGraphSignature(inputs, _output_specs(old, inputs, mutations, outputs))
    lifted = fx.GraphModule(root, graph, class_name="GraphModule")
    lifted.meta.update({k: v for k, v in {**program.graph_module.meta, **gm.meta}.items()})
    return ExportedProgram(
        root=lifted,
        graph=graph,
        graph_signature=signature,
        state_dict=state,
        range_constraints=dict(program.range_constraints),
        module_call_graph=[entry for entry in program.module_call_graph if entry.fqn == ""],
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=[program.verifier],
    )


def _parameters(value: Any, name: str, layout: Layout) -> bool:
    return isinstance(value, nn.Parameter)


def _buffers(value: Any, name: str, layout: Layout) -> bool:
    return not isinstance(value, nn.Parameter) and name in layout.state and name not in layout.tensors


def _others(value: Any, name: str, layout: Layout) -> bool:
    return not _parameters(value, name, layout) and not _buffers(value, name, layout)


def _renamed(argument: Any, name: str) -> Any:
    return type(argument)(**{**vars(argument), "name": name})


def _fake_like(gm: fx.GraphModule, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    mode = fake_mode_of(gm.graph)
    return value if mode is None else mode.from_tensor(value, static_shapes=True)


def fake_mode_of(graph: fx.Graph) -> Any:
    """The FakeTensorMode of the graph's values, or None."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return None


def _output_specs(
    old: ExportGraphSignature, inputs: list[InputSpec], mutations: list[tuple[fx.Node, fx.Node]], outputs: list[Any]
) -> list[OutputSpec]:
    by_name = {spec.arg.name: spec for spec in inputs}
    specs = []
    for target, value in mutations:
        spec = by_name[target.name]
        kind = {
            InputKind.BUFFER: OutputKind.BUFFER_MUTATION,
            InputKind.PARAMETER: OutputKind.PARAMETER_MUTATION,
        }.get(spec.kind, OutputKind.USER_INPUT_MUTATION)
        written = spec.arg.name if kind == OutputKind.USER_INPUT_MUTATION else spec.target
        specs.append(OutputSpec(kind, TensorArgument(value.name), written))
    user = [spec for spec in old.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    for wanted, value in zip(user, outputs, strict=True):
        argument = _renamed(wanted.arg, value.name) if isinstance(value, fx.Node) else wanted.arg
        specs.append(OutputSpec(OutputKind.USER_OUTPUT, argument, wanted.target))
    return specs
