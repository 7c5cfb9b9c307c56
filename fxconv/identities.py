"""Nodes that do nothing in eval mode, out of a captured graph: dropout, ``nn.Identity``, stochastic depth, ``0 + x``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from fxconv.spelling import Op, base_name, base_type, canonical
from fxconv.spelling_common import attribute
from fxconv.strides import read_as_view

_NOTHING = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
    "stochastic_depth", "alias", "lift_fresh", "positive",
}  # fmt: skip
"""Functions that return their argument, the same storage and strides. ``contiguous`` and ``clone`` may not."""


def remove_identities(gm: fx.GraphModule, barriers: Mapping[str, str]) -> None:
    """Let the readers of such a node read what it reads; nodes in ``barriers`` (a hook, a write in place) stay.

    They cost little and hide much: a Linear behind a dropout stands next to what is before it. Lifting sees through
    them, but where neither side is rewritten they would stay in the result. The code of ``gm`` is not compiled anew: a copy of its
    graph is what is handed back.
    """
    for node in list(gm.graph.nodes):
        if node.name in barriers or not _does_nothing(node, gm):
            continue
        (source,) = node.all_input_nodes
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)


def _does_nothing(node: fx.Node, gm: fx.GraphModule) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        module = attribute(gm, str(node.target))
        known = base_type(module) or nn.Module
        dropout = issubclass(known, nn.modules.dropout._DropoutNd) and not (module.training and module.p)
        return dropout or known is nn.Identity
    if node.op not in ("call_function", "call_method"):
        return False
    name = base_name(node, gm)
    if name not in _NOTHING and name.strip("_") not in _NEUTRAL:
        return False
    found = canonical(node, gm)
    return isinstance(found, Op) and (found.name == "identity" or _is_neutral(node, found))


_NEUTRAL = frozenset("add iadd radd sub isub mul imul rmul div truediv itruediv".split())
"""Operators that change nothing with a 0 or a 1 as the other operand; ``sum`` of a list of tensors begins with 0."""


def _is_neutral(node: fx.Node, op: Op) -> bool:
    """Whether a number is added or multiplied that changes nothing. The result is a tensor of its own, as it must stay
    where the caller gets it and its operand too."""
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1}.get(op.name)
    if neutral is None or len(op.inputs) != 2:
        return False
    a, b = op.inputs
    number, tensor = (a, b) if isinstance(a, (int, float)) and op.name in ("add", "mul") else (b, a)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != neutral or not isinstance(tensor, fx.Node):
        return False
    before, after = tensor.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.dtype != after.dtype or any(u.op == "output" for u in node.users):
        return False
    return before.stride() == after.stride() or not read_as_view(node)
