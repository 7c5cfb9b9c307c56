"""A constant is added behind what reads the sum, by all readers at once.

``y = S x + c, vᵢ = Mᵢ y ⇒ vᵢ = Mᵢ (S x) + Mᵢ c``: the bias of a convolution whose results are scaled, pooled and cut, each of
which adds a constant of its own anyway.

Exact where each reader's image of the constant is known (see `distribute`). Saves the constant, but only once its last reader
has taken it over: one by one the steps gain nothing, so all are taken in one. Late, because a reader's map that has no
constant yet is composed as a whole first.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv.expr import Const, Map, Sum, Value
from fxconv.law import Context, Joint, Law, Outcome
from fxconv.passes.absorb_together import all_taken_in


def _entries(v: Value, context: Context) -> float:
    """How many numbers a value adds as constants."""
    terms = v.node.terms if isinstance(v.node, Sum) else ()
    return sum(context.count(t.node.kernel.shape) for t in terms if isinstance(t.node, Const))


def _distribute(v: Value, context: Context) -> Iterator[Outcome]:
    if not isinstance(v.node, Sum) or context.uses(v) < 2:
        return
    if len(v.node.terms) != 2 or not any(isinstance(t.node, Const) for t in v.node.terms):
        return
    pairs = all_taken_in(v, v, context, composed=False)
    if pairs is None or len(pairs) < 2:
        return
    added = sum(_entries(new, context) - _entries(u, context) for u, new in pairs)
    # A map's operator adds a constant for nothing: all that is to be saved there is the numbers.
    if added < _entries(v, context) or not any(isinstance(t.node, Map) for t in v.node.terms):
        yield Joint(tuple(pairs))


law = Law("distribute together", _distribute, late=True)
