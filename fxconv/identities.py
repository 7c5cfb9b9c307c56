"""Nodes that do nothing in eval mode, out of a captured graph: dropout, ``nn.Identity``, stochastic depth."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from fxconv.spelling import Op, base_name, base_type, canonical
from fxconv.spelling_common import attribute

_NOTHING = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
    "stochastic_depth", "alias", "lift_fresh", "positive",
}  # fmt: skip
"""Functions that return their argument, the same storage and strides. ``contiguous`` and ``clone`` may not."""


def remove_identities(gm: fx.GraphModule, barriers: Mapping[str, str]) -> None:
    """Let the readers of such a node read what it reads; nodes in ``barriers`` (a hook, a write in place) stay.

    They cost little and hide much: a Linear behind a dropout stands next to what is before it. Lifting sees through
    them, but where neither side is rewritten they would stay in the result.
    """
    for node in list(gm.graph.nodes):
        if node.name in barriers or not _does_nothing(node, gm):
            continue
        (source,) = node.all_input_nodes
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
    gm.recompile()


def _does_nothing(node: fx.Node, gm: fx.GraphModule) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        module = attribute(gm, str(node.target))
        known = base_type(module) or nn.Module
        dropout = issubclass(known, nn.modules.dropout._DropoutNd) and not (module.training and module.p)
        return dropout or known is nn.Identity
    if node.op not in ("call_function", "call_method") or base_name(node, gm) not in _NOTHING:
        return False
    found = canonical(node, gm)
    return isinstance(found, Op) and found.name == "identity"
