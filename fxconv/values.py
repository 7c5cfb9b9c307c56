"""The values of a graph under rewriting: which node defines each now, who reads it, and what is alive.

Counts are kept as a value's node changes; what no node reads any more is dead and reads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from fxconv.cost import Price
from fxconv.expr import Apply, Map, Node, Sum, Value, View, operands
from fxconv.steps import Layout


@dataclass(frozen=True)
class Original:
    """How the fx graph computes a value: its node there, the values that node reads, and its price.

    ``layout`` is in the order of the tensor's dims, ``memory`` in that of its strides (a permuted tensor's differ);
    ``viewed`` says whether a reader takes a view of it that needs just those strides.
    """

    node: fx.Node
    definition: Node
    reads: tuple[Value, ...]
    price: Price
    layout: Layout
    memory: Layout
    allowed: bool
    viewed: bool


@dataclass(kw_only=True)
class Values:
    """Who computes and who reads each value.

    Attributes:
        originals: how the fx graph computes the values that came from it.
        uses: how often each live value is read, by others and as a root.
        users: the values that read a value, and how often.
        restated: values that are computed by fxconv's operators though their node is still the original's.
        table: each node's value, so that equal expressions are one value.
        owners: the values inside an fx node's definition that read a value.
        levels: a number above that of all that a value reads, as long as `ordered`.
        ordered: whether no value was redefined by one from behind it.
    """

    originals: dict[Value, Original] = field(default_factory=dict)
    uses: dict[Value, int] = field(default_factory=dict)
    users: dict[Value, dict[Value, int]] = field(default_factory=dict)
    restated: set[Value] = field(default_factory=set)
    table: dict[Node, Value] = field(default_factory=dict)
    owners: dict[Value, list[Value]] = field(default_factory=dict)
    levels: dict[Value, int] = field(default_factory=dict)
    ordered: bool = True

    def unchanged(self, v: Value) -> bool:
        """Whether the value is still computed by the fx node it came from."""
        original = self.originals.get(v)
        return original is not None and v.node is original.definition and v not in self.restated

    def reads(self, v: Value) -> tuple[Value, ...]:
        """The values that v's computation reads at present."""
        if self.unchanged(v):
            return self.originals[v].reads
        return operands(v.node)

    def alone(self, v: Value) -> bool:
        """Whether v has one use, and is not computed by the original graph anyway."""
        return self.uses.get(v, 0) <= 1 and not self.unchanged(v)

    def users_of(self, v: Value) -> list[Value]:
        """The values that read v at present."""
        return list(self.users.get(v, ()))

    def anchored(self, v: Value) -> bool:
        """Whether nodes of the original graph read v, so that it must come in the original's dims."""
        if v not in self.originals:
            return False
        return self.uses.get(v, 0) > sum(self.users.get(v, {}).values()) or any(self.unchanged(u) for u in self.users.get(v, ()))

    def intern(self, x: Value) -> Value:
        """The value itself, or an equal one that is known already; new operands are interned too."""
        if x in self.uses or x in self.originals or self.table.get(x.node) is x:
            return x
        node = x.node
        if isinstance(node, Sum):
            terms = tuple(self.intern(t) for t in node.terms)
            if terms != node.terms:
                node = Sum(terms)
        elif isinstance(node, (Map, View, Apply)):
            inner = self.intern(node.x)
            if inner is not node.x:
                node = _with_operand(node, inner)
        found = self.table.get(node)
        if found is not None:
            return found
        x.node = node
        self.table[node] = x
        self.levels[x] = max((self.levels.get(y, 0) for y in operands(node)), default=0)
        return x

    def depends(self, x: Value, v: Value) -> bool:
        """Whether computing x reads v; values of the original graph from before v can't.

        Levels only fall along what is read as long as no value was redefined by one from behind it (`ordered`): then
        values from before v need not be followed at all.
        """
        levels, originals, ordered = self.levels, self.originals, self.ordered
        limit, made = levels.get(v, 0), v not in originals
        stack, seen = [x], {x}
        while stack:
            y = stack.pop()
            if y is v:
                return True
            if levels.get(y, 0) < limit + (made and y in originals):
                if ordered or self.unchanged(y):
                    continue
            for z in self.reads(y):
                if z not in seen:
                    seen.add(z)
                    stack.append(z)
        return False

    def rewire(self, v: Value, node: Node, restate: bool) -> dict[Value, int]:
        """Set a value's node and count uses anew; the values whose readers or reads have changed, with their uses before."""
        alive = v in self.uses
        before = self.reads(v) if alive else ()
        v.node = node
        if restate:
            self.restated.add(v)
        else:
            self.restated.discard(v)
        if not alive:
            return {}
        touched = {v: self.uses[v]}
        after = self.reads(v)
        limit = self.levels.get(v, 0) - (v in self.originals)
        if self.ordered and any(self.levels.get(x, 0) > limit for x in after):
            self.ordered = False
        for x in after:
            self.use(x, v, touched)
        for x in before:
            self.drop(x, v, touched)
        return touched

    def use(self, x: Value, by: Value | None, touched: dict[Value, int]) -> None:
        """Count one more reader of x (None: a root); ``touched`` takes the uses before of all that this brings to life."""
        stack: list[tuple[Value, Value | None]] = [(x, by)]
        while stack:
            x, by = stack.pop()
            if by is not None:
                mine = self.users.setdefault(x, {})
                mine[by] = mine.get(by, 0) + 1
            count = self.uses.get(x, 0)
            self.uses[x] = count + 1
            touched.setdefault(x, count)
            if count == 0:
                stack.extend((y, x) for y in self.reads(x))

    def drop(self, x: Value, by: Value, touched: dict[Value, int]) -> None:
        """Count one reader of x less; what nothing reads any more reads nothing either."""
        stack = [(x, by)]
        while stack:
            x, by = stack.pop()
            mine = self.users[x]
            mine[by] -= 1
            if not mine[by]:
                del mine[by]
            touched.setdefault(x, self.uses[x])
            self.uses[x] -= 1
            if self.uses[x] == 0:
                del self.uses[x]
                stack.extend((y, x) for y in self.reads(x))


def _with_operand(node: Map | View | Apply, x: Value) -> Node:
    if isinstance(node, Map):
        return Map(x, node.roles, node.kernel)
    if isinstance(node, View):
        return View(x, node.splits, node.groups)
    return Apply(x, node.op, node.sizes, node.kept, node.shifts)
