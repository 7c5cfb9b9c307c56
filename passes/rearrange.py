"""Slices of one map side by side are the map with its rows rearranged.

``cat(y[b], y[a]) ⇒ G y ⇒ (G M) x + G c`` where ``y = M x + c`` and G picks entries of one axis: a roll, a swap of halves or a
reversed chunk behind a convolution is an order of its rows. (In front of one it is an order of columns, which `distribute` and
`merge branches` find.)

Exact always. Saves the copy that a concatenation makes; where something else reads y too, it would be computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fxconv import kernel as kernels
from fxconv.axes import is_static
from fxconv.expr import Kept, Map, New, Role, Sum, Value, Window, is_selection
from fxconv.law import Context, Law, Outcome, through_view
from fxconv.passes.absorb_together import through
from fxconv.refs import make_sum


def _rearrange(v: Value, context: Context) -> Iterator[Outcome]:
    if not isinstance(v.node, Sum):
        return
    picked: dict[tuple[Value, int], list[Value]] = {}
    for t in v.node.terms:
        found = _picked_from(t)
        if found is not None:
            picked.setdefault(found, []).append(t)
    for (y, slot), parts in picked.items():
        between, inner = through_view(y)
        terms = inner.node.terms if isinstance(inner.node, Sum) else (inner,)
        if len(parts) < 2 or not any(isinstance(t.node, Map) and t.node.contracted for t in terms):
            continue
        shown = list(zip(*(_entries(t, y, slot) for t in parts), strict=True))
        index = [max(at) for at in shown]
        disjoint = all(sum(i >= 0 for i in at) == 1 for at in shown)
        if not disjoint:
            continue
        new = through(_gather(y, slot, tuple(index)), between, inner)
        if new is not None:
            yield make_sum([new, *(t for t in v.node.terms if t not in parts)])


def _picked_from(t: Value) -> tuple[Value, int] | None:
    """What a value is a selection of, and along which slot, all of static size; None if it is none."""
    if not is_selection(t.node) or (slot := _slot(t)) < 0 or not is_static(t.sizes[slot]):
        return None
    while is_selection(t.node) and isinstance(t.node, Map) and _slot(t) == slot:
        if not isinstance(t.node.roles[slot], Window) or not is_static(t.node.x.sizes[slot]):
            return None
        t = t.node.x
    return t, slot


def _entries(t: Value, y: Value, slot: int) -> list[int]:
    """Per entry of a selection of y, the one of y that it shows; −1 where that is zero."""
    entries = list(range(int(t.sizes[slot])))
    while t is not y:
        assert isinstance(t.node, Map)
        role, n = t.node.roles[slot], int(t.node.x.sizes[slot])
        assert isinstance(role, Window)
        places = [i * role.filter.down - role.filter.offset for i in entries]
        entries = [p if i >= 0 and 0 <= p < n else -1 for i, p in zip(entries, places, strict=True)]
        t = t.node.x
    return entries


def _slot(t: Value) -> int:
    """The slot along which a selection selects, where that is one only and the others keep their order; else −1."""
    assert isinstance(t.node, Map)
    slots = [o for o, r in enumerate(t.node.roles) if isinstance(r, Window)]
    in_order = all(not isinstance(r, New) and r.src == o for o, r in enumerate(t.node.roles))
    return slots[0] if len(slots) == 1 and in_order else -1


def _gather(y: Value, slot: int, index: tuple[int, ...]) -> Map:
    """Entries of a slot by their indices."""
    n = int(y.sizes[slot])
    roles: list[Role] = [New(len(index)) if o == slot else Kept(o) for o in range(y.rank)]

    def rows() -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(index), n).double()

    return Map(y, tuple(roles), kernels.derive((len(index), n), ("gather", index), (), rows))


law = Law("rearrange", _rearrange)
