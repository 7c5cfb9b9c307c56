"""Equal maps of several values, added, are one map of their sum.

``M x + M y ⇒ M(x + y)``: two upsamplings that are added (feature pyramids), two poolings, one weight applied to two values.
The reverse of distributing; what is added below may be branches of one value, which then merge.

Exact always. Maps of which others read the result stay: they are computed anyway. So do selections, which are the parts of a
concatenation.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from fxconv.expr import Map, Sum, Value, is_selection, view
from fxconv.law import Context, Law, Outcome, through_view
from fxconv.normal_form import normal
from fxconv.raw import as_value
from fxconv.refs import make_sum


def _factor(v: Value, context: Context) -> Iterator[Outcome]:
    if not isinstance(v.node, Sum):
        return
    alike: dict[Hashable, list[Value]] = {}
    for t in v.node.terms:
        between, inner = through_view(t)
        m = inner.node
        if not isinstance(m, Map) or is_selection(m) or context.uses(t) > 1 or context.uses(inner) > 1:
            continue
        layout = (between.splits, between.groups) if between is not None else None
        alike.setdefault((m.x.sizes, m.roles, m.kernel, layout), []).append(t)
    for found in alike.values():
        if len({through_view(t)[1].node for t in found}) > 1:
            yield make_sum([_of_their_sum(found), *(t for t in v.node.terms if t not in found)])


def _of_their_sum(terms: list[Value]) -> Value:
    between, _ = through_view(terms[0])
    maps = [t.node for _, t in map(through_view, terms) if isinstance(t.node, Map)]
    made = normal(make_sum([m.x for m in maps]), maps[0].roles, maps[0].kernel)
    return made if between is None else as_value(view(made, between.splits, between.groups))


law = Law("factor", _factor)
