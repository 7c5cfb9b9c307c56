"""Capture by ``torch.export``: which dims are dynamic, how long it may take, and what the graph then relies on."""

from __future__ import annotations

import contextlib
import inspect
import io
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxconv import shapes
from fxconv.capture_int import Namespaces, asked, symbolic_int
from fxconv.captured import Captured, frozen_reason, quiet
from fxconv.errors import CaptureError, TrainingModeError
from fxconv.functional import functionalise
from fxconv.hazards import check_not_quantised, check_plain, training_ops
from fxconv.program import Layout, fake_mode_of, relift, unlift
from fxconv.result import finish, set_convention
from fxconv.squeezes import sink_squeezes
from fxconv.structure import structural_copy

SLOW_CALL_SECONDS = 0.2
"""An export step that takes longer than this is bogged down in symbolic sizes: ordinary ones take about 5 ms."""
SLOW_EXPORT_SECONDS = 8.0
"""CPU seconds in such steps after which an export with every dim dynamic is given up. torchvision's Swin takes 225 s
with symbolic height and width and 5 s without; convolutional networks spend less than 1 s in such steps."""
SLOW_SHARE = 0.5
"""What share of all its CPU time such an export spends in slow steps at least. Between its passes any export takes time in
proportion to the size of the graph, 10 s of 100 with 10,000 nodes."""


@dataclass(frozen=True)
class Plan:
    """One way to export: which dims are dynamic, and whether a batch of 1 is repeated to 2.

    ``free`` are the leaves whose channels are dynamic too, see ``shapes.all_dynamic``.
    """

    dynamic: Any
    double: bool
    note: str
    free: frozenset[int] = frozenset()


def plans(args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, free: frozenset[int] = frozenset()) -> list[Plan]:
    double = shapes.needs_doubling(args, kwargs, dynamic_shapes)
    repeated = "captured at batch 2 (export specialises a batch of 1)" if double else ""
    if dynamic_shapes is not None:
        plans = [Plan(dynamic_shapes, True, repeated)] if double else []
        return [*plans, Plan(dynamic_shapes, False, "")]
    plans = [Plan("all", double, repeated, free), Plan("batch", double, repeated)]
    if double:
        plans.append(Plan("all", False, "captured at the batch of the example", free))
    plans.append(Plan("none", False, "captured at the sizes of the example only"))
    return plans


def export_module(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan) -> Captured:
    use_args, use_kwargs = shapes.doubled(args, kwargs, _given(plan)) if plan.double else (args, kwargs)
    use_args, use_kwargs = shapes.distinct(use_args, use_kwargs)
    try:
        program = run_export(model, use_args, use_kwargs, plan.dynamic, free=plan.free)
    except NotImplementedError:
        # sympy, asked to solve (h // 32) = 1, which a feature map that is one element high asks.
        images = shapes.image_dims((use_args, use_kwargs))
        larger = _export_larger(model, use_args, use_kwargs, plan, images) if plan.dynamic == "all" else None
        if larger is None:
            raise
        program = larger
    pinned, only_ones = _pinned_dims(program)
    ones = _dims_fixed_by_ones(program) if plan.dynamic == "all" else set()
    if (pinned or ones) and plan.dynamic in ("all", "batch"):
        larger = _export_larger(model, use_args, use_kwargs, plan, pinned | ones) if only_ones or not pinned else None
        if larger is not None:
            program, pinned = larger, set()
        elif pinned:
            program = run_export(model, use_args, use_kwargs, plan.dynamic, pinned, plan.free)
    frozen = frozen_reason(model)
    captured = unlifted(program, flat=False)
    gm, layout = captured.gm, captured.layout
    name, forward = type(model).__name__, model.forward
    checks = shapes.size_checks(gm, _static_by_choice(gm, plan, pinned))
    return Captured(
        gm,
        "aten",
        "export",
        args,
        kwargs,
        lambda rewritten: finish(rewritten, name, frozen, gm, layout, forward, checks),
        [n for n in (plan.note, *captured.notes) if n],
        captured.barriers,
        checks=checks,
    )


def _static_by_choice(gm: fx.GraphModule, plan: Plan, pinned: set[Any]) -> set[tuple[str, int]]:
    """(placeholder, dim) that the graph has fixed although the model might not: to be checked when it runs."""
    fixed: set[tuple[str, int]] = set()
    for index, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        value = node.meta.get("val")
        for dim, size in enumerate(shapes.sizes(value) if isinstance(value, torch.Tensor) else ()):
            chosen = plan.dynamic != "all" or (index, dim) in pinned or dim == 0 or size == 1
            if not shapes.is_dynamic(size) and chosen:
                fixed.add((node.name, dim))
        if isinstance(value, torch.Tensor):
            fixed |= {(node.name, dim) for dim in shapes.fixed_by_ones(value)}
    return fixed


def _given(plan: Plan) -> Any:
    return None if isinstance(plan.dynamic, str) else plan.dynamic


def run_export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Any,
    pinned: set[Any] | None = None,
    free: frozenset[int] = frozenset(),
) -> ExportedProgram:
    if dynamic in ("all", "batch"):
        positional, named = shapes.all_dynamic((args, kwargs), dynamic, free)
        spec: Any = {"args": positional, "kwargs": named}
        if pinned:
            spec = _without_dims(spec, pinned)
        given: Any = (*spec["args"], *spec["kwargs"].values())
        given = _by_name(model, args, kwargs, given)
    else:
        given = None if dynamic == "none" else dynamic

    def export(namespaces: Namespaces) -> tuple[ExportedProgram, Namespaces]:
        budget = _Budget() if dynamic == "all" else contextlib.nullcontext()
        # A failed export prints the graph that it has so far to stderr.
        with quiet(), contextlib.redirect_stderr(io.StringIO()), asked() as found, symbolic_int(namespaces), budget:
            program = torch.export.export(structural_copy(model), args, kwargs or None, dynamic_shapes=given, strict=False)
        return program, found

    program, found = export({})
    namespaces: Namespaces = {}
    while found.keys() - namespaces.keys() and dynamic in ("all", "batch"):
        # The more sizes stay symbolic, the more code is seen to ask for one.
        namespaces |= found
        try:
            wider, found = export(namespaces)
        except Exception:
            break
        if _dynamic_dims(wider) <= _dynamic_dims(program):
            break
        program = wider
    return program


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], specs: tuple[Any, ...]) -> Any:
    """export wants a tuple without keyword arguments and without ``*args``, and a dict by argument name with them."""
    signature = inspect.signature(model.forward)
    if not kwargs and all(p.kind is not p.VAR_POSITIONAL for p in signature.parameters.values()):
        return specs
    bound = signature.bind(*args, **kwargs)
    values = iter(specs)
    named: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name not in bound.arguments:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            named[name] = tuple(next(values) for _ in bound.arguments[name])
        elif parameter.kind is not parameter.VAR_KEYWORD and name not in kwargs:
            named[name] = next(values)
    by_key = dict(zip(kwargs, specs[len(args) :], strict=True))
    for name, parameter in signature.parameters.items():
        if name in by_key:
            named[name] = by_key[name]
        elif parameter.kind is parameter.VAR_KEYWORD and name in bound.arguments:
            named.update({k: by_key[k] for k in bound.arguments[name]})
    return named


def _export_larger(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan, pinned: set[Any]
) -> ExportedProgram | None:
    """The program of an example twice or four times as large in the pinned dims, where that leaves none pinned."""
    for factor in (2, 4):
        try:
            more_args, more_kwargs = shapes.enlarged(args, kwargs, pinned, factor)
            program = run_export(model, more_args, more_kwargs, plan.dynamic, free=plan.free)
        except Exception:
            return None
        sizes = _input_sizes(program)
        if not _pinned_dims(program)[0] and all(shapes.is_dynamic(sizes[i][d]) for i, d in pinned):
            return program
    return None


def _input_sizes(program: ExportedProgram) -> dict[int, tuple[Any, ...]]:
    """Leaf index of an input → its sizes."""
    return {i: shapes.sizes(value) for i, value in _inputs(program).items()}


def _dynamic_dims(program: ExportedProgram) -> int:
    """How many dims of inputs are dynamic and not pinned to one value."""
    return sum(shapes.is_dynamic(s) for sizes in _input_sizes(program).values() for s in sizes) - len(_pinned_dims(program)[0])


def _inputs(program: ExportedProgram) -> dict[int, torch.Tensor]:
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    return {i: values[name] for i, name in enumerate(names) if isinstance(values.get(name), torch.Tensor)}


def _dims_fixed_by_ones(program: ExportedProgram) -> set[tuple[int, int]]:
    return {(i, dim) for i, value in _inputs(program).items() for dim in shapes.fixed_by_ones(value)}


def _pinned_dims(program: ExportedProgram) -> tuple[set[Any], bool]:
    """(leaf index, dim) of inputs that stay symbolic although the graph holds for one value only; see ``shapes``."""
    mode = fake_mode_of(program.graph)
    if mode is None or mode.shape_env is None:
        return set(), False
    symbols, only_ones = shapes.pinned_symbols(mode.shape_env)
    if not symbols:
        return set(), False
    found = set()
    for index, value in _inputs(program).items():
        for dim, size in enumerate(shapes.sizes(value)):
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols:
                found.add((index, dim))
    return found, only_ones


def _without_dims(spec: Any, pinned: set[Any]) -> Any:
    index = -1

    def fix(leaf: Any) -> Any:
        nonlocal index
        index += 1
        if not isinstance(leaf, dict):
            return leaf
        return {dim: value for dim, value in leaf.items() if (index, dim) not in pinned} or None

    def is_leaf(value: Any) -> bool:
        return value is None or (isinstance(value, dict) and bool(value) and all(isinstance(k, int) for k in value))

    return pytree.tree_map(fix, spec, is_leaf=is_leaf)


class _TooSlow(CaptureError):
    pass


class _Budget(TorchFunctionMode):
    """Gives an export up that has spent too long in slow steps (CPU time, so that a busy machine changes nothing)."""

    def __enter__(self) -> _Budget:
        self.started = self.last = time.thread_time()
        self.slow = 0.0
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        now = time.thread_time()
        step, self.last = now - self.last, now
        if step > SLOW_CALL_SECONDS:
            self.slow += step
            if self.slow > max(SLOW_EXPORT_SECONDS, SLOW_SHARE * (now - self.started)):
                raise _TooSlow("with every dim dynamic the export is too slow; pass dynamic_shapes to insist")
        return func(*args, **(kwargs or {}))


@dataclass
class _Unlifted:
    gm: fx.GraphModule
    layout: Layout
    notes: list[str]
    barriers: dict[str, str]


def unlifted(program: ExportedProgram, flat: bool) -> _Unlifted:
    """The program as a functional graph module that is called as its model was."""
    gm, layout = unlift(program)
    training = training_ops(gm.graph)
    if training is not None:
        raise TrainingModeError(f"{training} runs in training mode: call model.eval() before exporting")
    barriers = functionalise(gm)
    set_convention(gm, layout, flat=flat)
    return _Unlifted(gm, layout, sink_squeezes(gm), barriers)


def from_program(program: ExportedProgram, args: tuple[Any, ...] | None, kwargs: dict[str, Any]) -> Captured:
    check_not_quantised(program.graph_module)
    for name, tensor in {**program.state_dict, **program.constants}.items():
        if isinstance(tensor, torch.Tensor):
            check_plain(name, tensor)
    example = program.example_inputs
    if args is None and example is not None:
        args, kwargs = tuple(example[0]), dict(example[1])
    plain = unlifted(program, flat=True)
    layout = plain.layout

    def rebuild(rewritten: fx.GraphModule) -> ExportedProgram:
        return relift(rewritten, program, plain.gm, layout)

    return Captured(plain.gm, "aten", "export", args or (), kwargs, rebuild, plain.notes, plain.barriers)
