"""A sum of sums is one sum.

``(x + c) + (y + d) ⇒ x + y + (c + d)``: constants meet and are added up, and branches of one input meet and can merge.

A constant that is zero adds nothing; so does a sum of constants that cancel up to the rounding of their float64 values, such
as a BatchNorm's shift less its value at zero (the two are the same real number, computed on two ways).

Always exact. Only a sum that nobody else reads is opened: flattening through shared sums makes residual chains quadratic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fxconv.constant_images import viewed
from fxconv.expr import Const, Sum, Value, View
from fxconv.kernel import Kernel
from fxconv.law import Context, Law, Outcome, through_view
from fxconv.refs import make_sum


def _flatten(v: Value, context: Context) -> Iterator[Outcome]:
    if isinstance(v.node, View) and isinstance(v.node.x.node, Sum) and context.uses(v.node.x) <= 1:
        # A view of a sum is the sum of the views: nothing is computed anew.
        yield make_sum([viewed(v.node, t) for t in v.node.x.node.terms])
        return
    if not isinstance(v.node, Sum):
        return
    terms: list[Value] = []
    opened = False
    for t in v.node.terms:
        between, inner = through_view(t)
        if isinstance(inner.node, Sum) and context.uses(t) <= 1 and context.uses(inner) <= 1:
            opened = True
            terms.extend(viewed(between, s) for s in inner.node.terms)
        elif isinstance(t.node, View) and isinstance(inner.node, Const):
            opened = True
            terms.append(viewed(t.node, inner))
        else:
            terms.append(t)
    constants = [t.node for t in terms if isinstance(t.node, Const)]
    idle = [c for c in constants if cancels(c.kernel)]
    if opened or len(constants) > 1:
        yield make_sum(terms)
    elif idle and len(terms) > 1:
        yield make_sum([t for t in terms if t.node not in idle])


MOST_COMPARED = 2**20
"""Entries of the largest constant whose values are looked at."""


def cancels(k: Kernel) -> bool:
    """Whether every entry is zero, or what rounding left of a sum of kernels."""
    if k.uniform is not None:
        return k.uniform == 0.0
    parts = k.parents
    if k.spec != "add" or not k.is_static or int(k.entries) > MOST_COMPARED:
        return False

    def rounded(total: torch.Tensor) -> bool:
        bound = sum(part.tensor().abs() for part in parts)
        return bool((total.abs() <= 4 * torch.finfo(torch.float64).eps * bound).all())

    found: bool = k.fact("cancels", rounded)
    return found


law = Law("flatten sums", _flatten)
