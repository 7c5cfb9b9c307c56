"""The matrices of resampling along one axis: interpolation, adaptive and border-aware average pooling, padding with values,
picking entries.

Each row sums to 1, so a constant passes unchanged; the maps of different axes commute with each other and with
everything on other axes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

CUBIC = "cubic"
"""1-d interpolation has no bicubic mode; it is read off a 2-d one with a unit axis."""
PICK = "pick"
"""Entries at places that are counted from the ends of an axis, whose size need not be known: a class token."""

PADDING = frozenset(("reflect", "replicate", "circular"))
"""Padding with values of the axis itself."""


@lru_cache(maxsize=256)
def matrix(kind: str, parameters: tuple[Any, ...], n_in: int, n_out: int) -> torch.Tensor:
    """The float64 matrix ``[n_out, n_in]`` of a resampling.

    Args:
        kind: "linear", "cubic", "nearest", "nearest-exact" (parameters: align_corners, scale or None), "adaptive_avg"
            (none; 1 output is the mean), "avg_inside" (kernel, stride, padding, ceil_mode: average over the elements
            that are inside), one of `PADDING` (elements in front, elements behind) or "pick" (the place of each output,
            negative from the end).
        n_in: input size.
        n_out: output size.

    Raises:
        ValueError: unknown kind, or sizes that do not belong together.
    """
    eye = torch.eye(n_in, dtype=torch.float64)[:, None, :]  # basis vectors as a batch of signals
    if kind == "adaptive_avg":
        out = F.adaptive_avg_pool1d(eye, n_out)
    elif kind == PICK:
        out = eye[..., list(parameters)]
    elif kind == "avg_inside":
        kernel, stride, padding, ceil_mode = parameters
        out = F.avg_pool1d(eye, kernel, stride, padding, ceil_mode, count_include_pad=False)
    elif kind in PADDING:
        out = F.pad(eye, list(parameters), mode=kind)
    elif kind in ("linear", CUBIC, "nearest", "nearest-exact"):
        align_corners, scale = parameters
        mode = {"linear": "bilinear", CUBIC: "bicubic"}.get(kind, kind)
        align = align_corners if kind in ("linear", CUBIC) else None
        image = eye[:, :, None, :]
        if scale is None:
            out = F.interpolate(image, size=(1, n_out), mode=mode, align_corners=align)
        else:
            out = F.interpolate(image, scale_factor=(1.0, scale), mode=mode, align_corners=align, recompute_scale_factor=False)
        out = out[:, :, 0, :]
    else:
        raise ValueError(f"unknown resampling {kind!r}")
    if out.shape[-1] != n_out:
        raise ValueError(f"{kind} {parameters} turns {n_in} into {out.shape[-1]}, not {n_out}")
    return out[:, 0, :].T.contiguous()
