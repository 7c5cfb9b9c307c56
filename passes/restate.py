"""The same expression, written as another operator.

``Linear ⇔ convolution``, a full-kernel convolution as a Linear, a product with a constant as a bias: layout is no
operation, so the operator that an expression becomes is a choice of emission. This law proposes the expression itself; the
search takes it where writing it anew is cheaper than the original node, or the only form that the target allows. A constant
that the model computes from parameters at every call is stored then; an elementwise function takes its operand's layout. An
addition multiplies what it adds by a number itself, so the product need not be written: ``x + 2 y`` is one operator.

Always exact: nothing changes but the operator.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv.expr import Apply, Const, Kept, Map, Shared, Sum, Value, is_multiple
from fxconv.law import Context, Joint, Law, Outcome


def _computes(v: Value) -> bool:
    """Whether a value is more than a scale and a shift, for which the original's BatchNorm is as good as any spelling."""
    if isinstance(v.node, Sum):
        return any(_computes(t) for t in v.node.terms)
    if not isinstance(v.node, Map):
        return False
    return bool(v.node.contracted) or any(not isinstance(r, (Kept, Shared)) for r in v.node.roles)


def _restate(v: Value, context: Context) -> Iterator[Outcome]:
    node = v.node
    if isinstance(node, (Map, Sum)) and (_computes(v) or context.folds(v)) or isinstance(node, Apply) and node.op.any_layout:
        yield v
    elif isinstance(node, Sum) and sum(not isinstance(t.node, Const) for t in node.terms) > 1:
        multiplied = [t for t in node.terms if is_multiple(t.node) and context.uses(t) <= 1]
        if multiplied:
            yield Joint(tuple((x, x) for x in (v, *multiplied)))


law = Law("restate", _restate)
