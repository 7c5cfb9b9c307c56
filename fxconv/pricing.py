"""What the values of a graph cost, and the layout that each comes in, kept as they are rewritten.

Replacing a value's node changes the price of that value, of what comes alive or dies with it, and of the users whose plan
depends on them; nothing else is priced anew. What is alike is priced once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fxconv.axes import Size
from fxconv.cost import CostModel, Price, score
from fxconv.expr import (
    Apply,
    Const,
    Kept,
    Leaf,
    Map,
    New,
    Resample,
    Sum,
    Value,
    View,
    Window,
    has_resample,
    is_multiple,
    is_selection,
    operands,
)
from fxconv.lift import Lifter
from fxconv.plan import gathered, plan_map
from fxconv.steps import Chain, Layout, Plan, Step, Target, plan_view
from fxconv.strides import reading, sliced_at
from fxconv.sums import concatenated, multiples, plan_sum
from fxconv.values import Values

IMPOSSIBLE = Price(seconds=1e6, macs=1e18, params=1e18, launches=1e9)
"""The price of a node that no operator of the target computes."""


@dataclass(frozen=True)
class _MapPrice:
    """What writing a map or a view comes to: its price, the layout of the result, and the slice that it ends in."""

    price: Price
    layout: Layout
    sliced: tuple[Step, int] | None


@dataclass(frozen=True)
class _Wanted:
    """The layout that a value is read in; and the sizes of what an interpolation makes of it, if one reads it."""

    layout: Layout
    interpolated: tuple[Size, ...] | None = None


@dataclass
class PricedValues(Values):
    """Values with their prices and layouts."""

    lifter: Lifter
    model: CostModel
    target: Target
    objective: str
    prices: dict[Value, Price] = field(default_factory=dict)
    layouts: dict[Value, Layout] = field(default_factory=dict)
    total: Price = field(default_factory=Price)
    _map_prices: dict[object, _MapPrice | None] = field(default_factory=dict)
    _sum_prices: dict[object, tuple[Price, Layout]] = field(default_factory=dict)

    def score(self) -> float:
        return score(self.total, self.objective)

    def honest_total(self) -> Price:
        """The total with operators that the target forbids at their own price, not the search's penalty."""
        total = Price()
        for v in self.uses:
            total = total + (self._original_price(v) if self.unchanged(v) else self.prices.get(v, Price()))
        return total

    def prices_before(self) -> dict[str, Price]:
        """What each node of the original graph cost, by its name."""
        found: dict[str, Price] = {}
        for original in self.originals.values():
            name = original.node.name
            found[name] = found.get(name, Price()) + original.price
        return found

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

    def layout(self, v: Value) -> Layout:
        known = self.layouts.get(v)
        if known is not None:
            return known
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
        return min(plans, key=lambda p: score(self._plan_price(v, p) + self._onward(v, p, wanted), self.objective))

    def _plan_price(self, v: Value, plan: Plan) -> Price:
        """What a plan of v's costs, with the permuted views at its ends."""
        return self._steps_price(plan.steps) + self._turns(v, plan.steps, plan.layout)

    def _turn(self, v: Value) -> Price:
        """What it costs that a value is read by a permuted view."""
        return self.model.price(Step("turn", v.sizes, v.sizes))

    def _turned(self, v: Value, layout: Layout) -> bool:
        """Whether a value in a layout is read by a permuted view: another node's in the order of its strides."""
        original = self.originals.get(v)
        return original is not None and slot_order(layout, v) == slot_order(original.memory, v) != slot_order(original.layout, v)

    def _turns(self, v: Value, steps: Sequence[Step], layout: Layout) -> Price:
        """What permuted views cost: those that the steps of a value begin and end with, and those through which it reads
        and hands on values of the original graph in the order of their strides, where the two don't cancel."""
        (x, *_), price = operands(v.node), Price()
        moved = next((s for s in steps[:2] if s.kind == "permute"), None)
        copied = moved is not None and not moved.attrs.get("free")
        if not copied and (moved is not None) != (self.unchanged(x) and self._turned(x, self.layout(x))):
            price = price + self._turn(x)
        back = bool(steps) and bool(steps[-1].attrs.get("free"))
        if back != (self.anchored(v) and self._turned(v, layout)):
            price = price + self._turn(v)
        return price

    def _onward(self, v: Value, plan: Plan, wanted: _Wanted | None) -> Price:
        """What a plan will cost the users of its result: in the layout that they want, or in the operand's order."""
        if wanted is not None:
            chain = Chain(v.sizes, plan.layout)
            chain.to(wanted.layout)
            price = self._steps_price(chain.steps)
            if wanted.interpolated is not None and not any(s.kind == "conv" for s in plan.steps):
                # ONNX Runtime interpolates the blocks of channels that a convolution leaves, anything else far slower.
                price = price + self.model.price(Step("permute", wanted.interpolated, wanted.interpolated))
            return price
        if len(plan.steps) > 1 and any(s.kind == "permute" for s in plan.steps):
            last = plan.steps[-1]
            return self.model.price(Step("permute", last.shape, last.shape))
        return Price()

    def _wanted(self, v: Value) -> _Wanted | None:
        """The order of slots in which a dense map is read, where that is settled: by the nodes of the original graph
        that read it, or by the other terms of a sum; through views and sums that have no order of their own."""
        if not _flexible(v):
            return None
        seen, views, order = v, list[View](), list[int]()
        interpolated = None
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
            if isinstance(seen.node, Map) and _interpolates(seen.node):
                # Interpolation wants what it slides along last.
                moving = {r.src for r in seen.node.roles if isinstance(r, (Resample, Window))}
                order = sorted(range(seen.node.x.rank), key=lambda s: (s in moving, s))
                interpolated = seen.sizes
            elif isinstance(seen.node, View):
                views.append(seen.node)
            elif not isinstance(seen.node, Sum):
                return None
            else:
                others = [t for t in seen.node.terms if isinstance(t.node, (Map, Apply)) and not _flexible(t)]
                orders = [[s for g in self.layout(t) for s in g] for t in others]
                # A part that the concatenation writes itself is in the layout of what it is a part of.
                order = next((o for o in orders if len(o) == seen.rank), [])
        for view in reversed(views):
            order = view.slots_behind(order)
        return _Wanted(tuple((s,) for s in order), interpolated)

    def _steps_price(self, steps: Iterable[Step]) -> Price:
        price = Price()
        for step in steps:
            price = price + self.model.price(step)
        return price

    def reprice(
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
            if x is not v and self.unchanged(x) and count and x in self.uses and not is_selection(x.node):
                continue  # an original's price and layout do not depend on who reads it, but for a slice's
            queue.append(x)
            before[x] = self.prices.get(x), self.layouts.get(x)
            if isinstance(x.node, View) and is_selection(x.node.x.node) and x.node.x in self.uses:
                queue.append(x.node.x)  # a slice is copied by who reads it through a view too
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
        """Terms that sums add to x and that a concatenation or an addition may write itself, which hangs on what x is."""
        for u in self.users.get(x, ()):
            if isinstance(u.node, Sum) and not self.unchanged(u):
                yield from (t for t in u.node.terms if is_selection(t.node) or is_multiple(t.node))

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
            return self._original_price(v) if original.allowed else IMPOSSIBLE
        node = v.node
        if isinstance(node, (Leaf, Const)):
            self.layouts[v] = tuple((i,) for i in range(v.rank))
            return Price()
        if isinstance(node, Sum):
            price, self.layouts[v] = self._sum_price(node)
            for t in node.terms:
                if self.unchanged(t) and self.layout(t) == self.layouts[v] and self._turned(t, self.layouts[v]):
                    price = price + self._turn(t)
            if self.anchored(v) and self._turned(v, self.layouts[v]):
                price = price + self._turn(v)
            return price
        if isinstance(node, Apply):
            self.layouts[v] = node.op.layout(node, self.layout(node.x))
            steps = node.op.steps(node, self.layout(node.x))
            return self._steps_price(steps) + self._turns(v, steps, self.layouts[v])
        if isinstance(node, Map) and (is_selection(node) and self._inlined(v) or is_multiple(node) and self._added(v)):
            # The concatenation or the addition reads the operand itself.
            self.layouts[v] = self.layout(node.x)
            return Price()
        found = self._map_price(v)
        if found is None:
            self.layouts[v] = tuple((i,) for i in range(v.rank))
            return IMPOSSIBLE
        self.layouts[v] = found.layout
        if found.sliced is None:
            return found.price
        return found.price + self._copies(v, *found.sliced) + self._unblocked(v, found.sliced[0])

    def _original_price(self, v: Value) -> Price:
        """What v costs as the original graph computes it; a slice, with the copies that its readers make, whoever they are now."""
        price = self.originals[v].price
        found = self._map_price(v) if is_selection(v.node) else None
        if found is None or found.sliced is None:
            return price
        step, at = found.sliced
        return price + self._copies_by(reading(self, v, step.shape[at:]).copies, step)

    def _map_price(self, v: Value) -> _MapPrice | None:
        """The price of a map or a view, worked out once for all that are alike; None where no operator computes it."""
        node = v.node
        assert isinstance(node, (Map, View))
        layout = self.layout(node.x)
        if isinstance(node, View):
            key: object = (node.x.sizes, node.splits, node.groups, layout, self._ends(v))
        else:
            key = (node.x.sizes, node.roles, layout, node.kernel.uniform, gathered(node.kernel), self._wanted(v), self._ends(v))
        if key not in self._map_prices:
            plan = self.best_plan(v)
            found = None
            if plan is not None:
                at = sliced_at(plan)
                found = _MapPrice(self._plan_price(v, plan), plan.layout, None if at is None else (plan.steps[-1], at))
            self._map_prices[key] = found
        return self._map_prices[key]

    def _ends(self, v: Value) -> object:
        """What the turns of a plan depend on."""
        x = operands(v.node)[0]
        original = self.originals.get(v) if self.anchored(v) else None
        read = self.originals[x].layout if self.unchanged(x) else None
        return read, None if original is None else (original.layout, original.memory)

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
        return (*key, self.layout(node.x)) if is_selection(node) or is_multiple(node) else key

    def _copies(self, v: Value, step: Step, at: int) -> Price:
        """What the readers of a slice pay because it is not contiguous."""
        found = reading(self, v, step.shape[at:])
        if found.contiguous:
            return self.model.price(Step("copy", step.shape, step.shape))
        return self._copies_by(found.copies, step)

    def _unblocked(self, v: Value, step: Step) -> Price:
        """What it costs to take some of a convolution's channels: runtimes keep those in blocks, and copy to cut them."""
        node = v.node
        assert isinstance(node, (Map, View))
        if isinstance(node, View) or not is_selection(node):
            return Price()
        cut = {r.src for r in node.roles if isinstance(r, Window)}
        x = node.x.node.x if isinstance(node.x.node, Apply) else node.x
        terms = [t for t in operands(x.node) if isinstance(t.node, Map)] if isinstance(x.node, Sum) else [x]
        for t in terms:
            if isinstance(t.node, Map) and any(isinstance(t.node.roles[s], New) for s in cut):
                plan = self.best_plan(t)
                if plan is not None and any(s.kind == "conv" for s in plan.steps):
                    return self._copies_by(2, step)  # out of blocks, and into them
        return Price()

    def _copies_by(self, readers: int, step: Step) -> Price:
        """What it costs that readers copy a slice before they compute."""
        return self.model.price(Step("copy", step.shape, step.shape)).times(readers)._replace(launches=0.0)

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

    def _added(self, v: Value) -> bool:
        """Whether the only user is a sum that multiplies v's operand by the number itself."""
        users = self.users.get(v, ())
        if not self.alone(v) or self.uses.get(v) != len(users) or self.anchored(v):
            return False
        return all(isinstance(u.node, Sum) and not self.unchanged(u) and v in multiples(u.node, self.alone) for u in users)


def slot_order(layout: Layout, v: Value) -> list[int]:
    """Slots in memory order, those of size 1 left out."""
    return [s for g in layout for s in g if v.sizes[s] != 1]


def _interpolates(m: Map) -> bool:
    """Whether a map resamples, or repeats what is nearest."""
    if has_resample(m):
        return True
    filters = [r.filter for r in m.roles if isinstance(r, Window)]
    return m.kernel.uniform == 1.0 and any(f.up > 1 for f in filters) and all(f.is_nearest for f in filters)


def _flexible(v: Value) -> bool:
    """Whether a value can be written in several layouts: a Linear or a 1×1 convolution."""
    return isinstance(v.node, Map) and bool(v.node.contracted) and all(isinstance(r, (Kept, New)) for r in v.node.roles)
