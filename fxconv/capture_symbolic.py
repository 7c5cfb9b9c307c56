"""Capture by ``symbolic_trace``: modules stay modules, and what cannot be traced stays whole."""

from __future__ import annotations

from typing import Any, TypeAlias

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
    free: frozenset[int] = frozenset(),
) -> Captured:
    """``free``: see ``shapes.all_dynamic``.

    ``whole`` refuses a graph that hides much of the model in children that cannot be traced: parts do better.
    """
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
        propagated, chosen, pinned = propagate_shapes(gm, args, kwargs, chosen, free)
        notes += propagated
        checks = shapes.size_checks(gm, _fixed_sizes(gm, chosen, pinned))
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


def _fixed_sizes(gm: fx.GraphModule, chosen: Any, pinned: Dims) -> set[tuple[str, int]]:
    """(placeholder, dim) that the shapes of the graph take for fixed although the model might not.

    ``chosen`` and ``pinned`` as from ``propagate_shapes``.
    """
    fixed: set[tuple[str, int]] = set()
    for index, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        dims = shapes.fixed_by_ones(value) | {d for i, d in pinned if i == index}
        static = {d for d, size in enumerate(shapes.sizes(value)) if not shapes.is_dynamic(size)}
        dims |= static if chosen != "all" else static & {0}
        fixed |= {(node.name, d) for d in dims}
    return fixed


Dims: TypeAlias = "frozenset[tuple[int, int]]"
"""(placeholder index, dim)."""


class _Propagation:
    """One graph, run on fake inputs with fewer and fewer dynamic dims until it runs and pins none of them."""

    def __init__(self, gm: fx.GraphModule, free: frozenset[int]) -> None:
        self.gm, self.free = gm, free
        self.error: Exception | None = None
        self.pinned: Dims = frozenset()

    def runs(self, inputs: tuple[Any, Any], dynamic: Any, static: Dims = frozenset()) -> bool:
        """Whether the graph runs so. Sets ``pinned``: dims that stay symbolic although the graph holds for one size."""
        try:
            with quiet():
                mode = shapes.propagate(self.gm, *inputs, dynamic, self.free, static)
        except ArgsError:
            raise
        except Exception as caught:
            self.error = self.error or caught
            return False
        symbols = shapes.pinned_symbols(mode.shape_env)[0] if dynamic == "all" and mode.shape_env is not None else set()
        self.pinned = frozenset(
            (i, d)
            for i, value in self.inputs()
            for d, size in enumerate(shapes.sizes(value))
            if shapes.is_dynamic(size) and size.node.expr.free_symbols & symbols
        )
        return True

    def inputs(self) -> list[tuple[int, torch.Tensor]]:
        values = [n.meta.get("val") for n in self.gm.graph.nodes if n.op == "placeholder"]
        return [(i, v) for i, v in enumerate(values) if isinstance(v, torch.Tensor)]

    def fixed_by_ones(self) -> bool:
        return any(shapes.fixed_by_ones(v) for _, v in self.inputs())

    def frees(self, images: set[tuple[int, int]]) -> bool:
        """Whether the heights and widths are dynamic, and nothing is pinned."""
        dynamic = {(i, d) for i, v in self.inputs() for d, size in enumerate(shapes.sizes(v)) if shapes.is_dynamic(size)}
        return images <= dynamic and not self.pinned and not self.fixed_by_ones()


def propagate_shapes(
    gm: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Any,
    free: frozenset[int] = frozenset(),
) -> tuple[list[str], Any, Dims]:
    """Shapes with dynamic dims; with fewer of them where the graph does not run so or pins them.

    Returns notes, what was made dynamic in the end, and which dims of it were made static because the graph pins them.
    """
    given = dynamic if not isinstance(dynamic, str) else None
    double = shapes.needs_doubling(args, kwargs, given)
    wide = shapes.doubled(args, kwargs, given) if double else (args, kwargs)
    run = _Propagation(gm, free)
    if run.runs(wide, dynamic):
        ones, pinned = run.fixed_by_ones(), run.pinned
        if not ones and not pinned:
            return [], dynamic, frozenset()
        # Larger images, in whose feature maps no size is 1, may pin nothing.
        images = shapes.image_dims(wide)
        leaves = pytree.tree_leaves(wide)
        small = dynamic == "all" and images and all(leaves[i].numel() <= 2**20 for i, _ in images)
        if small and run.runs(shapes.enlarged(wide[0], wide[1], images, 4), dynamic) and run.frees(images):
            return [], dynamic, frozenset()
        if run.runs(wide, dynamic, pinned) and not run.pinned:
            return [], dynamic, pinned
    for inputs, choice in ((wide, "batch"), ((args, kwargs), dynamic), ((args, kwargs), "none")):
        if run.runs(inputs, choice) and not run.pinned:
            return ([] if choice == dynamic else [f"only these dims are dynamic: {choice}"]), choice, frozenset()
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    raise CaptureError(f"the graph does not run on fake inputs ({one_line(run.error)})") from run.error
