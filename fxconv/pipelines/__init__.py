"""Thin adapters, one per ecosystem.

`fxconv.backend` for ``torch.compile``, `InductorPass` for Inductor's ``pre_grad_custom_pass``, `TransformPass` for fx
pass managers, `ExecuTorchPass` for ``to_edge_transform_and_lower``. They are imported when first asked for: each needs
what the others do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxconv.pipelines.dynamo import Backend, backend
    from fxconv.pipelines.executorch import ExecuTorchPass
    from fxconv.pipelines.inductor import InductorPass
    from fxconv.pipelines.manager import TransformPass

__all__ = ["Backend", "ExecuTorchPass", "InductorPass", "TransformPass", "backend"]

_HOMES = {
    "Backend": "dynamo",
    "backend": "dynamo",
    "ExecuTorchPass": "executorch",
    "InductorPass": "inductor",
    "TransformPass": "manager",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
