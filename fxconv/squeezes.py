"""A squeeze that may also drop a dynamic dim (``squeeze()`` at batch 1), split into the part that never depends on sizes
and the part that does, which is moved behind the affine work that it commutes with.

``fc(conv(x).squeeze())`` becomes ``fc(conv(x).squeeze((2, 3))).squeeze((0,))``: at batch 1 both return ``[K]`` rather than
``[1, K]``, and the convolution and the Linear stand next to each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxconv.spelling import Op, canonical
from fxconv.spelling_common import Param, attribute

aten = torch.ops.aten

_UNARY = {"identity", "relu", "leaky_relu", "neg"}
_BINARY = {"add", "sub", "mul", "div"}


def sink_squeezes(gm: fx.GraphModule) -> list[str]:
    """Split every such squeeze of ``gm`` whose readers it commutes with; needs shapes. Returns notes for the report."""
    notes: list[str] = []
    changed = False
    for node in list(gm.graph.nodes):
        if not _depends_on_size(node, gm):
            continue
        moved = _Sink(gm, node).run()
        changed = changed or moved
        notes.append(
            f"{node.name}: a bare squeeze() removes the batch dim at batch 1, as in the original"
            + (" (it was moved behind what it commutes with)" if moved else "")
        )
    if changed:
        gm.graph.lint()
        gm.recompile()
    return notes


def _depends_on_size(node: fx.Node, gm: fx.GraphModule) -> bool:
    target = str(node.target)
    if node.op not in ("call_function", "call_method") or "squeeze" not in target or "unsqueeze" in target:
        return False
    op = canonical(node, gm)
    return isinstance(op, Op) and bool(op.attrs.get("bare_squeeze"))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1 or isinstance(size, torch.SymInt) and size.node.expr == 1


def _is_dynamic(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


class _Sink:
    """One squeeze, with the values behind it that may keep the dims which the squeeze might have dropped."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node) -> None:
        self.gm, self.node = gm, node
        self.x: fx.Node = node.all_input_nodes[0]
        sizes = tuple(self.x.meta["val"].shape)
        asked = self._asked(len(sizes))
        self.ones = [d for d in asked if _is_one(sizes[d])]
        kept = [d for d in range(len(sizes)) if d not in self.ones]
        self.unknown = [i for i, d in enumerate(kept) if d in asked and _is_dynamic(sizes[d])]
        self.rank = len(kept)

    def _asked(self, rank: int) -> list[int]:
        dim = self.node.args[1] if len(self.node.args) > 1 else self.node.kwargs.get("dim")
        if dim is None:
            return list(range(rank))
        items = dim if isinstance(dim, (list, tuple)) else (dim,)
        return [int(d) % rank for d in items]

    def run(self) -> bool:
        """Whether the graph was changed."""
        region = self._region()
        if not self.unknown or not region:
            return False
        graph = self.gm.graph
        with graph.inserting_before(self.node):
            inner = self._squeeze(self.x, self.ones, self.node.meta["val"]) if self.ones else self.x
        inside = {self.node, *region}
        for value in [self.node, *region]:
            outside = [user for user in value.users if user not in inside]
            if not outside:
                continue
            source = inner if value is self.node else value
            with graph.inserting_after(value):
                outer = self._squeeze(source, self.unknown, value.meta["val"])
            for user in outside:
                user.replace_input_with(value, outer)
        self.node.replace_all_uses_with(inner)
        graph.erase_node(self.node)
        return True

    def _squeeze(self, source: fx.Node, dims: list[int], val: torch.Tensor) -> fx.Node:
        if isinstance(self.node.target, torch._ops.OpOverload):
            made = self.gm.graph.call_function(aten.squeeze.dims, (source, list(dims)))
        else:
            made = self.gm.graph.call_method("squeeze", (source, tuple(dims)))
        made.meta = {k: v for k, v in self.node.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")}
        made.meta["val"] = val
        return made

    def _region(self) -> list[fx.Node]:
        """Nodes behind the squeeze that compute the same whether the dims are dropped before or after them.

        Empty where none of them has weights, or where what is squeezed is no affine operator: then nothing is won.
        """
        if not isinstance(canonical(self.x, self.gm), Op):
            return []
        region: list[fx.Node] = []
        inside = {self.node}
        weighted = False
        for node in self.gm.graph.nodes:
            if node.op not in ("call_function", "call_method", "call_module") or inside.isdisjoint(node.all_input_nodes):
                continue
            op = canonical(node, self.gm)
            if isinstance(op, Op) and self._commutes(op, inside):
                region.append(node)
                inside.add(node)
                weighted = weighted or op.name == "linear" or len(node.all_input_nodes) > 1
        return region if weighted else []

    def _commutes(self, op: Op, inside: set[fx.Node]) -> bool:
        first, *rest = op.inputs
        if op.name in _UNARY:
            return True
        behind = self.rank - 1 - max(self.unknown, default=-1)
        if op.name == "linear":
            constant = all(not isinstance(o, fx.Node) or o.op == "get_attr" for o in rest)
            return first in inside and constant and behind >= 1
        if op.name in _BINARY:
            return all(o in inside or self._broadcasts_behind(o, behind) for o in (first, *rest))
        return False

    def _broadcasts_behind(self, operand: Any, behind: int) -> bool:
        """Whether an operand has no extent at the dims that might be dropped, nor before them."""
        if isinstance(operand, fx.Node):
            if operand.op != "get_attr":
                return False
            operand = attribute(self.gm, str(operand.target))
        elif isinstance(operand, Param):
            operand = attribute(self.gm, operand.name)
        return not isinstance(operand, torch.Tensor) or operand.dim() <= behind
