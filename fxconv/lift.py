"""From an fx graph to expressions: every affine operator becomes a value, everything else a barrier with a reason.

The graph's nodes are read through `spelling.canonical`, so nothing here knows how an operator was spelled. Layout
operators (view, permute, flatten, …) give no node at all: only another grouping of the same value's slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from fxconv import kernel as kernels
from fxconv.axes import Size, shape_of
from fxconv.constants import Constants
from fxconv.expr import Const, Leaf, Value
from fxconv.refs import LiftError, Ref
from fxconv.spelling import Barrier, Op, Operand, Param, canonical, elementwise
from fxconv.spelling_common import attribute


@dataclass
class Lifted:
    """The expressions of a graph.

    Attributes:
        refs: for each node with a floating tensor value, its value and how its dims group the value's slots.
        ops: the canonical operator of each lifted node.
        barriers: why a node was not lifted; "" where its users carry its meaning (split, chunk).
        producers: the node that a value was first lifted from (layout operators share their operand's value).
    """

    refs: dict[fx.Node, Ref] = field(default_factory=dict)
    ops: dict[fx.Node, Op] = field(default_factory=dict)
    barriers: dict[fx.Node, str] = field(default_factory=dict)
    producers: dict[Value, fx.Node] = field(default_factory=dict)

    def is_layout(self, node: fx.Node) -> bool:
        """Whether the node only regroups the dims of a value that an earlier node produced."""
        ref = self.refs.get(node)
        return ref is not None and self.producers.get(ref.value) is not node


class Lifter:
    """Lifts one graph; `operators` adds a method per canonical operator."""

    def __init__(self, gm: fx.GraphModule, barriers: Mapping[str, str], functions: bool = False) -> None:
        """
        Args:
            gm: the graph.
            barriers: reasons not to lift nodes, by name.
            functions: whether to lift elementwise functions (GELU, tanh) that nothing but layout passes through: it lets
                convolutions on either side agree on one, and costs a search over larger regions.
        """
        self.gm = gm
        self.functions = functions
        self.barrier_names = barriers
        self.constants = Constants(gm)
        self.lifted = Lifted()

    def run(self) -> Lifted:
        from fxconv.operators import lift_operator

        for node in self.gm.graph.nodes:
            if node.op == "output":
                continue
            ref: Ref | None = None
            if self.constants.is_constant(node):
                value = self.tensor_of(node)
                if value is not None and value.is_floating_point():
                    ref = self.filled(node) or self.constant(node)
            elif node.op != "placeholder":
                op = canonical(node, self.gm, self.barrier_names)
                if self.functions and isinstance(op, Barrier) and node.name not in self.barrier_names:
                    op = elementwise(node, self.gm) or op
                if isinstance(op, Barrier):
                    self.lifted.barriers[node] = op.reason
                else:
                    try:
                        ref = lift_operator(self, node, op)
                        self.lifted.ops[node] = op
                    except LiftError as error:
                        self.lifted.barriers[node] = str(error)
            if ref is None:
                ref = self.leaf(node)
            if ref is not None:
                self.lifted.refs[node] = ref
                if ref.value not in self.lifted.producers:
                    self.lifted.producers[ref.value] = node
                    ref.value.origin = node
        return self.lifted

    def tensor_of(self, node: fx.Node) -> torch.Tensor | None:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            return val
        if node.op == "get_attr":
            found = self.constants.value(node)
            return found if isinstance(found, torch.Tensor) else None
        return None

    def leaf(self, node: fx.Node) -> Ref | None:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or not val.is_floating_point() or val.layout != torch.strided:
            return None
        shape = shape_of(val)
        sizes = tuple(s for s in shape if s != 1)
        count = iter(range(len(sizes)))
        dims = tuple((next(count),) if s != 1 else () for s in shape)
        return Ref(Value(Leaf(node.name, sizes)), dims)

    # -- constants ----------------------------------------------------------------------------------------------------

    def is_constant(self, operand: Operand) -> bool:
        return isinstance(operand, (int, float)) or self.constants.is_constant(operand)

    def shape(self, operand: Operand) -> tuple[Size, ...]:
        """The shape of a tensor operand."""
        if isinstance(operand, (int, float)):
            return ()
        if isinstance(operand, fx.Node):
            val = operand.meta.get("val")
            if isinstance(val, torch.Tensor):
                return shape_of(val)
        return tuple(self.constants.value(operand).shape)

    def kernel(self, operand: Operand) -> kernels.Kernel:
        """A constant operand as a lazy float64 kernel of its own shape."""
        if isinstance(operand, (int, float)):
            return kernels.uniform((), float(operand))
        constants = self.constants
        if isinstance(operand, fx.Node):
            kind, name = "node", constants.spelled(operand)
        else:
            kind, name = "param", operand.name if isinstance(operand, Param) else str(operand)

        def values() -> torch.Tensor:
            return constants.value(operand).detach().to(torch.float64)

        k = kernels.stored(values, self.shape(operand), (id(constants), kind, name))
        if isinstance(operand, Param) or isinstance(operand, fx.Node) and operand.op == "get_attr":
            # Structure tests read the weight as it is stored, without a float64 copy.
            path = operand.name if isinstance(operand, Param) else str(operand.target)
            k._facts.setdefault("native", attribute(constants.gm, path))
            k._facts.setdefault("path", path)
        return k

    def filled(self, node: fx.Node) -> Ref | None:
        """A constant whose entries are known to be the same, because the graph makes it so; else None."""
        from fxconv.operators import lift_operator

        op = canonical(node, self.gm, self.barrier_names) if node.op.startswith("call_") else None
        return lift_operator(self, node, op) if isinstance(op, Op) and op.name == "full" else None

    def constant(self, operand: Operand) -> Ref:
        k = self.kernel(operand)
        sizes = tuple(s for s in k.shape if s != 1)
        count = iter(range(len(sizes)))
        dims = tuple((next(count),) if s != 1 else () for s in k.shape)
        return Ref(Value(Const(sizes, (True,) * len(sizes), kernels.reshape(k, sizes))), dims)

    def ref(self, operand: Operand) -> Ref:
        """A tensor operand (an earlier node, or a constant) as a reference.

        Raises:
            LiftError: the operand is not a floating-point tensor.
        """
        if isinstance(operand, fx.Node):
            found = self.lifted.refs.get(operand)
            if found is not None:
                return found
            raise LiftError(f"{operand.name} is not a floating-point tensor")
        if operand is None:
            raise LiftError("an operand is missing")
        return self.constant(operand)


def lift(gm: fx.GraphModule, barriers: Mapping[str, str]) -> Lifted:
    """Lift a captured graph (functional, with ``meta["val"]`` on its nodes)."""
    return Lifter(gm, barriers).run()
