"""Graphs whose weights arrive as placeholders (Dynamo's), bound to the values of those weights, rewritten, and unbound.

Binding turns each weight's placeholder into a ``get_attr`` of the very tensor, since only constants can be folded.
Unbinding turns the weights that are still read back into placeholders, so that the signature stays what it was.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxconv.capture import Captured
from fxconv.functional import functionalise
from fxconv.options import Options
from fxconv.program import drop_guards, set_attribute
from fxconv.report import Report

Weights = dict[int, torch.Tensor]
"""Index of a placeholder → the weight that it stands for."""

_STEP = re.compile(r"\.(\w+)|\['([^']+)'\]|\[(\d+)\]")
_CONTAINERS = {"_modules", "_parameters", "_buffers"}


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph with the placeholders of the original, and what was done to it."""

    gm: fx.GraphModule
    report: Report
    added: tuple[str, ...]
    """Attributes that hold new weights, in the order of the graph."""


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders of a graph, in order."""
    return [n for n in graph.nodes if n.op == "placeholder"]


def find_weights(graph: fx.Graph, example_inputs: Sequence[Any]) -> Weights:
    """Placeholders of a Dynamo graph that stand for parameters, buffers and other tensors of a module.

    A Python float of a module (``bn.eps`` under ``dynamic=True``) arrives as a tensor without dims; it counts too.
    """
    found: Weights = {}
    for index, (node, value) in enumerate(zip(placeholders(graph), example_inputs, strict=True)):
        if not isinstance(value, torch.Tensor) or _is_fake(value):
            continue
        static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is not None
        if isinstance(value, nn.Parameter) or static or _is_scalar_of_module(node, value):
            found[index] = value
    return found


_BATCH_STATISTICS = {"batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit"}


def training_node(graph: fx.Graph) -> str | None:
    """The name of a node that drops values at random or updates running statistics, or None.

    Such an update shows in no schema and moves no version counter, so nothing here could keep account of it.
    """
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        target: Any = node.target
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        name = str(getattr(packet, "__name__", "")).removesuffix("_")
        if name in _BATCH_STATISTICS:
            functional = getattr(target, "__module__", "") == "torch.nn.functional"
            flag = "use_input_stats" if name == "instance_norm" else "training"
            default = functional and name == "instance_norm"
            running = _argument(node, 1 if functional else 3, "running_mean", None)
            if running is not None and _argument(node, 5, flag, default):
                return str(node.name)
        elif "dropout" in name and _argument(node, 1, "p", 0.5):
            if _argument(node, 2, "training", True) and _argument(node, 2, "train", True):
                return str(node.name)
    return None


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _is_fake(value: torch.Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def _is_scalar_of_module(node: fx.Node, value: torch.Tensor) -> bool:
    if value.dim() or not all(n.target == "item" for n in node.users):
        return False
    return any(f"['{key}']" in source_name(node) for key in _CONTAINERS)


def held_by_module(node: fx.Node) -> bool:
    """Whether Dynamo read the placeholder's value from a module, as a parameter, a buffer or a plain attribute."""
    name = source_name(node)
    return any(f"['{key}']" in name for key in _CONTAINERS) or re.search(r"\.\w+$", name) is not None


def source_name(node: fx.Node) -> str:
    """Where Dynamo found the value of a placeholder: ``L['self']._modules['fc']._parameters['weight']``, or ""."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name
    return re.sub(r"\._(modules|parameters|buffers)\[", r"['_\1'][", str(name))


def qualified_name(node: fx.Node) -> str:
    """The name of a placeholder's weight in its module: ``fc.weight``."""
    name = re.sub(r"^[LG]\['[^']*'\]", "", source_name(node))
    steps = [a or b or c for a, b, c in _STEP.findall(name)]
    path = ".".join(s for s in steps if s not in _CONTAINERS)
    return path if path and all(s.isidentifier() or s.isdigit() for s in path.split(".")) else str(node.name)


def rewrite_bound(gm: fx.GraphModule, weights: Mapping[int, torch.Tensor], examples: Sequence[Any], options: Options) -> Rewritten:
    """Rewrite a copy of ``gm`` for these values of its weights; the placeholders stay.

    Args:
        gm: a graph whose nodes carry ``example_value`` or ``val``. It is not changed.
        weights: as `find_weights` gives them.
        examples: example values for all placeholders. Fake ones and symbolic sizes are made concrete for the
            whole-model check.

    Raises:
        FxconvError: nothing that holds for this graph; options that are wrong, or a check that fails under
            ``verify="raise"``.
    """
    from fxconv.transform import run_captured

    bound, names = _bind(gm, weights)
    reference = fx.GraphModule(bound, copy.deepcopy(bound.graph))
    barriers = functionalise(bound)
    inputs = tuple(concrete(v) for i, v in enumerate(examples) if i not in weights)
    captured = Captured(bound, "aten", "dynamo", inputs, {}, rebuild=lambda g: fx.GraphModule(g, g.graph), barriers=barriers)
    before = set(_attributes(bound))
    result, report = run_captured(reference, captured, options)
    added = tuple(name for name in _attributes(result) if name not in before)
    unbind(result, gm.graph, names)
    return Rewritten(result, report, added)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph over the same tensors, its placeholders' sources included."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    _finish_output(gm.graph, graph, graph.graph_copy(gm.graph, env))
    for old, new in env.items():
        copy_source(old, new)
    return fx.GraphModule(gm, graph)


def _attributes(gm: fx.GraphModule) -> list[str]:
    return list(dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "get_attr"))


def _bind(gm: fx.GraphModule, weights: Mapping[int, torch.Tensor]) -> tuple[fx.GraphModule, dict[str, int]]:
    """A private graph module with the weights as attributes; and attribute name → placeholder index."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, env)
    root = nn.Module()
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            set_attribute(root, str(node.target), operator.attrgetter(str(node.target))(gm))
    _finish_output(gm.graph, graph, output)
    names: dict[str, int] = {}
    for index, original in enumerate(placeholders(gm.graph)):
        node = env[original]
        if index not in weights:
            continue
        value = weights[index]
        if value.dim() == 0 and node.users and all(n.target == "item" for n in node.users):
            _inline_scalar(graph, node, value)
            continue
        name = _free_name(root, qualified_name(original), names)
        set_attribute(root, name, value if isinstance(value, nn.Parameter) else value.detach())
        names[name] = index
        with graph.inserting_before(node):
            read = graph.get_attr(name)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        graph.erase_node(node)
    for node in graph.nodes:
        if "val" not in node.meta and "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    drop_guards(graph)
    return fx.GraphModule(root, graph, type(gm).__name__), names


def _finish_output(source: fx.Graph, graph: fx.Graph, output: Any) -> None:
    (old,) = [n for n in source.nodes if n.op == "output"]
    graph.output(output).meta = dict(old.meta)


def _inline_scalar(graph: fx.Graph, node: fx.Node, value: torch.Tensor) -> None:
    """``bn.eps.item()`` is the number; a symbolic float would keep BatchNorm from being folded."""
    number = value.item()
    for item in list(node.users):
        for user in list(item.users):
            user.args = fx.node.map_aggregate(user.args, lambda a, i=item: number if a is i else a)  # type: ignore
            user.kwargs = fx.node.map_aggregate(user.kwargs, lambda a, i=item: number if a is i else a)  # type: ignore
        graph.erase_node(item)
    graph.erase_node(node)


def _free_name(root: nn.Module, wanted: str, taken: Mapping[str, int]) -> str:
    head = wanted.split(".")[0]
    if head in dir(fx.GraphModule) or head == "self":
        wanted = f"w_{wanted}"
    name, count = wanted, 0
    while name in taken or any(t.startswith(name + ".") or name.startswith(t + ".") for t in taken):
        count += 1
        name = f"{wanted}_{count}"
    return name


def unbind(gm: fx.GraphModule, original: fx.Graph, names: Mapping[str, int]) -> None:
    """Give ``gm`` the placeholders of the original graph again, in their order."""
    reads: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and str(node.target) in names:
            reads.setdefault(names[str(node.target)], []).append(node)
    kept = {str(n.target): n for n in placeholders(gm.graph)}
    for index, source in reversed(list(enumerate(placeholders(original)))):
        first = next(iter(gm.graph.nodes))
        node = kept.get(str(source.target))
        if node is None:
            with gm.graph.inserting_before(first):
                node = gm.graph.create_node("placeholder", str(source.target), (), {}, name=source.name)
        elif node is not first:
            first.prepend(node)
        # Inductor's C++ wrapper takes a "val" on any placeholder for a sign that all of them have one.
        node.meta = dict(source.meta)
        copy_source(source, node)
        for read in reads.get(index, ()):
            read.replace_all_uses_with(node)
            gm.graph.erase_node(read)
    for name in names:
        _remove(gm, name)
    gm.graph.lint()
    gm.recompile()


def copy_source(source: fx.Node, node: fx.Node) -> None:
    """Give a copied placeholder its source, which copying leaves behind."""
    # AOTAutograd asks every placeholder of a Dynamo graph for this attribute, or none.
    if hasattr(source, "_dynamo_source"):
        node._dynamo_source = source._dynamo_source


def _remove(gm: fx.GraphModule, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    try:
        owner = gm.get_submodule(path) if path else gm
    except AttributeError:
        return
    if hasattr(owner, leaf):
        delattr(owner, leaf)


def concrete(value: Any) -> Any:
    """A real stand-in for a fake tensor or a symbolic size: Gaussian values at the example's sizes."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return hint(value)
    if not isinstance(value, torch.Tensor) or not _is_fake(value):
        return value
    shape = [hint(s) for s in value.shape]
    if not value.is_floating_point():
        return torch.zeros(shape, dtype=value.dtype, device=value.device)
    generator = torch.Generator(device=value.device).manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=value.dtype, device=value.device)


def hint(size: Any) -> Any:
    """The example's value of a symbolic size."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size.node.hint
    return size
