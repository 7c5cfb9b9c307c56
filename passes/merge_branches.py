"""Parallel maps of one value, added, become one map.

``Map₁ x + Map₂ x ⇒ (Map₁ + Map₂) x``: RepVGG, MobileOne, ACNet, DBB, LoRA, ``x + Linear(x)``.

Per output axis the roles are brought to a common one: kept and shared become shared (ones along the axis); windows of
equal up and down become a window over the union of their taps; kept or shared beside a contraction becomes a
contraction with a diagonal. Branches whose axes are split differently are first refined to common axes.

Exact always. Refused where windows have different strides, or one branch slides where another contracts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fxconv.branches import Reading, merge, readings
from fxconv.expr import Const, Sum, Value
from fxconv.law import Context, Law, Outcome, Refusal
from fxconv.refs import make_sum


def _merge(v: Value, context: Context) -> Iterator[Outcome]:
    if not isinstance(v.node, Sum):
        return
    by_base: dict[Value, list[tuple[int, Reading]]] = {}
    for i, t in enumerate(v.node.terms):
        if isinstance(t.node, Const):
            continue
        for reading in readings(t):
            by_base.setdefault(reading[0], []).append((i, reading))
    seen: set[frozenset[int]] = set()
    for candidates in by_base.values():
        if len({i for i, _ in candidates}) < 2:
            continue
        read = [(i, branch) for i, (_, get) in candidates if (branch := get()) is not None]
        found = list({i: (i, branch) for i, branch in reversed(read)}.values())[::-1]
        if len(found) < 2:
            continue
        result = merge([b for _, b in found])
        if not isinstance(result, str):
            yield _with(v.node, result, [i for i, _ in found])
        elif len(found) == 2:
            yield Refusal(result)
        if len(found) == 2:
            continue
        for a in range(len(found)):
            for b in range(a + 1, len(found)):
                pair = frozenset((found[a][0], found[b][0]))
                if pair in seen:
                    continue
                seen.add(pair)
                two = merge([found[a][1], found[b][1]])
                yield Refusal(two) if isinstance(two, str) else _with(v.node, two, sorted(pair))


def _with(node: Sum, merged: Value, gone: Sequence[int]) -> Value:
    return make_sum([merged, *(t for i, t in enumerate(node.terms) if i not in gone)])


law = Law("merge branches", _merge)
