"""The verifier's public face: per cluster, per weight, per model; and what to do when something fails.

- `check_cluster`: a rewritten cluster against what it replaced, proved or confirmed in float64.
- `check_rounding`: the emitted weights against the float64 ones they were rounded from.
- `check_model`: the whole result against the whole original, in float64 and in its own dtype.
- `verify`: any two models, for users; also ``fxconv.verify``.
- `bisect`, `reproduction`: the guilty rewrite when only the whole fails, and a script that shows it.
"""

from __future__ import annotations

from fxconv.blame import bisect, reproduction
from fxconv.probe import InputSpec
from fxconv.rounding import check_rounding
from fxconv.verify_cluster import Probe, Verdict, check_cluster
from fxconv.verify_model import ModelVerdict, check_model, verify

__all__ = [
    "InputSpec",
    "ModelVerdict",
    "Probe",
    "Verdict",
    "bisect",
    "check_cluster",
    "check_model",
    "check_rounding",
    "reproduction",
    "verify",
]
