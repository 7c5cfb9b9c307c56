"""A sum of sums is one sum.

``(x + c) + (y + d) ⇒ x + y + (c + d)``: constants meet and are added up, and branches of one input meet and can merge.

Always exact. Only a sum that nobody else reads is opened: flattening through shared sums makes residual chains quadratic.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv.algebra import view_constant
from fxconv.expr import Const, Sum, Value, View, view
from fxconv.law import Context, Law, Outcome, through_view
from fxconv.refs import make_sum


def _flatten(v: Value, context: Context) -> Iterator[Outcome]:
    if isinstance(v.node, View) and isinstance(v.node.x.node, Sum) and context.uses(v.node.x) <= 1:
        # A view of a sum is the sum of the views: nothing is computed anew.
        yield make_sum([_seen(v.node, t) for t in v.node.x.node.terms])
        return
    if not isinstance(v.node, Sum):
        return
    terms: list[Value] = []
    opened = False
    for t in v.node.terms:
        between, inner = through_view(t)
        if isinstance(inner.node, Sum) and context.uses(t) <= 1 and context.uses(inner) <= 1:
            opened = True
            terms.extend(_seen(between, s) if between is not None else s for s in inner.node.terms)
        elif isinstance(t.node, View) and isinstance(inner.node, Const):
            opened = True
            terms.append(_seen(t.node, inner))
        else:
            terms.append(t)
    constants = [t.node for t in terms if isinstance(t.node, Const)]
    idle = [c for c in constants if c.kernel.uniform == 0.0]
    if opened or len(constants) > 1:
        yield make_sum(terms)
    elif idle and len(terms) > 1:
        yield make_sum([t for t in terms if t.node not in idle])


def _seen(between: View, t: Value) -> Value:
    if isinstance(t.node, Const):
        return Value(view_constant(View(t, between.splits, between.groups), t.node))
    seen = view(t, between.splits, between.groups)
    return seen if isinstance(seen, Value) else Value(seen)


law = Law("flatten sums", _flatten)
