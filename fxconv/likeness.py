"""Which values of a graph are alike: what the search found at one need not be searched for at the others.

Networks are made of repeated blocks. `Likeness.around` describes a value's surroundings, up to a number of steps along
what is read and by whom, in everything that a search at it looks at: nodes, roles, sizes, which kernels are one and the
same, counts of readers, prices, layouts, and of the weights' numbers what laws ask of them. Values whose descriptions
are equal have the same steps open to them; should they differ further away, a better step may be overlooked, never a
wrong one taken.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import fx

from fxconv.expr import Apply, Const, Leaf, Map, Node, Sum, Value, View, operands
from fxconv.kernel import Kernel
from fxconv.law import Law
from fxconv.state import State

REACH = 3
"""Steps along which surroundings are looked at, one for each move of a search; values inside an operator take no step."""

MOST = 160
"""Values that surroundings have at most; further ones are left out."""

Described = tuple[int, tuple[Kernel, ...]]
"""What can be said of a node or kernel without its stored tensors, and those."""


class Likeness:
    """Descriptions of values under one search."""

    def __init__(self, state: State, laws: Sequence[Law]) -> None:
        self._state = state
        self._numbers = [law.numbers for law in laws if law.numbers is not None]
        self._nodes: dict[int, tuple[Node, int, tuple[Kernel, ...]]] = {}
        self._originals: dict[Value, int] = {}
        self._kernels: dict[Kernel, Described] = {}
        self._kinds: dict[Hashable, int] = {}

    def around(self, v: Value) -> Hashable:
        """A description of v and its surroundings."""
        state = self._state
        order, number, far = [v], {v: 0}, [0]
        tensors: dict[Kernel, int] = {}
        found: list[Hashable] = []
        for x in order:  # which grows
            original = state.originals.get(x)
            unchanged = state.unchanged(x)
            near = list(operands(x.node))
            near += original.reads if original is not None and unchanged else ()
            near += sorted(state.users.get(x, ()), key=lambda u: u.id)
            distance = far[number[x]]
            if distance < REACH:
                for y in near:
                    if y not in number and len(order) < MOST:
                        number[y] = len(order)
                        order.append(y)
                        far.append(distance + (y in state.uses))
            kind, stored = self._node(x)
            found.append((
                kind, tuple([tensors.setdefault(k, len(tensors)) for k in stored]), tuple([number.get(y, -1) for y in near]),
                state.uses.get(x, 0), unchanged, x in state.restated, x in state.folding,
                state.layouts.get(x), self._original(x) if original is not None else None,
            ))  # fmt: skip
        return tuple(found)

    def _kind(self, described: Hashable) -> int:
        """A number for a description, short to compare."""
        return self._kinds.setdefault(described, len(self._kinds))

    def _original(self, x: Value) -> int:
        """How the graph computed x, and what reads it there."""
        if x not in self._originals:
            was = self._state.originals[x]
            read_by = self._read_by(was.node)
            self._originals[x] = self._kind((was.price, was.layout, was.memory, was.allowed, was.viewed, read_by))
        return self._originals[x]

    def _node(self, x: Value) -> Described:
        node = x.node
        if id(node) not in self._nodes:
            kernel: Kernel | None = None
            what: Hashable
            if isinstance(node, Map):
                kernel, what = node.kernel, (node.roles, node.x.sizes)
            elif isinstance(node, Const):
                kernel, what = node.kernel, (node.sizes, node.varies)
            elif isinstance(node, View):
                what = (node.x.sizes, node.splits, node.groups)
            elif isinstance(node, Apply):
                what = (type(node.op), node.op.name, str(node.op.op.attrs), node.op.dims, node.sizes, node.kept, node.shifts)
            else:
                assert isinstance(node, (Leaf, Sum))
                what = x.sizes
            kind, stored = self._kernel(kernel) if kernel is not None else (-1, ())
            asked = tuple(ask(x) for ask in self._numbers)
            self._nodes[id(node)] = node, self._kind((type(node), what, kind, asked)), stored
        return self._nodes[id(node)][1:]

    def _kernel(self, kernel: Kernel) -> Described:
        """A kernel by how it is derived; chains of them are deep, so nothing here recurses."""
        stack = [kernel]
        while stack:
            k = stack[-1]
            missing = [p for p in k.parents if p not in self._kernels]
            if missing:
                stack += missing
                continue
            stack.pop()
            if k in self._kernels:
                continue
            name = k.spec[0] if isinstance(k.spec, tuple) and k.spec else k.spec
            if name in ("stored", "literal"):
                self._kernels[k] = self._kind((name, k.shape)), (k,)
                continue
            parts = [self._kernels[p] for p in k.parents]
            stored = tuple(dict.fromkeys(s for _, part in parts for s in part))
            place = {s: i for i, s in enumerate(stored)}
            same = tuple((kind, tuple(place[s] for s in part)) for kind, part in parts)
            self._kernels[k] = self._kind((k.spec, k.shape, k.uniform, same)), stored
        return self._kernels[kernel]

    def _read_by(self, node: fx.Node) -> Hashable:
        """The operators that read an fx node, and those that read them: a slice may have to be contiguous for them."""
        return tuple((self._called(u), tuple(map(self._called, u.users))) for u in node.users)

    def _called(self, node: fx.Node) -> str:
        """What a node calls; of a module its class, since no two have the same name."""
        module = isinstance(node.target, str) and node.op == "call_module"
        return type(self._state.lifter.gm.get_submodule(str(node.target))).__name__ if module else str(node.target)
