"""`TransformPass`: the transform as a pass of ``torch.fx.passes.infra.pass_manager.PassManager``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxconv.options import Options
from fxconv.pipelines.bound import concrete, placeholders
from fxconv.report import Report, read
from fxconv.transform import transform


class TransformPass(PassBase):
    """Rewrites a GraphModule in eval mode; ``modified`` is true only when something was rewritten.

    Args:
        args: example inputs. Without them those are used that the graph's metadata describe, if it has any.
        kwargs: example keyword inputs.
        **keywords: those of `fxconv.Options`, or ``options=``.
    """

    def __init__(self, args: Any = None, kwargs: Mapping[str, Any] | None = None, **keywords: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.options = Options.of(keywords.pop("options", None), **keywords)
        self.report: Report | None = None
        """What the latest run did."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite; an unmodified graph module is handed back itself."""
        args = self.args if self.args is not None else _described(graph_module)
        result = transform(graph_module, args, self.kwargs, options=self.options)
        self.report = read(result)
        if not self.report.applied:
            return PassResult(graph_module, False)
        return PassResult(result, True)


def _described(gm: fx.GraphModule) -> tuple[Any, ...] | None:
    """Inputs of the shapes that the placeholders' metadata give, None where one has none."""
    values = [n.meta.get("val", n.meta.get("example_value")) for n in placeholders(gm.graph)]
    if not values or not all(isinstance(v, torch.Tensor) for v in values):
        return None
    return tuple(concrete(v) for v in values)
