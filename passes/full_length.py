"""A window over the whole input as a Linear: for targets that have no convolution.

``Map with windows that each cover their whole input once ⇒ Map without``: a full-length convolution becomes one Linear on the
flattened input, with the same weights in another order (what a checkpoint holds stays one weight, see
`fxconv.weight_map`).

Exact always. Used for ``target="linear"`` only, as `densify` is, which has every other window.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv import kernel as kernels
from fxconv.expr import Kept, Map, New, Role, Value, Window, is_selection, kernel_shape, role_size
from fxconv.law import Context, Law, Outcome
from fxconv.normal_form import normal


def _full_length(v: Value, context: Context) -> Iterator[Outcome]:
    m = v.node
    if not isinstance(m, Map) or is_selection(m) or m.kernel.uniform is not None or (order := weights_order(m)) is None:
        return
    roles: list[Role] = [r if isinstance(r, (Kept, New)) else New(role_size(r, m.x.sizes)) for r in m.roles]
    shape = kernel_shape(tuple(roles), m.x.sizes)
    yield normal(m.x, roles, kernels.reshape(kernels.permute(m.kernel, order), shape))


def weights_order(m: Map) -> list[int] | None:
    """The order of the kernel's axes in a Linear, where every window covers its whole input once; else None."""
    axis_of: dict[int, int] = {}
    rows: list[int] = []
    axis = 0
    for r in m.roles:
        if not isinstance(r, (Kept, New, Window)):
            return None
        if isinstance(r, Window):
            f = r.filter
            if (f.up, f.dilation, f.offset, r.size, f.taps) != (1, 1, 0, 1, m.x.sizes[r.src]):
                return None
            axis_of[r.src] = axis
        elif isinstance(r, New):
            rows.append(axis)
        axis += not isinstance(r, Kept)
    if not axis_of:
        return None
    axis_of.update({s: axis + i for i, s in enumerate(m.contracted)})
    return [*rows, *(axis_of[s] for s in sorted(axis_of))]


law = Law("full length", _full_length)
