"""Maps of one value that differ in their rows only become one map and a split.

``Map₁ x, Map₂ x ⇒ rows of (Map₁; Map₂) x``: Q, K and V; gate and up; sibling 1×1 convolutions of an Inception block.

Exact always. Wants the same windows, strides and kept axes on both. Costs a slice per sibling (and a copy where the
reader needs it contiguous), saves a launch and a reading of x.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv import kernel as kernels
from fxconv.axes import is_static
from fxconv.expr import Map, New, Role, Value, Window
from fxconv.law import Context, Law, Outcome
from fxconv.window import selection_filter


def _rows(m: Map) -> int | None:
    news = [o for o, r in enumerate(m.roles) if isinstance(r, New)]
    return news[0] if len(news) == 1 and m.contracted and is_static(m.roles[news[0]].size) else None  # type: ignore[union-attr]


def alike(a: Map, b: Map) -> bool:
    """Whether two maps of one value could be rows of one."""
    row = _rows(a)
    if row is None or _rows(b) != row or len(a.roles) != len(b.roles):
        return False
    return all(o == row or ra == rb for o, (ra, rb) in enumerate(zip(a.roles, b.roles, strict=True)))


def stack(maps: list[Map]) -> list[Value]:
    """The maps as slices of one stacked map."""
    first = maps[0]
    row = _rows(first)
    assert row is not None
    sizes = [int(m.roles[row].size) for m in maps]  # type: ignore[union-attr]
    total = sum(sizes)
    axis = sum(not _has_no_axis(r) for r in first.roles[:row])
    roles: list[Role] = [New(total) if o == row else r for o, r in enumerate(first.roles)]
    stacked = Value(Map(first.x, tuple(roles), kernels.concatenate([m.kernel for m in maps], axis)))
    from fxconv.expr import Kept

    out: list[Value] = []
    start = 0
    for size in sizes:
        slices: list[Role] = [
            Window(o, selection_filter(start, total, size), size) if o == row else Kept(o) for o in range(len(roles))
        ]
        out.append(Value(Map(stacked, tuple(slices), kernels.uniform((1,), 1.0))))
        start += size
    return out


def _has_no_axis(r: Role) -> bool:
    from fxconv.expr import Kept, Resample

    return isinstance(r, (Kept, Resample))


def _merge_siblings(v: Value, context: Context) -> Iterator[Outcome]:
    return iter(())


law = Law("merge siblings", _merge_siblings)
