"""What every table of the test suite uses: random weights, the one `check`, multiply-adds, remarks.

`check` is the contract of `fxconv.transform` in one function; a row of a table says only what is particular to it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from graphs import kinds, launches, order
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode

import fxconv

Args = tuple[Any, ...]


class Outputs(nn.Module):
    """A model that gives whatever a function makes of its input."""

    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.how(x)


# --- random weights ------------------------------------------------------------------------------------------------


def randomise(model: nn.Module, seed: int = 0, gain: float = 1.5) -> nn.Module:
    """Randomise EVERY parameter and buffer of `model`, in place; returns it in eval mode.

    BatchNorm: mean ~ N(0, .3), var ~ U(.5, 2), weight ~ U(.5, 1.5), bias ~ N(0, .3); the affine of other norms
    likewise; biases
    ~ N(0, .3); LayerScale and other per-channel scales ~ U(.5, 1.5); tokens and position tables ~ N(0, .3); weights ~
    N(0, gain / fan_in), so that the activations of deep networks stay finite and of ordinary size. No parameter keeps
    its initial
    value: a zero-initialised head or a LayerScale of 1e-6 would hide any mistake upstream of it.

    Floating buffers that are no statistics (masks, blur kernels) are scaled by U(.9, 1.1): their zeros and infinities
    mean something.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like) * std

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator) * (high - low) + low).to(like)

    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                p.copy_(_random_parameter(module, name, p, normal, uniform, gain))
            for name, b in module.named_buffers(recurse=False):
                if not b.is_floating_point():
                    continue
                if name.endswith("running_mean"):
                    b.copy_(normal(b, 0.3))
                elif name.endswith("running_var"):
                    b.copy_(uniform(b, 0.5, 2.0))
                else:
                    b.mul_(uniform(b, 0.9, 1.1))
    return model.eval()


def _random_parameter(
    module: nn.Module,
    name: str,
    p: Tensor,
    normal: Callable[[Tensor, float], Tensor],
    uniform: Callable[[Tensor, float, float], Tensor],
    gain: float,
) -> Tensor:
    norm = isinstance(module, _BatchNorm) or "Norm" in type(module).__name__
    if norm and p.ndim <= 1:
        return normal(p, 0.3) if "bias" in name else uniform(p, 0.5, 1.5)
    if sum(size != 1 for size in p.shape) <= 1:  # a scalar or per-channel vector in any shape
        return uniform(p, 0.5, 1.5) if re.search(r"gamma|scale|weight|alpha|gain|ls\d?$", name) else normal(p, 0.3)
    if isinstance(module, nn.Embedding):
        return normal(p, 1.0)
    if re.search(r"embed|token|pos|bias|table|query", name):
        return normal(p, 0.3)
    fan_in = math.prod(p.shape[1:])
    transposed = getattr(module, "transposed", False)
    if transposed:  # (C_in, C_out / groups, *k): C_in / groups channels, of each the taps that reach one output position
        fan_in = p.shape[0] // module.groups * math.prod(p.shape[2:]) // math.prod(module.stride)
    return normal(p, math.sqrt(gain / max(fan_in, 1)))


def settle(model: nn.Module, *args: Any) -> nn.Module:
    """Rescale each convolution's and Linear's weight, in execution order, so that what it adds to its bias has a
    deviation of 1.

    Networks that sum many branches per block would otherwise reach 1e14, where biases drown and nothing can be seen
    of them.
    """

    def rescale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        bias = module.bias
        shape = [1, -1, *[1] * (output.ndim - 2)] if module.weight.ndim > 2 else [-1]
        shift = bias.view(shape) if isinstance(bias, Tensor) else 0.0
        scale = (output - shift).std()
        if not scale > 0:
            return output
        module.weight.div_(scale)
        return (output - shift) / scale + shift

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]
    handles = [m.register_forward_hook(rescale) for m in layers if type(m).__module__.startswith("torch.")]
    run(model, args)
    for handle in handles:
        handle.remove()
    return model


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A Gaussian tensor of `shape`, with a few large values of both signs (a ReLU or a max-pool must matter)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype) * 1.5


def _redraw(args: Any, resize: Callable[[Tensor], Sequence[int]], seed: int) -> Any:
    """The same structure of arguments with new values and sizes; tensors of integers are tiled, not drawn."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = tuple(resize(leaf))
        if leaf.is_floating_point():
            return draw(shape, seed, leaf.dtype)
        repeats = [-(-new // old) for new, old in zip(shape, leaf.shape, strict=True)]
        return leaf.repeat(repeats)[tuple(slice(0, n) for n in shape)]

    return tree_map(one, args)


def with_batch(args: Any, batch: int, seed: int = 1) -> Any:
    """Arguments of another batch size: dim 0 of every tensor whose dim 0 is the batch of the first one."""
    first = next(leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor))
    old = first.shape[0]
    return _redraw(args, lambda t: [batch if d == 0 and n == old else n for d, n in enumerate(t.shape)], seed)


def other_sizes(args: Any, seed: int = 2) -> Iterator[Any]:
    """Arguments at other sizes beyond the batch: everything spatial doubled, each dim doubled alone, odd sizes."""
    tensors = [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]
    ndim = max(t.ndim for t in tensors)
    yield _redraw(args, lambda t: [n * 2 if d >= 2 else n for d, n in enumerate(t.shape)], seed)
    for dim in range(1, ndim):
        yield _redraw(args, lambda t, dim=dim: [n * 2 if d == dim else n for d, n in enumerate(t.shape)], seed)
    yield _redraw(args, lambda t: [n + d if d >= 2 else n for d, n in enumerate(t.shape)], seed)


# --- measures ------------------------------------------------------------------------------------------------------


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


def relative_error(got: Any, want: Any) -> float:
    """Largest difference over the largest magnitude wanted, the worst over all outputs; infinite where structure or
    shape differ.
    """
    got_leaves, got_spec = tree_flatten(got)
    want_leaves, want_spec = tree_flatten(want)
    if got_spec != want_spec:
        return math.inf
    worst = 0.0
    for a, b in zip(got_leaves, want_leaves, strict=True):
        if not isinstance(b, Tensor):
            worst = worst if a == b else math.inf
            continue
        if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        if not b.numel():
            continue
        if b.is_floating_point() or b.is_complex():
            scale = max(b.abs().max().item(), 1e-300)
            error = ((a - b).abs().max() / scale).item()
            worst = max(worst, math.inf if math.isnan(error) else error)
        elif not torch.equal(a, b):
            return math.inf
    return worst


def run(model: Any, args: Args, kwargs: Mapping[str, Any] | None = None) -> Any:
    """One forward pass without gradients, on copies of the arguments (a model may write to its input)."""
    module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (tuple(args), dict(kwargs or {})))
    with torch.no_grad():
        return module(*args, **kwargs)


def macs(model: Any, args: Args, kwargs: Mapping[str, Any] | None = None) -> int:
    """Multiply-adds of convolutions and matrix products in one forward pass (FlopCounterMode counts 2 per MAC)."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention kernel is opaque to the counter
    try:
        with FlopCounterMode(display=False) as counter:
            run(model, args, kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops() // 2


def n_params(model: nn.Module) -> int:
    """Stored numbers, each storage counted once."""
    module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    tensors = [t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()]
    return sum({t.data_ptr(): t.numel() for t in tensors}.values())


# --- the report ----------------------------------------------------------------------------------------------------


def remarks(result: Any) -> list[str]:
    """Everything a report says: reasons of missed and rolled-back rewrites, advice, barriers, warnings."""
    report = fxconv.report(result)
    lines = [f"{remark.law}: {remark.reason} at {remark.where}" for remark in (*report.missed, *report.advice)]
    lines += [f"rolled back: {rewrite.verdict.get('reason')} at {rewrite.where}" for rewrite in report.rolled_back]
    lines += [str(barrier) for barrier in report.barriers]
    return lines + [str(warning) for warning in report.warnings]


def said(result: Any, pattern: str) -> bool:
    """Whether a remark matches the regular expression `pattern` (case does not matter)."""
    return any(re.search(pattern, line, re.IGNORECASE) for line in remarks(result))


# --- the original stays --------------------------------------------------------------------------------------------


class Snapshot:
    """What must be the same about a caller's model before and after: values, storages, hooks, modes, modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._look()
        self.values = {name: t.detach().clone() for name, t in self._tensors()}

    def _tensors(self) -> Iterable[tuple[str, Tensor]]:
        yield from self.model.named_parameters(remove_duplicate=False)
        yield from self.model.named_buffers(remove_duplicate=False)

    def _look(self) -> dict[str, Any]:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
        return {
            "state_dict": list(self.model.state_dict()),
            "storages": {name: (t.data_ptr(), t._version, t.requires_grad) for name, t in self._tensors()},
            "modules": {n: (id(m), m.training, sorted(vars(m))) for n, m in self.model.named_modules(remove_duplicate=False)},
            "hooks": {n: [list(getattr(m, h).values()) for h in hooks] for n, m in self.model.named_modules()},
            "graph": str(self.model.graph) if isinstance(self.model, torch.fx.GraphModule) else None,
        }

    def assert_unchanged(self) -> None:
        now = self._look()
        for what, value in self.before.items():
            assert now[what] == value, f"the original's {what} changed"
        for name, tensor in self._tensors():
            assert torch.equal(tensor, self.values[name]) or tensor.isnan().any(), f"the original's {name} changed"


def assert_shared(result: nn.Module, model: nn.Module) -> None:
    """What a result holds under the original's name is the original's own tensor, not a copy."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, tensor in [*result.named_parameters(), *result.named_buffers()]:
        if name in own and tensor.numel():
            assert tensor.data_ptr() == own[name].data_ptr(), f"{name} was copied (or another tensor has its name)"


# --- the one check -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What `check` found: for the assertions that a row adds."""

    original: nn.Module
    result: Any
    kinds: Counter[str]
    macs_before: int
    macs_after: int
    args: Args = field(repr=False)

    @property
    def report(self) -> Any:
        return fxconv.report(self.result)


def check(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    max_macs_ratio: float | None = None,
    ops: Mapping[str, int] | None = None,
    at_most: Mapping[str, int] | None = None,
    max_launches: int | None = None,
    before: tuple[str, str] | None = None,
    tol: float = 1e-12,
    batches: Sequence[int] = (1, 3),
    sizes: bool | str = True,
    refused: str | None = None,
    laws: str | None = None,
    prepare: bool = True,
    more_macs: bool = False,
    **options: Any,
) -> Outcome:
    """Transform `model` in float64 and assert everything that must hold for every model.

    - the original is unchanged, and the tensors that the result kept are the original's own;
    - the result is verified, nothing was rolled back (a rollback hides a wrong law), and it agrees to `tol`
      (relative) on `args`, on new values at each of `batches`, and with `sizes` at other
      sizes, wherever the original itself accepts them ("spatial": of all dims but the channels);
    - multiply-adds: never above the original's (unless `more_macs`), at most `max_macs_ratio` of them;
    - `ops`: exact counts of kinds of nodes (see graphs.kinds; "conv+linear" is a sum); `at_most`: upper bounds;
      `max_launches`: on all;
    - `before`: every node of the first kind ("conv|linear": either) comes before every one of the second;
    - `refused`: a pattern that some remark must match; `laws`: a pattern that the law of some applied rewrite must
      match.

    `options` are handed to `fxconv.transform`. `prepare=False` leaves the model as it is (dtype, mode).
    """
    args = args if isinstance(args, tuple) else (args,)
    kwargs = dict(kwargs or {})
    if prepare:
        model = model.double().eval()
        args, kwargs = tree_map(_double, (args, kwargs))
    snapshot = Snapshot(model)
    result = fxconv.transform(model, args, kwargs or None, **options)
    snapshot.assert_unchanged()
    assert_shared(result, model)

    trials = [("the example", (args, kwargs))]
    trials += [(f"batch {batch}", with_batch((args, kwargs), batch)) for batch in batches]
    if sizes:
        others = [o for o in other_sizes((args, kwargs)) if sizes != "spatial" or _channels_stay(args, o)]
        trials += [("other sizes", other) for other in others]
    for what, (trial, named) in trials:
        try:
            want = run(model, trial, named)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            assert what != "the example", "the original does not run"
            continue
        error = relative_error(run(result, trial, named), want)
        shapes = [tuple(t.shape) for t in tensors_of(trial)]
        assert error <= tol, f"{what} {shapes}: relative error {error:.3g} above {tol:g}\n{result.graph}"
    snapshot.assert_unchanged()

    report = fxconv.report(result)
    wrong = [(r.name, r.laws, r.verdict.get("reason"), r.verdict.get("max_error")) for r in report.rolled_back]
    assert not wrong, f"rolled back, so a law or the verifier was wrong: {wrong}\n{result.graph}"
    assert report.verified, f"not verified: {report}"
    outcome = Outcome(model, result, kinds(result), macs(model, args, kwargs), macs(result, args, kwargs), args)
    if before is not None:
        _assert_order(result, *before)
    _assert_cost(outcome, max_macs_ratio, more_macs, ops or {}, at_most or {}, max_launches)
    if refused is not None:
        assert said(result, refused), f"no remark matches {refused!r}: {remarks(result)}"
    if laws is not None:
        chains = [" ".join(rewrite.laws) for rewrite in report.applied]
        assert any(re.search(laws, chain, re.IGNORECASE) for chain in chains), f"no rewrite matches {laws!r}: {chains}"
    return outcome


def _channels_stay(args: Args, other: Any) -> bool:
    return all(a.shape[1] == b.shape[1] for a, b in zip(tensors_of(args), tensors_of(other[0]), strict=True))


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _assert_cost(
    out: Outcome,
    ratio: float | None,
    more_macs: bool,
    ops: Mapping[str, int],
    at_most: Mapping[str, int],
    max_launches: int | None,
) -> None:
    graph = out.result.graph
    if not more_macs:
        assert out.macs_after <= out.macs_before, f"MACs {out.macs_before:,} -> {out.macs_after:,}\n{graph}"
    if ratio is not None:
        share = out.macs_after / max(out.macs_before, 1)
        assert share <= ratio, f"MACs {out.macs_before:,} -> {out.macs_after:,}: {share:.3f} above {ratio}\n{_why(out, graph)}"

    def count(kind: str) -> int:
        return sum(out.kinds[part] for part in kind.split("+"))

    wrong = {kind: count(kind) for kind, n in ops.items() if count(kind) != n}
    assert not wrong, f"wanted {dict(ops)}, not {wrong}\n{_why(out, graph)}"
    over = {kind: count(kind) for kind, n in at_most.items() if count(kind) > n}
    assert not over, f"wanted at most {dict(at_most)}, not {over}\n{_why(out, graph)}"
    if max_launches is not None:
        count = launches(out.result)
        assert count <= max_launches, f"{count} launches, wanted at most {max_launches}\n{_why(out, graph)}"


def _assert_order(result: Any, first: str, then: str) -> None:
    sequence = order(result)
    early = [i for i, kind in enumerate(sequence) if kind in first.split("|")]
    late = [i for i, kind in enumerate(sequence) if kind in then.split("|")]
    assert early and late and early[-1] < late[0], f"wanted every {first} before every {then}, not {sequence}"


def _why(out: Outcome, graph: Any) -> str:
    return "\n".join([str(graph), "remarks:", *remarks(out.result)[:20]])
