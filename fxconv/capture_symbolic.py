"""Capture by ``symbolic_trace``: modules stay modules, and what cannot be traced stays whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxconv import shapes
from fxconv.captured import Captured, frozen_reason, one_line, quiet
from fxconv.errors import ArgsError, CaptureError
from fxconv.functional import functionalise
from fxconv.hazards import mode_dependent
from fxconv.result import HOOKS, finish
from fxconv.squeezes import sink_squeezes
from fxconv.structure import structural_copy
from fxconv.trace import strip_asserts, trace


def symbolic_module(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    expected: Any = None,
    whole: bool = False,
) -> Captured:
    """``whole`` refuses a graph that hides much of the model in children that cannot be traced: parts do better."""
    twin = structural_copy(model, own_buffers=True)
    with quiet():
        gm, barriers = trace(twin, model)
    strip_asserts(gm)
    if whole:
        _refuse_mostly_opaque(gm, barriers)
    keep_root_hooks(twin, gm)
    if args is not None:
        _keep_output_types(gm, expected)
    notes: list[str] = []
    checks: list[shapes.SizeCheck] = []
    if args is not None:
        chosen = dynamic_shapes if dynamic_shapes is not None else "all"
        propagated, chosen = propagate_shapes(gm, args, kwargs, chosen)
        notes += propagated
        checks = shapes.size_checks(gm, _fixed_sizes(gm, chosen))
    barriers = {**functionalise(gm), **barriers}
    if args is not None:
        notes += sink_squeezes(gm)
    targets = {str(n.target) for n in gm.graph.nodes if n.op == "call_module" and _switches(gm, str(n.target))}
    name = type(model).__name__
    baked = frozen_reason(model) if not targets else ""

    def rebuild(rewritten: fx.GraphModule) -> fx.GraphModule:
        kept = {str(n.target) for n in rewritten.graph.nodes if n.op == "call_module"}
        frozen = frozen_reason(model) if targets - kept else baked
        result = finish(rewritten, name, frozen, gm, None, model.forward, checks)
        keep_root_hooks(twin, result)
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


def keep_root_hooks(source: nn.Module, gm: nn.Module) -> None:
    """Hooks of the model itself run around its forward, which is what was traced: they go on doing so."""
    for kind in HOOKS:
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
        if node.op != "placeholder" or not isinstance(value, torch.Tensor):
            continue
        dims = shapes.fixed_by_ones(value)
        dims |= {d for d, size in enumerate(shapes.sizes(value)[:1]) if not shapes.is_dynamic(size)}
        if chosen != "all":
            dims |= {d for d, size in enumerate(shapes.sizes(value)) if not shapes.is_dynamic(size)}
        fixed |= {(node.name, d) for d in dims}
    return fixed


def _any_fixed_by_ones(gm: fx.GraphModule) -> bool:
    values = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    return any(isinstance(v, torch.Tensor) and shapes.fixed_by_ones(v) for v in values)


def _larger(inputs: tuple[Any, Any], dynamic: Any) -> list[tuple[tuple[Any, Any], Any]]:
    """Larger images, in whose feature maps no size is 1 (which would pin the size of the image)."""
    leaves = pytree.tree_leaves(inputs)
    images = shapes.image_dims(inputs)
    if dynamic != "all" or not images or any(leaves[i].numel() > 2**20 for i, _ in images):
        return []
    return [(shapes.enlarged(*inputs, images, 4), dynamic)]


def _all_dynamic(gm: fx.GraphModule, dims: set[tuple[int, int]]) -> bool:
    """Whether these (placeholder index, dim) are dynamic."""
    values = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    return all(i < len(values) and shapes.is_dynamic(shapes.sizes(values[i])[d]) for i, d in dims)


def propagate_shapes(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> tuple[list[str], Any]:
    """Shapes with dynamic dims; with fewer of them where the graph does not run so or pins them.

    Returns notes and what was made dynamic in the end.
    """
    double = shapes.needs_doubling(args, kwargs, dynamic if not isinstance(dynamic, str) else None)
    given = dynamic if not isinstance(dynamic, str) else None
    wide = shapes.doubled(args, kwargs, given) if double else (args, kwargs)
    larger = _larger(wide, dynamic)
    # What a larger example does not free of sizes that are 1 is taken as it is, and checked when it runs.
    tries = [(wide, dynamic), *larger, *([(wide, dynamic)] if larger else []), (wide, "batch"), ((args, kwargs), dynamic)]
    tries.append(((args, kwargs), "none"))
    error: Exception | None = None
    for i, ((use_args, use_kwargs), choice) in enumerate(tries):
        try:
            with quiet():
                mode = shapes.propagate(gm, use_args, use_kwargs, choice)
        except ArgsError:
            raise
        except Exception as caught:
            error = error or caught
            continue
        if choice == "all" and mode.shape_env is not None and shapes.pinned_symbols(mode.shape_env)[0]:
            continue
        if i < 2 * len(larger) and _any_fixed_by_ones(gm):
            continue
        if 0 < i < 1 + len(larger) and not _all_dynamic(gm, shapes.image_dims((args, kwargs))):
            continue
        return ([] if choice == dynamic else [f"only these dims are dynamic: {choice}"]), choice
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    raise CaptureError(f"the graph does not run on fake inputs ({one_line(error)})") from error
