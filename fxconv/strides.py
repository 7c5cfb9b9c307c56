"""Slices are views: who reads one copies it, or takes its strides, or needs it contiguous.

A rewrite that makes a value a slice of a larger tensor (siblings merged into one operator) hands views to readers that had
contiguous tensors. What that costs, and whether it is allowed at all, depends on the readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from fxconv.axes import Size, product, same, shape_of
from fxconv.expr import Apply, Kept, Map, New, Shared, Sum, View, is_selection
from fxconv.steps import Plan

if TYPE_CHECKING:
    from fxconv.expr import Value
    from fxconv.pricing import PricedValues

COPYING = frozenset(
    "conv linear matmul addmm einsum avg_pool adaptive_avg_pool max_pool interpolate im2col mm bmm baddbmm "
    "scaled_dot_product_attention multi_head_attention_forward "
    "softmax _softmax log_softmax _log_softmax layer_norm native_layer_norm group_norm native_group_norm instance_norm".split()
)
"""Operators that copy an operand which is not contiguous before they compute (ATen calls ``contiguous()`` on it), or read
it so much slower that it comes to the same."""

VIEWING = frozenset(("view", "_unsafe_view", "view_as", "as_strided"))
"""Operators that fail on strides that they can't express; ``reshape`` copies instead."""


@dataclass(frozen=True)
class Reading:
    """How a slice is read.

    Attributes:
        copies: readers that copy it by themselves.
        contiguous: whether some reader fails unless it is contiguous (or nobody knows what that reader does).
    """

    copies: int
    contiguous: bool


def sliced_at(plan: Plan) -> int | None:
    """The dim that a plan's last step slices, if its result is no contiguous tensor."""
    if not plan.steps or plan.steps[-1].kind != "slice":
        return None
    step = plan.steps[-1]
    d = int(step.attrs["dim"])
    return d if any(s != 1 for s in step.shape[:d]) else None


def reading(state: PricedValues, v: Value, boundary: Sequence[Size]) -> Reading:
    """Who reads a slice.

    Args:
        state: the state.
        v: the value that is a slice.
        boundary: the shape from the sliced dim on; the strides of the dims before it don't fit those.
    """
    copies, contiguous = 0, False
    original = state.originals.get(v)
    readers = list(state.users.get(v, {}).items())
    for u, count in readers:  # which grows
        if state.unchanged(u):
            continue
        if isinstance(u.node, View):
            readers += state.users.get(u, {}).items()
        copies += count * _copies(u)
    if original is None:
        return Reading(copies, False)
    inner = product(boundary)
    stack: list[tuple[fx.Node, bool]] = [(original.node, True)]
    seen: set[fx.Node] = set()
    while stack:
        node, plain = stack.pop()
        for user in node.users:
            if user in seen or not _alive(state, user):
                continue
            seen.add(user)
            op = state.lifter.lifted.ops.get(user)
            name = _name(user)
            if user.op == "output":
                contiguous = True
            elif user.op == "call_module" and not _is_torch(state, user):
                contiguous = True
            elif _is_view(state, user):
                if name in VIEWING and not (plain and _fits(user, inner)):
                    contiguous = True
                stack.append((user, plain and name != "permute" and name != "transpose"))
            elif (op.name if op is not None else name) in COPYING:
                copies += 1
    return Reading(copies, contiguous)


def read_as_view(node: fx.Node) -> bool:
    """Whether a reader of a tensor, directly or through permutations, fails on strides that it can't view."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            name = _name(user)
            if name in VIEWING:
                return True
            if name in ("permute", "transpose", "t", "alias", "detach") and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def needs_copy(state: PricedValues, v: Value) -> bool:
    """Whether a slice must be made contiguous for its readers."""
    if not is_selection(v.node):
        return False
    plan = state.best_plan(v)
    at = sliced_at(plan) if plan is not None else None
    return plan is not None and at is not None and reading(state, v, plan.steps[-1].shape[at:]).contiguous


def _copies(u: Value) -> int:
    """Whether a rewritten reader copies its operand."""
    node = u.node
    if isinstance(node, Map):
        if is_selection(node):
            return 0
        return int(bool(node.contracted) or not all(isinstance(r, (Kept, Shared, New)) for r in node.roles))
    if isinstance(node, Apply):
        return int(not all(node.kept))
    return int(not isinstance(node, (Sum, View)))


def _alive(state: PricedValues, node: fx.Node) -> bool:
    """Whether a node of the original graph is still computed by itself."""
    ref = state.lifter.lifted.refs.get(node)
    if node not in state.lifter.lifted.ops or ref is None:
        return True
    return ref.value in state.uses and (state.unchanged(ref.value) or state.lifter.lifted.is_layout(node))


def _is_view(state: PricedValues, node: fx.Node) -> bool:
    op = state.lifter.lifted.ops.get(node)
    return op is not None and op.name in ("reshape", "permute", "identity", "expand") or _name(node) in VIEWING


def _fits(node: fx.Node, inner: Size) -> bool:
    """Whether a view keeps a dim boundary where the strides of a slice break."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return False
    shape = shape_of(val)
    return any(same(product(shape[k:]), inner) for k in range(len(shape) + 1))


def _is_torch(state: PricedValues, node: fx.Node) -> bool:
    module = state.lifter.gm.get_submodule(str(node.target))
    return isinstance(module, nn.Module) and type(module).__module__.startswith("torch.nn.")


def _name(node: fx.Node) -> str:
    """The bare name of what a node calls."""
    if node.op == "call_method":
        return str(node.target)
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).split("::")[-1]
    return str(getattr(node.target, "__name__", node.target))
