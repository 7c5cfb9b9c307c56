"""A positive scale passes through ReLU, LeakyReLU, PReLU and max-pooling; any shift passes through max-pooling.

``f(s·x) ⇔ s·f(x)`` for s > 0 per channel, and ``maxpool(x + c) ⇔ maxpool(x) + c``: ReLU → BN (γ > 0) → max-pool → conv becomes
ReLU → max-pool → conv.

Exact when every scale is positive (read off the values; one that is not refuses, with the value), and the scale does
not vary along an axis that the function mixes.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv.expr import Apply, Const, Kept, Map, Shared, Sum, Value
from fxconv.law import Context, Law, Outcome, Refusal
from fxconv.refs import make_sum


def _is_scale(m: Map) -> bool:
    return (
        not m.contracted
        and all(isinstance(r, (Kept, Shared)) and r.src == o for o, r in enumerate(m.roles))
        and (bool(m.kernel.shape) or m.kernel.uniform != 1.0)
    )


def _blocked(m: Map, f: Apply) -> str | None:
    """Why a scale does not pass through a function, or None where it does."""
    if any(isinstance(r, Shared) and not f.kept[o] for o, r in enumerate(m.roles)):
        return f"the scale varies along an axis that {f.op.name} mixes"
    least = m.kernel.fact("least", lambda t: float(t.min()))
    if not least > 0:
        return f"a scale of {least:.3g} is not positive, so it does not pass through {f.op.name}"
    return None


def _homogeneity(v: Value, context: Context) -> Iterator[Outcome]:
    if isinstance(v.node, Apply):
        if not v.node.op.homogeneous:
            return
        yield from _pull_out(v.node)
    elif isinstance(v.node, Map) and _is_scale(v.node) and isinstance(v.node.x.node, Apply):
        f = v.node.x.node
        if not f.op.homogeneous:
            return
        why = _blocked(v.node, f)
        if why is not None:
            yield Refusal(why)
        else:
            inner = Value(Map(f.x, v.node.roles, v.node.kernel))
            yield Value(Apply(inner, f.op, f.sizes, f.kept, f.shifts))


def _pull_out(f: Apply) -> Iterator[Outcome]:
    inner = f.x.node
    if isinstance(inner, Map) and _is_scale(inner):
        why = _blocked(inner, f)
        if why is not None:
            yield Refusal(why)
            return
        plain = Value(Apply(inner.x, f.op, f.sizes, f.kept, f.shifts))
        yield Value(Map(plain, inner.roles, inner.kernel))
    elif isinstance(inner, Sum) and f.shifts:
        constants = [t for t in inner.terms if isinstance(t.node, Const)]
        others = [t for t in inner.terms if not isinstance(t.node, Const)]
        if len(constants) != 1 or not others:
            return
        c = constants[0].node
        assert isinstance(c, Const)
        if any(varies and not kept for varies, kept in zip(c.varies, f.kept, strict=True)):
            yield Refusal(f"a shift that varies along an axis that {f.op.name} mixes")
            return
        plain = Value(Apply(make_sum(others), f.op, f.sizes, f.kept, f.shifts))
        yield make_sum([plain, Value(Const(f.sizes, c.varies, c.kernel))])


def _numbers(v: Value) -> bool:
    """Whether v is scaled by positive numbers."""
    if not isinstance(v.node, Map) or not _is_scale(v.node):
        return False
    k = v.node.kernel
    least: float = k.uniform if k.uniform is not None else k.fact("least", lambda t: float(t.min()))
    return least > 0


law = Law("homogeneity", _homogeneity, numbers=_numbers)
