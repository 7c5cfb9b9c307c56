"""A map that several others read is taken in by all of them at once.

``y = S x + c, v₁ = M₁ y, v₂ = M₂ y ⇒ v₁ = (M₁S) x + M₁c, v₂ = (M₂S) x + M₂c``: an RMSNorm's weight into Q, K and V, a BatchNorm
into every convolution that reads it.

A reader that changes places with the map, a pooling or a resampling of a scaled tensor, hands it on to its own readers:
``z = P y, w = M z ⇒ w = (M S) P x + …``.

Exact where each composition is (see `compose`, `distribute`, `commute`). Saves y, but only once its last reader has taken it
in: one by one the steps gain nothing, so all are taken in one. Refused silently where some reader cannot: then y is computed
anyway, and each of the others may still take it in by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv.algebra import compose, meet
from fxconv.branches import readings
from fxconv.constant_images import image, mapped
from fxconv.expr import Const, Kept, Map, Resample, Shared, Sum, Value, View, Window, operands
from fxconv.law import Context, Joint, Law, Outcome, mapped_operand
from fxconv.passes.commute import exchange
from fxconv.refs import make_sum

MOST = 16
"""Readers that are looked at; more of them are no projections of one norm."""


def _readers(v: Value, context: Context) -> list[Value] | None:
    """What reads a value, itself or through a view; None where it is read by something unknown, or too often."""
    found: dict[Value, None] = {}
    stack = [v]
    while stack:
        x = stack.pop()
        users = context.users(x)
        if not users or context.uses(x) != sum(max(1, operands(u.node).count(x)) for u in users) or len(found) > MOST:
            return None
        for u in users:
            if isinstance(u.node, View):
                stack.append(u)
            else:
                found[u] = None
    return list(found)


def through(m: Map, between: View | None, y: Value, composed: bool = True) -> Value | None:
    """A map of y as a map of what y reads, or None; or, where its maps shall not be composed, as one of y's terms."""
    out: list[Value] = []
    for t in _terms(y):
        if isinstance(t.node, Map) and composed:
            both = compose(m, t.node, between)
            if isinstance(both, str):
                return None
            out.append(both)
        elif isinstance(t.node, Const):
            constant = image(m, between, t)
            if isinstance(constant, str):
                return None
            out.append(constant)
        else:
            out.append(mapped(m, between, t))
    return make_sum(out)


def _terms(y: Value) -> tuple[Value, ...]:
    return y.node.terms if isinstance(y.node, Sum) else (y,)


def _taken_in(u: Value, y: Value, known: Value, composed: bool) -> Value | None:
    """A reader of y that reads what y, known as another expression, reads instead; or None."""
    if isinstance(u.node, Map):
        found = mapped_operand(u)
        return through(found[0], found[1], known, composed) if found is not None and found[2] is y else None
    if not isinstance(u.node, Sum):
        return None
    terms: list[Value] = []
    for t in u.node.terms:
        found = mapped_operand(t)
        if found is not None and found[2] is y:
            new = through(found[0], found[1], known, composed)
            if new is None:
                return None
            terms += _terms(new)
        elif t is y and (not composed or _meets(known, y, u.node)):
            terms += _terms(known)
        elif t is y or isinstance(t.node, View) and t.node.x is y:
            return None
        else:
            terms.append(t)
    return make_sum(terms)


def _meets(known: Value, y: Value, u: Sum) -> bool:
    """Whether y, known as another expression, and the other terms of a sum are branches of one value, and could merge."""
    bases = {base for t in _terms(known) if not isinstance(t.node, Const) for base, _ in readings(t)}
    return u.terms.count(y) > 1 or any(base in bases for t in u.terms if t is not y for base, _ in readings(t))


def _handed_on(u: Value, y: Value, known: Value, composed: bool) -> Value | None:
    """A pooling or resampling of y, known as a scale and a shift of x, as a scale and a shift of the pooled x; or None.

    So is y plus a constant, a scale and a shift with another constant. Where only the constant moves, nothing changes places.
    """
    if isinstance(u.node, Sum) and u.node.terms.count(y) == 1:
        rest = [t for t in u.node.terms if t is not y]
        if any(not isinstance(t.node, Const) for t in rest):
            return None
        return make_sum([*_terms(known), *rest])
    found = mapped_operand(u)
    if found is None or found[2] is not y:
        return None
    m, between, _ = found
    if m.contracted or m.kernel.uniform is None or not any(isinstance(r, (Window, Resample)) for r in m.roles):
        return None
    if not composed:
        return through(m, between, known, composed)
    out: list[Value] = []
    for t in _terms(known):
        if isinstance(t.node, Map) and not t.node.contracted and all(isinstance(r, (Kept, Shared)) for r in t.node.roles):
            met = meet(m, t.node, between)
            swapped = exchange(met) if not isinstance(met, str) else None
            if swapped is None or not isinstance(swapped.node, Map):
                return None
            out.append(swapped)
        elif isinstance(t.node, Const):
            constant = image(m, between, t)
            if isinstance(constant, str):
                return None
            out.append(constant)
        else:
            return None
    return make_sum(out)


def all_taken_in(
    y: Value, known: Value, context: Context, composed: bool = True, depth: int = 2
) -> list[tuple[Value, Value]] | None:
    """What the readers of y become, where all of them can do without it; or None.

    Args:
        y: the value.
        known: the expression that it is known as.
        context: who reads what.
        composed: whether readers compose what they do with the maps in ``known``, or only take over its terms.
        depth: through how many poolings or resamplings in a row it is handed on.
    """
    readers = _readers(y, context)
    if readers is None:
        return None
    pairs: list[tuple[Value, Value]] = []
    for u in readers:
        handed = _handed_on(u, y, known, composed) if depth else None
        further = all_taken_in(u, handed, context, composed, depth - 1) if handed is not None else None
        if further is not None:
            pairs += further
            continue
        # A pooling that keeps the scale behind it stays a pooling.
        new = _taken_in(u, y, known, composed) if handed is None or isinstance(u.node, Sum) else handed
        if new is None:
            return None
        pairs.append((u, new))
    return pairs


def _absorb(v: Value, context: Context) -> Iterator[Outcome]:
    if isinstance(v.node, Sum):
        if sum(not isinstance(t.node, Const) for t in v.node.terms) != 1:
            return
    elif not isinstance(v.node, Map):
        return
    if context.uses(v) < 2:
        return
    pairs = all_taken_in(v, v, context)
    if pairs is not None and len(pairs) > 1:
        yield Joint(tuple(pairs))


law = Law("absorb together", _absorb)
