"""A regrouping of a map's rows is the map of regrouped rows.

``view(M x) ⇒ M' x`` with the rows of the kernel split and reordered: a channel shuffle behind a convolution. The same in front of
an elementwise function or a pooling, ``f(view(M x)) ⇒ view'(f(M' x))``, whose result is then in the order in which its tensor is
wanted; and for the terms of a sum.

Exact always. Saves the copy that a reshape after a transpose makes; where something else reads the map too, it would be
computed twice, so it must have no other reader.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv.branches import as_branch, merge
from fxconv.constant_images import viewed
from fxconv.expr import Apply, Const, Map, Sum, Value, View, permute_view
from fxconv.law import Context, Law, Outcome
from fxconv.raw import as_value
from fxconv.refs import make_sum


def _rows(v: Value, context: Context) -> Value | None:
    """A view of a map, or of a sum of maps and constants, without the view; None where it is none of them."""
    if not isinstance(v.node, View) or context.uses(v.node.x) > 1:
        return None
    x = v.node.x
    if isinstance(x.node, Sum):
        terms: list[Value] = []
        for t in x.node.terms:
            seen = viewed(v.node, t)
            rows = seen if isinstance(seen.node, Const) else _rows(seen, context)
            if rows is None:
                return None
            terms.append(rows)
        return make_sum(terms)
    if not isinstance(x.node, Map) or not x.node.contracted:
        return None
    branch = as_branch(v)
    if branch is None or branch.base is x:
        return None
    out = merge([branch])
    return out if isinstance(out, Value) and isinstance(out.node, Map) else None


def _before(f: Apply, context: Context) -> Value | None:
    """A function of a view, with the operand's slots in the order of the tensor's dims."""
    if len(f.sizes) != f.x.rank:
        return None
    order = [s for d in f.op.dims for s in d]
    order += [s for s in range(f.x.rank) if s not in order]
    rows = _rows(as_value(permute_view(f.x, tuple(order))), context)
    if rows is None:
        return None
    place = {s: i for i, s in enumerate(order)}
    op = f.op.with_dims(tuple(tuple(place[s] for s in d) for d in f.op.dims))
    inner = Value(Apply(rows, op, tuple(f.sizes[s] for s in order), tuple(f.kept[s] for s in order), f.shifts))
    if order == sorted(order):
        return inner
    return as_value(permute_view(inner, tuple(place[s] for s in range(f.x.rank))))


def _absorb_views(v: Value, context: Context) -> Iterator[Outcome]:
    if isinstance(v.node, View):
        rows = _rows(v, context)
        if rows is not None:
            yield rows
    elif isinstance(v.node, Apply):
        out = _before(v.node, context)
        if out is not None:
            yield out
    elif isinstance(v.node, Sum):
        terms = [_rows(t, context) for t in v.node.terms]
        if any(t is not None for t in terms):
            yield make_sum([new if new is not None else t for new, t in zip(terms, v.node.terms, strict=True)])


law = Law("absorb views", _absorb_views)
