"""Graph modules that behave as ordinary modules: called as the original was, pickled, copied, moved and cast."""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxconv.errors import TrainingModeError
from fxconv.program import Layout, set_attribute, still_held
from fxconv.shapes import SizeCheck, insert_checks
from fxconv.spelling_common import attribute

STATE = "fxconv_module"
"""Key of ``gm.meta`` under which a :class:`Converted` keeps what it must know of its original (plain Python values)."""


HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip
"""Attributes of a module that hold its forward hooks."""


class Converted(fx.GraphModule):
    """A ``GraphModule`` in eval mode that keeps its graph, names and metadata through pickling and casts.

    Where the original's BatchNorm or dropout was folded away or baked in as inference, ``train()`` raises
    :class:`TrainingModeError`; elsewhere it works as usual.
    """

    def train(self, mode: bool = True) -> Converted:
        state = self.__dict__.get("meta", {}).get(STATE, {})
        if mode and state.get("frozen"):
            raise TrainingModeError(
                f"this {type(self).__name__} was rewritten for inference ({state['frozen']}): "
                "train the original module and transform it again"
            )
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Converted:
        """``.to()``, ``.half()``, ``.cuda()`` … also rewrite the dtypes and devices that tracing put into the graph."""
        result = super()._apply(fn, recurse)
        _rewrite_baked(self, fn)
        return result

    def __copy__(self) -> Converted:
        return _twin(self, {k: v for k, v in self.__dict__.items() if k != "_graph"}, copy.copy(self.graph))

    def __deepcopy__(self, memo: dict[int, Any]) -> Converted:
        # GraphModule's own keeps only what the graph reads: unused parameters and their order would be lost.
        body = copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "_graph"}, memo)
        result = _twin(self, body, copy.deepcopy(self.graph, memo))
        memo[id(self)] = result
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        body = {k: v for k, v in self.__dict__.items() if k not in ("_graph", "_lineno_map", "_prologue_start")}
        return _load, (body, _encode_graph(self.graph), type(self).__name__)


# ----------------------------------------------------------------- calling convention


def _only(spec: Any, allowed: tuple[type, ...]) -> bool:
    return spec.is_leaf() or (spec.type in allowed and all(_only(child, allowed) for child in _children(spec)))


def _children(spec: Any) -> list[Any]:
    return list(spec.children()) if callable(getattr(spec, "children", None)) else list(spec.children_specs)


def is_plain_call(in_spec: Any) -> bool:
    """Whether every positional and keyword argument is a single leaf."""
    args, kwargs = _children(in_spec)
    return all(c.is_leaf() for c in _children(args)) and all(c.is_leaf() for c in _children(kwargs))


def set_convention(gm: fx.GraphModule, layout: Layout, flat: bool = False) -> None:
    """Make the unlifted ``gm`` callable as its original: arguments by name and position, outputs structured.

    Plain Python signatures where possible, pytree flattening otherwise. With ``flat`` the graph's own output stays a
    flat tuple, which an ExportedProgram needs.
    """
    args, kwargs = _children(layout.in_spec)
    keys = list(kwargs.context)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    plain_out = _only(layout.out_spec, (tuple, list, dict))
    if not flat and is_plain_call(layout.in_spec) and plain_out:
        for node, key in zip(placeholders[len(_children(args)) :], keys, strict=True):
            node.target = key
        output.args = (pytree.tree_unflatten(list(output.args[0]), layout.out_spec),)
    else:
        names = _argument_names(layout, args, keys)
        gm.graph._codegen = _PyTreeCodeGen(_PyTreeInfo(names, layout.in_spec, layout.out_spec))
    gm.recompile()


def _argument_names(layout: Layout, args: Any, keys: list[str]) -> list[str]:
    names: list[str] = []
    index = 0
    for child in _children(args):
        first = layout.argument_names[index] if child.num_leaves else f"arg{len(names)}"
        names.append(first if child.is_leaf() else first.split("_")[0])
        index += child.num_leaves
    unique: list[str] = []
    for name in names:
        while name in unique or name in keys or not name.isidentifier():
            name = f"{name}_" if name.isidentifier() else f"arg{len(unique)}"
        unique.append(name)
    return [*unique, *keys]


def guard_constants(gm: fx.GraphModule, constants: dict[int, Any], forward: Any) -> None:
    """Refuse at run time other values of arguments that the capture fixed: flags, and optional arguments left out.

    Adds ``torch._assert`` nodes at the head of the graph, and placeholders for the optional arguments.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if not placeholders:
        return
    last = placeholders[-1]
    guards: list[tuple[fx.Node, Any]] = [(placeholders[i], value) for i, value in constants.items()]
    if not isinstance(gm.graph._codegen, _PyTreeCodeGen):
        guards += _add_omitted(gm, placeholders, forward)
        last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        for node, value in guards:
            compare = operator.is_ if value is None or isinstance(value, bool) else operator.eq
            message = f"captured with {node.target}={value!r}: transform the model again for another value"
            check = gm.graph.call_function(compare, (node, value))
            asserted = gm.graph.call_function(torch._assert, (check, message))
            check.append(asserted)
    if guards:
        gm.recompile()


def _add_omitted(gm: fx.GraphModule, placeholders: list[fx.Node], forward: Any) -> list[tuple[fx.Node, Any]]:
    """Placeholders for parameters of the original's forward that have a simple default and were not given."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return []
    known = {str(n.target): n for n in placeholders}
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not set(known) <= set(names) or [n for n in names if n in known] != [str(n.target) for n in placeholders]:
        return []  # *args, **kwargs, or keywords in another order
    added: list[tuple[fx.Node, Any]] = []
    optional = False
    for parameter in parameters:
        if parameter.name in known:
            if optional:
                return added  # Python allows no argument without default behind one with
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not isinstance(parameter.default, (type(None), bool, int, float, str)):
            return added
        optional = True
    for parameter in parameters:
        if parameter.name in known or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
        with gm.graph.inserting_after(last):
            node = gm.graph.placeholder(parameter.name, default_value=parameter.default)
        added.append((node, parameter.default))
    return added


# ----------------------------------------------------------------- finishing


def finish(
    gm: fx.GraphModule,
    name: str,
    frozen: str,
    source: fx.GraphModule,
    layout: Layout | None,
    forward: Any,
    checks: Sequence[SizeCheck] = (),
) -> Converted:
    """A :class:`Converted` that runs a copy of the graph of ``gm`` over its tensors. ``gm`` stays as it is.

    Args:
        name: of the class of the result.
        frozen: why the result cannot be trained, "" where it can.
        source: the graph module as it was captured: what its graph did not read is taken from it, and the order.
        checks: conditions on input sizes, made at each run.

    Parameters that the captured graph read and that ``gm`` does not read are dropped; all others keep their names.
    """
    root = nn.Module()
    reads = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module"))
    if layout is not None:
        for attribute_name in still_held(layout, reads, source):
            owner = gm if attribute_name in reads else source
            persistent = attribute_name not in layout.tensors | layout.non_persistent
            set_attribute(root, attribute_name, attribute(owner, attribute_name), persistent)
    else:
        order = {module_name: i for i, (module_name, _) in enumerate(source.named_modules())}
        reads = dict.fromkeys(sorted(reads, key=lambda target: order.get(target, len(order))))
    for target in reads:
        if not _has(root, target):
            set_attribute(root, target, attribute(gm, target), persistent=_is_persistent(gm, target))
    graph = copy.deepcopy(gm.graph)
    result = Converted(root, graph, class_name=name if name.isidentifier() else "Converted")
    _adopt(result, root)
    if layout is not None:
        guard_constants(result, layout.constants, forward)
    insert_checks(result, list(checks))
    result.meta = dict(gm.meta)
    result.meta[STATE] = {"frozen": frozen, "dtype": _common_dtype(result)}
    for module in result.modules():
        module.training = False
    return result


def _has(root: nn.Module, name: str) -> bool:
    try:
        attribute(root, name)
    except AttributeError:
        return False
    return True


def _is_persistent(gm: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf not in gm.get_submodule(path)._non_persistent_buffers_set


def _adopt(result: fx.GraphModule, gm: nn.Module) -> None:
    """Also what the graph does not read, in the original's order, and which buffers are persistent."""
    result._parameters.clear()
    result._buffers.clear()
    result._modules.clear()
    result._parameters.update(gm._parameters)
    result._buffers.update(gm._buffers)
    result._modules.update(gm._modules)
    result._non_persistent_buffers_set |= gm._non_persistent_buffers_set


def _common_dtype(gm: nn.Module) -> str | None:
    """The dtype of most floating parameters, by name (``"float32"``)."""
    counts: dict[torch.dtype, int] = {}
    for tensor in [*gm.parameters(), *gm.buffers()]:
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return str(max(counts, key=lambda d: counts[d])).removeprefix("torch.") if counts else None


def _rewrite_baked(gm: Converted, fn: Any) -> None:
    """Apply ``fn`` (of ``Module._apply``) to the dtypes and devices in the arguments of the graph."""
    state = gm.meta.get(STATE, {})
    dtype = getattr(torch, state["dtype"]) if state.get("dtype") else None
    seen: dict[Any, Any] = {}

    def replaced(argument: Any) -> Any:
        if argument == dtype and isinstance(argument, torch.dtype):
            if argument not in seen:
                seen[argument] = fn(torch.empty(0, dtype=argument)).dtype
            return seen[argument]
        if isinstance(argument, torch.device):
            if argument not in seen:
                probe = fn(torch.empty(0, device=argument))
                seen[argument] = probe.device
            return seen[argument]
        return argument

    changed = False
    for node in gm.graph.nodes:
        args = fx.node.map_aggregate(node.args, replaced)
        kwargs: Any = fx.node.map_aggregate(node.kwargs, replaced)
        if any(key != value for key, value in seen.items()) and (args != node.args or kwargs != node.kwargs):
            node.args, node.kwargs = args, kwargs
            changed = True
    if dtype is not None:
        state["dtype"] = str(fn(torch.empty(0, dtype=dtype)).dtype).removeprefix("torch.")
    if changed:
        gm.recompile()


# ----------------------------------------------------------------- pickling


@dataclass(frozen=True)
class _Ref:
    """A node of the pickled graph, by name."""

    name: str


@dataclass(frozen=True)
class _Target:
    """A function of the pickled graph: an operator overload or an importable name."""

    kind: str
    path: str


def _encode_target(node: fx.Node) -> Any:
    target: Any = node.target
    if node.op != "call_function":
        return target
    if isinstance(target, torch._ops.OpOverload):
        return _Target("overload", f"{target._schema.name}::{target._overloadname}")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _Target("higher_order", target.name())
    path = fx.node._get_qualified_name(target)
    if _import(path) is target:
        return _Target("import", path)
    return target


def _import(path: str) -> Any:
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        try:
            for part in parts[cut:]:
                value = getattr(value, part)
        except AttributeError:
            continue
        return value
    return None


def _decode_target(target: Any) -> Any:
    if not isinstance(target, _Target):
        return target
    if target.kind == "overload":
        namespace, name, overload = target.path.split("::")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    if target.kind == "higher_order":
        return getattr(torch.ops.higher_order, target.path)
    return _import(target.path)


def _encode_meta(meta: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in meta.items():
        if key == "nn_module_stack":
            kept[key] = {
                path: (name, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
                for path, (name, kind) in value.items()
            }
        elif key == "stack_trace" or key.startswith("fxconv"):
            try:
                pickle.dumps(value)
            except Exception:  # an operator overload: fxconv_inplace is of no use in a finished module
                continue
            kept[key] = value
    return kept


def _encode_graph(graph: fx.Graph) -> dict[str, Any]:
    def reference(node: fx.Node) -> Any:
        return _Ref(node.name)

    nodes = [
        (
            node.op,
            node.name,
            _encode_target(node),
            fx.node.map_arg(node.args, reference),
            fx.node.map_arg(node.kwargs, reference),
            _encode_meta(node.meta),
        )
        for node in graph.nodes
    ]
    info = graph._codegen.pytree_info if isinstance(graph._codegen, _PyTreeCodeGen) else None
    return {"nodes": nodes, "pytree": None if info is None else tuple(info)}


def _decode_graph(encoded: dict[str, Any]) -> fx.Graph:
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}

    def resolve(argument: Any) -> Any:
        return env[argument.name] if isinstance(argument, _Ref) else argument

    for op, name, target, args, kwargs, meta in encoded["nodes"]:
        new_args: Any = fx.node.map_aggregate(args, resolve)
        new_kwargs: Any = fx.node.map_aggregate(kwargs, resolve)
        node = graph.create_node(op, _decode_target(target), new_args, new_kwargs, name=name)
        node.meta = dict(meta)
        env[name] = node
    if encoded["pytree"] is not None:
        graph._codegen = _PyTreeCodeGen(_PyTreeInfo(*encoded["pytree"]))
    return graph


def _load(body: dict[str, Any], encoded: dict[str, Any], class_name: str) -> Converted:
    return _from_body(body, _decode_graph(encoded), class_name)


def _twin(original: Converted, body: dict[str, Any], graph: fx.Graph) -> Converted:
    result = _from_body(body, graph, type(original).__name__)
    for kind in HOOKS:
        getattr(result, kind).update(getattr(original, kind))
    return result


def _from_body(body: dict[str, Any], graph: fx.Graph, class_name: str) -> Converted:
    holder = nn.Module()
    holder.__dict__ = body
    result = Converted(holder, graph, class_name=class_name)
    _adopt(result, holder)
    for key, value in body.items():  # plain attributes that a parent may read
        if key not in result.__dict__:
            setattr(result, key, value)
    result.meta = dict(body.get("meta", {}))
    result.training = body.get("training", False)
    return result
