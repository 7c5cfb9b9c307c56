"""A map of a sum is the sum of the maps; a map of a constant is a constant.

``M(x + y + c) ⇒ M x + M y + M(c)``; with concatenation as a sum of selections also ``M(cat(x, y)) ⇒ M_x x + M_y y``, where
the selections are absorbed as column blocks of the kernel.

Always exact. Where M reads zero padding, ``M(c)`` varies at the border; where that border has a dynamic size there is no
constant for it, and the law refuses. Pays only once each branch has absorbed its selection, so that is done in the same
step.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv.algebra import compose, map_constant, normal, view_constant
from fxconv.expr import Const, Map, Sum, Value, View, is_selection, view
from fxconv.law import Context, Law, Outcome, Refusal, mapped_operand
from fxconv.refs import make_sum


def _term(m: Map, between: View | None, t: Value, absorb: bool) -> Value | str:
    """The map (after a view) of one term."""
    if isinstance(t.node, Const):
        c = t.node
        if between is not None:
            c = view_constant(View(t, between.splits, between.groups), c)
        result = map_constant(m, c)
        return result if isinstance(result, str) else Value(result)
    if isinstance(t.node, Map) and (absorb or is_selection(t.node)):
        composed = compose(m, t.node, between)
        if not isinstance(composed, str):
            return composed
    x = t if between is None else view(t, between.splits, between.groups)
    x = x if isinstance(x, Value) else Value(x)
    return normal(x, m.roles, m.kernel)


def _distribute(v: Value, context: Context) -> Iterator[Outcome]:
    found = mapped_operand(v)
    if found is None:
        return
    m, between, x = found
    if isinstance(x.node, Const):
        result = _term(m, between, x, absorb=True)
        yield Refusal(result) if isinstance(result, str) else result
        return
    if not isinstance(x.node, Sum):
        return
    for absorb in (True, False):
        terms: list[Value] = []
        for t in x.node.terms:
            mapped = _term(m, between, t, absorb)
            if isinstance(mapped, str):
                yield Refusal(mapped)
                return
            terms.append(mapped)
        yield make_sum(terms)


law = Law("distribute", _distribute)
