"""Is a whole model as accurate as the one that it came from?

Both run on the example inputs and on Gaussian ones of the same shape, in one batch of two, and at batch 1; in float64
and in the model's own dtype. With O₆₄ the original in float64 (every weight widened, whatever dtypes are baked in), and
for each output its error relative to O₆₄, in the largest entry and in the root mean square over each sample:

- float32, bfloat16, float16: the result's error may be at most FACTOR times the *original's own* error, plus FLOOR unit
  roundoffs (of a result computed in float32 ACCUMULATED, for what operators round that sum more products than the
  original's). No tolerance is chosen: a model that loses three digits in float32 may go on losing them, one that loses
  none may not begin to. The same holds for the result in float64, whose weights were rounded once, with FLOOR.
- float64: there is nothing more accurate to measure against, so the original's error is estimated by Monte Carlo
  arithmetic (one more run, each operation's result perturbed, see `fxconv.tolerance`) and the result may lie UNITS
  roundoffs of that away. The same holds for a float32 result in float64 if its weights are given unrounded (``exact``).

The largest of few errors fluctuates (a model may have a single output). A result that exceeds the limit moderately is
therefore measured again, on many more inputs, before it is called worse; both sides' errors then come from those.

Some outputs hang on rounding: detections are sorted and cut off at a threshold. Where the original itself, in its own
dtype, is off by a quarter or of another size, only float64 with exact weights can tell, and without those the model is
"not verifiable".

A result in which nothing was rewritten is compared in its own dtype alone, where its outputs are bit for bit the original's.

Cost, in units of one sample: three passes of each model in float64, and one of the original for the noise where it is
needed; three of the result in its own dtype and four of the original, whose result must be the same twice. Of float64
models seven and three in all. Memory: one float64 copy at a time, above 32 MiB of four fifths of the model, and the outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxconv.arithmetic import Perturb, Watch, float64_copy, float64_fits, float64_run, own_dtype, reference_arithmetic, undisturbed
from fxconv.errors import ArgsError, NotAModuleError
from fxconv.judge import FACTOR, Judge, OutputError, Run
from fxconv.model_inputs import Batches, fixed_batch
from fxconv.outputs import (
    OverflowFound,
    comparable,
    contiguity,
    flatten_output,
    is_floating,
    is_tensor,
    leaf_names,
    structural_difference,
    widened,
)
from fxconv.tolerance import DELTA

__all__ = ["ModelVerdict", "check_model", "verify"]

Weights = Mapping[str, torch.Tensor]

_MORE = 12
"""Further samples of a result that exceeds its limit by less than `_HOPELESS`."""

_HOPELESS = 64.0

_DRAWS = 3
"""Draws of the original's noise where its output hangs on rounding."""


@dataclass(frozen=True)
class ModelVerdict:
    """What comparing two models came to. Plain data; True only when verified."""

    status: str
    """"verified" | "failed" | "not verifiable"."""
    reason: str = ""
    dtype: str = ""
    """The original's floating dtype, for instance "float32"."""
    error: float = 0.0
    """Largest error of the result in its own dtype, relative to the original in float64."""
    original_error: float = 0.0
    """Largest error of the original in its own dtype, likewise; in float64 its estimate."""
    float64_error: float = 0.0
    """Largest error of the result in float64, likewise."""
    limit: float = 0.0
    """What `error` may be, of the output that is nearest to its limit."""
    factor: float = FACTOR
    outputs: tuple[OutputError, ...] = ()
    batches: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    """What the user may want to know: strides that differ, outputs that could not be compared."""
    passes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Forward passes taken, in samples: "original", "result" in their dtype, "original64", "result64"."""

    def __bool__(self) -> bool:
        return self.status == "verified"

    def __str__(self) -> str:
        lines = [self.status + (f": {self.reason}" if self.reason else "")]
        if self.outputs:
            lines.append(
                f"error against the original in float64: result {self.error:.1e} in {self.dtype}, "
                f"{self.float64_error:.1e} in float64; the original's own {self.original_error:.1e}"
            )
        lines += [f"note: {n}" for n in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The mapping that a report keeps as its ``verification``."""
        return dataclasses.asdict(self)


class _Stop(Exception):
    """The verdict is reached; carries it."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def verify(a: Any, b: Any, args: Any, kwargs: Mapping[str, Any] | None = None, **options: Any) -> ModelVerdict:
    """Compare any two models on ``args``: does ``b`` compute what ``a`` does, as accurately as ``a`` does?

    Either is an ``nn.Module`` (a ``GraphModule`` too) or an ``ExportedProgram``. A bare tensor for ``args`` is wrapped.
    ``options`` are those of `check_model`. Raises NotAModuleError and ArgsError on misuse, and never for a difference.
    """
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, tuple):
        raise ArgsError(f"args is a {type(args).__name__}: give a tuple of positional arguments, or one tensor")
    return check_model(as_module(a), as_module(b), args, kwargs, **options)


def as_module(model: Any) -> nn.Module:
    """The callable module behind a model or program. Raises NotAModuleError for anything else."""
    if isinstance(model, ExportedProgram):
        # Guards would refuse the batch of 2 even where the graph takes it; what the graph does is compared.
        return model.module(check_guards=False)
    if isinstance(model, nn.Module):
        return model
    raise NotAModuleError(f"a {type(model).__name__} cannot be run: give an nn.Module or an ExportedProgram")


def check_model(
    original: nn.Module,
    result: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_dims: Sequence[int | None] | str | None = "auto",
    exact: Weights | Callable[[], Weights] | None = None,
    exact_if_unstable: bool = False,
    unrewritten: bool = False,
    seed: int = 0,
    factor: float = FACTOR,
) -> ModelVerdict:
    """Compare ``result`` with ``original``, by the criteria in the module's docstring.

    ``batch_dims`` has one entry per leaf of ``(args, kwargs)`` in pytree order: the dim that samples lie along, or
    None. "auto": dim 0 of every tensor whose size there is that of the first floating tensor, unless a graph says it is
    static or the original refuses another batch. None: nothing is batched, and the example's own shapes are used.

    ``exact``: the float64 weights, by qualified name in ``result``, that the result's were rounded from, or a function
    that makes them (it is called when no other float64 model is alive). With them the result is judged at float64
    rounding in float64, and it does not matter what its own dtype can resolve.

    ``exact_if_unstable``: only where the original's output hangs on rounding. It costs three passes of the result more.

    ``unrewritten``: the result is the original as it was captured. Where its outputs are the original's bit for bit, its
    errors are the original's own, and nothing is run in float64.

    Neither model is changed: buffers that a forward pass writes to are restored, random generators too.
    """
    inputs = (args, dict(kwargs or {}))
    return _Comparison(original, result, inputs, batch_dims, exact, exact_if_unstable, unrewritten, seed, factor).run()


class _Comparison:
    def __init__(
        self,
        original: nn.Module,
        result: nn.Module,
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        batch_dims: Sequence[int | None] | str | None,
        exact: Weights | Callable[[], Weights] | None,
        exact_if_unstable: bool,
        unrewritten: bool,
        seed: int,
        factor: float,
    ) -> None:
        self.original = original
        self.result = result
        self.leaves, self.spec = pytree.tree_flatten(inputs)
        if batch_dims == "auto" and (fixed_batch(original) or fixed_batch(result)):
            batch_dims = None
        self.batches = Batches(self.leaves, batch_dims)
        self.dtype = own_dtype(original, self.leaves)
        self.spare = None if self.dtype == torch.float64 else exact
        self.exact: Weights | Callable[[], Weights] | None = None
        if not exact_if_unstable:
            self.exact, self.spare = self.spare, None
        self.unrewritten = unrewritten
        self.seed = seed
        self.judge = Judge(self.dtype, factor, self.exact is not None)
        self.seeds = [seed]
        self.notes: list[str] = []
        self.passes = {"original": 0.0, "result": 0.0, "original64": 0.0, "result64": 0.0}
        self.names: list[str] = []
        self.runs: list[Run] = []
        self.narrow = False

    def run(self) -> ModelVerdict:
        outputs: tuple[OutputError, ...] = ()
        try:
            with reference_arithmetic(), undisturbed(self.original, self.result) as self.restore:
                outputs = self._measure()
            status, reason = self._sentence(outputs)
        except _Stop as stop:
            status, reason = stop.status, str(stop)
        except OverflowFound as overflow:
            status, reason = "failed", str(overflow)
        self.notes += [f"{o.name} {o.note}" for o in outputs if o.note]
        nearest = max(outputs, key=lambda o: o.ratio, default=None)
        return ModelVerdict(
            status,
            reason,
            str(self.dtype).removeprefix("torch."),
            max((o.result for o in outputs), default=0.0),
            max((o.original for o in outputs), default=0.0),
            max((o.float64 for o in outputs), default=0.0),
            nearest.limit if nearest else 0.0,
            self.judge.factor,
            outputs,
            tuple(r.samples for r in self.runs),
            tuple(self.seeds),
            tuple(self.notes),
            dict(self.passes),
        )

    @staticmethod
    def _sentence(outputs: Sequence[OutputError]) -> tuple[str, str]:
        """Status and reason."""
        bad = [o for o in outputs if not o.unstable and not o.ratio <= 1]
        if bad:
            o = max(bad, key=lambda o: o.ratio)
            return "failed", (
                f"{o.name} has an error of {o.result:.2e}, in float64 {o.float64:.2e}, which is {o.ratio:.2g} times "
                f"its limit; the original's own is {o.original:.2e} (all against the original in float64)"
            )
        for o in outputs:
            if o.unstable:
                return "not verifiable", f"{o.name}: {o.unstable}"
        return "verified", ""

    # --- running ---------------------------------------------------------------------------------------------------

    def _call(self, side: str, module: nn.Module, inputs: Sequence[Any], samples: float) -> tuple[list[Any], Any]:
        """Flattened outputs and their structure. Inputs are cloned: a model may write to them."""
        self.passes[side] += samples
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        args, kwargs = pytree.tree_unflatten(copies, self.spec)
        try:
            leaves, spec = flatten_output(module(*args, **kwargs))
            return list(map(comparable, leaves)), spec
        finally:
            self.restore()

    def _measure(self) -> tuple[OutputError, ...]:
        self.runs = self._own_runs()
        if self.unrewritten and all(_bit_for_bit(run) for run in self.runs):
            self.notes.append("nothing was rewritten, and every output is bit for bit the original's")
            return ()
        self._float64_runs(self.runs)
        outputs = self.judge(self.names, self.runs)
        worst = max((o.ratio for o in outputs if not o.unstable), default=0.0)
        if 1 < worst < _HOPELESS:
            self.seeds.append(self.seed + 1)
            self.notes.append(f"measured again on {_MORE} samples, since few errors fluctuate")
            count = _MORE // self.batches.stacked
            more = [Run("Gaussian inputs", self.batches.gaussian(self.seed + 1 + k), self.batches.stacked) for k in range(count)]
            for run in more:
                run.original, spec = self._call("original", self.original, run.inputs, run.samples)
                self._result_run(run, spec)
            self._float64_runs(more)
            self.runs = [*self.runs, *more]
            outputs = self.judge(self.names, self.runs)
        if self.spare is not None and any(o.unstable for o in outputs):
            outputs = self._with_exact_weights()
        return outputs

    def _with_exact_weights(self) -> tuple[OutputError, ...]:
        """Judge what hangs on rounding in float64 alone, by the noise of a few draws: one may leave a tie as it was."""
        self.exact, self.spare = self.spare, None
        self.judge = dataclasses.replace(self.judge, exact=True)
        self._run_wide("result64", self.result, self.runs, float64_fits(self.result))
        whole = float64_fits(self.original)
        with (
            float64_copy(self.original, whole=whole) as wide,
            undisturbed(wide) as self.restore,
            float64_run(whole=whole),
        ):
            for k in range(_DRAWS):
                self.runs[0].noise = _most(self.runs[0].noise, self._noise(wide, self.runs[0], k))
        return self.judge(self.names, self.runs)

    def _own_runs(self) -> list[Run]:
        """Both models in their own dtype: the example at batch 1, twice the original, and with a Gaussian sample."""
        batches = self.batches
        single = Run("the example", batches.one(), 1)
        label = "Gaussian inputs" if batches.dims is None else "the example and a Gaussian sample in a batch of 2"
        double = Run(label, batches.with_gaussian(self.seed), batches.stacked)
        try:
            with Watch() as watch:
                single.original, spec = self._call("original", self.original, single.inputs, 1)
            again, _ = self._call("original", self.original, single.inputs, 1)
        except Exception as error:  # noqa: BLE001 - a model raises what it likes
            if batches.guessed and batches.size > 1:
                return self._unbatched()  # one sample of the example is not what it takes
            raise _Stop("not verifiable", f"the original raises on the example inputs: {_text(error)}") from error
        self._same_twice(single.original, again, watch)
        self.narrow = watch.narrow
        self.names = leaf_names(spec, len(single.original))
        self._result_run(single, spec)
        try:
            double.original, spec = self._call("original", self.original, double.inputs, double.samples)
        except Exception as error:  # noqa: BLE001
            if batches.guessed and batches.dims is not None:
                return self._unbatched()  # dim 0 was no batch, or a fixed one
            raise _Stop("not verifiable", f"the original raises on {double.label}: {_text(error)}") from error
        self._result_run(double, spec)
        return [single, double]

    def _unbatched(self) -> list[Run]:
        self.batches = Batches(self.leaves, None)
        return self._own_runs()

    def _result_run(self, run: Run, spec: Any) -> None:
        watch = Watch()
        try:
            with watch:
                run.result, result_spec = self._call("result", self.result, run.inputs, run.samples)
        except Exception as error:  # noqa: BLE001
            raise _Stop("failed", f"the result raises on {run.label}, the original does not: {_text(error)}") from error
        problem = structural_difference(run.original, spec, run.result, result_spec, self.names)
        if problem and not (problem.startswith("shapes") and self._size_hangs_on_rounding(run)):
            if problem.startswith("shapes") and watch.squeezes:
                problem += "; " + "; ".join(watch.squeezes)
            raise _Stop("failed", problem)
        for name, a, b in zip(self.names, run.original, run.result, strict=True):
            if isinstance(a, torch.Tensor) and a.stride() != b.stride():
                note = f"{name} has strides {b.stride()} instead of {a.stride()}"
                if contiguity(a) != contiguity(b) and note not in self.notes:
                    self.notes.append(note)

    def _size_hangs_on_rounding(self, run: Run) -> bool:
        """Whether the original's own outputs have other shapes in float64."""
        try:
            with float64_copy(self.original) as copied, float64_run():
                wide, _ = self._call("original64", copied, list(map(_float64, run.inputs)), 1)
        except Exception:  # noqa: BLE001 - then the difference is simply that
            return False
        return [getattr(x, "shape", None) for x in wide] != [getattr(x, "shape", None) for x in run.original]

    def _float64_runs(self, runs: list[Run]) -> None:
        """The float64 outputs of both, one float64 model at a time; of a float64 model they are there already."""
        if self.dtype == torch.float64 and not self.narrow:
            for run in runs:
                run.original64, run.result64 = run.original, run.result
                run.noise = self._noise(self.original, run)
            return
        first = self._first_of_a_batch(runs)
        apart = [r for r in runs if r is not first]
        for side, module in (("original64", self.original), ("result64", self.result)):
            try:
                whole = float64_fits(module)
                try:
                    self._run_wide(side, module, apart, whole)
                except (RuntimeError, TypeError, ValueError):
                    # Some modules (LSTM) compare dtypes before anything can widen their parameters.
                    if whole:
                        raise
                    self._run_wide(side, module, apart, True)
            except ArgsError:
                raise
            except Exception as error:  # noqa: BLE001
                name = side.removesuffix("64")
                raise _Stop("not verifiable", f"the {name} does not run in float64: {_text(error)}") from error
            if first is not None:
                own, batch = getattr(first, side.removesuffix("64")), getattr(apart[0], side)
                setattr(first, side, [b[: len(a)] if is_tensor(a) and a.dim() else b for a, b in zip(own, batch, strict=True)])

    def _first_of_a_batch(self, runs: list[Run]) -> Run | None:
        """The run of the example alone, where what both models make of it is what they make of it in the batch of two.

        A model in which samples do not meet need not be run on the same sample twice in float64.
        """
        if self.exact is not None or self.batches.dims is None or len(runs) != 2 or runs[0].samples == runs[1].samples:
            return None
        single, double = runs
        pairs = [*zip(single.original, double.original, strict=True), *zip(single.result, double.result, strict=True)]
        return single if all(not is_tensor(a) or _equal(a, b[: len(a)] if a.dim() else b) for a, b in pairs) else None

    def _run_wide(self, side: str, module: nn.Module, runs: list[Run], whole: bool) -> None:
        with float64_copy(module, whole=whole) as wide:
            if side == "result64" and self.exact is not None:
                _load(wide, self.exact() if callable(self.exact) else self.exact)
            with undisturbed(wide) as self.restore, float64_run(whole=whole):
                for run in runs:
                    found = self._call(side, wide, list(map(_float64, run.inputs)), run.samples)[0]
                    # A model may return a parameter, which is about to go.
                    setattr(run, side, [x.detach() if isinstance(x, torch.Tensor) else x for x in found])
                if side == "original64" and (self.dtype == torch.float64 or self.exact is not None):
                    # One sample is enough: noise is measured relative to the output.
                    runs[0].noise = self._noise(wide, runs[0])

    def _noise(self, module: nn.Module, run: Run, turn: int = 0) -> list[Any]:
        """|O_δ − O| / δ for every floating output, of one draw; which entries of others changed; None for another size."""
        mode = Perturb(DELTA, self.seed + 1 + turn, everywhere=False)
        inputs = [mode.noisy(_float64(x)) if isinstance(x, torch.Tensor) else x for x in run.inputs]
        with mode:
            moved, _ = self._call("original64", module, inputs, run.samples)
        found: list[Any] = []
        for m, o in zip(moved, run.original64, strict=True):
            if not is_tensor(o) or m.shape != o.shape:
                found.append(None)
            else:
                found.append((m - o).abs() / DELTA if is_floating(o) else (m != o).double())
        return found

    def _same_twice(self, first: list[Any], second: list[Any], watch: Watch) -> None:
        """Raise where the original is random: two runs differ by more than the order of a sum could explain."""
        for a, b in zip(first, second, strict=True):
            if not is_tensor(a):
                continue
            if not _equal(a, b):
                ops = ", ".join(watch.random) or "an operator that is not deterministic"
                raise _Stop("not verifiable", f"the original gives another result each time: {ops}")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are the same, floating ones up to what the order of a sum could explain."""
    if a.shape != b.shape or not is_floating(a):
        return torch.equal(a, b)
    scale = float(a.abs().nan_to_num(0, 0, 0).max()) if a.numel() else 0.0
    gap = float((widened(a) - widened(b)).abs().nan_to_num(0).max()) if a.numel() else 0.0
    return gap <= 64 * torch.finfo(a.dtype).eps * scale and torch.equal(a.isnan(), b.isnan())


def _bit_for_bit(run: Run) -> bool:
    """Whether the two models' outputs are the same, down to the bits of a NaN."""
    pairs = [(a, b) for a, b in zip(run.original, run.result, strict=True) if is_tensor(a)]  # others were compared before
    return all(a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _most(a: list[Any], b: list[Any]) -> list[Any]:
    """The larger of two draws' noise, None where either is."""
    return [None if x is None or y is None else torch.maximum(x, y) for x, y in zip(a, b, strict=True)] if a else b


def _load(module: nn.Module, weights: Weights) -> None:
    """Put float64 weights in place of the rounded ones, without a copy. Raises ArgsError for an unknown name.

    The parameters may be those of the result itself, where they are too large for a copy: it is they that are replaced,
    wherever they are tied, and not what they hold.
    """
    found: dict[int, Any] = {}
    for name, value in weights.items():
        owner: Any = module
        *path, leaf = name.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        stored = getattr(owner, leaf, None)
        if id(stored) in found:
            continue  # tied
        if not isinstance(stored, torch.Tensor) or stored.shape != value.shape:
            raise ArgsError(f"the result has no weight {name} of shape {tuple(value.shape)}")
        wide = value.detach().to(stored.device, torch.float64)
        if stored.dtype == torch.float64:  # a copy, which nobody reads any more
            stored.data = stored.data.new_empty(0)
        found[id(stored)] = nn.Parameter(wide, requires_grad=False) if isinstance(stored, nn.Parameter) else wide
    for m in module.modules():
        spaces: tuple[dict[str, Any], ...] = (m._parameters, m._buffers, vars(m))
        for held in spaces:
            for key, old in list(held.items()):
                if isinstance(old, torch.Tensor) and id(old) in found:
                    held[key] = found[id(old)]


def _float64(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.dtype.is_floating_point:
        return x.to(torch.float64)
    return x.to(torch.complex128) if isinstance(x, torch.Tensor) and x.dtype.is_complex else x


def _text(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
