"""`torch._inductor.config.pre_grad_custom_pass = InductorPass(model)`: rewriting inside Inductor.

Inductor asks for ``uuid()`` before it looks into its cache of compiled graphs, and runs the pass only where it finds
nothing. Folded weights become part of the compiled code, so a uuid that did not cover their values would serve one
model's folded weights to another model of the same architecture.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxconv.fingerprint import tensors_hash
from fxconv.options import Options
from fxconv.pipelines.bound import copy_source, placeholders, qualified_name, rewrite_bound
from fxconv.report import Report
from fxconv.version import __version__


class InductorPass(CustomGraphPass):
    """Rewrites the graphs of one model inside Inductor, for inference.

    Dynamo hands weights over as inputs, without their values, so the pass needs the model. The weights are taken for
    frozen: what is written to them after compilation is not seen (`fxconv.backend` sees it).

    Args:
        model: the module that is compiled. Weights are found in it by name; a graph with inputs that are not the
            weights of this model is rewritten around them.
        **keywords: those of `fxconv.Options`, or ``options=``.
    """

    def __init__(self, model: nn.Module, **keywords: Any) -> None:
        self.options = Options.of(keywords.pop("options", None), **keywords)
        self.model = model
        self.reports: list[Report] = []

    def uuid(self) -> str:
        """SHA-256 over fxconv's version, every option and the value of every weight."""
        parts = (__version__, torch.__version__, self.options.fingerprint(), tensors_hash(_tensors(self.model)))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place."""
        owner = graph.owning_module
        if owner is None:
            return
        tensors = _tensors(self.model)
        inputs = placeholders(graph)
        known = [tensors.get(qualified_name(n)) for n in inputs]
        weights = {i: t for i, (n, t) in enumerate(zip(inputs, known, strict=True)) if t is not None and _fits(n, t)}
        if not weights or (torch.is_grad_enabled() and any(t.requires_grad for t in weights.values())):
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


def _fits(node: fx.Node, tensor: torch.Tensor) -> bool:
    """Whether the placeholder is read from the module that is compiled, and looks like this tensor."""
    value = node.meta.get("example_value")
    same = isinstance(value, torch.Tensor) and value.shape == tensor.shape and value.dtype == tensor.dtype
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is not None
    return same and (static or isinstance(value, nn.Parameter))


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
