"""What capture hands on, and what its two ways share."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxconv import shapes
from fxconv.hazards import mode_dependent


@dataclass
class Captured:
    """A model as a graph that fxconv may rewrite."""

    gm: fx.GraphModule
    """Private graph over the caller's own tensors, callable like the model. Every node has ``meta["val"]`` where shapes
    are known. Functional but for the nodes named in ``barriers``."""
    dialect: str
    """"aten" or "module"."""
    how: str
    """"export" or "symbolic"."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """The example inputs as the caller gave them; empty when none were given."""
    rebuild: Callable[[fx.GraphModule], Any]
    """Hands back the same kind of thing as went in: a graph module, or an ExportedProgram."""
    notes: list[str] = field(default_factory=list)
    """For the report: what was assumed, what was tried and failed."""
    barriers: dict[str, str] = field(default_factory=dict)
    """Node name → why it must be treated as opaque."""
    fixed_batch: bool = False
    """The graph holds for the batch of the example only, although the model itself runs at others: capture in parts may
    do better."""
    checks: list[shapes.SizeCheck] = field(default_factory=list)
    """Conditions on input sizes that ``rebuild`` makes the result check when it runs."""


class Uncompiled(fx.GraphModule):
    """A graph module that others read and copy, and nobody calls: generating and compiling its code would be for nothing."""

    def recompile(self) -> Any:
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings about what the caller did not write: solver tracebacks, deprecations inside torch."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch._dynamo", "torch.export", "torch._export",
             "torch._subclasses.fake_tensor")  # fmt: skip
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def frozen_reason(model: nn.Module) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules() if mode_dependent(m)})
    return f"{', '.join(kinds)} in eval mode" if kinds else ""


def one_line(error: BaseException | None) -> str:
    if error is None:
        return "unknown"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:200]}"
