"""How a sum is written: concatenations of selections into disjoint places, biases inside operators, and additions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxconv.axes import Size, is_static
from fxconv.constant_images import constant_before
from fxconv.expr import Const, Kept, Map, Sum, Value, View, Window, is_multiple, is_selection
from fxconv.plan import broadcast_kernel, takes_bias
from fxconv.steps import Chain, Layout, Step


@dataclass(frozen=True)
class Part:
    """One tensor of a sum.

    Attributes:
        kind: "term" (a value, times ``factor``), "cat" (values side by side along ``slot``) or "const".
        values: the values that it reads; empty for a constant.
        bias: the map that the (only) value is, perhaps through a view, and a constant that its operator adds itself.
        chains: per value, the steps that bring its tensor into the sum's layout.
        step: the concatenation, or the constant's addition (its weights), where there is one.
    """

    kind: str
    values: tuple[Value, ...]
    bias: tuple[Value, Const] | None = None
    chains: tuple[tuple[Step, ...], ...] = ()
    step: Step | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class SumPlan:
    parts: tuple[Part, ...]
    adds: tuple[Step, ...]
    layout: Layout


_Groups = list[tuple[int, list[Value]]]
_concatenated: dict[Sum, tuple[tuple[int, ...], _Groups]] = {}


def concatenated(node: Sum) -> _Groups:
    """Groups of terms that are selections tiling one slot: (slot, terms in order)."""
    # Terms are cells: the answer holds as long as each still has the node that it had.
    stamp = tuple(id(t.node) for t in node.terms)
    known = _concatenated.get(node)
    if known is not None and known[0] == stamp:
        return known[1]
    if len(_concatenated) > 4096:
        _concatenated.clear()
    groups = _find_concatenated(node)
    _concatenated[node] = (stamp, groups)
    return groups


def _find_concatenated(node: Sum) -> _Groups:
    by_slot: dict[int, list[tuple[int, int, Value]]] = {}
    for t in node.terms:
        m = t.node
        if not is_selection(m) or not isinstance(m, Map):
            continue
        slots = [o for o, r in enumerate(m.roles) if isinstance(r, Window)]
        in_order = all(not isinstance(r, (Kept, Window)) or r.src == o for o, r in enumerate(m.roles))
        if len(slots) != 1 or not in_order:
            continue
        role = m.roles[slots[0]]
        assert isinstance(role, Window)
        n = m.x.sizes[role.src]
        if role.filter.down != 1 or role.filter.offset < 0 or not is_static(n):
            continue
        by_slot.setdefault(slots[0], []).append((role.filter.offset, int(n), t))
    groups: _Groups = []
    for slot, found in by_slot.items():
        total = node.terms[0].sizes[slot]
        chosen: list[Value] = []
        at = 0
        for start, n, t in sorted(found, key=lambda f: (f[0], f[1], f[2].id)):
            if start == at:
                chosen.append(t)
                at += n
        if len(chosen) > 1 and at == total:
            groups.append((slot, chosen))
    return groups


@dataclass(frozen=True)
class Carrier:
    """A term whose operator adds the sum's constant for nothing.

    Attributes:
        term: the term.
        constant: the constant among the terms.
        map: the term itself, or what it is a view of.
        bias: the constant as the map's operator adds it.
    """

    term: Value
    constant: Value
    map: Value
    bias: Const


def multiples(node: Sum, alone: Callable[[Value], bool]) -> list[Value]:
    """Terms that are a number times a value, which the addition itself multiplies: all but what comes first."""
    found = [t for t in node.terms if is_multiple(t.node)]
    others = any(not isinstance(t.node, Const) and t not in found for t in node.terms)
    return [t for t in (found if others else found[1:]) if alone(t)]


def bias_carrier(node: Sum, alone: Callable[[Value], bool]) -> Carrier | None:
    """The term whose operator adds the sum's constant for nothing."""
    constants = [t for t in node.terms if isinstance(t.node, Const)]
    if len(constants) != 1 or not isinstance(constants[0].node, Const):
        return None
    c = constants[0].node
    through: Carrier | None = None
    multiplied = multiples(node, alone)
    for t in node.terms:
        if isinstance(t.node, Map):
            if t not in multiplied and alone(t) and takes_bias(t.node, c):
                return Carrier(t, constants[0], t, c)
        elif through is None and isinstance(t.node, View) and isinstance(t.node.x.node, Map):
            if alone(t) and alone(t.node.x) and takes_bias(t.node.x.node, before := constant_before(t.node, c)):
                through = Carrier(t, constants[0], t.node.x, before)
    return through


def plan_sum(node: Sum, layout_of: Callable[[Value], Layout], alone: Callable[[Value], bool]) -> SumPlan:
    """The tensors to add, all brought into one layout.

    Args:
        node: the sum.
        layout_of: layouts of values.
        alone: whether a value has no other user (so that a bias can go into its operator).
    """
    sizes = node.terms[0].sizes
    carrier = bias_carrier(node, alone)
    in_cat: set[Value] = set()
    multiplied = multiples(node, alone)
    cats = concatenated(node)
    for _, group in cats:
        in_cat.update(group)
    # A concatenation's layout wins; otherwise the one that the fewest terms must be permuted for.
    ranked = [t for t in node.terms if not isinstance(t.node, Const)]
    layout: Layout = tuple((i,) for i in range(len(sizes)))
    if cats:
        first = cats[0][1][0].node
        assert isinstance(first, Map)
        layout = layout_of(first.x)
    elif ranked:
        layout = _agreed([layout_of(t) for t in ranked], sizes)
    parts: list[Part] = []
    for slot, group in cats:
        sources = [t.node.x for t in group if isinstance(t.node, Map)]
        layout = _with_own_dim(layout, slot)
        chains = []
        for x in sources:
            chain = Chain(x.sizes, layout_of(x))
            chain.to(layout)
            chains.append(tuple(chain.steps))
        shape = Chain(sizes, layout).shape()
        dim = next(i for i, g in enumerate(layout) if slot in g)
        parts.append(Part("cat", tuple(sources), None, tuple(chains), Step("cat", shape, shape, attrs={"dim": dim})))
    for t in node.terms:
        if t in in_cat or (carrier is not None and t is carrier.constant):
            continue
        if isinstance(t.node, Const):
            c = t.node
            varying = [o for o, f in enumerate(c.varies) if f]
            layout_c = _cut(layout, set(varying))
            order = [s for g in layout_c for s in g if s in varying]
            k = broadcast_kernel(c.kernel, [varying.index(s) for s in order], layout_c, set(varying), sizes)
            if layout_c != layout:
                layout = layout_c
            shape = Chain(sizes, layout).shape()
            parts.append(Part("const", (), None, (), Step("add_const", shape, shape, (k,))))
            continue
        if t in multiplied and isinstance(t.node, Map):
            chain = Chain(t.sizes, layout_of(t.node.x))
            chain.to(layout)
            assert t.node.kernel.uniform is not None
            parts.append(Part("term", (t.node.x,), None, (tuple(chain.steps),), factor=t.node.kernel.uniform))
            continue
        chain = Chain(t.sizes, layout_of(t))
        chain.to(layout)
        bias = (carrier.map, carrier.bias) if carrier is not None and t is carrier.term else None
        parts.append(Part("term", (t,), bias, (tuple(chain.steps),)))
    parts.sort(key=lambda p: p.factor != 1.0)
    shape = Chain(sizes, layout).shape()
    tensors = sum(p.kind != "const" for p in parts)
    adds = tuple(Step("add", shape, shape) for _ in range(max(tensors - 1, 0)))
    if len({p.kind for p in parts} & {"const"}) and any(p.chains for p in parts):
        # A constant may have cut the layout after other parts were arranged for it.
        parts = [_rearranged(p, layout, sizes, layout_of) for p in parts]
    return SumPlan(tuple(parts), adds, layout)


def _agreed(layouts: Sequence[Layout], sizes: tuple[Size, ...]) -> Layout:
    """The layout in whose order most of the tensors are; of several such, one with the slots in their own order.

    Of those that differ only in how dims merge slots, the one that most have, or else the finest: images stay images. A
    reshape costs nothing by itself, but no runtime fuses what is on either side of it, or keeps its own layout through it.
    """
    orders = [tuple(s for g in layout for s in g if sizes[s] != 1) for layout in layouts]
    best = max(orders, key=lambda order: (orders.count(order), order == tuple(sorted(order))))
    alike = [layout for layout, order in zip(layouts, orders, strict=True) if order == best]
    return max(alike, key=lambda layout: (alike.count(layout), len(layout)))


def _rearranged(p: Part, layout: Layout, sizes: tuple[Size, ...], layout_of: Callable[[Value], Layout]) -> Part:
    if p.kind == "const" or not p.values:
        return p
    chains = []
    for x in p.values:
        chain = Chain(x.sizes, layout_of(x))
        chain.to(layout)
        chains.append(tuple(chain.steps))
    step = p.step
    if step is not None:
        shape = Chain(sizes, layout).shape()
        slot_dim = next(i for i, (a, b) in enumerate(zip(shape, Chain(p.values[0].sizes, layout).shape(), strict=True)) if a != b)
        step = Step("cat", shape, shape, attrs={"dim": slot_dim})
    return Part(p.kind, p.values, p.bias, tuple(chains), step, p.factor)


def _with_own_dim(layout: Layout, slot: int) -> Layout:
    """The layout with a slot in a dim of its own; one that no dim names, as its size was 1, in such a dim if there is one."""
    if (slot,) in layout:
        return layout
    if not any(slot in g for g in layout):
        for d, g in enumerate(layout):
            if not g and all(s < slot for h in layout[:d] for s in h) and all(s > slot for h in layout[d + 1 :] for s in h):
                return (*layout[:d], (slot,), *layout[d + 1 :])
    return _cut(layout, {slot})


def _cut(layout: Layout, slots: set[int]) -> Layout:
    """The layout with dims cut where membership in ``slots`` changes."""
    out: list[tuple[int, ...]] = []
    for g in layout:
        part: list[int] = []
        for s in g:
            if part and (s in slots) != (part[-1] in slots):
                out.append(tuple(part))
                part = []
            part.append(s)
        out.append(tuple(part))
    named = {s for g in out for s in g}
    return tuple(out) + tuple((s,) for s in sorted(slots - named))
