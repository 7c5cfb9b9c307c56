"""A window as a dense matrix: for targets that have no convolution.

``Map with windows or groups ⇒ Map without``: every slot that the map slides along or varies over is contracted, and its
output slots are rows. A convolution of any stride, padding, dilation and groups, transposed or not, becomes one Linear
on the flattened input.

Exact always. Needs static sizes, and has output size × input size entries, so it is refused above 2**26 of them. Used
for ``target="linear"`` only: wherever a convolution may be emitted it is the better form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fxconv import kernel as kernels
from fxconv.axes import Size, is_static
from fxconv.expr import Kept, Map, New, Resample, Role, Shared, Value, Window, is_selection, kernel_shape, role_size
from fxconv.law import Context, Law, Outcome, Refusal
from fxconv.normal_form import normal
from fxconv.passes.full_length import weights_order
from fxconv.raw import places

MOST = 2**26
"""Entries of the largest matrix: 256 MiB in float32."""


def _densify(v: Value, context: Context) -> Iterator[Outcome]:
    m = v.node
    if not isinstance(m, Map) or is_selection(m) or any(isinstance(r, Resample) for r in m.roles):
        return
    dense = [r for r in m.roles if isinstance(r, (Shared, Window))]
    if not any(isinstance(r, Window) for r in m.roles) and not (dense and m.contracted):
        return
    if m.kernel.uniform is not None and not m.contracted:
        return  # pooling and nearest upsampling are no convolutions
    sizes: list[Size] = [m.x.sizes[r.src] for r in dense] + [role_size(r, m.x.sizes) for r in dense]
    if not all(is_static(s) for s in (*sizes, *m.kernel.shape)):
        dynamic = ", ".join(str(s) for s in dict.fromkeys(sizes) if not is_static(s))
        yield Refusal(
            f"a convolution along a dynamic size ({dynamic}) is no matrix",
            "the sizes were static: give dynamic_shapes that leave only the batch dynamic",
        )
        return
    roles: list[Role] = [r if isinstance(r, (Kept, New)) else New(role_size(r, m.x.sizes)) for r in m.roles]
    shape = kernel_shape(tuple(roles), m.x.sizes)
    entries = math.prod(int(s) for s in shape)
    if entries > MOST:
        yield Refusal(f"as a Linear it has {entries} weights, more than 2**26", "the image were smaller")
        return
    if weights_order(m) is not None:
        return  # `full_length` has it, and keeps the weights
    k = kernels.derive(shape, ("densify", m.roles, m.x.sizes), (m.kernel,), lambda: matrix(m))
    yield normal(m.x, roles, k)


def matrix(m: Map) -> torch.Tensor:
    """The map as a dense tensor: one axis per output slot that is not kept, then one per input slot that is not, in
    float64."""
    k = m.kernel.tensor()
    sources: list[int] = []
    axis = 0
    for r in m.roles:
        if isinstance(r, (Shared, Window)):
            n = int(m.x.sizes[r.src])
            if isinstance(r, Shared):
                k = torch.diag_embed(k.movedim(axis, -1))
            else:
                k = torch.tensordot(k.movedim(axis, -1), places(r.filter, n, int(r.size)).to(k.device), 1)
            k = k.movedim(-2, axis)  # the input's axis stays last
            sources.append(r.src)
        axis += not isinstance(r, Kept)
    # [outputs…, contracted…, sources…] → inputs ascending
    inputs = [*m.contracted, *sources]
    order = sorted(range(len(inputs)), key=lambda i: inputs[i])
    return k.permute([*range(axis), *(axis + i for i in order)]).contiguous()


law = Law("densify", _densify)
