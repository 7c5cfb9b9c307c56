"""A map of a sum is the sum of the maps; a map of a constant is a constant.

``M(x + y + c) ⇒ M x + M y + M(c)``, or only ``M(x + y) + M(c)``; with concatenation as a sum of selections also
``M(cat(x, y)) ⇒ M_x x + M_y y``, where the selections are absorbed as column blocks of the kernel.

Always exact. Where M reads zero padding, ``M(c)`` varies at the border; where that border has a dynamic size there is no
constant for it, and the law refuses. Distributing pays only once each branch has absorbed what it met, so that is done
in the same step, to three degrees: absorb selections only; absorb the map that is next; or push M down each branch as
far as it goes (through single-use sums, and below what makes tensors larger, such as an upsampling).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fxconv.algebra import join, meet
from fxconv.constant_images import image, mapped, viewed
from fxconv.expr import Const, Map, Sum, Value, View, Window, has_resample, is_selection
from fxconv.law import Context, Law, Outcome, Refusal, mapped_operand, through_view
from fxconv.normal_form import normal
from fxconv.passes.commute import exchange
from fxconv.raw import raw
from fxconv.refs import make_sum


def _term(m: Map, between: View | None, t: Value, absorb: bool) -> Value:
    """The map (after a view) of one term that is no constant."""
    if isinstance(t.node, Map) and (absorb or is_selection(t.node)):
        composed = join(m, t.node, between)
        if isinstance(composed, Value):
            return composed
    return mapped(m, between, t)


def _push(m: Map, between: View | None, t: Value, context: Context, depth: int = 24) -> Value | str:
    """The map of a term, as deep down as it goes."""
    if isinstance(t.node, Const):
        return image(m, between, t)
    if depth == 0 or context.uses(t) > 1:
        return _term(m, between, t, absorb=False)
    if isinstance(t.node, Sum):
        parts: list[Value] = []
        for s in t.node.terms:
            part = _push(m, between, s, context, depth - 1)
            if isinstance(part, str):
                return mapped(m, between, t)
            parts.append(part)
        return make_sum(parts)
    if isinstance(t.node, Map):
        larger = context.count(t.sizes) - context.count(t.node.x.sizes)
        # Below what makes the tensor larger rather than into it.
        grows = larger > 0 and (has_resample(t.node) or t.node.kernel.uniform is not None)
        # Resampling takes in nothing; below a map it leaves the map to what reads the resampled tensor.
        # Two dense maps of different axes: first the one that leaves less for the other to do.
        leaves_less = m.contracted and t.node.contracted and context.count(raw(m).out_sizes) < context.count(m.x.sizes)
        if grows or leaves_less or larger >= 0 and has_resample(m):
            met = meet(m, t.node, between)
            swapped = exchange(met) if not isinstance(met, str) else None
            if swapped is not None:
                return _below(swapped, context, depth)
        if m.contracted and _pools(t.node):
            return mapped(m, between, t)  # as one they would be a convolution with a tap for all that is pooled
        composed = join(m, t.node, between)
        if isinstance(composed, Value):
            return _further(composed, context, depth)
    return mapped(m, between, t)


def _pools(m: Map) -> bool:
    """Whether a map adds up several places of each channel by itself, with equal weights."""
    slides = any(isinstance(r, Window) and r.filter.up == 1 and r.filter.taps > 1 for r in m.roles)
    return slides and not m.contracted and m.kernel.uniform is not None


def _further(v: Value, context: Context, depth: int) -> Value:
    """Push the map that a value is into what it reads."""
    view_, inner = through_view(v)
    if not isinstance(inner.node, Map):
        return v
    between, x = through_view(inner.node.x)
    if not isinstance(x.node, (Sum, Map)) or context.uses(x) > 1:
        return v
    pushed = _push(inner.node, between, x, context, depth - 1)
    if isinstance(pushed, str):
        return v
    return _seen(view_, pushed)


def _below(v: Value, context: Context, depth: int) -> Value:
    """After a swap ``B(A(x))``: push A on."""
    view_, outer = through_view(v)
    if not isinstance(outer.node, Map):
        return v
    between, inner = through_view(outer.node.x)
    pushed = _further(inner, context, depth - 1)
    if pushed is inner:
        return v
    return _seen(view_, normal(_seen(between, pushed), outer.node.roles, outer.node.kernel))


def _seen(between: View | None, x: Value) -> Value:
    if between is None:
        return x
    if isinstance(x.node, Sum):
        return make_sum([_seen(between, t) for t in x.node.terms])
    return viewed(between, x)


def _absorbs(t: Value, context: Context) -> bool:
    """Whether a branch could take a map in: it is itself a map (or a sum of maps) that nobody else reads."""
    while isinstance(t.node, View) or is_selection(t.node):
        if context.uses(t) > 1:
            return False
        assert isinstance(t.node, (View, Map))
        t = t.node.x
    if isinstance(t.node, Const):
        return False
    return context.uses(t) <= 1 and isinstance(t.node, (Map, Sum))


def _column_blocks(m: Map, between: View | None, branches: list[Value]) -> int:
    """How many branches are slices of a common value along an axis that the map contracts: column blocks of one map."""
    read: Counter[Value] = Counter()
    for t in branches:
        if is_selection(t.node) and isinstance(t.node, Map) and _contracts(m, between, t.node):
            x = t.node.x
            while is_selection(x.node) and isinstance(x.node, Map):
                x = x.node.x
            read[x] += 1
    return sum(n for n in read.values() if n > 1)


def _repeated(branches: list[Value]) -> int:
    """How many branches are a value that stands elsewhere in the same concatenation too: a map of it is computed once."""
    read = Counter(t.node.x for t in branches if is_selection(t.node) and isinstance(t.node, Map))
    return sum(n for n in read.values() if n > 1)


def _contracts(m: Map, between: View | None, selection: Map) -> bool:
    """Whether a map, after a view, contracts every axis along which its operand is a selection."""
    summed = set(m.contracted)
    if between is not None:
        atoms = {a for s in summed for a in between.groups[s]}
        slot_of = [o for o, split in enumerate(between.splits) for _ in split]
        summed = {o for o in slot_of if all(a in atoms for a, slot in enumerate(slot_of) if slot == o)}
    return all(o in summed for o, r in enumerate(selection.roles) if isinstance(r, Window))


def _distribute(v: Value, context: Context) -> Iterator[Outcome]:
    found = mapped_operand(v)
    if found is None:
        return
    m, between, x = found
    if isinstance(x.node, Const):
        result = image(m, between, x)
        yield Refusal(result) if isinstance(result, str) else result
        return
    if not isinstance(x.node, Sum):
        return
    branches = [t for t in x.node.terms if not isinstance(t.node, Const)]
    constants = [t for t in x.node.terms if isinstance(t.node, Const)]
    images: list[Value] = []
    for t in constants:
        constant = image(m, between, t)
        if isinstance(constant, str):
            yield Refusal(constant)
            return
        images.append(constant)
    if constants and context.uses(x) <= 1:
        # The constants alone can always go: M is computed as often as before, of fewer terms. (Where others read the sum, it
        # would lose the operator that adds its bias for nothing; `absorb_together` moves the constant for all of them.)
        yield make_sum([mapped(m, between, make_sum(branches)), *images]) if branches else make_sum(images)
    able = sum(_absorbs(t, context) for t in branches) or _column_blocks(m, between, branches) or _repeated(branches)
    if not able or (not m.contracted and (2 * able < len(branches) or context.uses(x) > 1)):
        # Nothing to gain: M would be computed once per branch, and still read the same tensors; or next to a sum that is
        # computed anyway.
        return
    deep = _push(m, between, x, context)
    if not isinstance(deep, str) and not isinstance(deep.node, Map):
        yield deep
    for absorb in (True, False):
        pushed = [_term(m, between, t, absorb) for t in branches]
        yield make_sum([*pushed, *images])


law = Law("distribute", _distribute)
