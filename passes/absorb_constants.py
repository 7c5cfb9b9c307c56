"""A constant added behind a map that preserves constants is added in front of it.

``M(x) + c ⇒ M(x + c)`` where ``M(c) = c``: the bias of a convolution that was moved below an upsampling or behind a pooling
goes with it, into the convolution.

Exact when M keeps every axis along which c varies, and maps a constant to itself along the others: resampling always,
averaging and nearest upsampling where no output reads padding.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv import kernel as kernels
from fxconv.constant_images import map_constant
from fxconv.expr import Const, Kept, Map, New, Shared, Sum, Value
from fxconv.law import Context, Law, Outcome
from fxconv.refs import make_sum


def _preserves(m: Map, c: Const) -> Const | None:
    """The constant on the operand's side that the map sends to c, or None."""
    if m.contracted or any(isinstance(r, (New, Shared)) for r in m.roles) or len(m.roles) != m.x.rank:
        return None
    varies = [False] * m.x.rank
    for o, r in enumerate(m.roles):
        if c.varies[o]:
            if not isinstance(r, Kept):
                return None
            varies[r.src] = True
    kept_order = [r.src for o, r in enumerate(m.roles) if c.varies[o] and isinstance(r, Kept)]
    if kept_order != sorted(kept_order):
        return None
    before = Const(m.x.sizes, tuple(varies), c.kernel)
    after = map_constant(m, before)
    if isinstance(after, str) or after.varies != c.varies:
        return None
    # Equal sums of taps that are 1 leave the constant as it is; anything else shows in the numbers of a single entry.
    probe = map_constant(m, Const(m.x.sizes, (False,) * m.x.rank, _one()))
    if isinstance(probe, str) or any(probe.varies):
        return None
    factor = probe.kernel.fact("only", lambda t: float(t))
    return before if abs(factor - 1.0) <= 4e-16 else None


def _one() -> kernels.Kernel:
    return kernels.uniform((), 1.0)


def _absorb(v: Value, context: Context) -> Iterator[Outcome]:
    if not isinstance(v.node, Sum) or len(v.node.terms) != 2:
        return
    for t, other in (v.node.terms, v.node.terms[::-1]):
        c = other.node
        if isinstance(t.node, Map) and isinstance(c, Const) and context.uses(t) <= 1:
            before = _preserves(t.node, c)
            if before is not None:
                yield Value(Map(make_sum([t.node.x, Value(before)]), t.node.roles, t.node.kernel))


law = Law("absorb constants", _absorb)
