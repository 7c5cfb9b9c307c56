"""The search's state: which node defines each value now, what is alive, and what it all costs — kept incrementally.

Replacing a value's node changes the costs of that value, of what comes alive or dies with it, and of the users whose plan
depends on them; nothing else is recomputed. Every change is logged, so that a trial is undone by playing back the log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxconv.axes import as_size, shape_of
from fxconv.cost import CostModel, Price, score
from fxconv.expr import (
    Apply,
    Const,
    Kept,
    Leaf,
    Map,
    New,
    Node,
    Resample,
    Sum,
    Value,
    View,
    has_resample,
    is_selection,
    operands,
    walk,
)
from fxconv.kernel import Kernel
from fxconv.lift import Lifter
from fxconv.original import layout_copies, original_steps
from fxconv.plan import Chain, Layout, Plan, Step, Target, gathered, plan_map, plan_view
from fxconv.strides import read_as_view, reading, sliced_at
from fxconv.sums import concatenated, plan_sum

IMPOSSIBLE = Price(seconds=1e6, macs=1e18, params=1e18, launches=1e9)
"""The price of a node that no operator of the target computes."""

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


@dataclass
class _Change:
    """One entry of the log: what a value's node was, and what was priced otherwise then."""

    v: Value
    node: Node
    restated: bool
    total: Price
    priced: dict[Value, tuple[Price | None, Layout | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class _MapPrice:
    """What writing a map or a view comes to: its price, the layout of the result, and the slice that it ends in."""

    price: Price
    layout: Layout
    sliced: tuple[Step, int] | None


def _storage(w: Kernel) -> Hashable:
    """What two readers of one stored tensor have in common."""
    path: Hashable = w._facts.get("path")
    return path if path is not None else w


@dataclass
class State:
    """Values of one graph under rewriting."""

    lifter: Lifter
    model: CostModel
    target: Target
    objective: str
    target_name: str | None = None
    originals: dict[Value, Original] = field(default_factory=dict)
    uses: dict[Value, int] = field(default_factory=dict)
    users: dict[Value, dict[Value, int]] = field(default_factory=dict)
    prices: dict[Value, Price] = field(default_factory=dict)
    layouts: dict[Value, Layout] = field(default_factory=dict)
    restated: set[Value] = field(default_factory=set)
    table: dict[Node, Value] = field(default_factory=dict)
    owners: dict[Value, list[Value]] = field(default_factory=dict)
    levels: dict[Value, int] = field(default_factory=dict)
    total: Price = field(default_factory=Price)
    ordered: bool = True
    folding: set[Value] = field(default_factory=set)
    _log: list[_Change] = field(default_factory=list)
    _map_prices: dict[object, _MapPrice | None] = field(default_factory=dict)
    _sum_prices: dict[object, tuple[Price, Layout]] = field(default_factory=dict)

    # -- construction -------------------------------------------------------------------------------------------------

    def load(self, roots: Iterable[Value]) -> None:
        """Take over a lifted graph; ``roots`` are the values that barriers and outputs read."""
        lifted = self.lifter.lifted
        counted: set[fx.Node] = set()
        steps_of: dict[fx.Node, list[Step]] = {}
        readers: Counter[Hashable] = Counter()
        for node in lifted.producers.values():
            op = lifted.ops.get(node)
            steps_of[node] = original_steps(self.lifter, node, op) if op is not None else []
            readers.update({_storage(w) for step in steps_of[node] for w in step.weights})
        for value, node in lifted.producers.items():
            ref = lifted.refs[node]
            op = lifted.ops.get(node)
            steps = steps_of[node]
            price = Price()
            for step in steps:
                # A weight that several operators share is stored once: a rewrite of one of them frees only its part.
                price = price + self.model.price(step, lambda w: readers[_storage(w)])
            if op is not None and steps:
                for step, sharing in layout_copies(self.lifter, op, self.model.number):
                    price = price + self.model.price(step).times(1 / sharing)
            reads: list[Value] = []
            for operand in op.inputs if op is not None else ():
                if isinstance(operand, fx.Node):
                    # Weights computed in the graph are computed anew at every call.
                    computing = self._constant_price(operand, counted)
                    price = price + computing
                    if computing.launches:
                        self.folding.add(value)
                if isinstance(operand, fx.Node) and (found := lifted.refs.get(operand)) is not None:
                    reads.append(found.value)
            allowed = all(self._allowed(step) for step in steps)
            memory = self._memory(node, ref.dims)
            viewed = memory != ref.dims and read_as_view(node)
            self.originals[value] = Original(node, value.node, tuple(reads), price, ref.dims, memory, allowed, viewed)
            self.levels[value] = len(self.levels) + 1
        for inner in walk(list(lifted.producers)):
            self.table.setdefault(inner.node, inner)
            for x in operands(inner.node):
                if x not in self.originals:
                    self.owners.setdefault(x, []).append(inner)
        self.roots = list(dict.fromkeys(roots))
        for v in self.roots:
            self._use(v, None)

    def _constant_price(self, node: fx.Node, counted: set[fx.Node]) -> Price:
        """What the original graph spends on a constant that it computes, charged to the first reader."""
        price, stack = Price(), [node]
        while stack:
            n = stack.pop()
            if n in counted or not n.op.startswith("call_") or not self.lifter.is_constant(n):
                continue
            counted.add(n)
            val = n.meta.get("val")
            if isinstance(val, torch.Tensor):
                shape = shape_of(val)
                price = price + self.model.price(Step("scale", shape, shape))
            stack.extend(n.all_input_nodes)
        return price

    def honest_total(self) -> Price:
        """The total with operators that the target forbids at their own price, not the search's penalty."""
        total = Price()
        for v in self.uses:
            total = total + (self.originals[v].price if self.unchanged(v) else self.prices.get(v, Price()))
        return total

    def forbidden(self) -> list[Value]:
        """Values that are still computed by an operator that the target forbids."""
        return [v for v in self.uses if self.unchanged(v) and not self.originals[v].allowed]

    def _memory(self, node: fx.Node, dims: Layout) -> Layout:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or val.layout != torch.strided:
            return dims
        strides = [self.model.number(as_size(s)) for s in val.stride()]
        real = [d for d in range(len(dims)) if dims[d]]
        if any(strides[d] == 0 for d in real):
            return dims
        order = sorted(real, key=lambda d: -strides[d])
        return dims if order == real else tuple(dims[d] for d in order)

    def _allowed(self, step: Step) -> bool:
        if step.kind == "linear":
            return self.target.linear
        if step.kind in ("conv", "conv_transpose"):
            return len(step.weights[0].shape) - 2 in self.target.conv
        return True

    # -- questions ----------------------------------------------------------------------------------------------------

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
        return list(self.users.get(v, ()))

    def score(self) -> float:
        return score(self.total, self.objective)

    def layout(self, v: Value) -> Layout:
        stack = [v]
        while stack:
            x = stack[-1]
            missing = [y for y in self.reads(x) if y not in self.layouts] if x not in self.layouts else []
            if missing:
                stack.extend(missing)
                continue
            if x not in self.layouts:
                self._price(x)
            stack.pop()
        return self.layouts[v]

    def best_plan(self, v: Value, bias: Const | None = None) -> Plan | None:
        """The cheapest way to write a value that is a map or a view."""
        node = v.node
        if isinstance(node, View):
            return plan_view(node, self.layout(node.x))
        assert isinstance(node, Map)
        plans = plan_map(node, self.layout(node.x), self.target, bias)
        if not plans:
            return None
        if self.target.full_kernel:
            return plans[0]
        if bias is not None and len(plans) > 1:
            # The sum that adds the bias is planned for the layout that the map has without.
            plain = self.best_plan(v)
            plans = [p for p in plans if plain is not None and p.layout == plain.layout] or plans
        wanted = self._wanted(v)
        return min(plans, key=lambda p: score(self._steps_price(p.steps) + self._onward(v, p, wanted), self.objective))

    def _onward(self, v: Value, plan: Plan, wanted: Layout | None) -> Price:
        """What a plan will cost the users of its result: in the layout that they want, or in the operand's order."""
        if wanted is not None:
            chain = Chain(v.sizes, plan.layout)
            chain.to(wanted)
            return self._steps_price(chain.steps)
        if len(plan.steps) > 1 and any(s.kind == "permute" for s in plan.steps):
            last = plan.steps[-1]
            return self.model.price(Step("permute", last.shape, last.shape))
        return Price()

    def _wanted(self, v: Value) -> Layout | None:
        """The order of slots in which a dense map is read, where that is settled: by the nodes of the original graph
        that read it, or by the other terms of a sum; through views and sums that have no order of their own."""
        if not _flexible(v):
            return None
        seen, views, order = v, list[View](), list[int]()
        while not order:
            if self.anchored(seen):
                order = [s for g in self.originals[seen].memory for s in g]
                break
            users = self.users.get(seen, ())
            if len(users) != 1 or not self.alone(seen):
                return None
            (seen,) = users
            if self.unchanged(seen):
                return None
            if isinstance(seen.node, Map) and has_resample(seen.node):
                # Interpolation wants what it slides along last.
                moving = {r.src: r for r in seen.node.roles if isinstance(r, Resample)}
                order = sorted(range(seen.node.x.rank), key=lambda s: (s in moving, s))
            elif isinstance(seen.node, View):
                views.append(seen.node)
            elif not isinstance(seen.node, Sum):
                return None
            else:
                others = [t for t in seen.node.terms if isinstance(t.node, (Map, Apply)) and not _flexible(t)]
                order = [s for g in self.layout(others[0]) for s in g] if others else []
        for view in reversed(views):
            order = view.slots_behind(order)
        return tuple((s,) for s in order)

    def _steps_price(self, steps: Iterable[Step]) -> Price:
        price = Price()
        for step in steps:
            price = price + self.model.price(step)
        return price

    # -- interning ----------------------------------------------------------------------------------------------------

    def intern(self, x: Value) -> Value:
        """The value itself, or an equal one that the state knows already; new operands are interned too."""
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

    # -- change -------------------------------------------------------------------------------------------------------

    def redefine(self, v: Value, new: Value) -> bool:
        """Let ``v`` be computed as ``new`` is; False where that changes nothing, or would make v depend on itself."""
        new = self.intern(new)
        node: Node = new.node
        if new is v:
            # The same expression written anew.
            if not self.unchanged(v):
                return False
            self._set(v, node, restate=True)
            return True
        if self._depends(new, v):
            return False
        if new in self.uses or new in self.originals or isinstance(node, (Leaf, Const)):
            # Another value that exists: v is an alias of it.
            node = View(new, tuple((s,) for s in new.sizes), tuple((i,) for i in range(new.rank)))
        if node == v.node and not self.unchanged(v):
            return False
        self._set(v, node, restate=False)
        return True

    def revert(self, v: Value) -> bool:
        """Let v be computed by the node of the original graph again; False where it is."""
        if v not in self.originals or self.unchanged(v):
            return False
        self._set(v, self.originals[v].definition, restate=False)
        return True

    def _depends(self, x: Value, v: Value) -> bool:
        """Whether computing x reads v; values of the original graph from before v can't.

        Levels only fall along what is read as long as no value was redefined by one from behind it (`ordered`): then
        values from before v need not be followed at all.
        """
        limit = self.levels.get(v, 0)
        stack, seen = [x], {x}
        while stack:
            y = stack.pop()
            if y is v:
                return True
            if self.levels.get(y, 0) < limit + (v not in self.originals and y in self.originals):
                if self.ordered or self.unchanged(y):
                    continue
            for z in self.reads(y):
                if z not in seen:
                    seen.add(z)
                    stack.append(z)
        return False

    def _set(self, v: Value, node: Node, restate: bool) -> None:
        change = _Change(v, v.node, v in self.restated, self.total)
        self._log.append(change)
        self._assign(v, node, restate, change.priced)

    def _assign(
        self, v: Value, node: Node, restate: bool, before: dict[Value, tuple[Price | None, Layout | None]] | None = None
    ) -> None:
        """Let v be computed by a node; ``before`` takes the prices and layouts that this changes."""
        touched = self._rewire(v, node, restate)
        if touched:
            self._reprice(touched, v, before)

    def _rewire(self, v: Value, node: Node, restate: bool) -> dict[Value, int]:
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
            self._use(x, v, touched)
        for x in before:
            self._drop(x, v, touched)
        return touched

    def retract_impossible(self) -> None:
        """Restore what the target has no operator for: where there is none either way, the original stays."""
        again = True
        while again:  # restoring a value brings others to life
            again = False
            for v in [v for v in self.originals if v in self.uses and not self.unchanged(v)]:
                if v in self.uses and self._impossible(v):
                    self.restore(v)
                    again = True

    def _impossible(self, v: Value) -> bool:
        stack = [v]
        while stack:
            x = stack.pop()
            if x is v or x not in self.originals:
                if self.prices.get(x, Price()).launches >= IMPOSSIBLE.launches:
                    return True
                stack.extend(self.reads(x))
        return False

    def snapshot(self, v: Value) -> tuple[Node, bool]:
        """How v is computed now, for `reinstate`."""
        return v.node, v in self.restated

    def reinstate(self, v: Value, kept: tuple[Node, bool]) -> None:
        """Let v be computed as it was at a snapshot."""
        self._assign(v, *kept)

    def restore(self, v: Value) -> None:
        """Let v be computed by the node it came from again."""
        self._assign(v, self.originals[v].definition, False)

    def price_before(self, v: Value, nodes: Iterable[str]) -> Price:
        """What the original nodes that a rewrite replaced cost."""
        names = set(nodes)
        total = Price()
        for original in self.originals.values():
            if original.node.name in names:
                total = total + original.price
        return total

    def price_after(self, v: Value) -> Price:
        """What v costs now, with the values that only the rewriting made."""
        total, seen, stack = Price(), set[Value](), [v]
        while stack:
            x = stack.pop()
            if x in seen:
                continue
            seen.add(x)
            total = total + self.prices.get(x, Price())
            stack.extend(y for y in self.reads(x) if y not in self.originals)
        return total

    def mark(self) -> int:
        return len(self._log)

    def undo(self, mark: int) -> None:
        while len(self._log) > mark:
            change = self._log.pop()
            self._rewire(change.v, change.node, change.restated)
            for x, (price, layout) in change.priced.items():
                if price is None:
                    self.prices.pop(x, None)
                else:
                    self.prices[x] = price
                if layout is None:
                    self.layouts.pop(x, None)
                else:
                    self.layouts[x] = layout
            self.total = change.total

    def _use(self, x: Value, by: Value | None, touched: dict[Value, int] | None = None) -> None:
        stack: list[tuple[Value, Value | None]] = [(x, by)]
        born: list[Value] = []
        while stack:
            x, by = stack.pop()
            if by is not None:
                mine = self.users.setdefault(x, {})
                mine[by] = mine.get(by, 0) + 1
            count = self.uses.get(x, 0)
            self.uses[x] = count + 1
            if touched is not None:
                touched.setdefault(x, count)
            if count == 0:
                born.append(x)
                stack.extend((y, x) for y in self.reads(x))
        if touched is None:
            self._reprice(dict.fromkeys(born, 0))

    def _drop(self, x: Value, by: Value, touched: dict[Value, int]) -> None:
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

    def _reprice(
        self,
        touched: dict[Value, int],
        v: Value | None = None,
        before: dict[Value, tuple[Price | None, Layout | None]] | None = None,
    ) -> None:
        """Price anew what is touched, and what depends on it.

        Args:
            touched: values whose readers or reads have changed, with their uses before.
            v: the value among them whose node has changed.
            before: takes the prices and layouts that change.
        """
        before = {} if before is None else before
        queue: list[Value] = []
        for x, count in touched.items():
            if x is not v and self.unchanged(x) and count and x in self.uses:
                continue  # an original's price and layout do not depend on who reads it
            queue.append(x)
            before[x] = self.prices.get(x), self.layouts.get(x)
            if not self.unchanged(x):
                self.layouts.pop(x, None)
                queue.extend(t for t in operands(x.node) if t in self.uses and _flexible(t))
            # Who reads a value is priced by its kind, its layout and whether it is used once.
            if x is v or (count <= 1) != (self.uses.get(x, 0) <= 1):
                for u in self.users.get(x, ()):
                    queue.append(u)
                    if isinstance(u.node, View) and isinstance(x.node, Map):
                        # A sum may give the map its bias, through the view.
                        queue.extend(w for w in self.users.get(u, ()) if isinstance(w.node, Sum) and not self.unchanged(w))
                for part in self._parts_beside(x):
                    before.setdefault(part, (self.prices.get(part), self.layouts.pop(part, None)))
                    queue.append(part)
        seen: set[Value] = set()
        while queue:
            x = queue.pop()
            if x in seen:
                continue
            seen.add(x)
            if x not in before:
                before[x] = self.prices.get(x), self.layouts.get(x)
            old = self.prices.pop(x, None)
            if old is not None:
                self.total = self.total - old
            if x not in self.uses:
                self.layouts.pop(x, None)
                continue
            layout = self.layouts.get(x)
            price = self._price(x)
            self.prices[x] = price
            self.total = self.total + price
            if layout != self.layouts.get(x):
                for user in self.users.get(x, ()):
                    if user in seen and not self.unchanged(user):
                        seen.discard(user)
                    queue.append(user)

    def _parts_beside(self, x: Value) -> Iterator[Value]:
        """Terms that sums add to x and that a concatenation may write itself, which hangs on what x is."""
        for u in self.users.get(x, ()):
            if isinstance(u.node, Sum) and not self.unchanged(u):
                yield from (t for t in u.node.terms if isinstance(t.node, Map) and is_selection(t.node))

    def anchored(self, v: Value) -> bool:
        """Whether nodes of the original graph read v, so that it must come in the original's dims."""
        if v not in self.originals:
            return False
        return self.uses.get(v, 0) > sum(self.users.get(v, {}).values()) or any(
            self.unchanged(u) for u in self.users.get(v, ())
        )

    def _price(self, v: Value) -> Price:
        """The price of computing v from what it reads; sets its layout."""
        price = self._own_price(v)
        if not self.unchanged(v) and self.anchored(v):
            # The original's users saw these strides; in the order of its dims is as good, unless one asks for a view.
            original = self.originals[v]
            ways = []
            for layout in (original.memory, original.layout)[: 1 if original.viewed else 2]:
                chain = Chain(v.sizes, self.layouts[v])
                chain.to(layout)
                ways.append((self._steps_price(chain.steps), layout))
            back, self.layouts[v] = min(ways, key=lambda w: w[0].seconds)
            price = price + back
        return price

    def _own_price(self, v: Value) -> Price:
        if self.unchanged(v):
            original = self.originals[v]
            self.layouts[v] = original.memory
            if isinstance(v.node, Apply) and not self.unchanged(v.node.x) and v.node.x.sizes == v.sizes:
                # An elementwise function hands on the strides that it gets.
                self.layouts[v] = self.layout(v.node.x)
            return original.price if original.allowed else IMPOSSIBLE
        node = v.node
        if isinstance(node, (Leaf, Const)):
            self.layouts[v] = tuple((i,) for i in range(v.rank))
            return Price()
        if isinstance(node, Sum):
            price, self.layouts[v] = self._sum_price(node)
            return price
        if isinstance(node, Apply):
            self.layouts[v] = node.op.layout(node, self.layout(node.x))
            return self._steps_price(node.op.steps(node, self.layout(node.x)))
        if isinstance(node, Map) and is_selection(node) and self._inlined(v):
            # The concatenation reads the operand itself.
            self.layouts[v] = self.layout(node.x)
            return Price()
        found = self._map_price(v)
        if found is None:
            self.layouts[v] = tuple((i,) for i in range(v.rank))
            return IMPOSSIBLE
        self.layouts[v] = found.layout
        return found.price if found.sliced is None else found.price + self._copies(v, *found.sliced)

    def _map_price(self, v: Value) -> _MapPrice | None:
        """The price of a map or a view, worked out once for all that are alike; None where no operator computes it."""
        node = v.node
        assert isinstance(node, (Map, View))
        layout = self.layout(node.x)
        if isinstance(node, View):
            key: object = (node.x.sizes, node.splits, node.groups, layout)
        else:
            key = (node.x.sizes, node.roles, layout, node.kernel.uniform, gathered(node.kernel), self._wanted(v))
        if key not in self._map_prices:
            plan = self.best_plan(v)
            found = None
            if plan is not None:
                at = sliced_at(plan)
                found = _MapPrice(self._steps_price(plan.steps), plan.layout, None if at is None else (plan.steps[-1], at))
            self._map_prices[key] = found
        return self._map_prices[key]

    def _sum_price(self, node: Sum) -> tuple[Price, Layout]:
        """The price of a sum and its layout, worked out once for all that are alike."""
        key = tuple(self._term_key(t) for t in node.terms)
        found = self._sum_prices.get(key)
        if found is None:
            plan = plan_sum(node, self.layout, self.alone)
            steps = [s for p in plan.parts for c in p.chains for s in c]
            steps += [p.step for p in plan.parts if p.step is not None]
            price = self._steps_price([*steps, *plan.adds])
            for p in plan.parts:
                if p.bias is not None:
                    # What the operator costs more with a bias than without: a scale becomes another one altogether.
                    plain, biased = self.best_plan(p.bias[0]), self.best_plan(*p.bias)
                    if plain is not None and biased is not None:
                        price = price + self._steps_price(biased.steps) - self._steps_price(plain.steps)
            found = self._sum_prices[key] = price, plan.layout
        return found

    def _term_key(self, t: Value) -> object:
        """What the plan of a sum depends on in one of its terms."""
        node = t.node
        if isinstance(node, Const):
            return node.sizes, node.varies
        if isinstance(node, View) and isinstance(node.x.node, Map):
            # Its map may carry a bias.
            return t.sizes, node.splits, node.groups, self.layout(t), self.alone(t), self._term_key(node.x)
        if not isinstance(node, Map):
            return t.sizes, self.layout(t)
        key = (node.x.sizes, node.roles, node.kernel.uniform, gathered(node.kernel), self.alone(t), self.layout(t))
        return (*key, self.layout(node.x)) if is_selection(node) else key

    def _copies(self, v: Value, step: Step, at: int) -> Price:
        """What the readers of a slice pay because it is not contiguous."""
        found = reading(self, v, step.shape[at:])
        copy = self.model.price(Step("copy", step.shape, step.shape))
        if found.contiguous:
            return copy
        return replace(copy.times(found.copies), launches=0.0)

    def _inlined(self, v: Value) -> bool:
        """Whether every user writes v as a part of its own concatenation."""
        users = self.users.get(v)
        if not users or self.uses[v] != sum(users.values()):
            return False
        for u in users:
            if self.unchanged(u) or not isinstance(u.node, Sum):
                return False
            if not any(v in group for _, group in concatenated(u.node)):
                return False
        return True


def _flexible(v: Value) -> bool:
    """Whether a value can be written in several layouts: a Linear or a 1×1 convolution."""
    return isinstance(v.node, Map) and bool(v.node.contracted) and all(isinstance(r, (Kept, New)) for r in v.node.roles)


def _with_operand(node: Map | View | Apply, x: Value) -> Node:
    if isinstance(node, Map):
        return Map(x, node.roles, node.kernel)
    if isinstance(node, View):
        return View(x, node.splits, node.groups)
    return Apply(x, node.op, node.sizes, node.kept, node.shifts)
