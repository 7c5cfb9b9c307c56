"""Equal maps of several values, added, are one map of their sum.

``a M x + b M y + c ⇒ a M(x + (b/a) y) + c``: two upsamplings that are added (feature pyramids), two poolings, one weight applied
to two values whose results are subtracted. The reverse of distributing; what is added below may be branches of one value, which
then merge.

Exact always. Maps of which others read the result stay: they are computed anyway. So do selections, which are the parts of a
concatenation.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from fxconv import kernel as kernels
from fxconv.expr import Const, Map, Sum, Value, View, identity_map, is_multiple, is_selection, view
from fxconv.law import Context, Law, Outcome, through_view
from fxconv.normal_form import normal
from fxconv.raw import as_value
from fxconv.refs import make_sum

Multiple = tuple[float, Value]
"""A number and the value that it multiplies."""


def _factor(v: Value, context: Context) -> Iterator[Outcome]:
    if not isinstance(v.node, Sum):
        return
    terms = [m for t in v.node.terms for m in _multiples(t, context)]
    alike: dict[Hashable, list[Multiple]] = {}
    for factor, t in terms:
        between, inner = through_view(t)
        m = inner.node
        if not isinstance(m, Map) or is_selection(m) or context.uses(t) > 1 or context.uses(inner) > 1:
            continue
        layout = (between.splits, between.groups) if between is not None else None
        own, kernel = _unit(m)
        alike.setdefault((m.x.sizes, m.roles, kernel, layout), []).append((factor * own, t))
    for found in alike.values():
        together = {t for _, t in found}
        if len({through_view(t)[1].node for t in together}) > 1 and all(factor for factor, _ in found):
            rest = [_times(factor, t) for factor, t in terms if t not in together]
            yield make_sum([_of_their_sum(found), *rest])


def _multiples(t: Value, context: Context, factor: float = 1.0) -> Iterator[Multiple]:
    """A term as multiples of values that are no sums and no multiples themselves; what others read too stays whole."""
    if context.uses(t) <= 1 and isinstance(t.node, Sum):
        for s in t.node.terms:
            yield from _multiples(s, context, factor)
    elif context.uses(t) <= 1 and isinstance(t.node, Map) and is_multiple(t.node):
        yield from _multiples(t.node.x, context, factor * _unit(t.node)[0])
    else:
        yield factor, t


def _unit(m: Map) -> tuple[float, kernels.Kernel]:
    """A map's kernel as a number times one that equal maps have in common."""
    if m.kernel.uniform:
        return m.kernel.uniform, kernels.uniform(m.kernel.shape, 1.0)
    return kernels.multiple_of(m.kernel)


def _times(factor: float, t: Value) -> Value:
    if factor == 1.0:
        return t
    if isinstance(t.node, Const):
        return Value(Const(t.node.sizes, t.node.varies, kernels.scaled(t.node.kernel, factor)))
    m = t.node if isinstance(t.node, Map) else identity_map(t)
    return normal(m.x, m.roles, kernels.scaled(m.kernel, factor))


def _of_their_sum(found: list[Multiple]) -> Value:
    """One of the maps of the sum of what they are of, which are multiplied by what their factors differ by."""
    between, _ = through_view(found[0][1])
    first = found[0][0]
    maps = [m for m in (through_view(t)[1].node for _, t in found) if isinstance(m, Map)]
    factors = [factor / first for factor, _ in found]
    _, kernel = _unit(maps[0])
    made = normal(_sum_of(factors, [m.x for m in maps]), maps[0].roles, kernels.scaled(kernel, first))
    return made if between is None else as_value(view(made, between.splits, between.groups))


def _sum_of(factors: list[float], xs: list[Value]) -> Value:
    """A sum of multiples; of what is seen through one view, it is taken before that."""
    views = [x.node for x in xs if isinstance(x.node, View)]
    if len(views) == len(xs) and len({(v.splits, v.groups) for v in views}) == 1:
        return as_value(view(_sum_of(factors, [v.x for v in views]), views[0].splits, views[0].groups))
    return make_sum([_times(factor, x) for factor, x in zip(factors, xs, strict=True)])


law = Law("factor", _factor)
