"""Errors that a caller of fxconv can see. Each message says what to do about it."""

from __future__ import annotations

__all__ = [
    "ArgsError",
    "CaptureError",
    "FxconvError",
    "NotAModuleError",
    "OptionError",
    "TrainingModeError",
    "VerificationError",
]


class FxconvError(Exception):
    """Base of every error that fxconv raises on purpose."""


class NotAModuleError(FxconvError, TypeError):
    """What was given is no ``nn.Module``, ``GraphModule`` or ``ExportedProgram`` that fxconv can read."""


class ArgsError(FxconvError, ValueError):
    """Example inputs are missing, of the wrong structure, or on another device than the model."""


class TrainingModeError(FxconvError, ValueError):
    """The model has BatchNorm or dropout active: its output is random or changes its state."""


class OptionError(FxconvError, ValueError):
    """An unknown target, objective, law or option; the message lists the known ones."""


class CaptureError(FxconvError, RuntimeError):
    """No graph of the model could be made, neither by ``torch.export`` nor by ``symbolic_trace``."""


class VerificationError(FxconvError, RuntimeError):
    """A rewritten model does not compute what the original does (only raised with ``verify="raise"``)."""
