"""Two maps in a row become one.

``Map₂(Map₁(x)) ⇒ (Map₂∘Map₁)(x)``, for all pairs of roles and through any view between them: BatchNorm into a
convolution or a Linear (and the reverse), Conv → Conv, Conv → flatten → Linear, Linear → Linear, padding and cropping
into a kernel.

Exact when, per window axis, ``gcd(down₁, up₂) = 1`` and the positions that the second window reads outside the first
one's output lie where its uncropped output is zero (`window.cascade`).

Costs as many multiply-adds as the composed kernel has entries, which can be far more than the two had: the search decides.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxconv.algebra import join
from fxconv.expr import Map, Resample, Value
from fxconv.law import Context, Law, Outcome, Refusal, mapped_operand
from fxconv.resample import PADDING


def _compose(v: Value, context: Context) -> Iterator[Outcome]:
    found = mapped_operand(v)
    if found is None:
        return
    outer, view, x = found
    if not isinstance(x.node, Map):
        return
    result = join(outer, x.node, view)
    if result is not None:
        yield Refusal(result) if isinstance(result, str) else result
        return
    for role in x.node.roles:
        if isinstance(role, Resample) and role.kind in PADDING:
            yield Refusal(f"padding_mode={role.kind!r}: what is read at the border are values, where a convolution pads zeros")
            return


law = Law("compose", _compose)
