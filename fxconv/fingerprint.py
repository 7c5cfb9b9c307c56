"""One hash over all weights of a model, for certificates: did this file really come from those weights?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch.export import ExportedProgram


def weights_hash(model: torch.nn.Module | ExportedProgram) -> str:
    """SHA-256, as hex, over name, dtype, shape and bytes of every entry of the state dict, sorted by name.

    A module and its export have the same hash: both are read through their state dict, so constants that only an
    export knows do not count. Bits are hashed, not values: -0.0 and 0.0 differ. Strides do not matter.
    """
    return tensors_hash(model.state_dict) if isinstance(model, ExportedProgram) else tensors_hash(model.state_dict())


def tensors_hash(tensors: Mapping[str, object]) -> str:
    """`weights_hash` of a mapping from name to tensor. Entries that are not tensors are hashed by their repr."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        if not isinstance(value, torch.Tensor):
            digest.update(f"{name}\0{value!r}\0".encode())
            continue
        t = value.detach()
        digest.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        if t.is_meta or t.numel() == 0:
            continue
        if t.layout != torch.strided or t.is_quantized:
            t = t.to_dense() if t.layout != torch.strided else t.int_repr()
        # reshape(-1) first: a tensor without dims cannot be viewed as another dtype.
        digest.update(t.contiguous().reshape(-1).cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
