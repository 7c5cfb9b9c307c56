"""Advice on how a model ends: an activation that the usual loss function already contains, or contains better.

Not a rewrite: dropping the activation changes the output, so it is the user's to do.
"""

from __future__ import annotations

from torch import fx

from .report import Remark
from .spelling import Op, canonical, user_name

_ADVICE = {
    "Softmax": "drop it before CrossEntropyLoss, which applies it",
    "Softmax2d": "drop it before CrossEntropyLoss, which applies it",
    "LogSoftmax": "redundant before CrossEntropyLoss",
    "Sigmoid": "prefer BCEWithLogitsLoss on the logits",
}

_LAYOUT = ("identity", "reshape", "permute", "slice", "select")


def advice(gm: fx.GraphModule) -> tuple[Remark, ...]:
    """A remark of kind "advice" for each output that is the result of Softmax, LogSoftmax or Sigmoid.

    Views and other layout operators between it and the output are looked through. Works in both dialects.
    """
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    remarks = {}
    for node in output.all_input_nodes:
        while isinstance(op := canonical(node, gm), Op) and op.name in _LAYOUT and isinstance(op.inputs[0], fx.Node):
            node = op.inputs[0]
        name = user_name(node, gm) if node.op.startswith("call_") else ""
        if name in _ADVICE:
            remarks[node.name] = Remark("advice", node.name, reason=f"the model ends in {name}: {_ADVICE[name]}")
    return tuple(remarks.values())
