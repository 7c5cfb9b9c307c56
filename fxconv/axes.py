"""Sizes of axes, and how a flat list of sizes is regrouped by a view.

A size is an ``int`` or, where it is dynamic, a ``sympy`` expression taken from a ``SymInt``. SymInts themselves never
pass this file: asking one a question (``h % 2 == 0``) adds a guard to the exported program, and they cannot be hashed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

# A sympy expression where dynamic; sympy has no types to name it by.
Size: TypeAlias = int | Any


def as_size(value: Any) -> Size:
    """An ``int``, ``SymInt`` or sympy expression as a `Size`; a constant expression becomes an ``int``."""
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    if isinstance(value, sympy.Basic):
        return int(value) if value.is_Integer else value
    return int(value)


def shape_of(tensor: Any) -> tuple[Size, ...]:
    """The shape of a (fake) tensor in sizes."""
    return tuple(as_size(s) for s in tensor.shape)


def is_static(size: Size) -> bool:
    return isinstance(size, int)


def product(sizes: Sequence[Size]) -> Size:
    """The product of sizes; 1 for none."""
    if len(sizes) == 1:
        return sizes[0]
    if all(isinstance(s, int) for s in sizes):
        return math.prod(sizes)
    return _symbolic_product(tuple(sizes))


@lru_cache(maxsize=65536)
def _symbolic_product(sizes: tuple[Size, ...]) -> Size:
    return as_size(sympy.Mul(*sizes))


@lru_cache(maxsize=65536)
def _expanded_difference_is_zero(a: sympy.Expr, b: sympy.Expr) -> bool:
    difference = sympy.expand(a - b)
    if difference != 0 and difference.has(FloorDiv):
        difference = sympy.expand(difference.replace(FloorDiv, _least_floor))
    return bool(difference == 0)


def _least_floor(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """``⌊a/b⌋`` with the constant in ``a`` brought between 0 and ``b``: ``⌊(s − 1)/2⌋ + 1`` is ``⌊(s + 1)/2⌋``."""
    constant, rest = sympy.expand(a).as_coeff_Add()
    if not (b.is_Integer and constant.is_Integer):
        return FloorDiv(a, b)
    return FloorDiv(rest + constant % b, b) + constant // b


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value of their symbols, as far as expansion can tell."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or _expanded_difference_is_zero(sympy.sympify(a), sympy.sympify(b))


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes have as many sizes, and the `same` ones."""
    return len(a) == len(b) and all(map(same, a, b))


@lru_cache(maxsize=65536)
def _quotient(a: sympy.Expr, b: sympy.Expr) -> Size | None:
    ratio = sympy.cancel(a / b)
    if sympy.denom(ratio) != 1:
        return None
    return as_size(ratio)


def quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` where it is a whole number for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if isinstance(a, int):
        return None
    return 1 if same(a, b) else _quotient(a, sympy.sympify(b))


def evaluate(size: Size, symbols: Mapping[sympy.Symbol, int]) -> int:
    """The size at given values of its symbols.

    Raises:
        KeyError: a symbol of the size has no value.
    """
    if isinstance(size, int):
        return size
    values = {s: symbols[s] for s in size.free_symbols}
    return int(size.subs(values))


def common_refinement(a: Sequence[Size], b: Sequence[Size]) -> tuple[Size, ...] | None:
    """The coarsest list of sizes that both lists are regroupings of, or None (6·6 and 4·9 have none).

    Both lists must have the same product; ones are dropped.
    """
    return _refined(tuple(a), tuple(b))


@lru_cache(maxsize=65536)
def _refined(a: tuple[Size, ...], b: tuple[Size, ...]) -> tuple[Size, ...] | None:
    left, right = [s for s in a if s != 1], [s for s in b if s != 1]
    out: list[Size] = []
    while left and right:
        x, y = left[0], right[0]
        if same(x, y):
            out.append(x)
            del left[0], right[0]
        elif (rest := quotient(x, y)) is not None:
            out.append(y)
            left[0] = rest
            del right[0]
        elif (rest := quotient(y, x)) is not None:
            out.append(x)
            right[0] = rest
            del left[0]
        else:
            # The heads don't divide each other: they may still match from the other end (symbolic leading sizes).
            return _refine_from_the_end(out, left, right)
    return tuple(out) if not left and not right else None


def _refine_from_the_end(head: list[Size], left: list[Size], right: list[Size]) -> tuple[Size, ...] | None:
    tail: list[Size] = []
    while left and right:
        x, y = left[-1], right[-1]
        if same(x, y):
            tail.append(x)
            del left[-1], right[-1]
        elif (rest := quotient(x, y)) is not None:
            tail.append(y)
            left[-1] = rest
            del right[-1]
        elif (rest := quotient(y, x)) is not None:
            tail.append(x)
            right[-1] = rest
            del left[-1]
        else:
            return None
    return tuple(head + tail[::-1]) if not left and not right else None


def split_like(sizes: Sequence[Size], refinement: Sequence[Size]) -> tuple[tuple[Size, ...], ...] | None:
    """How each size splits into consecutive members of ``refinement``; a size of 1 splits into nothing."""
    return _split_like(tuple(sizes), tuple(refinement))


@lru_cache(maxsize=65536)
def _split_like(sizes: tuple[Size, ...], refinement: tuple[Size, ...]) -> tuple[tuple[Size, ...], ...] | None:
    parts: list[tuple[Size, ...]] = []
    rest = list(refinement)
    for size in sizes:
        part: list[Size] = []
        remaining: Size = size
        while remaining != 1:
            if not rest:
                return None
            q = quotient(remaining, rest[0])
            if q is None:
                return None
            part.append(rest.pop(0))
            remaining = q
        parts.append(tuple(part))
    return tuple(parts) if not rest else None
