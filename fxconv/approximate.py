"""`approximate`: cheaper layers that are nearly the same, under an error budget, when asked.

Nothing here is exact, and the report says so: each replacement with its error on held-out calibration data, the whole
model's, and the Pareto table of everything that was fitted.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxconv.approximate_fit import Candidate, Moments, conv_candidates, linear_candidates
from fxconv.errors import ArgsError, TrainingModeError
from fxconv.options import nearest
from fxconv.report import Capture, Cost, Remark, Report, Rewrite, attach

_WIDEST = 4096
"""Features up to which a layer's second moments are collected: 128 MiB in float64."""

_PATCHES = 4096
"""Patches of a convolution sampled per batch."""


@dataclass
class _Layer:
    """A layer that may be replaced, with the moments of its inputs: calibration, and held out.

    ``names`` are all that the model has for it: a module may be used in several places.
    """

    names: tuple[str, ...]
    module: nn.Linear | nn.Conv1d | nn.Conv2d
    fit: Moments
    test: Moments
    positions: float = 0.0
    samples: int = 0
    candidates: list[tuple[Candidate, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight.detach().double().flatten(1)

    @property
    def bias(self) -> torch.Tensor:
        b = self.module.bias
        return b.detach().double() if b is not None else self.weight.new_zeros(self.weight.shape[0])

    @property
    def params(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def cost(self, macs: float, params: int, launches: int) -> Cost:
        """Of one sample; launches are those of one call."""
        return Cost(round(macs * self.positions / max(self.samples, 1)), params, launches)


def approximate(
    model: nn.Module,
    x: Any = None,
    *,
    calibration: Iterable[Any],
    max_error: float = 1e-2,
    objective: str = "macs",
    layers: Iterable[str] | None = None,
) -> nn.Module:
    """A cheaper model whose outputs differ by at most ``max_error`` on held-out calibration data.

    Linear layers become two of low rank, block-diagonal, Toeplitz (a convolution), or small filters with a full-length
    layer behind them; convolutions become two of low rank or take smaller kernels. All fits are least squares in closed
    form (`fxconv.approximate_fit`); nothing is trained. Every replacement keeps its layer's input and output shape.

    Args:
        model: in eval mode; it is not changed.
        x: an example input, for models that must be run once to be complete; usually None.
        calibration: batches, or (inputs, labels) pairs as a DataLoader gives; every fourth batch is held out, and at most
            256 are read. A batch for a model of several inputs begins with them.
        max_error: bound of ‖result − model‖ ÷ ‖model‖ over the outputs on the held-out batches.
        objective: "macs" or "params": what is saved per error.
        layers: qualified names of the layers that may be replaced; None: all.

    Returns:
        A copy of the model with layers replaced. `fxconv.report` reads what was done; `pareto` the table.

    Raises:
        ArgsError: no calibration data, a budget that is not positive, or an unknown objective or layer.
        TrainingModeError: the model is in training mode.
    """
    if objective not in ("macs", "params"):
        raise ArgsError(f"unknown objective {objective!r}: {nearest(objective, ('macs', 'params'))}")
    if not max_error > 0:
        raise ArgsError(f"max_error is {max_error}: give a positive relative error, for instance 1e-2")
    if any(m.training for m in model.modules()):
        raise TrainingModeError("the model is in training mode: call model.eval() first")
    count = _required(model)
    batches = [_inputs(b, count) for b in itertools.islice(calibration, 256)]
    if not batches:
        raise ArgsError("calibration is empty: give batches of real inputs, for instance a DataLoader")
    if len(batches) == 1:
        batches = _halves(batches[0])
    held = batches[3::4] or batches[-1:]
    fit = [b for i, b in enumerate(batches) if i % 4 != 3] if len(batches) > 3 else batches[:-1]
    result = copy.deepcopy(model)
    with torch.no_grad():
        if x is not None:
            result(*_inputs(x, count))
        found, refused = _layers(result, None if layers is None else set(layers))
        _collect(result, found, fit, held)
        expected = [_flat(result(*b)) for b in held]
        chosen, reached, total = _choose(result, found, held, expected, max_error, objective)
    report = _report(model, found, refused, chosen, reached, total, max_error, objective, batches=(len(fit), len(held)))
    out: nn.Module = attach(result, report)
    return out


def pareto(result: Any) -> list[dict[str, Any]]:
    """Every fit that nothing cheaper beats: layer, family, detail, macs, params, error, chosen."""
    from fxconv.report import read

    return list(read(result).verification.get("pareto", ()))


def _required(model: nn.Module) -> int:
    """How many positional inputs the model cannot do without; 1 where its signature does not say."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters))


def _inputs(batch: Any, count: int) -> tuple[Any, ...]:
    """The model's positional inputs of a batch: labels that a DataLoader adds are left out."""
    if isinstance(batch, torch.Tensor):
        batch = (batch,)
    if not isinstance(batch, (tuple, list)) or not batch:
        raise ArgsError(f"a calibration batch is a {type(batch).__name__}: give tensors, or (inputs, labels) pairs")
    if len(batch) < count:
        raise ArgsError(f"a calibration batch holds {len(batch)} tensors, and the model wants {count} inputs")
    return tuple(batch[:count])


def _halves(batch: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    samples = len(batch[0])
    if samples < 4:
        raise ArgsError(f"calibration holds {samples} samples: give more, a quarter of them is held out")
    return list(zip(*(x.chunk(4) for x in batch), strict=True))


def _flat(out: Any) -> torch.Tensor:
    from torch.utils._pytree import tree_leaves

    return torch.cat([t.detach().double().flatten() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])


def _layers(model: nn.Module, wanted: set[str] | None) -> tuple[list[_Layer], list[Remark]]:
    found, refused = [], []
    names = {n for n, _ in model.named_modules(remove_duplicate=False)}
    for unknown in sorted((wanted or set()) - names):
        raise ArgsError(f"the model has no layer {unknown!r}: {nearest(unknown, sorted(names))}")
    places: dict[nn.Module, list[str]] = {}
    for name, m in model.named_modules(remove_duplicate=False):
        places.setdefault(m, []).append(name)
    for m, called in places.items():
        if not isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) or wanted is not None and not wanted & {*called}:
            continue
        name = called[0]
        why = _blocked(m)
        size = m.weight[0].numel()
        if not why and size > _WIDEST:
            why = f"its {size} input features are more than the {_WIDEST} whose second moments are collected"
        if why:
            refused.append(Remark("refused", name, "approximate", why))
        else:
            found.append(_Layer(tuple(called), m, Moments(size), Moments(size)))
    return found, refused


def _blocked(m: nn.Module) -> str:
    if type(m) not in (nn.Linear, nn.Conv1d, nn.Conv2d):
        return f"{type(m).__name__} is a subclass, which may do something else"
    if m._forward_hooks or m._forward_pre_hooks:
        return "it has hooks"
    if isinstance(m, (nn.Conv1d, nn.Conv2d)) and (m.groups != 1 or m.padding_mode != "zeros" or isinstance(m.padding, str)):
        return f"groups={m.groups}, padding={m.padding!r}, padding_mode={m.padding_mode!r}"
    return ""


def _collect(model: nn.Module, layers: list[_Layer], fit: list[Any], held: list[Any]) -> None:
    """One pass over each part; every layer's inputs are added to its moments as they come by."""
    generator = torch.Generator().manual_seed(0)
    state = {"fit": True}

    def hook(layer: _Layer) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = _rows(module, args[0])
            if state["fit"]:
                layer.positions += len(rows)
            if len(rows) > _PATCHES:
                rows = rows[torch.randperm(len(rows), generator=generator)[:_PATCHES].to(rows.device)]
            (layer.fit if state["fit"] else layer.test).add(rows)

        return record

    handles = [layer.module.register_forward_pre_hook(hook(layer)) for layer in layers]
    try:
        for part, batches in ((True, fit), (False, held)):
            for batch in batches:
                state["fit"] = part
                model(*batch)
                if part:
                    for layer in layers:
                        layer.samples += len(batch[0])
    finally:
        for handle in handles:
            handle.remove()


def _rows(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The vectors that a layer's weight is applied to."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        flat = 2 - len(module.kernel_size)  # a sequence is an image of height 1
        x = x if x.dim() == 4 - flat else x[None]
        x = x.unsqueeze(2) if flat else x
        ones, none = (1,) * flat, (0,) * flat
        size, dilation, stride = ones + module.kernel_size, ones + module.dilation, ones + module.stride
        patches = F.unfold(x, size, dilation, (*none, *map(int, module.padding)), stride)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return x.reshape(-1, x.shape[-1])


# -- Choice -----------------------------------------------------------------------------------------------------------


def _price(c: Candidate, objective: str) -> float:
    return c.macs if objective == "macs" else c.params


def _front(layer: _Layer, objective: str) -> list[tuple[Candidate, float]]:
    """Candidates that are cheaper than the layer and that no cheaper one beats, cheapest first."""
    full = layer.weight.numel() if objective == "macs" else layer.params
    make = linear_candidates if isinstance(layer.module, nn.Linear) else conv_candidates
    made = make(layer.module, layer.fit)  # type: ignore[arg-type]
    rated = [(c, c.error(layer.weight, layer.bias, layer.test)) for c in made]
    rated = [(c, e) for c, e in rated if _price(c, objective) < full and math.isfinite(e)]
    rated.sort(key=lambda r: (_price(r[0], objective), r[1]))
    front: list[tuple[Candidate, float]] = []
    for c, e in rated:
        if not front or e < front[-1][1]:
            front.append((c, e))
    return front


@dataclass
class _Choice:
    layer: _Layer
    candidate: Candidate
    error: float
    total: float


def _choose(
    model: nn.Module,
    layers: list[_Layer],
    held: list[Any],
    expected: list[torch.Tensor],
    budget: float,
    objective: str,
) -> tuple[dict[str, _Choice], dict[str, float], float]:
    """Greedy: layers in the order of what they save per error, each as cheap as the whole model's budget admits."""
    chosen: dict[str, _Choice] = {}
    reached: dict[str, float] = {}
    total = 0.0

    def whole() -> float:
        error = sum(float((_flat(model(*b)) - e).square().sum()) for b, e in zip(held, expected, strict=True))
        return math.sqrt(error / max(sum(float(e.square().sum()) for e in expected), 1e-300))

    def gain(layer: _Layer) -> float:
        full = layer.weight.numel() if objective == "macs" else layer.params
        scale = layer.positions / max(layer.samples, 1) if objective == "macs" else 1.0
        return max(((full - _price(c, objective)) * scale / max(e, budget / 10) for c, e in layer.candidates), default=0.0)

    for layer in layers:
        if layer.fit.count and layer.test.count:
            layer.candidates = _front(layer, objective)
    for layer in sorted(layers, key=lambda v: -gain(v)):
        front = layer.candidates
        # Errors fall along the front: bisect for the cheapest that the whole model's budget admits.
        low, high, best = 0, len(front) - 1, None
        while low <= high:
            middle = (low + high) // 2
            candidate, error = front[middle]
            _replace(model, layer.names, candidate.build())
            now = whole()
            if now <= budget:
                best, high = (candidate, error, now), middle - 1
            else:
                low = middle + 1
                reached[layer.name] = min(reached.get(layer.name, math.inf), now)
        if best is None:
            _replace(model, layer.names, layer.module)
            continue
        _replace(model, layer.names, best[0].build())
        chosen[layer.name] = _Choice(layer, *best)
        total = best[2]
    return chosen, reached, total


def _replace(model: nn.Module, names: tuple[str, ...], module: nn.Module) -> None:
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.eval())


# -- Report -----------------------------------------------------------------------------------------------------------


def _report(
    model: nn.Module,
    layers: list[_Layer],
    refused: list[Remark],
    chosen: Mapping[str, _Choice],
    reached: Mapping[str, float],
    total: float,
    budget: float,
    objective: str,
    batches: tuple[int, int],
) -> Report:
    rewrites, missed = [], list(refused)
    before = after = Cost()
    for layer in layers:
        full = layer.cost(layer.weight.numel(), layer.params, 1)
        before = before + full
        choice = chosen.get(layer.name)
        if choice is None:
            after = after + full
            missed.append(_missed(layer, reached.get(layer.name), budget))
            continue
        c = choice.candidate
        now = layer.cost(c.macs, c.params, c.launches)
        after = after + now
        verdict = {
            "status": "confirmed",
            "reason": f"error {choice.error:.2e} of its output on held-out data, {choice.total:.2e} of the model's",
            "max_error": choice.error,
        }
        law = f"approximate: {c.family}, {c.detail}"
        rewrites.append(Rewrite(layer.name, (layer.name,), (layer.name,), (law,), full, now, verdict, layer.name, "approximate"))
    verification = {
        "status": "not verifiable",
        "reason": f"approximate, as asked: error {total:.2e} on held-out calibration data (budget {budget:.2e})",
        "error": total,
        "budget": budget,
        "batches": list(batches),
        "pareto": list(_table(layers, chosen)),
    }
    return Report(
        model=type(model).__name__,
        objective=objective,
        capture=Capture("modules"),
        rewrites=tuple(rewrites),
        missed=tuple(missed),
        cost_before=before,
        cost_after=after,
        verification=verification,
    )


def _missed(layer: _Layer, reached: float | None, budget: float) -> Remark:
    if not layer.fit.count:
        return Remark("missed", layer.name, "approximate", "the calibration data never reaches it")
    if reached is None:
        return Remark("missed", layer.name, "approximate", "nothing that was fitted is cheaper")
    reason = f"the best that saves anything brings the model's error to {reached:.2e}, over the budget of {budget:.2e}"
    return Remark("missed", layer.name, "approximate", reason, f"max_error were {reached:.1e}")


def _table(layers: list[_Layer], chosen: Mapping[str, _Choice]) -> Iterator[dict[str, Any]]:
    for layer in layers:
        full = layer.cost(layer.weight.numel(), layer.params, 1)
        for c, error in layer.candidates:
            cost = layer.cost(c.macs, c.params, c.launches)
            yield {
                "layer": layer.name,
                "family": c.family,
                "detail": c.detail,
                "macs": cost.macs,
                "params": cost.params,
                "macs_before": full.macs,
                "params_before": full.params,
                "error": error,
                "chosen": layer.name in chosen and chosen[layer.name].candidate is c,
            }
