"""Everything between a value and another one, where paths part and meet again, becomes one map.

``y = A x, v = B (C y + D x) + E y ⇒ v = (B C A + B D + E A) x``: a moving average, what is left of the series and a Linear of each
(DLinear), the last step taken off in front of a Linear and added behind it, adapters on slices of a fused Q, K and V.

The paths are composed one by one, from x on, and added where they meet (see `compose`, `merge branches`). Exact where each of
those steps is. Late: it stands in for several steps, none of which pays alone and some of which cost more than the search may
spend on the way.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv.algebra import join
from fxconv.branches import merge, readings
from fxconv.constant_images import image, viewed
from fxconv.expr import Apply, Const, Leaf, Map, Sum, Value, View, operands
from fxconv.law import Context, Law, Outcome, mapped_operand, through_view
from fxconv.normal_form import normal
from fxconv.passes.flatten_sums import cancels
from fxconv.refs import make_sum

MOST = 48
"""Values between the two, at most."""

BASES = 2
"""How many values, the nearest ones, everything is told as a map of."""


def _bases(v: Value, near: list[Value]) -> list[Value]:
    """The values that every path from v leads through, nearest first, once paths have parted and met again."""
    place = {x: i for i, x in enumerate(near)}
    found: list[Value] = []
    frontier, parted = {v}, False
    while frontier:
        x = max(frontier, key=place.__getitem__)
        if len(frontier) == 1 and parted and not isinstance(x.node, View):
            found.append(x)
            if len(found) == BASES:
                break
        if isinstance(x.node, (Leaf, Apply)):
            break
        frontier.discard(x)
        frontier |= {y for y in operands(x.node) if not isinstance(y.node, Const)}
        parted |= len(frontier) > 1
    return found


def _near(v: Value) -> list[Value] | None:
    """What v is computed from by affine steps, operands first; None where that is too much to look at."""
    out: list[Value] = []
    seen: set[Value] = set()
    stack: list[tuple[Value, bool]] = [(v, False)]
    while stack:
        x, done = stack.pop()
        if done:
            out.append(x)
        elif x not in seen:
            seen.add(x)
            if len(seen) > MOST:
                return None
            stack.append((x, True))
            if not isinstance(x.node, Apply):
                stack += [(y, False) for y in operands(x.node)]
    return out


def _told(v: Value, base: Value, near: list[Value]) -> Value | None:
    """v as one map of base, or as base itself, plus a constant; None where it is none."""
    known: dict[Value, tuple[Value, ...]] = {base: (base,)}
    for x in near:
        if x in known:
            continue
        node = x.node
        terms: list[Value] = []
        if isinstance(node, Const):
            terms.append(x)
        elif isinstance(node, Sum):
            terms += [s for t in node.terms for s in known.get(t, ())]
            if any(t not in known for t in node.terms):
                continue
        elif isinstance(node, View):
            if node.x not in known:
                continue
            terms += [viewed(node, s) for s in known[node.x]]
        elif isinstance(node, Map):
            if node.x not in known:
                continue
            for s in known[node.x]:
                new = image(node, None, s) if isinstance(s.node, Const) else _mapped(node, s, base)
                if new is None or isinstance(new, str):
                    return None
                terms.append(new)
        else:
            continue
        added = _added(terms, base)
        if added is None:
            return None
        known[x] = added
    return make_sum(list(known[v])) if v in known else None


def _mapped(m: Map, t: Value, base: Value) -> Value | None:
    """A map of (a view of) a map of base as one map of base."""
    whole = normal(t, m.roles, m.kernel)
    view, inner = through_view(whole)
    found = mapped_operand(inner)
    if found is None or found[2] is base:
        return whole
    outer, between, x = found
    if not isinstance(x.node, Map):
        return None
    both = join(outer, x.node, between)
    return viewed(view, both) if isinstance(both, Value) else None


def _added(terms: list[Value], base: Value) -> tuple[Value, ...] | None:
    """Terms with all that read base as one of them, and constants added up, without those that cancel."""
    constants = [t for t in terms if isinstance(t.node, Const)]
    maps = [t for t in terms if not isinstance(t.node, Const)]
    if constants:
        total = make_sum(constants)
        constants = [] if isinstance(total.node, Const) and maps and cancels(total.node.kernel) else [total]
    if len(maps) < 2:
        return (*maps, *constants)
    branches = []
    root = through_view(base)[1]
    for t in maps:
        branch = next((b for x, read in readings(t) if x is root and (b := read()) is not None), None)
        if branch is None:
            return None
        branches.append(branch)
    merged = merge(branches)
    return None if isinstance(merged, str) else (merged, *constants)


def _collapse(v: Value, context: Context) -> Iterator[Outcome]:
    near = None if isinstance(v.node, (Leaf, Apply, Const)) else _near(v)
    if near is None:
        return
    for base in _bases(v, near):
        told = _told(v, base, near)
        if told is not None:
            yield told


law = Law("collapse", _collapse, late=True)
