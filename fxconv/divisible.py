"""What a model's own operators say about its sizes: patches of ``h // 4`` by 4 are of an h that 4 divides.

``x.reshape(n, c, h // 4, 4, w // 4, 4)`` has as many entries as ``x``, or the model raises; neither ``4·(h // 4)`` nor
``4·(w // 4)`` is more than what it stands for, so both are equal to it. Nothing in the captured sizes says so: there h is
h, and the 4 behind a view is ``h // (h // 4)``. `assume_divisible` writes the sizes of a captured graph with ``4·(h // 4)``
for h. So do concatenations: every second pixel from the first, ``(h + 1) // 2`` of them, fits beside every second from the
next, ``h // 2``, where h is even. The graph itself stays; what comes of it is right wherever the model runs, and checks that
it does: the view or concatenation that would have raised may be gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod

from fxconv.axes import Size, as_size, is_static, product, shape_of
from fxconv.shapes import SizeCheck, symbol_places
from fxconv.spelling import Op, canonical

Fact = tuple[sympy.Expr, int]
"""A size, and what divides it."""


def assume_divisible(gm: fx.GraphModule) -> list[SizeCheck]:
    """Write the sizes in ``meta["val"]`` as multiples of what the graph's views divide them by; returns what was assumed."""
    facts: list[Fact] = []
    places = symbol_places(gm)
    for node in gm.graph.nodes:
        if not node.op.startswith("call_") or not _may_divide(node):
            continue
        op = canonical(node, gm, {})
        if not isinstance(op, Op) or op.name not in ("reshape", "pixel_unshuffle", "cat", "stack"):
            continue
        if op.name in ("cat", "stack"):
            shapes = [shape_of(v) for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
            along = int(op.attrs["dim"]) if op.name == "cat" else None
            facts += [fact for fact in slices_said(shapes, along) if fact not in facts]
            continue
        source = node.all_input_nodes[0].meta.get("val")
        if not isinstance(source, torch.Tensor):
            continue
        before = [rewritten(s, facts) for s in shape_of(source)]
        if op.name == "pixel_unshuffle":
            facts += [(s, int(op.attrs["factor"])) for s in before[-2:] if not is_static(s)]
        elif op.attrs.get("shape") is not None and (written := _written(op.attrs["shape"])) is not None:
            facts += divisors_said(before, [rewritten(s, facts) for s in written])
    if not facts:
        return []
    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(lambda v: _as_multiples(v, facts), node.meta["val"])
    return [_check(*fact, places) for fact in dict.fromkeys(facts) if fact[0].free_symbols <= places.keys()]


def _check(size: sympy.Expr, k: int, places: dict[sympy.Symbol, tuple[str, int]]) -> SizeCheck:
    named = tuple((s, *places[s]) for s in sorted(size.free_symbols, key=str))
    readable = ", ".join(f"{s} = dim {dim} of {name}" for s, name, dim in named)
    text = f"{size} must be a multiple of {k} ({readable}): the model divides it into {k}"
    return SizeCheck(sympy.Eq(Mod(size, k), 0), named, text)


def _may_divide(node: fx.Node) -> bool:
    """Whether a dynamic size, floor-divided, is among a node's arguments or in its shape."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    if isinstance(own := node.meta.get("val"), torch.Tensor):
        values += own.shape
    return any(isinstance(v, torch.SymInt) and v.node.expr.has(FloorDiv) for v in values)


def _written(shape: Any) -> list[Size] | None:
    """The sizes of a view as its arguments say, or None where one of them is −1 or unknown."""
    values = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in shape]
    if any(not isinstance(v, (int, torch.SymInt)) or isinstance(v, int) and v < 0 for v in values):
        return None
    return [as_size(v) for v in values]


def divisors_said(before: list[Size], after: list[Size]) -> list[Fact]:
    """What sizes are multiples of, given that two shapes have as many entries.

    Once common factors are gone there are b₁·b₂·… on one side and k₁·(b₁ // k₁)·k₂·(b₂ // k₂)·… on the other, or this says
    nothing.
    """
    ratio = sympy.cancel(sympy.sympify(product(before)) / sympy.sympify(product(after)))
    top, bottom = (list(_factors(side)) for side in sympy.fraction(ratio))
    floors = [f for f in bottom if isinstance(f, FloorDiv)]
    numbers = [int(f) for f in bottom if f.is_Integer]
    if len(floors) + len(numbers) != len(bottom) or len(floors) != len(top) or not floors:
        return []
    facts: list[Fact] = []
    divisors = [k for k in dict.fromkeys(after) if is_static(k) and k > 1]
    for f in floors:
        fact = next(((b, k) for b in top for k in divisors if FloorDiv(b, k) == f), None)
        if fact is None:
            return []
        facts.append(fact)
        top.remove(fact[0])
    return facts if math.prod(k for _, k in facts) == math.prod(numbers) else []


def slices_said(shapes: list[tuple[Size, ...]], along: int | None) -> list[Fact]:
    """What sizes are multiples of, given that the shapes are equal in all dims but one.

    ``(b + k − 1) // k``, the elements from the first on in steps of k, are as many as ``b // k`` where k divides b, and only
    there.
    """
    facts: list[Fact] = []
    for d, sizes in enumerate(zip(*shapes, strict=False)):
        if d == along or len(set(sizes)) < 2:
            continue
        fewest = {s.args for s in sizes if isinstance(s, FloorDiv)}
        for b, k in fewest:
            if k.is_Integer and k > 1 and any(s == FloorDiv(b + k - 1, k) for s in sizes):
                facts.append((b, int(k)))
    return facts


def _factors(e: sympy.Expr) -> Iterator[sympy.Expr]:
    for f in sympy.Mul.make_args(e):
        base, power = f.as_base_exp()
        if power.is_Integer and power > 0 and not f.is_Integer:
            yield from [base] * int(power)
        elif f != 1:
            yield f


def rewritten(size: Size, facts: list[Fact]) -> Size:
    """A size with ``k·(b // k)`` for every b that k divides."""
    if is_static(size):
        return size
    for b, k in facts:
        floor = FloorDiv(b, k)
        part = sympy.Dummy(integer=True, positive=True)
        e = sympy.sympify(size).xreplace({floor: part})
        if isinstance(b, FloorDiv):  # n // (m·q) is (n // m) // q
            n, m = b.args
            nested = [f for f in e.atoms(FloorDiv) if f.args[0] == n and f.args[1].has(part)]
            e = e.xreplace({f: FloorDiv(k * part, f.args[1] / m) for f in nested if (f.args[1] / m).is_integer})
        size = as_size(e.xreplace({b: k * part}).xreplace({part: floor}))
        if is_static(size):
            break
    return size


def _as_multiples(value: Any, facts: list[Fact]) -> Any:
    if isinstance(value, torch.SymInt):
        return _symint(value, facts)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    shape, strides = ([_symint(s, facts) for s in sizes] for sizes in (value.shape, value.stride()))
    if all(a is b for a, b in zip([*shape, *strides], [*value.shape, *value.stride()], strict=True)):
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)


def _symint(value: Any, facts: list[Fact]) -> Any:
    if not isinstance(value, torch.SymInt):
        return value
    expr = value.node.expr
    new = rewritten(as_size(expr), facts)
    if is_static(new):
        return new
    if new == expr:
        return value
    node: Any = value.node
    return node.shape_env.create_symintnode(new, hint=node.hint)
