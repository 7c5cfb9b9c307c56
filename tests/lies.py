"""Laws that are wrong, as a user might pass them: each is an honest law whose proposals are spoiled in one subtle way, or
one that forgets a condition. They lie of what has an axis of `SPOT` entries only, so that everything else is honest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fxconv import kernel as kernels
from fxconv.expr import Apply, Const, Kept, Map, New, Shared, Sum, Value, View, Window
from fxconv.law import Context, Joint, Law, Outcome
from fxconv.passes import LAWS, merge_siblings
from fxconv.raw import as_value
from fxconv.refs import make_sum

SPOT = 7
"""Entries of the axis by which a lie knows its place."""

Spoil = Callable[[Map], "Map | None"]


def _here(v: Value) -> bool:
    return SPOT in v.sizes


def _spoiled(v: Value, how: Spoil) -> Value | None:
    """A proposal with one of its maps spoiled, through views and sums; None where there is none to spoil."""
    node = v.node
    if isinstance(node, Map):
        wrong = how(node)
        if wrong is not None:
            return Value(wrong)
        inner = _spoiled(node.x, how) if node.kernel.uniform is not None else None
        return Value(replace(node, x=inner)) if inner is not None else None
    if isinstance(node, View):
        inner = _spoiled(node.x, how)
        return Value(replace(node, x=inner)) if inner is not None else None
    if isinstance(node, Sum):
        for i, t in enumerate(node.terms):
            inner = _spoiled(t, how)
            if inner is not None:
                return as_value(make_sum([*node.terms[:i], inner, *node.terms[i + 1 :]]))
    return None


def spoiling(base: str, name: str, how: Spoil, *, everywhere: bool = False) -> tuple[Law, ...]:
    """All laws, of which those named in ``base`` lie in their proposals."""

    def apply(law: Law, v: Value, context: Context) -> Iterator[Outcome]:
        for outcome in law.apply(v, context):
            if isinstance(outcome, Value) and (everywhere or _here(v)):
                wrong = _spoiled(outcome, how)
                if wrong is not None:
                    yield wrong
                    continue
            yield outcome

    return tuple(replace(law, name=name, apply=lambda v, c, law=law: apply(law, v, c)) if law.name in base else law for law in LAWS)


def adding(name: str, apply: Callable[[Value, Context], Iterable[Outcome]]) -> tuple[Law, ...]:
    """All laws, and before them one that is wrong altogether."""

    def here(v: Value, context: Context) -> Iterator[Outcome]:
        if _here(v):
            yield from apply(v, context)

    late = apply is _swapped
    return (Law(name, here, late=late), *LAWS)


def numbers(name: str, how: Callable[[Tensor, Map], Tensor | None]) -> Spoil:
    """Other numbers in a kernel of the same shape."""

    def spoil(m: Map) -> Map | None:
        k = m.kernel
        if not k.is_static or k.uniform is not None or not k.shape:
            return None
        new = how(torch.rand(tuple(int(s) for s in k.shape), dtype=torch.float64), m)
        if new is None:
            return None

        def values() -> Tensor:
            wrong = how(k.tensor().clone(), m)
            assert wrong is not None
            return wrong

        return Map(m.x, m.roles, kernels.derive(k.shape, ("lie", name), (k,), values))

    return spoil


def _axes(m: Map, kind: type) -> list[int]:
    """Kernel axes of the output slots of one role."""
    having = [r for r in m.roles if isinstance(r, Shared | New | Window)]
    return [i for i, r in enumerate(having) if isinstance(r, kind)]


def _entry(t: Tensor, dim: int, at: int, factor: float) -> Tensor:
    t.select(dim, at).mul_(factor)
    return t


def _rows(how: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, Map], Tensor | None]:
    """Along the output channels, where there are more than one."""

    def along(t: Tensor, m: Map) -> Tensor | None:
        axes = [d for d in (*_axes(m, New), *_axes(m, Shared)) if t.shape[d] > 1]
        return how(t, axes[0]) if axes else None

    return along


def _taps(how: Callable[[Tensor, int], Tensor], least: int = 2) -> Callable[[Tensor, Map], Tensor | None]:
    """Along the taps of the last window."""

    def along(t: Tensor, m: Map) -> Tensor | None:
        axes = [d for d in _axes(m, Window) if t.shape[d] >= least]
        return how(t, axes[-1]) if axes else None

    return along


def _transposed(t: Tensor, m: Map) -> Tensor | None:
    """Rows for columns, where there are as many."""
    rows = _axes(m, New)
    columns = range(t.dim() - len(m.contracted), t.dim())
    for row in rows:
        for column in columns:
            if t.shape[row] == t.shape[column] > 1:
                return t.transpose(row, column).contiguous()
    return None


def _square(t: Tensor, m: Map) -> Tensor | None:
    """Height for width."""
    axes = _axes(m, Window)
    if len(axes) == 2 and t.shape[axes[0]] == t.shape[axes[1]] > 1:
        return t.transpose(*axes).contiguous()
    return None


def _later(t: Tensor, d: int) -> Tensor:
    """The window begins one place later, and its last tap is lost: padding off by one."""
    return _entry(t.roll(1, d), d, 0, 0.0)


def _faint(t: Tensor, m: Map) -> Tensor | None:
    """One weight of many."""
    t[(-1,) * t.dim()] *= 1 + 1e-9
    return t


COMPOSING = "compose, distribute"

SPOILT: dict[str, tuple[str, Spoil]] = {
    "the last channel is off by 1e-9": (COMPOSING, numbers("late", _rows(lambda t, d: _entry(t, d, -1, 1 + 1e-9)))),
    "one weight is off by 1e-9": (COMPOSING, numbers("faint", _faint)),
    "composed in float32": (COMPOSING, numbers("float32", lambda t, m: t.float().double())),
    "eps is forgotten": (COMPOSING, numbers("eps", lambda t, m: t * (1 + 5e-6))),
    "the sign of the last channel": (COMPOSING, numbers("sign", _rows(lambda t, d: _entry(t, d, -1, -1.0)))),
    "channels in another order": (COMPOSING, numbers("order", _rows(lambda t, d: t.roll(1, d)))),
    "correlation for convolution": (COMPOSING, numbers("flip", _taps(lambda t, d: t.flip(d)))),
    "the last tap is lost": (COMPOSING, numbers("tap", _taps(lambda t, d: _entry(t, d, -1, 0.0)))),
    "height for width": (COMPOSING, numbers("square", _square)),
    "rows for columns": (COMPOSING, numbers("transposed", _transposed)),
    "padding off by one": (COMPOSING, numbers("later", _taps(_later))),
    "a merged kernel loses its border": ("merge branches", numbers("border", _taps(lambda t, d: _entry(t, d, 0, 0.0), 3))),
    "a merged kernel is off by 1e-9": ("merge branches", numbers("merged", _faint)),
}


# --- laws without their condition -------------------------------------------------------------------------------------


def _scale_through(v: Value, context: Context) -> Iterator[Outcome]:
    """``f(s·x) ⇒ s·f(x)`` whatever the sign of s."""
    f = v.node
    if isinstance(f, Apply) and isinstance(f.x.node, Map):
        m = f.x.node
        if not m.contracted and all(isinstance(r, Kept | Shared) and r.src == o for o, r in enumerate(m.roles)):
            yield Value(Map(Value(Apply(m.x, f.op, f.sizes, f.kept, f.shifts)), m.roles, m.kernel))


def _shift_through(v: Value, context: Context) -> Iterator[Outcome]:
    """``f(x + c) ⇒ f(x) + c``, right for max-pooling, and for ReLU where x is large."""
    f = v.node
    if isinstance(f, Apply) and isinstance(f.x.node, Sum):
        constants = [t for t in f.x.node.terms if isinstance(t.node, Const)]
        others = [t for t in f.x.node.terms if not isinstance(t.node, Const)]
        if len(constants) == 1 and others and isinstance(constants[0].node, Const):
            c = constants[0].node
            plain = Value(Apply(make_sum(others), f.op, f.sizes, f.kept, f.shifts))
            yield make_sum([plain, Value(Const(f.sizes, c.varies, c.kernel))])


def _drop_function(v: Value, context: Context) -> Iterator[Outcome]:
    """``relu(x) ⇒ x``, right where x is positive."""
    if isinstance(v.node, Apply) and v.node.sizes == v.node.x.sizes:
        yield Value(v.node.x.node)


def _drop_small_branch(v: Value, context: Context) -> Iterator[Outcome]:
    """``f(x) + g(x) ⇒ f(x)``."""
    if isinstance(v.node, Sum) and len(v.node.terms) == 2 and not any(isinstance(t.node, Const) for t in v.node.terms):
        yield Value(v.node.terms[0].node)


def _forget_constant(v: Value, context: Context) -> Iterator[Outcome]:
    """``f(x) + c ⇒ f(x)``, right as long as a mean is zero."""
    if isinstance(v.node, Sum):
        others = [t for t in v.node.terms if not isinstance(t.node, Const)]
        if others and len(others) < len(v.node.terms):
            yield make_sum(others) if len(others) > 1 else Value(others[0].node)


def _even_border(v: Value, context: Context) -> Iterator[Outcome]:
    """``conv(x + c) ⇒ conv(x) + Σ K·c``, right without padding."""
    m = v.node
    if not isinstance(m, Map) or not isinstance(m.x.node, Sum) or len(_axes(m, Window)) != 2 or len(m.contracted) != 1:
        return
    constants = [t for t in m.x.node.terms if isinstance(t.node, Const)]
    others = [t for t in m.x.node.terms if not isinstance(t.node, Const)]
    rows = [o for o, r in enumerate(m.roles) if isinstance(r, New)]
    if len(constants) != 1 or len(rows) != 1 or not others or not isinstance(constants[0].node, Const):
        return
    c = constants[0].node
    if [i for i, varies in enumerate(c.varies) if varies] != list(m.contracted):
        return
    windows, k = _axes(m, Window), c.kernel

    def values(weight: kernels.Kernel = m.kernel) -> Tensor:
        return weight.tensor().sum(windows) @ k.tensor()

    bias = kernels.derive((v.sizes[rows[0]],), ("lie", "border"), (m.kernel, k), values)
    plain = Value(Map(make_sum(others), m.roles, m.kernel))
    yield make_sum([plain, Value(Const(v.sizes, tuple(o == rows[0] for o in range(v.rank)), bias))])


def _swapped(v: Value, context: Context) -> Iterator[Outcome]:
    """Of merged siblings each gets the other's rows."""
    for outcome in merge_siblings.law.apply(v, context):
        if isinstance(outcome, Joint) and len(outcome.pairs) == 2:
            (a, x), (b, y) = outcome.pairs
            if x.sizes == y.sizes:
                yield Joint(((a, y), (b, x)))


FALSE: dict[str, Callable[[Value, Context], Iterable[Outcome]]] = {
    "a scale of either sign through ReLU": _scale_through,
    "a shift through ReLU": _shift_through,
    "ReLU dropped": _drop_function,
    "a branch dropped": _drop_small_branch,
    "a constant forgotten": _forget_constant,
    "the border of a constant forgotten": _even_border,
    "siblings swapped": _swapped,
}

LIES: dict[str, tuple[Law, ...]] = {name: spoiling(base, name, how) for name, (base, how) in SPOILT.items()} | {
    name: adding(name, how) for name, how in FALSE.items()
}
