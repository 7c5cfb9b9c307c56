"""`torch.compile(model, backend=fxconv.backend("inductor"))`: Dynamo's graph, rewritten for inference.

Folded weights are copies. Before each run the weights that they came from are checked against what they were: the same
tensors (``is``) in the same memory at the same ``_version``, which every write moves but those that PyTorch does not
count: through ``.data`` or NumPy, by an optimizer with ``fused=True``, by BatchNorm in training. Running statistics are
small, so buffers are compared by value as well; the others are found with ``check="hash"``, at the price of hashing all
weights at each run. Changed weights are folded anew: where the graph comes out as before, into the compiled code's own
parameters; where it does not (other values may allow other rewrites), it is compiled again.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxconv.arithmetic import version
from fxconv.errors import CaptureError, FxconvError, OptionError
from fxconv.fingerprint import tensors_hash
from fxconv.hazards import check_not_quantised, check_plain
from fxconv.options import Options
from fxconv.pipelines.bound import (
    Rewritten,
    Weights,
    copied,
    find_weights,
    placeholders,
    qualified_name,
    rewrite_bound,
    training_node,
)
from fxconv.report import Report

logger = logging.getLogger("fxconv")

Compiled = Callable[..., Any]


class Backend:
    """A Dynamo backend that rewrites each graph and hands it on to another backend.

    ``reports`` collects what was done, one `Report` per graph, the latest last.
    """

    def __init__(self, inner: str | Callable[..., Any] = "inductor", options: Options | None = None) -> None:
        self.inner, self.options = inner, options or Options()
        self.reports: list[Report] = []
        self.__name__ = "fxconv"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **keywords: Any) -> Compiled:
        """Compile a Dynamo graph. ``options`` (of ``torch.compile``) are `fxconv.Options`, ``mode`` goes on."""
        options = _merged(self.options, keywords.pop("options", None))
        inner = _lookup(self.inner, keywords)
        weights = find_weights(gm.graph, example_inputs)
        # With Inductor's freezing on, Dynamo leaves the weights in the graph's module, and they count as constants.
        frozen = [*gm.parameters(), *gm.buffers()]
        reason = _reason_against(gm, weights, frozen, options) if weights or frozen else None
        if reason is not None:
            logger.warning("the graph is compiled as it is: %s", reason)
        if reason is not None or not (weights or frozen):
            return inner(gm, list(example_inputs))
        try:
            guarded = _Guarded(self, gm, example_inputs, weights, options, inner)
        except FxconvError:
            raise
        except Exception as error:  # compilation must not fail where it succeeds without fxconv
            logger.warning("the graph is compiled as it is: %s: %s", type(error).__name__, error)
            logger.debug("rewriting failed", exc_info=True)
            return inner(gm, list(example_inputs))
        guarded.compile(example_inputs)
        return guarded.run


def backend(inner: str | Callable[..., Any] = "inductor", **keywords: Any) -> Backend:
    """A backend for ``torch.compile`` that rewrites the graph for inference, then compiles it with ``inner``.

    ``torch.compile(model, backend="fxconv")`` is ``backend()``. A graph that is run with gradients on is left as it is,
    since the parameters' gradients could not come through folded weights: call under ``torch.no_grad()`` or
    ``torch.inference_mode()``.

    Args:
        inner: the name of a Dynamo backend, or a callable like one.
        **keywords: those of `fxconv.Options`, or ``options=`` with any form of them.

    Raises:
        OptionError: for an option that does not exist.
    """
    base = keywords.pop("options", None)
    return Backend(inner, Options.of(base, **keywords))


def fxconv_backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **keywords: Any) -> Compiled:
    """What ``backend="fxconv"`` names (entry point ``torch_dynamo_backends``)."""
    return Backend()(gm, example_inputs, **keywords)


def _merged(options: Options, given: Any) -> Options:
    if not given:
        return options
    if not isinstance(given, Mapping):
        raise OptionError(f"torch.compile(options={given!r}): give a dictionary with keys of fxconv.Options")
    return Options.of(options, **{str(k).replace("-", "_"): v for k, v in given.items()})


def _lookup(inner: str | Callable[..., Any], keywords: Mapping[str, Any]) -> Callable[..., Any]:
    found: Callable[..., Any] = inner if callable(inner) else torch._dynamo.lookup_backend(inner)
    mode = keywords.get("mode")
    if mode in (None, "default"):
        return found
    if inner != "inductor":
        raise OptionError(f"torch.compile(mode={mode!r}) is for Inductor; the inner backend is {inner!r}")
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx  # the attribute is there only once something has imported it

    patches = list_mode_options(mode)
    return lambda gm, inputs: compile_fx(gm, inputs, config_patches=patches)


def _reason_against(gm: fx.GraphModule, weights: Weights, frozen: Sequence[torch.Tensor], options: Options) -> str | None:
    """Why this graph must stay as it is, or None."""
    if torch.is_grad_enabled() and any(w.requires_grad for w in (*weights.values(), *frozen)):
        return "it is run with gradients, which folded weights would cut off; call the model under torch.no_grad()"
    try:
        check_not_quantised(gm)
        for index, weight in weights.items():
            check_plain(qualified_name(placeholders(gm.graph)[index]), weight)
    except CaptureError as error:
        return str(error)
    training = training_node(gm.graph)
    if training is not None:
        return f"{training} runs in training mode; call model.eval() first"
    if options.check != "hash" and any(version(w) is None for w in weights.values()):
        return (
            "weights that were made under torch.inference_mode() count no versions, so that a change would not be noticed; "
            'make the model outside of it, or give check="hash"'
        )
    return None


_SMALL = 2**16
"""Entries up to which a buffer is compared by value at each run: what a layer's running statistics have."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Guarded:
    """Compiled code for one graph, and the weights that it holds for."""

    def __init__(
        self,
        owner: Backend,
        gm: fx.GraphModule,
        examples: Sequence[Any],
        weights: Weights,
        options: Options,
        inner: Callable[..., Any],
    ) -> None:
        # Compiling may change the graph that it is given, so the one kept for folding anew is a copy.
        self.owner, self.options, self.inner = owner, options, inner
        self.original = copied(gm)
        nodes = placeholders(gm.graph)
        self.examples = [None if i in weights else n.meta.get("example_value") for i, n in enumerate(nodes)]
        self.indices = tuple(weights)
        self.rewritten = self._rewrite(weights, examples)
        self._remember(weights)
        self.compiled: Compiled = self.rewritten.gm
        self.parameters = {name: getattr(self.rewritten.gm, name) for name in self.rewritten.added}
        self.code = self.rewritten.gm.code

    def compile(self, examples: Sequence[Any]) -> None:
        """Hand the rewritten graph to the inner backend, while Dynamo is compiling."""
        self.compiled = self.inner(self.rewritten.gm, list(examples))

    def _rewrite(self, weights: Weights, examples: Sequence[Any]) -> Rewritten:
        rewritten = rewrite_bound(self.original, weights, examples, self.options)
        self.owner.reports.append(rewritten.report)
        applied = len(rewritten.report.applied)
        logger.info("torch.compile: %d rewrites, %s", applied, rewritten.report.verification.get("status", "not run"))
        if not applied:
            self.indices = ()  # nothing was folded: nothing to watch
        return rewritten

    def _remember(self, weights: Weights) -> None:
        shaped = [i for i in self.indices if weights[i].dim()]
        self.known = [(i, weakref.ref(weights[i]), version(weights[i]), _address(weights[i])) for i in shaped]
        self.buffers = [i for i in shaped if _is_small_buffer(weights[i])]
        self.values = _values([weights[i] for i in self.buffers])
        self.scalars = [(i, weights[i].clone()) for i in self.indices if not weights[i].dim()]
        self.hash = self._hash(weights) if self.options.check == "hash" else ""

    def _hash(self, weights: Mapping[int, torch.Tensor]) -> str:
        return tensors_hash({str(i): weights[i] for i in self.indices})

    def changed(self, args: Sequence[Any]) -> bool:
        """Whether any weight is another tensor, or has been written to."""
        for i, reference, count, address in self.known:
            weight: torch.Tensor = args[i]
            if weight is not reference() or version(weight) != count:
                return True
            if address != _address(weight):
                return True
        if any(not torch.equal(args[i], value) for i, value in self.scalars):
            return True
        if any(not torch.equal(a, b) for a, b in zip(_values([args[i] for i in self.buffers]), self.values, strict=True)):
            return True
        return bool(self.hash) and self._hash({i: args[i] for i in self.indices}) != self.hash

    def run(self, *args: Any) -> Any:
        """Run the compiled code, on weights folded anew if they have changed."""
        if self.indices and self.changed(args):
            self._refold(args)
        return self.compiled(*args)

    def _refold(self, args: Sequence[Any]) -> None:
        logger.info("torch.compile: weights have changed, folding anew")
        weights = {i: args[i] for i in self.indices}
        indices = self.indices
        fresh = self._rewrite(weights, [args[i] if e is None else e for i, e in enumerate(self.examples)])
        self.indices = indices
        values = {name: getattr(fresh.gm, name) for name in fresh.added}
        frozen = torch._inductor.config.freezing
        if fresh.gm.code == self.code and _alike(values, self.parameters) and not frozen:
            with torch.no_grad():
                for name, value in values.items():
                    self.parameters[name].copy_(value)
        else:
            dynamic = any(isinstance(e, torch.SymInt) for e in self.examples) or None
            self.compiled = torch.compile(_without_sources(fresh.gm), backend=self.inner, dynamic=dynamic)
            self.parameters, self.code = values, fresh.gm.code
        self.rewritten = fresh
        self._remember(weights)


def _alike(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a)


def _without_sources(gm: fx.GraphModule) -> fx.GraphModule:
    for node in placeholders(gm.graph):
        node.__dict__.pop("_dynamo_source", None)
    return gm


def _address(tensor: torch.Tensor) -> int | None:
    """Where the values lie, which ``p.data = …`` changes; None for a tensor subclass without memory of its own."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


def _is_small_buffer(weight: torch.Tensor) -> bool:
    plain = type(weight) is torch.Tensor and weight.dtype in _FLOATS
    return plain and weight.numel() <= _SMALL


def _values(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The bits of all tensors (NaN equals no NaN), one copy a dtype and device: to be compared in one step each."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach().reshape(-1))
    return [torch.cat(group).view(torch.uint8) for group in groups.values()]
