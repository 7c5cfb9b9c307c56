"""A private graph of any model, with shapes, and the way back to the same kind of thing.

Two dialects: "aten" from ``torch.export`` (parameters as ``get_attr``), "module" from ``symbolic_trace`` (``call_module``).
The caller's model is never traced itself but a structural copy that shares its tensors.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxconv import shapes
from fxconv.errors import ArgsError, CaptureError, OptionError, TrainingModeError
from fxconv.functional import functionalise, restore_inplace
from fxconv.hazards import check_model, hooked_modules, mode_dependent, training_ops, unwrap
from fxconv.program import Layout, fake_mode_of, relift, unlift
from fxconv.result import finish, set_convention
from fxconv.structure import structural_copy
from fxconv.trace import strip_asserts, trace

__all__ = ["Captured", "capture", "restore_inplace"]

SLOW_CALL_SECONDS = 0.2
"""An export step that takes longer than this is bogged down in symbolic sizes: ordinary ones take about 5 ms."""
SLOW_EXPORT_SECONDS = 8.0
"""CPU seconds in such steps after which an export with every dim dynamic is given up. torchvision's Swin takes 225 s with
symbolic height and width and 5 s without; of 130 timm families none is near."""


@dataclass
class Captured:
    """A model as a graph that fxconv may rewrite."""

    gm: fx.GraphModule
    """Private graph over the caller's own tensors, callable like the model. Every node has ``meta["val"]`` where shapes
    are known. Functional but for the nodes named in ``barriers``."""
    dialect: str
    """"aten" or "module"."""
    how: str
    """"export" or "symbolic"."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """The example inputs as the caller gave them; empty when none were given."""
    rebuild: Callable[[fx.GraphModule], Any]
    """Hands back the same kind of thing as went in: a graph module, or an ExportedProgram."""
    notes: list[str] = field(default_factory=list)
    """For the report: what was assumed, what was tried and failed."""
    barriers: dict[str, str] = field(default_factory=dict)
    """Node name → why it must be treated as opaque."""
    fixed_batch: bool = False
    """The graph holds for the batch of the example only, although the model itself runs at others: capture in parts may
    do better."""
    checks: list[shapes.SizeCheck] = field(default_factory=list)
    """Conditions on input sizes that ``rebuild`` makes the result check when it runs."""


def capture(
    model: Any,
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    mode: str = "auto",
) -> Captured:
    """Capture a Module, GraphModule or ExportedProgram.

    Args:
        args: example positional inputs (a bare tensor is wrapped), or None.
        dynamic_shapes: as for ``torch.export``; None makes every dim dynamic that can be.
        mode: "auto" (export with inputs, symbolic without; the other one where that fails), "export" or "symbolic".

    Raises:
        NotAModuleError, TrainingModeError, ArgsError, OptionError, CaptureError: each says what to do.
    """
    if mode not in ("auto", "export", "symbolic"):
        raise OptionError(f"capture={mode!r}: choose one of 'auto', 'export', 'symbolic'")
    if isinstance(args, torch.Tensor):
        args = (args,)
    if args is not None and not isinstance(args, (tuple, list)):
        raise ArgsError(f"args must be a tuple of example inputs, got {type(args).__name__}")
    given = None if args is None else tuple(args)
    if isinstance(model, ExportedProgram):
        return _from_program(model, given, dict(kwargs or {}))
    model = unwrap(model)
    check_model(model)
    if given is None and kwargs:
        given = ()
    if given is None:
        return _without_args(model, mode)
    _check_args(model, given, kwargs or {})
    return _with_args(model, given, dict(kwargs or {}), dynamic_shapes, mode)


# ----------------------------------------------------------------- with example inputs


def _with_args(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, mode: str
) -> Captured:
    expected = _expected(model, args, kwargs)
    hooked = hooked_modules(model)
    export: list[_Attempt] = [
        ("export", lambda plan=plan: _export(model, args, kwargs, plan))  # type: ignore[misc]
        for plan in _plans(args, kwargs, dynamic_shapes)
    ]
    whole = mode == "auto"
    symbolic: list[_Attempt] = [
        ("symbolic", lambda: _symbolic(model, args, kwargs, dynamic_shapes, expected, whole))
    ]
    # Export traces a hook's effect on values and loses its side effects; as a leaf module a hooked one keeps both.
    order = {"export": export, "symbolic": symbolic}.get(mode, [*symbolic, *export] if hooked else [*export, *symbolic])
    failures: list[str] = []
    hopeless: set[str] = set()
    fallback: Captured | None = None
    for kind, attempt in order:
        if kind in hopeless:
            continue
        try:
            captured = attempt()
            problem = _difference(captured.gm, args, kwargs, expected)
        except TrainingModeError:
            raise
        except Exception as error:
            problem = _one_line(error)
            if isinstance(error, GuardOnDataDependentSymNode):  # control flow on values: other sizes will not help
                hopeless.add(kind)
        if problem is not None:
            failures.append(problem)
            continue
        if hooked and captured.how == "export":
            captured.notes.append(_traced_hooks(hooked))
        if dynamic_shapes is None and _batch_is_fixed(captured.gm) and _runs_doubled(model, args, kwargs):
            captured.fixed_batch = True
            fallback = fallback or captured
            continue
        captured.notes[:0] = [f"capture attempt failed: {reason}" for reason in dict.fromkeys(failures)]
        _check_batch_of_one(model, captured)
        return captured
    if fallback is not None:
        fallback.notes[:0] = [f"capture attempt failed: {reason}" for reason in dict.fromkeys(failures)]
        fallback.notes.append("the batch is fixed to that of the example, although the model runs at others")
        return fallback
    reasons = "; ".join(dict.fromkeys(failures))
    raise CaptureError(f"{type(model).__name__} could not be captured whole ({reasons})")


def _batch_is_fixed(gm: fx.GraphModule) -> bool:
    """Whether no input has a dynamic dim 0, where some input has a dim 0."""
    values = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.dim() > 0]
    return bool(tensors) and not any(isinstance(t.shape[0], torch.SymInt) for t in tensors)


def _runs_doubled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the model runs on twice the batch."""
    runner = structural_copy(model, own_buffers=True)

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 else leaf

    try:
        with torch.no_grad():
            runner(*pytree.tree_map(twice, args), **pytree.tree_map(twice, kwargs))
    except Exception:
        return False
    return True


def _check_batch_of_one(model: nn.Module, captured: Captured) -> None:
    """A graph captured at two or more is run once at 1: models may treat that size in another way (``if n == 1:``)."""
    dynamic = [
        (n.name, v.shape[0].node.expr)
        for n in captured.gm.graph.nodes
        if n.op == "placeholder" and isinstance(v := n.meta.get("val"), torch.Tensor) and v.dim() > 0
        if isinstance(v.shape[0], torch.SymInt) and v.shape[0].node.expr.is_symbol
    ]
    leaves = [leaf for leaf in pytree.tree_leaves((captured.args, captured.kwargs)) if isinstance(leaf, torch.Tensor)]
    if not dynamic or not leaves or any(leaf.dim() == 0 or leaf.shape[0] < 2 for leaf in leaves):
        return

    def first(leaf: Any) -> Any:
        return leaf[:1] if isinstance(leaf, torch.Tensor) else leaf

    args, kwargs = pytree.tree_map(first, (captured.args, captured.kwargs))
    try:
        expected = _expected(model, args, kwargs)
    except ArgsError:
        return
    try:
        problem = _difference(captured.gm, args, kwargs, expected)
    except Exception as error:
        problem = _one_line(error)
    if problem is not None:
        name, symbol = dynamic[0]
        text = f"captured for a batch of 2 or more ({problem} at 1): transform again with a batch of 1"
        captured.checks.append(shapes.SizeCheck(symbol >= 2, ((symbol, name, 0),), text))
        captured.notes.append(f"the batch must be 2 or more: at 1 the model does something else ({problem})")


_Attempt = tuple[str, Callable[[], Captured]]


def _traced_hooks(hooked: list[str]) -> str:
    names = ", ".join(repr(name) if name else "the model itself" for name in hooked[:3])
    return (
        f"the forward hooks of {names} were traced: what they do to values is in the graph, what else they do "
        "(recording, printing) is not"
    )


@dataclass(frozen=True)
class _Plan:
    """One way to export: which dims are dynamic, and whether a batch of 1 is repeated to 2."""

    dynamic: Any
    double: bool
    note: str


def _plans(args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> list[_Plan]:
    double = shapes.needs_doubling(args, kwargs, dynamic_shapes)
    repeated = "captured at batch 2 (export specialises a batch of 1)" if double else ""
    if dynamic_shapes is not None:
        plans = [_Plan(dynamic_shapes, True, repeated)] if double else []
        return [*plans, _Plan(dynamic_shapes, False, "")]
    plans = [_Plan("all", double, repeated), _Plan("batch", double, repeated)]
    if double:
        plans.append(_Plan("all", False, "captured at batch 1 only: the model does not run on its input repeated to 2"))
    plans.append(_Plan("none", False, "captured at the sizes of the example only"))
    return plans


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: _Plan) -> Captured:
    use_args, use_kwargs = shapes.doubled(args, kwargs, _given(plan)) if plan.double else (args, kwargs)
    use_args, use_kwargs = shapes.distinct(use_args, use_kwargs)
    twin = structural_copy(model)
    program = _run_export(twin, use_args, use_kwargs, plan.dynamic)
    pinned = _pinned_dims(program)
    if pinned and plan.dynamic in ("all", "batch"):
        program = _run_export(structural_copy(model), use_args, use_kwargs, plan.dynamic, pinned)
    frozen = _frozen_reason(model)
    captured = _unlifted(program, args, kwargs, flat=False)
    gm, layout = captured.gm, captured.layout
    name, forward = type(model).__name__, model.forward
    checks = shapes.size_checks(gm, _static_by_choice(gm, plan, pinned))
    return Captured(
        gm,
        "aten",
        "export",
        args,
        kwargs,
        lambda rewritten: finish(rewritten, name, frozen, layout, forward, checks),
        [n for n in (plan.note, *captured.notes) if n],
        captured.barriers,
        checks=checks,
    )


def _static_by_choice(gm: fx.GraphModule, plan: _Plan, pinned: set[Any]) -> set[tuple[str, int]]:
    """(placeholder, dim) that the graph has fixed although the model might not: to be checked when it runs."""
    fixed: set[tuple[str, int]] = set()
    for index, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            chosen = plan.dynamic != "all" or (index, dim) in pinned or dim == 0 or size == 1
            if not isinstance(size, torch.SymInt) and chosen:
                fixed.add((node.name, dim))
    return fixed


def _given(plan: _Plan) -> Any:
    return None if isinstance(plan.dynamic, str) else plan.dynamic


def _run_export(
    twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any, pinned: set[Any] | None = None
) -> ExportedProgram:
    if dynamic in ("all", "batch"):
        spec: Any = {"args": shapes.all_dynamic(args, dynamic), "kwargs": shapes.all_dynamic(kwargs, dynamic)}
        if pinned:
            spec = _without_dims(spec, pinned)
        given: Any = (*spec["args"], *spec["kwargs"].values())
        given = _by_name(twin, args, kwargs, given)
    else:
        given = None if dynamic == "none" else dynamic
    budget = _Budget() if dynamic == "all" else contextlib.nullcontext()
    # A failed export prints the graph that it has so far to stderr.
    with _quiet(), contextlib.redirect_stderr(io.StringIO()), budget:
        return torch.export.export(twin, args, kwargs or None, dynamic_shapes=given, strict=False)


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], specs: tuple[Any, ...]) -> Any:
    """export wants a tuple without keyword arguments, and a dict by argument name with them."""
    if not kwargs:
        return specs
    import inspect

    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    values = iter(specs)
    named: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name not in bound.arguments:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            named[name] = tuple(next(values) for _ in bound.arguments[name])
        elif parameter.kind is not parameter.VAR_KEYWORD and name not in kwargs:
            named[name] = next(values)
    by_key = dict(zip(kwargs, specs[len(args) :], strict=True))
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in by_key:
            named[name] = by_key[name]
        elif parameter.kind is parameter.VAR_KEYWORD and name in bound.arguments:
            named.update({k: by_key[k] for k in bound.arguments[name]})
    return named


def _pinned_dims(program: ExportedProgram) -> set[Any]:
    """(leaf index, dim) of inputs that stay symbolic although the model accepts one value only."""
    mode = fake_mode_of(program.graph)
    if mode is None or mode.shape_env is None:
        return set()
    symbols = shapes.pinned_symbols(mode.shape_env)
    if not symbols:
        return set()
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    found = set()
    for index, name in enumerate(names):
        value = values.get(name)
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols:
                    found.add((index, dim))
    return found


def _without_dims(spec: Any, pinned: set[Any]) -> Any:
    index = -1

    def fix(leaf: Any) -> Any:
        nonlocal index
        index += 1
        if not isinstance(leaf, dict):
            return leaf
        return {dim: value for dim, value in leaf.items() if (index, dim) not in pinned} or None

    return pytree.tree_map(fix, spec, is_leaf=lambda v: v is None or (isinstance(v, dict) and all(isinstance(k, int) for k in v) and bool(v)))


class _TooSlow(CaptureError):
    pass


class _Budget(TorchFunctionMode):
    """Gives an export up that has spent too long in slow steps (CPU time, so that a busy machine changes nothing)."""

    def __enter__(self) -> _Budget:
        self.last, self.slow = time.thread_time(), 0.0
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        now = time.thread_time()
        step, self.last = now - self.last, now
        if step > SLOW_CALL_SECONDS:
            self.slow += step
            if self.slow > SLOW_EXPORT_SECONDS:
                raise _TooSlow("with every dim dynamic the export is too slow; pass dynamic_shapes to insist")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about what the caller did not write: solver tracebacks, deprecations inside torch."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch._dynamo", "torch.export", "torch._export",
             "torch._subclasses.fake_tensor")  # fmt: skip
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass
class _Unlifted:
    gm: fx.GraphModule
    layout: Layout
    notes: list[str]
    barriers: dict[str, str]


def _unlifted(program: ExportedProgram, args: Any, kwargs: Any, flat: bool) -> _Unlifted:
    gm, layout = unlift(program)
    training = training_ops(gm.graph)
    if training is not None:
        raise TrainingModeError(f"{training} runs in training mode inside the graph: call model.eval() before exporting")
    barriers = functionalise(gm)
    set_convention(gm, layout, flat=flat)
    return _Unlifted(gm, layout, _bare_squeezes(gm), barriers)


def _bare_squeezes(gm: fx.GraphModule) -> list[str]:
    from fxconv.spelling import Op, canonical

    notes = []
    for node in gm.graph.nodes:
        target = str(node.target)
        if "squeeze" in target and "unsqueeze" not in target:
            op = canonical(node, gm)
            if isinstance(op, Op) and op.attrs.get("bare_squeeze"):
                notes.append(f"{node.name}: a bare squeeze() removes the batch dim at batch 1, there and in the original")
    return notes


def _frozen_reason(model: nn.Module) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules() if mode_dependent(m)})
    return f"{', '.join(kinds)} in eval mode" if kinds else ""


# ----------------------------------------------------------------- symbolic


def _symbolic(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    expected: Any = None,
    whole: bool = False,
) -> Captured:
    """``whole`` refuses a graph that hides much of the model in children that cannot be traced: parts do better."""
    twin = structural_copy(model)
    with _quiet():
        gm, barriers = trace(twin)
    strip_asserts(gm)
    if whole:
        _refuse_mostly_opaque(gm, barriers)
    _keep_root_hooks(twin, gm)
    if args is not None:
        _keep_output_types(gm, expected)
    notes: list[str] = []
    checks: list[shapes.SizeCheck] = []
    if args is not None:
        chosen = dynamic_shapes if dynamic_shapes is not None else "all"
        propagated, chosen = _propagate(gm, args, kwargs, chosen)
        notes += propagated
        checks = shapes.size_checks(gm, _fixed_sizes(gm, chosen))
    barriers = {**functionalise(gm), **barriers}
    if args is not None:
        notes += _bare_squeezes(gm)
    targets = {str(n.target) for n in gm.graph.nodes if n.op == "call_module" and _switches(gm, str(n.target))}
    name = type(model).__name__
    baked = _frozen_reason(model) if not targets else ""

    def rebuild(rewritten: fx.GraphModule) -> fx.GraphModule:
        kept = {str(n.target) for n in rewritten.graph.nodes if n.op == "call_module"}
        frozen = _frozen_reason(model) if targets - kept else baked
        result = finish(rewritten, name, frozen, None, model.forward, checks)
        _keep_root_hooks(twin, result)
        return result

    return Captured(gm, "module", "symbolic", args or (), kwargs, rebuild, notes, barriers, checks=checks)


def _switches(gm: fx.GraphModule, target: str) -> bool:
    return any(mode_dependent(m) for m in gm.get_submodule(target).modules())


def _refuse_mostly_opaque(gm: fx.GraphModule, barriers: dict[str, str]) -> None:
    def weights(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    hidden = {
        str(n.target): barriers[n.name]
        for n in gm.graph.nodes
        if n.op == "call_module" and "cannot be traced" in barriers.get(n.name, "")
    }
    opaque = sum(weights(gm.get_submodule(target)) for target in hidden)
    if opaque > 0.1 * weights(gm):
        target, reason = next(iter(hidden.items()))
        raise CaptureError(f"symbolic_trace keeps {target!r} whole: {reason}")


def _keep_root_hooks(source: nn.Module, gm: nn.Module) -> None:
    """Hooks of the model itself run around its forward, which is what was traced: they go on doing so."""
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
                 "_forward_hooks_always_called"):  # fmt: skip
        getattr(gm, kind).update(getattr(source, kind))


def _keep_output_types(gm: fx.GraphModule, expected: Any) -> None:
    """``fx`` turns an OrderedDict or dataclass output into plain containers: rebuild what the model returned."""
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    leaves, spec = pytree.tree_flatten(output.args[0])
    _, wanted = pytree.tree_flatten(expected)
    if spec == wanted or len(leaves) != wanted.num_leaves:
        return
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if any(n.args for n in placeholders):
        return
    names = [str(n.target) for n in placeholders]
    _, in_spec = pytree.tree_flatten((tuple(0 for _ in names), {}))
    output.args = (tuple(leaves),)
    gm.graph._codegen = _PyTreeCodeGen(_PyTreeInfo(names, in_spec, wanted))
    gm.recompile()


def _fixed_sizes(gm: fx.GraphModule, chosen: Any) -> set[tuple[str, int]]:
    """(placeholder, dim) that the shapes of the graph take for fixed by choice (``chosen`` as in ``propagate``)."""
    fixed: set[tuple[str, int]] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and chosen != "all":
            fixed |= {(node.name, d) for d, size in enumerate(value.shape) if not isinstance(size, torch.SymInt)}
    return fixed


def _propagate(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> tuple[list[str], Any]:
    """Shapes with dynamic dims; with fewer of them where the graph does not run so or pins them.

    Returns notes and what was made dynamic in the end.
    """
    double = shapes.needs_doubling(args, kwargs, dynamic if not isinstance(dynamic, str) else None)
    given = dynamic if not isinstance(dynamic, str) else None
    wide = shapes.doubled(args, kwargs, given) if double else (args, kwargs)
    tries = [(wide, dynamic), (wide, "batch"), ((args, kwargs), dynamic), ((args, kwargs), "none")]
    error: Exception | None = None
    for (use_args, use_kwargs), choice in tries:
        try:
            with _quiet():
                mode = shapes.propagate(gm, use_args, use_kwargs, choice)
        except ArgsError:
            raise
        except Exception as caught:
            error = error or caught
            continue
        if choice == "all" and shapes.pinned_symbols(mode.shape_env):  # type: ignore[arg-type]
            continue
        return ([] if choice == dynamic else [f"only these dims are dynamic: {choice}"]), choice
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    raise CaptureError(f"the graph does not run on fake inputs ({_one_line(error)})") from error


# ----------------------------------------------------------------- without inputs


def _without_args(model: nn.Module, mode: str) -> Captured:
    failure: Exception | None = None
    if mode != "export":
        try:
            captured = _symbolic(model, None, {}, None)
        except Exception as error:
            failure = error
        else:
            return _guess_shapes(model, captured)
    for guess in shapes.guesses(model):
        try:
            with torch.no_grad(), _quiet():
                structural_copy(model, own_buffers=True)(*guess)
        except Exception:
            continue
        captured = _with_args(model, guess, {}, None, "export" if mode == "export" else "auto")
        captured.args, captured.kwargs = (), {}
        captured.notes.append(_assumed(guess))
        return captured
    reason = f" ({_one_line(failure)})" if failure is not None else ""
    raise ArgsError(
        f"{type(model).__name__} needs example inputs: its forward cannot be traced without them{reason}; "
        "pass args=(tensor, …) with the shapes that the model is run on"
    )


def _guess_shapes(model: nn.Module, captured: Captured) -> Captured:
    for guess in shapes.guesses(model):
        if len(guess) != sum(n.op == "placeholder" and not n.args for n in captured.gm.graph.nodes):
            break
        try:
            captured.notes += _propagate(captured.gm, guess, {}, "all")[0]
        except Exception:
            continue
        captured.notes += _bare_squeezes(captured.gm)
        captured.notes.append(_assumed(guess))
        return captured
    for node in captured.gm.graph.nodes:
        node.meta.pop("val", None)
    captured.notes.append("needs args: no input shape could be guessed, so nothing that depends on shapes is rewritten")
    return captured


def _assumed(guess: tuple[Any, ...]) -> str:
    listed = ", ".join(str(tuple(g.shape)) for g in guess)
    return f"no args: shapes are those for an input of {listed}; pass args for other ranks or sizes"


# ----------------------------------------------------------------- ExportedProgram


def _from_program(program: ExportedProgram, args: tuple[Any, ...] | None, kwargs: dict[str, Any]) -> Captured:
    example = program.example_inputs
    if args is None and example is not None:
        args, kwargs = tuple(example[0]), dict(example[1])
    unlifted = _unlifted(program, args, kwargs, flat=True)
    layout = unlifted.layout

    def rebuild(rewritten: fx.GraphModule) -> ExportedProgram:
        return relift(rewritten, program, layout)

    return Captured(
        unlifted.gm, "aten", "export", args or (), kwargs, rebuild, unlifted.notes, unlifted.barriers
    )


# ----------------------------------------------------------------- checks


def _check_args(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    import inspect

    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ArgsError(f"args do not fit {type(model).__name__}.forward: {error}") from error
    except ValueError:
        return
    places = {t.device for t in [*model.parameters(), *model.buffers()]}
    if len(places) != 1:
        return
    (place,) = places
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.device != place and leaf.dim() > 0:
            raise ArgsError(f"an input is on {leaf.device} and the model on {place}: move one of them")


def _expected(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model computes, run on a copy of its buffers and inputs so that nothing of the caller's changes.

    Raises:
        ArgsError: the model itself does not run on these inputs.
    """
    runner = structural_copy(model, own_buffers=True)
    try:
        with torch.no_grad():
            return runner(*shapes.cloned(args), **shapes.cloned(kwargs))
    except Exception as error:
        raise ArgsError(f"{type(model).__name__} does not run on the given args ({_one_line(error)})") from error


def _difference(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any) -> str | None:
    """How the captured graph differs from the model on the caller's own inputs, or None."""
    runner = structural_copy(gm, own_buffers=True)
    _keep_root_hooks(gm, runner)
    with torch.no_grad():
        actual = runner(*shapes.cloned(args), **shapes.cloned(kwargs))
    left, left_spec = pytree.tree_flatten(expected)
    right, right_spec = pytree.tree_flatten(actual)
    if len(left) != len(right):
        return f"the captured graph returns {len(right)} values, the model {len(left)}"
    for a, b in zip(left, right, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return (
                f"the captured graph returns {tuple(b.shape)} {b.dtype} where the model returns {tuple(a.shape)} {a.dtype}"
            )
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()) if a.numel() and a.is_floating_point() else 0, equal_nan=True):
            return "the captured graph computes other values than the model on the given args"
    return None


def _one_line(error: BaseException | None) -> str:
    if error is None:
        return "unknown"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:200]}"
