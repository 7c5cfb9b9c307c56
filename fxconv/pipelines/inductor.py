"""`torch._inductor.config.pre_grad_custom_pass = InductorPass(model)`: rewriting inside Inductor.

Inductor asks for ``uuid()`` before it looks into its cache of compiled graphs, and runs the pass only where it finds
nothing. Folded weights become part of the compiled code, so a uuid that did not cover their values would serve one
model's folded weights to another model of the same architecture.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxconv.fingerprint import tensors_hash
from fxconv.options import Options
from fxconv.pipelines.bound import copy_source, held_by_module, placeholders, rewrite_bound, training_node
from fxconv.report import Report
from fxconv.version import __version__

logger = logging.getLogger("fxconv")


class InductorPass(CustomGraphPass):
    """Rewrites the graphs of one model inside Inductor, for inference.

    Dynamo hands weights over as inputs, without their values, so the pass needs the model. The weights are taken for
    frozen: what is written to them after compilation is not seen (`fxconv.backend` sees it).

    Args:
        model: the module that is compiled, or one that it is a part of. What other models are compiled of, those of
            the same architecture too, is left alone: a weight counts only where the graph's input is that very tensor.
        **keywords: those of `fxconv.Options`, or ``options=``.
    """

    def __init__(self, model: nn.Module, **keywords: Any) -> None:
        self.options = Options.of(keywords.pop("options", None), **keywords)
        self.model = model
        self.reports: list[Report] = []

    def uuid(self) -> str:
        """SHA-256 over fxconv's version, every option, the value of every weight and which of them the graph reads.

        The last because one pass, once configured, sees the graphs of all models that are compiled after.
        """
        tensors = _tensors(self.model)
        context = torch._guards.TracingContext.try_get()
        mode = context.fake_mode if context is not None else None
        read = "all" if mode is None else repr(sorted(name for name, t in tensors.items() if _fake(mode, t) is not None))
        with unset_fake_temporarily():  # while a graph is traced, real values cannot be read
            values = tensors_hash(tensors)
        parts = (__version__, torch.__version__, self.options.fingerprint(), values, read)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place."""
        owner = graph.owning_module
        if owner is None:
            return
        tensors = _tensors(self.model)
        inputs = placeholders(graph)
        known = ((i, _weight(n, tensors)) for i, n in enumerate(inputs))
        weights = {i: t for i, t in known if t is not None}
        if not weights or (torch.is_grad_enabled() and any(t.requires_grad for t in weights.values())):
            return
        training = training_node(graph)
        if training is not None:
            logger.warning("the graph is left as it is: %s runs in training mode; call model.eval() first", training)
            return
        examples = [weights.get(i, n.meta.get("example_value")) for i, n in enumerate(inputs)]
        done = rewrite_bound(owner, weights, examples, self.options)
        self.reports.append(done.report)
        if done.report.applied:
            _adopt(owner, graph, done.gm)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a graph of the model may read, by qualified name; also those that no state dict lists."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[f"{path}.{key}".lstrip(".")] = value
    return found


def _weight(node: fx.Node, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The weight that a placeholder stands for: the tensor that its example is the fake one of, if a module holds it.

    An argument that is a weight by chance may be another tensor at the next call.
    """
    value = node.meta.get("example_value")
    if not isinstance(value, torch._subclasses.FakeTensor) or not held_by_module(node):
        return None
    return next((t for t in tensors.values() if _fake(value.fake_mode, t) is value), None)


def _fake(mode: torch._subclasses.FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor | None:
    """The fake tensor that stands for this one under ``mode``, None where it has met none."""
    return mode.fake_tensor_converter._get_memo(tensor)


def _adopt(owner: fx.GraphModule, graph: fx.Graph, rewritten: fx.GraphModule) -> None:
    """Make ``graph`` (of ``owner``) what ``rewritten`` is, with its new weights."""
    for node in reversed(list(graph.nodes)):
        graph.erase_node(node)
    env: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(rewritten.graph, env)
    (old,) = [n for n in rewritten.graph.nodes if n.op == "output"]
    graph.output(output).meta = dict(old.meta)
    for source, node in env.items():
        copy_source(source, node)
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in rewritten._parameters:
            owner.register_parameter(str(node.target), rewritten._parameters[str(node.target)])
    context = torch._guards.TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        # Weights were turned into inputs before this pass ran; those that it adds are constants of the traced graph.
        context.fake_mode.allow_non_fake_inputs = True
