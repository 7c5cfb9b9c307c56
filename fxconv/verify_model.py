"""Is a whole model as accurate as the one that it came from?

Both run on the example inputs and on Gaussian ones of the same shape, in one batch of two, and at batch 1; in float64
and in the model's own dtype. With O₆₄ the original in float64 (every weight widened, whatever dtypes are baked in), and
for each output its error relative to O₆₄, in the largest entry and in the root mean square over each sample:

- float32, bfloat16, float16: the result's error may be at most FACTOR times the *original's own* error, plus FLOOR unit
  roundoffs. No tolerance is chosen: a model that loses three digits in float32 may go on losing them, one that loses
  none may not begin to. The same holds for the result in float64, whose weights were rounded once.
- float64: there is nothing more accurate to measure against, so the original's error is estimated by Monte Carlo
  arithmetic (one more run, each operation's result perturbed, see `fxconv.tolerance`) and the result may lie UNITS
  roundoffs of that away.

The largest of few errors fluctuates (a model may have a single output). A result that exceeds the limit moderately is
therefore measured again, on many more inputs, before it is called worse; both sides' errors then come from those.

Cost, in units of one sample: three passes of each model in float64 and of the result in its own dtype, four of the
original (its result must be the same twice). For float64 models six and three in all. Memory: one float64 copy at a
time, and the outputs.
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

from fxconv.arithmetic import (
    Perturb,
    Promote,
    Watch,
    as_float64,
    own_dtype,
    reference_arithmetic,
    undisturbed,
)
from fxconv.errors import ArgsError, NotAModuleError
from fxconv.outputs import (
    ErrorRow,
    OverflowFound,
    contiguity,
    errors_of,
    flatten_output,
    is_floating,
    is_tensor,
    leaf_names,
    magnitude,
    structural_difference,
    widened,
)
from fxconv.tolerance import DELTA, UNIT_ROUNDOFF, UNITS

__all__ = ["FACTOR", "FLOOR", "ModelVerdict", "check_model", "verify"]

FACTOR = 4.0
"""How many times the original's own error the result's may be."""

FLOOR = 2.0
"""Unit roundoffs of the output's magnitude that are always allowed: the original may be exact by chance."""

_MORE = 12
"""Further samples of a result that exceeds its limit by less than `_HOPELESS`."""

_HOPELESS = 64.0


@dataclass(frozen=True)
class OutputError:
    """Errors of one output tensor, relative to the original in float64: the worst over the samples and both norms."""

    name: str
    original: float
    """The original in its own dtype; in a float64 model, its estimate."""
    result: float
    """The result in the model's dtype."""
    float64: float
    """The result in float64."""
    limit: float
    """What `result` and `float64` may be."""
    ratio: float
    """The largest share of its limit that any sample reached in either norm; at most 1 passes."""


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
    """What the errors of the output nearest to its limit may be."""
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
    return check_model(_module(a), _module(b), args, kwargs, **options)


def _module(model: Any) -> nn.Module:
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
    seed: int = 0,
    factor: float = FACTOR,
) -> ModelVerdict:
    """Compare ``result`` with ``original``, by the criteria in the module's docstring.

    ``batch_dims`` has one entry per leaf of ``(args, kwargs)`` in pytree order: the dim that samples lie along, or
    None. "auto": dim 0 of every tensor whose size there is that of the first floating tensor, unless a graph says it is
    static or the original refuses another batch. None: nothing is batched, and the example's own shapes are used.

    Neither model is changed: buffers that a forward pass writes to are restored, random generators too.
    """
    return _Comparison(original, result, args, dict(kwargs or {}), batch_dims, seed, factor).run()


@dataclass
class _Sides:
    """The outputs' leaves of one batch under the four runs."""

    label: str
    inputs: list[Any]
    samples: int
    """Samples in it: rows of outputs whose dim 0 is this are judged one by one."""
    original: list[Any] = dataclasses.field(default_factory=list)
    result: list[Any] = dataclasses.field(default_factory=list)
    original64: list[Any] = dataclasses.field(default_factory=list)
    result64: list[Any] = dataclasses.field(default_factory=list)
    noise: list[Any] = dataclasses.field(default_factory=list)


class _Comparison:
    def __init__(
        self,
        original: nn.Module,
        result: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_dims: Sequence[int | None] | str | None,
        seed: int,
        factor: float,
    ) -> None:
        self.original = original
        self.result = result
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.dtype = own_dtype(original, self.leaves)
        self.batch_dims = batch_dims
        self.seed = seed
        self.factor = factor
        self.seeds = [seed]
        self.notes: list[str] = []
        self.passes = {"original": 0.0, "result": 0.0, "original64": 0.0, "result64": 0.0}
        self.names: list[str] = []
        self.runs: list[_Sides] = []

    def run(self) -> ModelVerdict:
        outputs: tuple[OutputError, ...] = ()
        try:
            with reference_arithmetic(), undisturbed(self.original, self.result) as self.restore:
                outputs = self._measure()
            bad = [o for o in outputs if not o.ratio <= 1]
            status = "failed" if bad else "verified"
            reason = ""
            if bad:
                o = max(bad, key=lambda o: o.ratio)
                reason = (
                    f"{o.name} has an error of {max(o.result, o.float64):.2e}, {o.ratio:.2g} times its limit; the "
                    f"original's own is {o.original:.2e} (both against the original in float64)"
                )
        except _Stop as stop:
            status, reason = stop.status, str(stop)
        except OverflowFound as overflow:
            status, reason = "failed", str(overflow)
        nearest = max(outputs, key=lambda o: o.ratio, default=None)
        return ModelVerdict(
            status,
            reason,
            str(self.dtype).removeprefix("torch."),
            max((o.result for o in outputs), default=0.0),
            max((o.original for o in outputs), default=0.0),
            max((o.float64 for o in outputs), default=0.0),
            nearest.limit if nearest else 0.0,
            self.factor,
            outputs,
            tuple(r.samples for r in self.runs),
            tuple(self.seeds),
            tuple(self.notes),
            dict(self.passes),
        )

    # --- running ---------------------------------------------------------------------------------------------------

    def _call(self, side: str, module: nn.Module, inputs: Sequence[Any], samples: float) -> tuple[list[Any], Any]:
        """Flattened outputs and their structure. Inputs are cloned: a model may write to them."""
        self.passes[side] += samples / max(self.unit, 1)
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        args, kwargs = pytree.tree_unflatten(copies, self.spec)
        try:
            return flatten_output(module(*args, **kwargs))
        finally:
            self.restore()

    def _measure(self) -> tuple[OutputError, ...]:
        self.unit = 1
        self.runs = self._own_runs()
        self._float64_runs(self.runs)
        outputs = self._judge(self.runs)
        worst = max((o.ratio for o in outputs), default=0.0)
        if 1 < worst < _HOPELESS:
            self.seeds.append(self.seed + 1)
            self.notes.append(f"measured again on {_MORE} samples, since few errors fluctuate")
            more = [self._gaussian_run(self.seed + 1 + k) for k in range(_MORE // 2)]
            for run in more:
                for name, module in (("original", self.original), ("result", self.result)):
                    setattr(run, name, self._call(name, module, run.inputs, run.samples)[0])
            self._float64_runs(more)
            self.runs = [*self.runs, *more]
            outputs = self._judge(self.runs)
        return outputs

    def _own_runs(self) -> list[_Sides]:
        """Both models in their own dtype: the example at batch 1, twice the original, and with a Gaussian sample."""
        dims, size = self._batch()
        one = self.leaves if dims is None else _take(self.leaves, dims, 1)
        single = _Sides("the example", one, 1)
        if dims is None:
            gaussian = [_random(x, self._generator(self.seed)) for x in self.leaves]
            double = _Sides("Gaussian inputs", gaussian, 1)
        else:
            double = self._pair(one, dims, self.seed)
        try:
            with Watch() as watch:
                single.original, spec = self._call("original", self.original, one, 1)
            again, _ = self._call("original", self.original, one, 1)
        except Exception as error:  # noqa: BLE001 - a model raises what it likes
            if dims is not None and size > 1 and self.batch_dims == "auto":
                self.batch_dims = None  # one sample of the example is not what it takes
                return self._own_runs()
            raise _Stop("not verifiable", f"the original raises on the example inputs: {_text(error)}") from error
        self._same_twice(single.original, again, watch)
        self.narrow = watch.narrow
        self.names = leaf_names(spec, len(single.original))
        self._result_run(single, spec)
        try:
            double.original, spec = self._call("original", self.original, double.inputs, double.samples)
        except Exception as error:  # noqa: BLE001
            if dims is None or self.batch_dims != "auto":
                raise _Stop("not verifiable", f"the original raises on {double.label}: {_text(error)}") from error
            # Dim 0 was no batch, or a fixed one: then the example's own shapes are all that there is.
            self.batch_dims = None
            return self._own_runs()
        self._result_run(double, spec)
        self.dims = dims
        return [single, double]

    def _result_run(self, run: _Sides, spec: Any) -> None:
        watch = Watch()
        try:
            with watch:
                run.result, result_spec = self._call("result", self.result, run.inputs, run.samples)
        except Exception as error:  # noqa: BLE001
            raise _Stop("failed", f"the result raises on {run.label}, the original does not: {_text(error)}") from error
        problem = structural_difference(run.original, spec, run.result, result_spec, self.names)
        if problem:
            if problem.startswith("shapes differ") and watch.squeezes:
                problem += "; " + "; ".join(watch.squeezes)
            raise _Stop("failed", problem)
        for name, a, b in zip(self.names, run.original, run.result, strict=True):
            if isinstance(a, torch.Tensor) and a.stride() != b.stride():
                note = f"{name} has strides {b.stride()} instead of {a.stride()}"
                if contiguity(a) != contiguity(b) and note not in self.notes:
                    self.notes.append(note)

    def _float64_runs(self, runs: list[_Sides]) -> None:
        """The float64 outputs of both, one float64 model at a time; of a float64 model they are there already."""
        if self.dtype == torch.float64 and not self.narrow:
            for run in runs:
                run.original64, run.result64 = run.original, run.result
                run.noise = self._noise(self.original, run)
            return
        for side, module in (("original64", self.original), ("result64", self.result)):
            try:
                wide = as_float64(module)
                with undisturbed(wide) as self.restore:
                    for run in runs:
                        inputs = [_float64(x) for x in run.inputs]
                        with Promote():
                            setattr(run, side, self._call(side, wide, inputs, run.samples)[0])
                            if self.dtype == torch.float64 and side == "original64":
                                run.noise = self._noise(wide, run)
                del wide
            except Exception as error:  # noqa: BLE001
                name = side.removesuffix("64")
                raise _Stop("not verifiable", f"the {name} does not run in float64: {_text(error)}") from error

    def _noise(self, module: nn.Module, run: _Sides) -> list[Any]:
        """|O_δ − O| / δ for every floating output, of one draw; None for the others."""
        mode = Perturb(DELTA, self.seed + 1, everywhere=False)
        inputs = [mode.noisy(x) if isinstance(x, torch.Tensor) else x for x in run.inputs]
        with mode:
            moved, _ = self._call("original64", module, inputs, run.samples)
        return [
            (m - o).abs() / DELTA if is_floating(o) and m.shape == o.shape else None
            for m, o in zip(moved, run.original64, strict=True)
        ]

    # --- inputs ----------------------------------------------------------------------------------------------------

    def _batch(self) -> tuple[list[int | None] | None, int]:
        """The batch dim of every leaf, and the batch of the example; (None, 1) where there is none."""
        dims = self.batch_dims
        if dims == "auto":
            dims = _guess(self.leaves)
            if dims is not None and (_static(self.original) or _static(self.result)):
                dims = None
        elif dims is not None and not isinstance(dims, str) and len(dims) != len(self.leaves):
            raise ArgsError(f"batch_dims has {len(dims)} entries, and the inputs have {len(self.leaves)} leaves")
        if dims is None or isinstance(dims, str) or all(d is None for d in dims):
            return None, 1
        sizes = {x.shape[d] for x, d in zip(self.leaves, dims, strict=True) if d is not None}
        if len(sizes) != 1 or 0 in sizes:
            return None, 1
        return list(dims), sizes.pop()

    def _pair(self, one: list[Any], dims: Sequence[int | None], seed: int) -> _Sides:
        """The example and a Gaussian sample in one batch."""
        generator = self._generator(seed)
        both = [
            torch.cat([x, _random(x, generator)], d) if d is not None else x for x, d in zip(one, dims, strict=True)
        ]
        return _Sides("the example and a Gaussian sample in a batch of 2", both, 2)

    def _gaussian_run(self, seed: int) -> _Sides:
        one = self.runs[0].inputs
        generator = self._generator(seed)
        if self.dims is None:
            return _Sides("Gaussian inputs", [_random(x, generator) for x in one], 1)
        pairs = [
            torch.cat([_random(x, generator), _random(x, generator)], d) if d is not None else x
            for x, d in zip(one, self.dims, strict=True)
        ]
        return _Sides("Gaussian inputs in a batch of 2", pairs, 2)

    @staticmethod
    def _generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    # --- judging ---------------------------------------------------------------------------------------------------

    def _same_twice(self, first: list[Any], second: list[Any], watch: Watch) -> None:
        """Raise where the original is random: two runs differ by more than the order of a sum could explain."""
        for a, b in zip(first, second, strict=True):
            if not is_tensor(a):
                continue
            same = a.shape == b.shape
            if same and is_floating(a):
                scale = float(a.abs().nan_to_num(0, 0, 0).max()) if a.numel() else 0.0
                gap = float((widened(a) - widened(b)).abs().nan_to_num(0).max()) if a.numel() else 0.0
                same = gap <= 64 * torch.finfo(a.dtype).eps * scale
            elif same:
                same = torch.equal(a, b)
            if not same:
                ops = ", ".join(watch.random) or "an operator that is not deterministic"
                raise _Stop("not verifiable", f"the original gives another result each time: {ops}")

    def _judge(self, runs: Sequence[_Sides]) -> tuple[OutputError, ...]:
        found = []
        for k, name in enumerate(self.names):
            if not is_tensor(runs[0].original[k]):
                continue
            judge = self._floats if is_floating(runs[0].original[k]) else self._integers
            error = judge(name, k, runs)
            if error is not None:
                found.append(error)
        if not found and not self.notes:
            self.notes.append("the model returns no tensor")
        return tuple(found)

    def _floats(self, name: str, k: int, runs: Sequence[_Sides]) -> OutputError:
        top = max(magnitude(run.original64[k]) for run in runs)
        rows: list[ErrorRow] = []
        for run in runs:
            reference = run.original64[k]
            others = [run.original[k], run.result[k], run.result64[k]]
            if any(o.shape != reference.shape for o in others):
                raise _Stop(
                    "not verifiable",
                    f"the size of {name} depends on rounding: {tuple(reference.shape)} in float64, "
                    f"{tuple(others[0].shape)} in {self.dtype}",
                )
            noise = run.noise[k] if run.noise else None
            others.append(reference if noise is None else reference + UNIT_ROUNDOFF * noise)
            rows += errors_of(reference, others, run.samples, top, name)

        def most(of: Callable[[ErrorRow], float], norm: int) -> float:
            return max((of(r) for r in rows if r.norm == norm), default=0.0)

        wide = self.dtype == torch.float64
        base = (UNITS if wide else FLOOR) * _unit(self.dtype)
        ratio = 0.0
        limit = 0.0
        for norm in (1, 0):
            own = self.factor * most(lambda r: r.original, norm) + base
            allowed = UNITS * most(lambda r: r.noise, norm) + base if wide else own
            limit = max(own, allowed)
            ratio = max(ratio, most(lambda r: r.result, norm) / limit, most(lambda r: r.result64, norm) / allowed)
        original = max(most(lambda r: r.original, 0), most(lambda r: r.noise, 0))
        return OutputError(name, original, most(lambda r: r.result, 0), most(lambda r: r.result64, 0), limit, ratio)

    def _integers(self, name: str, k: int, runs: Sequence[_Sides]) -> OutputError:
        """Indices and masks: as many entries may differ from float64 as do in the original, and 1 in 10,000."""
        share = [0.0, 0.0, 0.0]
        for run in runs:
            reference = run.original64[k]
            for i, other in enumerate((run.original[k], run.result[k], run.result64[k])):
                if other.shape != reference.shape:
                    raise _Stop("not verifiable", f"the size of {name} depends on rounding")
                if reference.numel():
                    share[i] = max(share[i], float((other != reference).double().mean()))
        limit = self.factor * share[0] + 1e-4
        worst = max(share[1:])
        return OutputError(name, share[0], share[1], share[2], limit, worst / limit)


def _float64(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.dtype.is_floating_point:
        return x.to(torch.float64)
    return x.to(torch.complex128) if isinstance(x, torch.Tensor) and x.dtype.is_complex else x


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _text(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _random(x: Any, generator: torch.Generator) -> Any:
    """Something like ``x``: Gaussian of unit variance; integers drawn from the example's range; booleans by coin."""
    if not isinstance(x, torch.Tensor) or x.numel() == 0:
        return x
    if x.dtype.is_floating_point or x.dtype.is_complex:
        dtype = torch.complex128 if x.dtype.is_complex else torch.float64
        return torch.randn(x.shape, generator=generator, dtype=dtype).to(x)
    if x.dtype == torch.bool:
        # A mask that hides everything makes NaN: keep the example's where it is constant.
        return x if bool(x.all() == x.any()) else x[torch.randperm(x.shape[0], generator=generator).to(x.device)]
    low, high = int(x.min()), int(x.max())
    return torch.randint(low, high + 1, x.shape, generator=generator).to(x)


def _take(leaves: Sequence[Any], dims: Sequence[int | None], count: int) -> list[Any]:
    return [x.narrow(d, 0, count) if d is not None else x for x, d in zip(leaves, dims, strict=True)]


def _guess(leaves: Sequence[Any]) -> list[int | None] | None:
    first = next((x for x in leaves if is_floating(x) and x.dim()), None)
    first = first if first is not None else next((x for x in leaves if is_tensor(x) and x.dim()), None)
    if first is None:
        return None
    return [0 if is_tensor(x) and x.dim() and x.shape[0] == first.shape[0] else None for x in leaves]


def _static(module: nn.Module) -> bool:
    """Whether a graph says that the batch of its first tensor input is fixed."""
    graph = getattr(module, "graph", None)
    if graph is None or not isinstance(module, torch.fx.GraphModule):
        return False
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(value, torch.Tensor) and value.dim():
            return isinstance(value.shape[0], int)
    return False
