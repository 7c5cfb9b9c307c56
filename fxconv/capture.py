"""A private graph of any model, with shapes, and the way back to the same kind of thing.

Two dialects: "aten" from ``torch.export`` (parameters as ``get_attr``), "module" from ``symbolic_trace``
(``call_module``). The caller's model is never traced itself but a structural copy that shares its tensors.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from fxconv import shapes
from fxconv.capture_export import export_module, from_program, plans
from fxconv.capture_symbolic import keep_root_hooks, propagate_shapes, symbolic_module
from fxconv.captured import Captured, one_line, quiet
from fxconv.errors import ArgsError, CaptureError, OptionError
from fxconv.hazards import check_model, hooked_modules, unwrap
from fxconv.inplace import restore_inplace
from fxconv.squeezes import sink_squeezes
from fxconv.structure import structural_copy

__all__ = ["Captured", "capture", "restore_inplace"]


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
        return from_program(model, given, dict(kwargs or {}))
    model = unwrap(model)
    check_model(model)
    if given is None and kwargs:
        given = ()
    if given is None:
        return _without_args(model, mode)
    _check_args(model, given, kwargs or {})
    return _with_args(model, given, dict(kwargs or {}), dynamic_shapes, mode)


# ----------------------------------------------------------------- with example inputs


def _with_args(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, mode: str) -> Captured:
    expected = expected_output(model, args, kwargs)
    hooked = hooked_modules(model)
    taken, free = _free_channels(model, args, kwargs) if dynamic_shapes is None else (frozenset[int](), frozenset[int]())
    export: list[_Attempt] = [
        ("export", lambda plan=plan: export_module(model, args, kwargs, plan))  # type: ignore[misc]
        for plan in plans(args, kwargs, dynamic_shapes, free)
    ]
    whole = mode == "auto"
    symbolic: list[_Attempt] = [("symbolic", lambda: symbolic_module(model, args, kwargs, dynamic_shapes, expected, whole, free))]
    # Export traces a hook's effect on values and loses its side effects; as a leaf module a hooked one keeps both.
    order = {"export": export, "symbolic": symbolic}.get(mode, [*symbolic, *export] if hooked else [*export, *symbolic])
    failures: list[str] = []
    misfits = 0
    hopeless: set[str] = set()
    fallback: Captured | None = None
    for kind, attempt in order:
        if kind in hopeless:
            continue
        try:
            captured = attempt()
            problem = difference(captured.gm, args, kwargs, expected)
        except Exception as error:
            # A TrainingModeError too: the model is in eval mode, and random all the same (Monte Carlo dropout).
            problem = one_line(error)
            misfits += dynamic_shapes is not None and _do_not_fit(error)
            if misfits == len(export):
                raise ArgsError(
                    f"dynamic_shapes do not fit the given args ({problem}): they are those of torch.export.export, one entry for "
                    "each argument of forward, by position or by name, which maps dims of that argument"
                ) from error
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
        _check_channels(captured, taken)
        return captured
    if fallback is not None:
        fallback.notes[:0] = [f"capture attempt failed: {reason}" for reason in dict.fromkeys(failures)]
        fallback.notes.append("the batch is fixed to that of the example, although the model runs at others")
        return fallback
    reasons = "; ".join(dict.fromkeys(failures))
    raise CaptureError(f"{type(model).__name__} could not be captured whole ({reasons})")


def _do_not_fit(error: Exception) -> bool:
    """Whether an export failed on its dynamic shapes alone: their structure, a dim that is not there, or a size out of range."""
    if isinstance(error, IndexError):
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        return Path(torch.__file__).parent in Path(where).parents and "export" in Path(where).parts[-2]
    if isinstance(error, UserError):
        return error.error_type is UserErrorType.INVALID_INPUT
    return isinstance(error, ConstraintViolationError) and "not in range" in str(error)


def _batch_is_fixed(gm: fx.GraphModule) -> bool:
    """Whether no input has a dynamic dim 0, where some input has a dim 0."""
    values = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.dim() > 0]
    return bool(tensors) and not any(shapes.is_dynamic(shapes.sizes(t)[0]) for t in tensors)


def _runs_doubled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the model runs on twice the batch."""

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 else leaf

    return _runs(model, *pytree.tree_map(twice, (args, kwargs)))


def _check_batch_of_one(model: nn.Module, captured: Captured) -> None:
    """A graph captured at two or more is run once at 1: models may treat that size in another way (``if n == 1:``)."""
    dynamic = [
        (n.name, size.node.expr)
        for n in captured.gm.graph.nodes
        if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)
        for size in shapes.sizes(n.meta["val"])[:1]
        if isinstance(size, torch.SymInt) and size.node.expr.is_symbol
    ]
    leaves = [leaf for leaf in pytree.tree_leaves((captured.args, captured.kwargs)) if isinstance(leaf, torch.Tensor)]
    if not dynamic or not leaves or any(leaf.dim() == 0 or leaf.shape[0] < 2 for leaf in leaves):
        return

    def first(leaf: Any) -> Any:
        return leaf[:1] if isinstance(leaf, torch.Tensor) else leaf

    args, kwargs = pytree.tree_map(first, (captured.args, captured.kwargs))
    try:
        expected = expected_output(model, args, kwargs)
    except ArgsError:
        return
    try:
        problem = difference(captured.gm, args, kwargs, expected)
    except Exception as error:
        problem = one_line(error)
    if problem is not None:
        name, symbol = dynamic[0]
        text = f"captured for a batch of 2 or more ({problem} at 1): transform again with a batch of 1"
        captured.checks.append(shapes.SizeCheck(symbol >= 2, ((symbol, name, 0),), text))
        captured.notes.append(f"the batch must be 2 or more: at 1 the model does something else ({problem})")


def _free_channels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[frozenset[int], frozenset[int]]:
    """The leaves, among images and volumes, that the model takes with some other number of channels, and with any.

    The second are those whose channels neither weights nor indices fix.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    some: set[int] = set()
    every: set[int] = set()
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < 4 or leaf.shape[1] == 0:
            continue
        others = [torch.cat([leaf, leaf], 1), torch.cat([leaf, leaf[:, :1]], 1)]
        others += [leaf[:, :1]] if leaf.shape[1] > 1 else []
        runs = [_runs(model, *pytree.tree_unflatten([*leaves[:i], other, *leaves[i + 1 :]], spec)) for other in others]
        if any(runs):
            some.add(i)
        if all(runs):
            every.add(i)
    return frozenset(some), frozenset(every)


def _check_channels(captured: Captured, taken: frozenset[int]) -> None:
    """Where the model takes other numbers of channels and the graph does not, the result says so."""
    placeholders = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
    known = {(name, dim) for check in captured.checks for _, name, dim in check.symbols}
    for i in taken if len(placeholders) > max(taken, default=-1) else ():
        value = placeholders[i].meta.get("val")
        if not isinstance(value, torch.Tensor) or (placeholders[i].name, 1) in known:
            continue
        size = shapes.sizes(value)[1]
        if not shapes.is_dynamic(size):
            captured.checks.append(shapes.exact(placeholders[i], 1, int(size)))


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        expected_output(model, args, kwargs)
    except ArgsError:
        return False
    return True


_Attempt = tuple[str, Callable[[], Captured]]


def _traced_hooks(hooked: list[str]) -> str:
    names = ", ".join(repr(name) if name else "the model itself" for name in hooked[:3])
    return (
        f"the forward hooks of {names} were traced: what they do to values is in the graph, what else they do "
        "(recording, printing) is not"
    )


# ----------------------------------------------------------------- without inputs


def _without_args(model: nn.Module, mode: str) -> Captured:
    failure: Exception | None = None
    if mode != "export":
        try:
            captured = symbolic_module(model, None, {}, None)
        except Exception as error:
            failure = error
        else:
            return _guess_shapes(model, captured)
    for guess in shapes.guesses(model):
        try:
            with torch.no_grad(), quiet():
                structural_copy(model, own_buffers=True)(*guess)
        except Exception:
            continue
        captured = _with_args(model, guess, {}, None, "export" if mode == "export" else "auto")
        captured.args, captured.kwargs = (), {}
        captured.notes.append(_assumed(guess))
        return captured
    reason = f" ({one_line(failure)})" if failure is not None else ""
    raise ArgsError(
        f"{type(model).__name__} needs example inputs: its forward cannot be traced without them{reason}; "
        "pass args=(tensor, …) with the shapes that the model is run on"
    )


def _guess_shapes(model: nn.Module, captured: Captured) -> Captured:
    for guess in shapes.guesses(model):
        if len(guess) != sum(n.op == "placeholder" and not n.args for n in captured.gm.graph.nodes):
            break
        try:
            captured.notes += propagate_shapes(captured.gm, guess, {}, "all")[0]
        except Exception:
            continue
        captured.notes += sink_squeezes(captured.gm)
        captured.notes.append(_assumed(guess))
        return captured
    for node in captured.gm.graph.nodes:
        node.meta.pop("val", None)
    captured.notes.append("needs args: no input shape could be guessed, so nothing that depends on shapes is rewritten")
    return captured


def _assumed(guess: tuple[Any, ...]) -> str:
    listed = ", ".join(str(tuple(g.shape)) for g in guess)
    return f"no args: shapes are those for an input of {listed}; pass args for other ranks or sizes"


# ----------------------------------------------------------------- checks


def _check_args(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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


def expected_output(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model computes, run on a copy of its buffers and inputs so that nothing of the caller's changes.

    Raises:
        ArgsError: the model itself does not run on these inputs.
    """
    runner = structural_copy(model, own_buffers=True)
    try:
        with torch.no_grad():
            return runner(*shapes.cloned(args), **shapes.cloned(kwargs))
    except Exception as error:
        raise ArgsError(f"{type(model).__name__} does not run on the given args ({one_line(error)})") from error


def difference(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any) -> str | None:
    """How the captured graph differs from the model on the caller's own inputs, or None."""
    runner = structural_copy(gm, own_buffers=True)
    keep_root_hooks(gm, runner)
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
            return f"the captured graph returns {_kind(b)} where the model returns {_kind(a)}"
        if not _close(a, b):
            return "the captured graph computes other values than the model on the given args"
    return None


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Captured graphs run the same kernels, so this is equality up to their own run-to-run rounding."""
    if not a.is_floating_point() and not a.is_complex():
        return torch.equal(a, b)
    scale = float(torch.nan_to_num(a.abs(), posinf=0.0).max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
