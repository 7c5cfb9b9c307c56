"""Example inputs: which dims are dynamic, a batch that export does not specialise, guesses where none are given."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from fxconv.errors import ArgsError


def all_dynamic(values: Any, dims: str = "all", free: Collection[int] = ()) -> Any:
    """``dynamic_shapes`` for these arguments: ``Dim.AUTO`` on batch and spatial dims (or on dim 0 only, ``dims="batch"``).

    Dim 1 of an image or a volume is its channels, which weights fix; where only a concatenation reads them first,
    export would find a dynamic number of channels and the concatenation's places would be unknown. ``free`` are the
    indices of the leaves with which the model runs at other numbers of channels.
    """
    index = -1

    def spec(leaf: Any) -> Any:
        nonlocal index
        index += 1
        if not isinstance(leaf, torch.Tensor):
            return None
        count = leaf.dim() if dims == "all" else min(1, leaf.dim())
        wanted = [i for i in range(count) if dims == "all" or leaf.shape[i] > 1]
        return {i: Dim.AUTO for i in wanted if not (i == 1 and leaf.dim() >= 4 and index not in free)} or None

    return pytree.tree_map(spec, values)


def needs_doubling(args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None) -> bool:
    """Whether some tensor has a batch (dim 0) of 1, which export would specialise to 1.

    With ``dynamic_shapes`` from the caller only the dims 0 that it makes dynamic count.
    """
    return any(a is not b for a, b in zip(*_leaves(args, kwargs, dynamic_shapes), strict=True))


def doubled(args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None) -> tuple[Any, Any]:
    """The inputs with every batch of 1 repeated to 2."""
    _, new = _leaves(args, kwargs, dynamic_shapes)
    _, spec = pytree.tree_flatten((args, kwargs))
    new_args, new_kwargs = pytree.tree_unflatten(new, spec)
    return new_args, new_kwargs


def _leaves(args: Any, kwargs: Any, dynamic_shapes: Any) -> tuple[list[Any], list[Any]]:
    leaves, _ = pytree.tree_flatten((args, kwargs))
    allowed = _dynamic_batch(args, kwargs, dynamic_shapes)
    new = []
    for leaf, dynamic in zip(leaves, allowed, strict=True):
        if dynamic and isinstance(leaf, torch.Tensor) and leaf.dim() >= 1 and leaf.shape[0] == 1:
            leaf = torch.cat([leaf.detach()] * 2)  # keeps channels_last, which expand().contiguous() would not
        new.append(leaf)
    return leaves, new


def _dynamic_batch(args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> list[bool]:
    """Per leaf: whether dim 0 may be dynamic."""
    leaves, _ = pytree.tree_flatten((args, kwargs))
    if dynamic_shapes is None:
        return [True] * len(leaves)
    specs = list(dynamic_shapes.values()) if isinstance(dynamic_shapes, dict) else list(dynamic_shapes)
    values = [*args, *kwargs.values()]
    if len(specs) != len(values):
        return [False] * len(leaves)
    found: list[bool] = []
    for value, spec in zip(values, specs, strict=True):
        count = len(pytree.tree_leaves(value))
        if isinstance(value, torch.Tensor):
            first = spec.get(0) if isinstance(spec, dict) else spec[0] if spec else None
            found.append(first is not None and not isinstance(first, int) and first is not Dim.STATIC)
        else:
            found += [False] * count
    return found


def image_dims(inputs: Any) -> set[tuple[int, int]]:
    """(leaf index, dim) of the heights and widths among the inputs."""
    leaves = pytree.tree_leaves(inputs)
    return {(i, d) for i, v in enumerate(leaves) if isinstance(v, torch.Tensor) and v.dim() > 3 for d in range(2, v.dim())}


def enlarged(args: Any, kwargs: Any, dims: set[tuple[int, int]], factor: int) -> tuple[Any, Any]:
    """The inputs repeated ``factor`` times along the given (leaf index, dim)."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    for index, dim in dims:
        leaves[index] = torch.cat([leaves[index]] * factor, dim)
    new_args, new_kwargs = pytree.tree_unflatten(leaves, spec)
    return new_args, new_kwargs


def distinct(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The inputs with no tensor twice: export merges placeholders that are given the same object."""
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) in seen:
                return leaf.detach().clone()
            seen.add(id(leaf))
        return leaf

    new_args, new_kwargs = pytree.tree_map(once, (args, kwargs))
    return new_args, new_kwargs


def sizes(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The shape of a (fake) tensor: ints and SymInts."""
    return tuple(tensor.shape)


def is_dynamic(size: Any) -> bool:
    """Whether a size still depends on the input: a SymInt that has been solved does not."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def cloned(value: Any) -> Any:
    """A deep copy of the tensors in ``value``, so that a run cannot change the caller's inputs."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, value)


# ----------------------------------------------------------------- shapes of a module-dialect graph


class _Propagate(fx.Interpreter):
    """Runs the graph on fake tensors and records each value in ``meta["val"]``."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        node.meta["val"] = result
        return result


def propagate(
    gm: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    dynamic: Any = "all",
    free: Collection[int] = (),
    static: Collection[tuple[int, int]] = (),
) -> FakeTensorMode:
    """Fill ``meta["val"]`` of every node, with SymInts for dynamic dims.

    ``dynamic`` is "all" (but the channels of images, see ``all_dynamic``), "batch", "none", or a ``dynamic_shapes``
    structure as for ``torch.export``. ``static`` are (placeholder index, dim) that stay fixed under "all" and "batch".
    Raises whatever the graph raises on these inputs.
    """
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    flat = _bind(gm, args, kwargs or {})
    specs = _specs(gm, flat, dynamic)
    if specs and isinstance(dynamic, str) and dynamic == "all":
        specs = ["everything" if i in free else spec for i, spec in enumerate(specs)]
    fakes = [
        _fake(mode, value, spec, {d for index, d in static if index == i})
        for i, (value, spec) in enumerate(zip(flat, specs, strict=True))
    ]
    # Without the Python dispatcher, composite operators (upsampling by a factor) ask for every size as an int.
    with mode, torch.no_grad(), enable_python_dispatcher():
        _Propagate(gm, mode).run(*fakes)
    return mode


def _bind(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values: list[Any] = list(args)
    for node in placeholders[len(args) :]:
        if str(node.target) in kwargs:
            values.append(kwargs[str(node.target)])
        elif node.args:
            values.append(node.args[0])
        else:
            raise ArgsError(f"missing argument {node.target!r}")
    return values


def _specs(gm: fx.GraphModule, flat: list[Any], dynamic: Any) -> list[Any]:
    if isinstance(dynamic, str):
        return [dynamic] * len(flat)
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    if isinstance(dynamic, dict):
        return [dynamic.get(name) for name in names]
    given = list(dynamic)
    return given + [None] * (len(flat) - len(given))


def _fake(mode: FakeTensorMode, value: Any, spec: Any, static: Collection[int] = ()) -> Any:
    if not isinstance(value, torch.Tensor):
        return pytree.tree_map(lambda v: _fake(mode, v, spec) if isinstance(v, torch.Tensor) else v, value)
    dims: list[DimDynamic] = []
    for i, size in enumerate(value.shape):
        if spec in ("all", "everything"):
            dynamic = size > 1 and not (i == 1 and value.dim() >= 4 and spec == "all")
        elif spec == "batch":
            dynamic = i == 0 and size > 1
        else:
            chosen = spec.get(i) if isinstance(spec, dict) else spec[i] if isinstance(spec, (list, tuple)) else None
            dynamic = chosen is not None and not isinstance(chosen, int) and chosen is not Dim.STATIC
        dims.append(DimDynamic.DYNAMIC if dynamic and i not in static else DimDynamic.STATIC)
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=dims)
    return mode.from_tensor(value.detach(), symbolic_context=context)


def pinned_symbols(environment: ShapeEnv) -> tuple[set[Any], bool]:
    """Symbols that an equality guard ties to a number without solving it (``4·(h − 2)·(w − 2) = 144``).

    The flag says that every such number is 1: some feature map of the example is one element high, which torch treats
    as another kind of size. A larger example may be free of that.
    """
    pinned: set[Any] = set()
    ones = True
    for guard in environment.guards:
        expr = guard.expr
        if isinstance(expr, sympy.Eq):
            expr = expr.subs(environment.replacements)
            if isinstance(expr, sympy.Eq) and (expr.lhs.is_number or expr.rhs.is_number):
                found = _determined(expr, environment)
                pinned |= found
                ones = ones and (not found or expr.lhs == 1 or expr.rhs == 1)
    return pinned, ones


def _determined(equation: sympy.Eq, environment: ShapeEnv) -> set[Any]:
    """The symbols of an equation that cannot be scaled without breaking it: none in ``h % 4 = 0``, ``2·h // h = 2``."""
    hints = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    values = {s: sympy.Integer(int(hints[s])) for s in equation.free_symbols if s in hints}

    def holds(scaled: set[Any]) -> bool:
        for factor in (2, 3, 5):
            tried = {s: value * factor if s in scaled else value for s, value in values.items()}
            if equation.xreplace(tried) is sympy.true:
                return True
        return False

    if holds(set(values)):
        return set()
    return {s for s in values if not holds({s})}


def fixed_by_ones(tensor: torch.Tensor) -> set[int]:
    """The dims of an input that were fixed because some size computed from them is 1 in the example.

    A size of 1 is another kind of size: ``squeeze`` drops it and it broadcasts, so torch asks ``h - 3 = 1`` and solves
    it. A larger input may well run, and then that dim is 5 rather than 1.
    """
    raw = {size.node._expr: dim for dim, size in enumerate(sizes(tensor)) if isinstance(size, torch.SymInt)}
    environment = getattr(getattr(tensor, "fake_mode", None), "shape_env", None)
    found: set[int] = set()
    if environment is None:
        return found
    for guard in environment.guards:
        if isinstance(guard.expr, sympy.Eq) and 1 in (guard.expr.lhs, guard.expr.rhs):
            for symbol in guard.expr.free_symbols & set(raw):
                if environment.replacements.get(symbol, symbol).is_number:
                    found.add(raw[symbol])
    return found


# ----------------------------------------------------------------- what the capture assumed about sizes


@dataclass(frozen=True)
class SizeCheck:
    """A condition on input sizes that the captured graph relies on and the model's own code decided by."""

    expr: Any
    """A sympy boolean over ``symbols``."""
    symbols: tuple[tuple[Any, str, int], ...]
    """(symbol, placeholder name, dim)."""
    message: str


def symbol_places(gm: fx.GraphModule) -> dict[sympy.Symbol, tuple[str, int]]:
    """The first (placeholder, dim) that every symbol is the size of."""
    found: dict[sympy.Symbol, tuple[str, int]] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            for dim, size in enumerate(sizes(value)):
                if is_dynamic(size) and size.node.expr.is_symbol:
                    found.setdefault(size.node.expr, (node.name, dim))
    return found


def size_checks(gm: fx.GraphModule, static: set[tuple[str, int]]) -> list[SizeCheck]:
    """What must be checked when the graph runs: branches that the model's code took by size, and dims fixed by choice.

    A guard counts if the model's own file (or ``torch.nn``) asked the question; those that torch's shape functions ask
    (is it contiguous? does it broadcast?) only concern strides. ``static`` names (placeholder, dim) fixed by choice.
    """
    places = symbol_places(gm)
    checks: list[SizeCheck] = []
    fixed: list[tuple[fx.Node, int, int]] = []
    specialised: set[int] = set()
    environment: ShapeEnv | None = None
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor):
            continue
        environment = getattr(getattr(value, "fake_mode", None), "shape_env", None) or environment
        for dim, size in enumerate(sizes(value)):
            if not is_dynamic(size):
                fixed.append((node, dim, int(size)))
                if (node.name, dim) in static:
                    checks.append(exact(node, dim, int(size)))
    for guard in environment.guards if environment is not None else ():
        if not _asked_by_model(guard):
            continue
        if isinstance(guard.expr, sympy.Eq) and guard.expr.lhs.is_symbol and guard.expr.rhs.is_number:
            specialised.add(int(guard.expr.rhs))
            continue
        expr = guard.expr.xreplace(environment.replacements) if environment is not None else guard.expr
        symbols = sorted(expr.free_symbols, key=str)
        if not symbols or any(s not in places for s in symbols):
            continue
        named = tuple((s, *places[s]) for s in symbols)
        readable = ", ".join(f"{s} = dim {dim} of {name}" for s, name, dim in named)
        text = f"captured for sizes with {expr} ({readable}): transform again with such an example"
        checks.append(SizeCheck(expr, named, text))
    known = {(check.symbols[0][1], check.symbols[0][2]) for check in checks}
    for node, dim, number in fixed:
        if number in specialised and (node.name, dim) not in known:
            checks.append(exact(node, dim, number))
    return checks


def exact(node: fx.Node, dim: int, number: int) -> SizeCheck:
    """That an input has the size that the graph was captured for."""
    symbol = sympy.Symbol(f"{node.name}_{dim}", integer=True)
    text = f"captured for size {number} in dim {dim} of {node.target}: transform again for other sizes"
    return SizeCheck(sympy.Eq(symbol, number), ((symbol, node.name, dim),), text)


_QUESTION = re.compile(r"\b(if|elif|while|assert|and|or|not)\b|[<>=!]=|[<>]")


def _asked_by_model(guard: Any) -> bool:
    place = getattr(guard.sloc, "framework_loc", None)
    file = place if isinstance(place, str) else getattr(place, "filename", "")
    inside = file.replace("\\", "/").rpartition("/torch/")[2] if "/torch/" in file.replace("\\", "/") else ""
    if not inside.startswith("nn/"):
        return bool(file) and not inside
    # `return F.linear(...)` asks nothing: it is the kernel that it calls which asked, about strides.
    return bool(_QUESTION.search(getattr(place, "line", None) or "if"))


def insert_checks(gm: fx.GraphModule, checks: list[SizeCheck]) -> None:
    """``torch._assert`` nodes at the head of the graph, one per check."""
    placeholders = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
    if not checks or not placeholders:
        return
    read: dict[tuple[str, int], fx.Proxy] = {}
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    tracer = fx.proxy.GraphAppendingTracer(gm.graph)
    with gm.graph.inserting_before(first):
        for check in checks:
            values: dict[Any, Any] = {}
            for symbol, name, dim in check.symbols:
                if (name, dim) not in read:
                    node = gm.graph.call_function(torch.ops.aten.sym_size.int, (placeholders[name], dim))
                    read[name, dim] = fx.Proxy(node, tracer)
                values[symbol] = read[name, dim]
            try:
                condition = sympy_interp(PythonReferenceAnalysis, values, check.expr)
            except Exception:  # a function of sizes that has no Python form: nothing to check it with
                continue
            if isinstance(condition, fx.Proxy):
                gm.graph.call_function(torch._assert, (condition.node, check.message))
    gm.recompile()


# ----------------------------------------------------------------- guesses


def guesses(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Plausible positional inputs for ``model``, most likely first, from its first layer with weights."""
    count = _required_inputs(model)
    first = next((m for m in model.modules() if _has_weight(m)), None)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for shape, integer in _shapes(model, first):
        if integer:
            value = torch.zeros(shape, dtype=torch.long, device=device)
        else:
            value = torch.zeros(shape, dtype=dtype, device=device)
        yield tuple(value.clone() for _ in range(count))


def _has_weight(module: nn.Module) -> bool:
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.modules.batchnorm._NormBase, nn.LayerNorm)
    return isinstance(module, kinds)


def _required_inputs(model: nn.Module) -> int:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, len(required))


def _shapes(model: nn.Module, first: nn.Module | None) -> Iterator[tuple[tuple[int, ...], bool]]:
    sides = (224, 64, 32, 28, 256, 299, 384, 96, 128, 16, 8, 7, 4)
    if isinstance(first, nn.modules.conv._ConvNd):
        rank = len(first.kernel_size)
        lengths = {1: (1024, 100, 128, 64, 16000), 2: sides, 3: (16, 32, 8)}[rank]
        for side in lengths:
            yield (2, first.in_channels, *[side] * rank), False
    elif isinstance(first, nn.Linear):
        features = first.in_features
        yield (2, features), False
        yield (2, 1, features), False
        yield (2, 5, features), False
        for channels in (3, 1):
            side = round((features / channels) ** 0.5)
            if channels * side * side == features:
                yield (2, channels, side, side), False
        for side in sides:  # patches: c · p · p features from an image
            yield (2, 3, side, side), False
    elif isinstance(first, nn.Embedding):
        yield (2, 16), True
    elif isinstance(first, nn.modules.batchnorm._NormBase):
        for side in sides:
            yield (2, first.num_features, side, side), False
        yield (2, first.num_features), False
        yield (2, first.num_features, 100), False
    elif isinstance(first, nn.LayerNorm):
        yield (2, 5, *first.normalized_shape), False
    else:
        for side in sides:
            yield (2, 3, side, side), False
        yield (2, 16), False
