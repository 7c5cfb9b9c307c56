"""fxconv: exact rewriting of the affine work in PyTorch models, verified.

``fxconv.transform(model, args)`` gives the model in the form that is cheapest to run; ``fxconv.report(result)`` says what
was done, what was not, and why.
"""

from fxconv.approximate import approximate
from fxconv.densify import DensifyError, densify
from fxconv.errors import (
    ArgsError,
    CaptureError,
    FxconvError,
    NotAModuleError,
    OptionError,
    TrainingModeError,
    VerificationError,
)
from fxconv.law import Law, Refusal
from fxconv.options import Options
from fxconv.pipelines.dynamo import backend
from fxconv.report import Report
from fxconv.report import read as report
from fxconv.transform import explain, transform
from fxconv.verify import verify  # by the module of that name, which a later import would put in its place
from fxconv.version import __version__
from fxconv.weight_map import WeightMap, weight_map

__all__ = [
    "ArgsError",
    "CaptureError",
    "DensifyError",
    "FxconvError",
    "Law",
    "NotAModuleError",
    "OptionError",
    "Options",
    "Refusal",
    "Report",
    "TrainingModeError",
    "VerificationError",
    "WeightMap",
    "__version__",
    "backend",
    "approximate",
    "densify",
    "explain",
    "report",
    "transform",
    "verify",
    "weight_map",
]
