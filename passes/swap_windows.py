"""A window and what sums its outputs along the same axis change places.

``A(K(x)) ⇒ K'(A'(x))`` where K slides along an axis and A, which leaves the channels alone, pools, averages or contracts that
axis: a convolution behind a global average is a Linear on the averages of what each tap sees, 3×3 numbers per channel

    Σ_o a[o] Σ_t K[t] x[o·s + t − p]  =  Σ_t K[t] (Σ_o a[o] x[o·s + t − p]),

and a convolution in front of a pooling of stride d is one of stride d behind a pooling of stride 1, which has fewer taps than
the two composed.

Exact for contractions, means and single outputs where the sizes are static; for windows where the two would compose
(`window.cascade`): then what either reads at the border is zero padding.

Costs what A' does on the larger input, and saves the products of K with all but few of the outputs. Proposed only where the
result is smaller than what K makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fxconv import kernel as kernels
from fxconv.algebra import Meeting, meet
from fxconv.axes import Size, is_static
from fxconv.branches import densify
from fxconv.expr import Kept, Map, New, Resample, Role, Value, Window, is_selection, split_view
from fxconv.kernel import Kernel
from fxconv.law import Context, Law, Outcome, mapped_operand
from fxconv.normal_form import normal
from fxconv.passes.commute import inner_on, source
from fxconv.raw import Raw, as_value, densify_resampling, moved, places
from fxconv.window import Filter, cascade


def _swap(v: Value, context: Context) -> Iterator[Outcome]:
    found = mapped_operand(v)
    if found is None or not isinstance(found[2].node, Map):
        return
    outer, view, x = found
    inner = x.node
    assert isinstance(inner, Map)
    if not inner.contracted or is_selection(outer) or not any(isinstance(r, Window) and r.filter.taps > 1 for r in inner.roles):
        return
    if context.count(v.sizes) >= context.count(x.sizes):
        return
    met = meet(outer, inner, view)
    if not isinstance(met, str):
        result = _swapped(met)
        if result is not None:
            yield result


def _swapped(m: Meeting) -> Value | None:
    inner, perm = m.inner, m.perm
    sliding = {k for k in range(len(perm)) if isinstance(inner.roles[perm[k]], Window)}
    outer = _single_outputs_contracted(m.outer, sliding)
    if outer is None or any(not isinstance(inner.roles[perm[k]], (Kept, Window)) for k in outer.acting):
        return None
    summed = [k for k in outer.contracted if k in sliding]
    slid = [r.src for r in outer.roles if isinstance(r, Window) and r.src in sliding]
    if not summed and not slid:
        return None

    # First the outer map, on the inner one's input. A summed axis leaves the sums that the taps see, as an axis of taps.
    kernel, axes = outer.kernel, outer.axes()
    pairs: dict[int, tuple[Window, Window]] = {}
    for k in slid:
        role, r1 = next(r for r in outer.roles if isinstance(r, Window) and r.src == k), inner.roles[perm[k]]
        assert isinstance(r1, Window)
        exchanged = _exchanged(role, r1, inner.in_sizes[r1.src])
        if exchanged is None:
            return None
        pairs[k] = exchanged
    for k in summed:
        r1 = inner.roles[perm[k]]
        assert isinstance(r1, Window)
        n_in = inner.in_sizes[r1.src]
        if not is_static(n_in) or not is_static(r1.size):
            return None
        kernel = _seen_by_taps(kernel, axes.index(("in", k)), r1.filter, int(n_in), int(r1.size))
    axis: dict[tuple[str, int], int] = {key: i for i, key in enumerate([*axes, *(("tap", k) for k in summed)])}
    first: list[Role] = []
    place: dict[tuple[str, int], int] = {}
    order: list[int] = []

    def put(key: tuple[str, int], role: Role) -> None:
        place[key] = len(first)
        first.append(role)
        if key in axis:
            order.append(axis[key])

    for z, r in enumerate(outer.roles):
        if isinstance(r, New):
            put(("out", z), r)
            continue
        r1 = inner.roles[perm[r.src]]
        if isinstance(r1, New):
            continue
        put(("out", z), pairs[r.src][0] if r.src in pairs else moved(r, r1.src) if isinstance(r1, Kept) else Kept(r1.src))
    for i in inner.contracted:
        put(("in", i), Kept(i))
    for k in summed:
        r1 = inner.roles[perm[k]]
        assert isinstance(r1, Window)
        put(("tap", k), New(r1.filter.taps))
    columns = sorted((source(inner.roles[perm[k]]), axis["in", k]) for k in outer.contracted)
    base = as_value(split_view(m.x, m.in_splits))
    before = normal(base, first, kernels.permute(kernel, [*order, *(a for _, a in columns)]))

    # Then the inner map, on that: it slides over what was slid over, and contracts the axes of taps.
    return inner_on(m, outer, before, place, {k: then for k, (_, then) in pairs.items()})


def _single_outputs_contracted(outer: Raw, sliding: set[int]) -> Raw | None:
    """Resampling of sliding axes as a contraction, and windows that have one output; None where a size is dynamic."""
    resampled = {o for o, r in enumerate(outer.roles) if isinstance(r, Resample) and r.src in sliding}
    dense = densify_resampling(outer, resampled)
    if isinstance(dense, str):
        return None
    for o, r in enumerate(dense.roles):
        if isinstance(r, Window) and r.src in sliding and r.size == 1 and is_static(dense.in_sizes[r.src]):
            dense = densify(dense, o)
    return dense


def _seen_by_taps(k: Kernel, axis: int, f: Filter, n_in: int, n_out: int) -> Kernel:
    """An axis over the outputs of a filter as one over its inputs, and one over its taps that comes last."""
    shape = (*k.shape[:axis], n_in, *k.shape[axis + 1 :], f.taps)

    def numbers() -> torch.Tensor:
        values = k.tensor()
        table = places(f, n_in, n_out).permute(1, 2, 0).to(values.device)
        return torch.tensordot(values.movedim(axis, -1), table, 1).movedim(-2, axis)

    return kernels.derive(shape, ("seen by taps", axis, f, n_in, n_out), (k,), numbers)


def _exchanged(outer: Window, inner: Window, n_in: Size) -> tuple[Window, Window] | None:
    """Two windows in the other order: the outer one on the input, and the inner one on what that makes; None if it can't be.

    Both have positions ``o·d₁d₂ + u·e₂d₁ + t·e₁ − p₂d₁ − p₁``. The outer taps u go first, at every place that a tap t of the
    inner one reads then: at multiples of the greatest common divisor of ``d₁d₂`` and ``e₁``.
    """
    f2, f1 = outer.filter, inner.filter
    if f1.up != 1 or f2.up != 1:
        return None
    both = cascade(f2, f1, n_in, inner.size, outer.size)
    if isinstance(both, str):
        return None
    down, reach = f1.down * f2.down, (f1.taps - 1) * f1.dilation
    step = math.gcd(down, f1.dilation if f1.taps > 1 else 0)
    extent = both.filter.extent - down + reach + step
    first = Filter(1, step, f2.taps, f2.dilation * f1.down, f1.offset + f2.offset * f1.down, extent)
    then = Filter(1, down // step, f1.taps, max(f1.dilation // step, 1), 0, down // step - reach // step - 1)
    return Window(inner.src, first, first.out_size(n_in)), Window(0, then, outer.size)


law = Law("swap windows", _swap)
