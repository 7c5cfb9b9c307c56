"""Spellings of operators that are made of others: mixtures by a constant, copies, turns, contractions by dims."""

from __future__ import annotations

import string
from typing import Any

from fxconv.spelling_common import Barrier, Context, Op, spelling

# ----------------------------------------------------------------- mixtures by a constant


@spelling("addcmul")
def addcmul(c: Context, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Op:
    return c.make("addcmul", (input, tensor1, tensor2), value=c.number(value))


@spelling("addcdiv")
def addcdiv(c: Context, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Op:
    return c.make("addcdiv", (input, tensor1, tensor2), value=c.number(value))


@spelling("lerp")
def lerp(c: Context, input: Any, end: Any, weight: Any) -> Op:
    return c.make("lerp", (input, end, weight))


@spelling("torch.where", "aten.where")
def where(c: Context, condition: Any, input: Any = None, other: Any = None) -> Op | Barrier:
    if input is None or other is None:
        return Barrier("where without values gives places")
    return c.make("where", (condition, input, other))


@spelling("method.where")
def where_method(c: Context, input: Any, condition: Any, other: Any) -> Op:
    return c.make("where", (condition, input, other))


@spelling("masked_fill")
def masked_fill(c: Context, input: Any, mask: Any, value: Any) -> Op:
    return c.make("where", (mask, value, input))


# ----------------------------------------------------------------- copies and turns


@spelling("repeat", "tile")
def repeat(c: Context, input: Any, *repeats: Any, **kwargs: Any) -> Op:
    given = repeats or tuple(kwargs.values())
    items = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    counts = tuple(c.size(r) for r in items)
    counts = (1,) * (c.rank(input) - len(counts)) + counts  # only tile may name fewer dims
    if len(counts) == c.rank(input) and all(isinstance(r, int) and r == 1 for r in counts):
        return c.make("identity", (input,))
    return c.make("repeat", (input,), counts=counts)


@spelling("repeat_interleave")
def repeat_interleave(c: Context, input: Any, repeats: Any, dim: Any = None, *, output_size: Any = None) -> Op | Barrier:
    if dim is None:
        return Barrier("repeat_interleave of the flattened tensor")
    if not isinstance(repeats, int):
        return Barrier("repeat_interleave by a tensor of counts")
    return c.make("repeat_interleave", (input,), dim=c.dim(input, dim), count=c.integer(repeats))


@spelling("rot90")
def rot90(c: Context, input: Any, k: Any = 1, dims: Any = (0, 1)) -> Op:
    return c.make("rot90", (input,), k=c.integer(k) % 4, dims=c.dims(input, tuple(dims)))


@spelling("cumsum")
def cumsum(c: Context, input: Any, dim: Any, *, dtype: Any = None) -> Op:
    return c.make("cumsum", (input,), dim=c.dim(input, dim))


@spelling("hstack", "vstack", "row_stack", "dstack", "column_stack")
def stacked(c: Context, tensors: Any) -> Op | Barrier:
    dim = {"hstack": 1, "column_stack": 1, "dstack": 2}.get(c.opname, 0)
    if not isinstance(tensors, (list, tuple)):
        return Barrier(f"{c.opname} of a sequence that is itself a value of the graph")
    if any(c.rank(t) <= dim or c.rank(t) < 2 for t in tensors):
        return Barrier(f"{c.opname} of tensors that it adds dims to")
    return c.make("cat", tensors, dim=dim)


# ----------------------------------------------------------------- contractions by dims


@spelling("tensordot")
def tensordot(
    c: Context, input: Any, other: Any = None, dims: Any = 2, dims_other: Any = None, *, b: Any = None, out: Any = None
) -> Op | Barrier:  # fmt: skip
    other = b if other is None else other
    left, right = c.rank(input), c.rank(other)
    if dims_other is not None:  # aten: dims_self, dims_other
        mine, its = dims, dims_other
    elif isinstance(dims, int):
        mine, its = range(left - dims, left), range(dims)
    elif isinstance(dims, (list, tuple)) and len(dims) == 2:
        mine, its = (d if isinstance(d, (list, tuple)) else (d,) for d in dims)
    else:
        return Barrier("tensordot over dims that are no constants")
    first = string.ascii_letters[:left]
    second = list(string.ascii_letters[left : left + right])
    pairs = list(zip(c.dims(input, tuple(mine)), c.dims(other, tuple(its)), strict=True))
    for m, i in pairs:
        second[i] = first[m]
    gone = {first[m] for m, _ in pairs}
    out = "".join(x for x in (*first, *second) if x not in gone)
    return c.make("einsum", (input, other), equation=f"{first},{''.join(second)}->{out}")


@spelling("inner")
def inner(c: Context, input: Any, other: Any) -> Op | Barrier:
    if not (c.rank(input) and c.rank(other)):
        return Barrier("inner product with a number")
    return tensordot(c, input, other, ((c.rank(input) - 1,), (c.rank(other) - 1,)))
