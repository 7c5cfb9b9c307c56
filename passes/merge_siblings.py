"""Maps of one value that differ in their rows only become one map and a split.

``v₁ = Map₁ x + c₁, v₂ = Map₂ x + c₂ ⇒ S = (Map₁; Map₂) x + (c₁; c₂), v₁ = rows of S, v₂ = other rows of S``: Q, K and V; gate and
up; sibling 1×1 convolutions of an Inception block.

Exact always. Wants the same windows, strides and kept axes, one axis of rows, and no groups (the rows of a grouped
convolution are spread over the groups, and a slice of them is no view).

Where the siblings are read by the same elementwise function each, it is applied once, in front of the split: runtimes then
still compute it in the map's operator, and a slice of its result is as good.

Costs a slice per sibling, and a copy for each reader that needs its operand contiguous; saves launches and readings of x.
Only all siblings together pay, so they are redefined in one step, and late: a slice of a shared map hides the map from
the other laws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fxconv import kernel as kernels
from fxconv.axes import is_static
from fxconv.expr import Apply, Const, Kept, Map, New, Resample, Role, Shared, Sum, Value, View, Window, is_selection
from fxconv.kernel import Kernel
from fxconv.law import Context, Joint, Law, Outcome
from fxconv.refs import make_sum
from fxconv.window import selection_filter

MOST_LEFT_OUT = 4
"""Up to this many siblings, merging all but one is proposed too: one of them may be read in a way that makes its slice dear."""


@dataclass(frozen=True)
class Sibling:
    """A value that is ``map + bias`` of the common operand; the bias has one entry per row, or is None."""

    value: Value
    map: Map
    bias: Kernel | None


def _row(m: Map) -> int | None:
    """The output slot of a map's rows, where it has exactly one."""
    news = [(o, r) for o, r in enumerate(m.roles) if isinstance(r, New)]
    if len(news) != 1 or not m.contracted or not is_static(news[0][1].size):
        return None
    if any(isinstance(r, (Shared, Resample)) for r in m.roles):
        return None
    return news[0][0]


def _axis(m: Map, row: int) -> int:
    """The kernel axis of the rows."""
    return sum(not isinstance(r, (Kept, Resample)) for r in m.roles[:row])


def _size(m: Map, row: int) -> int:
    return int(m.kernel.shape[_axis(m, row)])


def _alike(a: Map, b: Map) -> bool:
    """Whether two maps could be rows of one."""
    row = _row(a)
    if row is None or _row(b) != row or len(a.roles) != len(b.roles) or _operand(a) != _operand(b):
        return False
    return all(o == row or ra == rb for o, (ra, rb) in enumerate(zip(a.roles, b.roles, strict=True)))


def _operand(m: Map) -> Value | View:
    """The operand, or the view that it is: equal views of one value are often different cells."""
    return m.x.node if isinstance(m.x.node, View) else m.x


def _bias(c: Const, row: int) -> Kernel | None:
    """A constant as one entry per row; None where it varies along something else."""
    if any(varies and o != row for o, varies in enumerate(c.varies)):
        return None
    return kernels.expand(kernels.reshape(c.kernel, (c.kernel.entries,)), (c.sizes[row],))


def _with_bias(s: Value) -> Sibling | None:
    """A value that is a map, or the sum of a map and one bias per row."""
    if isinstance(s.node, Map):
        return Sibling(s, s.node, None) if _row(s.node) is not None else None
    if not isinstance(s.node, Sum) or len(s.node.terms) != 2:
        return None
    for t, c in (s.node.terms, s.node.terms[::-1]):
        if isinstance(t.node, Map) and isinstance(c.node, Const) and (row := _row(t.node)) is not None:
            bias = _bias(c.node, row)
            return Sibling(s, t.node, bias) if bias is not None else None
    return None


def _carried(t: Value, context: Context) -> Value:
    """The sum that adds a map's bias, where nothing else reads the map."""
    users = context.users(t)
    if context.uses(t) == 1 and len(users) == 1 and _with_bias(users[0]) is not None:
        return users[0]
    return t


def _split(s: Sibling, context: Context) -> list[Sibling]:
    """The slices of a value that is only read in slices of its rows: siblings that are merged already."""
    row = _row(s.map)
    users = context.users(s.value)
    if row is None or not users or context.uses(s.value) != len(users):
        return [s]
    out: list[Sibling] = []
    for u in users:
        m = u.node
        if not isinstance(m, Map) or m.x is not s.value or not is_selection(m):
            return [s]
        if any(r != Kept(o) for o, r in enumerate(m.roles) if o != row):
            return [s]
        r = m.roles[row]
        if not isinstance(r, Window) or r.src != row or r.filter.down != 1 or not is_static(r.size):
            return [s]
        start, stop = -r.filter.offset, -r.filter.offset + int(r.size)
        if not 0 <= start < stop <= _size(s.map, row):
            return [s]
        roles: list[Role] = [New(stop - start) if o == row else q for o, q in enumerate(s.map.roles)]
        rows = Map(s.map.x, tuple(roles), kernels.take(s.map.kernel, _axis(s.map, row), start, stop))
        out.append(Sibling(u, rows, kernels.take(s.bias, 0, start, stop) if s.bias is not None else None))
    return out


def _siblings(m: Map, context: Context) -> list[Sibling]:
    """What is computed from the operand of a map in the same way, in the order in which it was made."""
    base = m.x.node.x if isinstance(m.x.node, View) else m.x
    readers: dict[Value, None] = {}
    for u in context.users(base):
        readers[u] = None
        if isinstance(u.node, View):
            readers.update(dict.fromkeys(context.users(u)))
    found: dict[Value, Sibling] = {}
    for u in readers:
        s = _with_bias(_carried(u, context) if isinstance(u.node, Map) else u)
        if s is not None and _alike(m, s.map):
            for part in _split(s, context):
                found[part.value] = part
    return sorted(found.values(), key=lambda s: s.value.id)


def _activation(s: Sibling, context: Context) -> Value | None:
    """The elementwise function that alone reads a sibling, if there is one."""
    users = context.users(s.value)
    if len(users) != 1 or context.uses(s.value) != 1:
        return None
    node = users[0].node
    return users[0] if isinstance(node, Apply) and node.x is s.value and node.op.any_operand else None


def _activations(siblings: list[Sibling], context: Context) -> list[Value]:
    """The functions that read the siblings, where each is read by one and all are the same; empty otherwise."""
    found = [u for s in siblings if (u := _activation(s, context)) is not None]
    functions = [u.node.op for u in found if isinstance(u.node, Apply)]
    return found if len(found) == len(siblings) and all(f.alike(functions[0]) for f in functions) else []


def stack(siblings: list[Sibling], activations: list[Value] | None = None) -> Joint:
    """The siblings as slices of one map; or the activations that read them, as slices of one activation of it."""
    first = siblings[0].map
    row = _row(first)
    assert row is not None
    sizes = [_size(s.map, row) for s in siblings]
    total = sum(sizes)
    roles: list[Role] = [New(total) if o == row else r for o, r in enumerate(first.roles)]
    kernel = kernels.concatenate([s.map.kernel for s in siblings], _axis(first, row))
    stacked = Value(Map(first.x, tuple(roles), kernel))
    if any(s.bias is not None for s in siblings):
        parts = [s.bias if s.bias is not None else kernels.uniform((n,), 0.0) for s, n in zip(siblings, sizes, strict=True)]
        varies = tuple(o == row for o in range(len(roles)))
        stacked = make_sum([stacked, Value(Const(stacked.sizes, varies, kernels.concatenate(parts, 0)))])
    if activations and isinstance(f := activations[0].node, Apply):
        stacked = Value(Apply(stacked, f.op, stacked.sizes, f.kept, f.shifts))
    pairs: list[tuple[Value, Value]] = []
    start = 0
    for value, size in zip(activations or [s.value for s in siblings], sizes, strict=True):
        slices: list[Role] = [
            Window(o, selection_filter(start, total, size), size) if o == row else Kept(o) for o in range(len(roles))
        ]
        pairs.append((value, Value(Map(stacked, tuple(slices), kernels.uniform((1,), 1.0)))))
        start += size
    return Joint(tuple(pairs))


def _merged(siblings: list[Sibling], context: Context) -> Iterator[Joint]:
    if activations := _activations(siblings, context):
        yield stack(siblings, activations)
    yield stack(siblings)


def _merge_siblings(v: Value, context: Context) -> Iterator[Outcome]:
    if is_selection(v.node) and isinstance(v.node, Map):
        # Slices of one map leave rows unread, or have further siblings.
        own = _with_bias(v.node.x)
        if own is None or v not in [s.value for s in _split(own, context)]:
            return
    else:
        own = _with_bias(v)
    if own is None or _carried(own.value, context) is not own.value:
        return
    siblings = _siblings(own.map, context)
    mine = [s.value for s in siblings]
    # The proposals of all of them are the same: those of the first and the last one will do, which are looked at before and
    # after the others have changed.
    if len(siblings) < 2 or v not in (mine[0], mine[-1]):
        return
    merged = own.map if own.value not in mine else None
    if merged is not None and {s.value for s in _split(own, context)} == set(mine):
        row = _row(merged)
        if row is None or sum(_size(s.map, row) for s in siblings) >= _size(merged, row):
            return
    yield from _merged(siblings, context)
    if 2 < len(siblings) <= MOST_LEFT_OUT:
        for left_out in siblings:
            yield from _merged([s for s in siblings if s is not left_out], context)


law = Law("merge siblings", _merge_siblings, late=True, margin=0.1)
