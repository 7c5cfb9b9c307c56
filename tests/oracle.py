"""The numeric value of an expression, computed slot by slot: the oracle that lifting, laws and emission are tested by."""

from __future__ import annotations

import torch

from fxconv import kernel as kernels
from fxconv.constant_images import map_constant, view_constant
from fxconv.expr import Const, Leaf, Map, Sum, Value, View, walk
from fxconv.refs import Ref, add_constants


def full(t: torch.Tensor) -> Const:
    return Const(tuple(t.shape), (True,) * t.dim(), kernels.literal(t))


def evaluate(root: Value, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value's numbers over its slots; ``leaves`` gives the leaves' by name, over theirs."""
    done: dict[Value, Const] = {}
    for v in walk([root]):
        node = v.node
        if isinstance(node, Leaf):
            done[v] = full(leaves[node.name].double().reshape(node.sizes))
        elif isinstance(node, Const):
            k = node.kernel.tensor()
            shape = [s if f else 1 for s, f in zip(node.sizes, node.varies, strict=True)]
            done[v] = full(k.reshape(shape).expand(node.sizes))
        elif isinstance(node, Map):
            out = map_constant(node, done[node.x])
            assert not isinstance(out, str), out
            t = out.kernel.tensor()
            shape = [s if f else 1 for s, f in zip(out.sizes, out.varies, strict=True)]
            done[v] = full(t.reshape(shape).expand(out.sizes))
        elif isinstance(node, View):
            done[v] = view_constant(node, done[node.x])
        elif isinstance(node, Sum):
            done[v] = add_constants([done[t] for t in node.terms])
        else:
            raise TypeError(f"the oracle evaluates affine expressions, not {node}")
    return done[root].kernel.tensor()


def as_tensor(ref: Ref, slots: torch.Tensor) -> torch.Tensor:
    """A value's numbers over slots, as the tensor that a reference describes."""
    order = [s for d in ref.dims for s in d]
    rest = [s for s in range(slots.dim()) if s not in order]
    return slots.permute(*order, *rest).reshape(tuple(int(s) for s in ref.shape))
