"""Is a replacement equal to what it replaces? The proof, or confirmation, per rewritten cluster.

`check_cluster` compares two float64 callables, the replacement with its *unrounded* weights, so that algebra is judged
at float64 rounding (`fxconv.tolerance` says how). That the emitted weights are those, rounded once, is
`fxconv.rounding`.

What the statuses mean:

- ``proved``: both were evaluated on every basis vector (at most ``basis_bound`` entries a sample), at the only spatial
  size that there is. Two affine maps that agree on a basis and at zero agree everywhere.
- ``confirmed``: both agree on Gaussian inputs, which miss a difference with probability zero up to rounding, at zero,
  on the border, on one channel, at two batch sizes, and at three spatial sizes where those are dynamic.
- ``failed``: they differ; the reason says where, by how much, at which size and on which input.
- ``unverified``: nothing could be compared, for instance since the original itself cannot run.

Cost, of each side: with dynamic spatial sizes one sample at full size and three (of little work five) at 5 to 7 pixels;
with static ones three (six) samples. The original runs once more, for the noise, only where its result's own magnitude
does not explain the error. A basis is added where it is small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn

from fxconv.arithmetic import Perturb, Work, version
from fxconv.probe import SHIFTED, SPARSE, InputSpec, Numbers, Sizes, draw, shapes_at
from fxconv.tolerance import DELTA, Miss, compare

__all__ = ["BASIS_BOUND", "Probe", "Verdict", "check_cluster"]

BASIS_BOUND = 1024
"""Input entries a sample up to which a cluster is proved rather than confirmed."""

_BASIS_WORK = 2**27
"""Multiply-adds that a proof may take: about 50 ms."""

_BASIS_CHUNK = 2**22
"""Input entries evaluated at once in a proof: 32 MiB."""

_DEAR = 2**24
"""Multiply-adds a sample (about 2 ms) from which fewer samples are probed."""

_ALONE = 128
"""Evaluations that a proof may take where basis vectors cannot share a batch."""

_DRAWS = 4
"""Further draws of the noise of either side before a difference is called one."""

_HOPELESS = 2.0**24
"""Tolerances beyond which no draw could make up for the difference."""


@dataclass(frozen=True)
class Probe:
    """One evaluation of both sides."""

    kinds: tuple[str, ...]
    """What the rows of the batch were; see `fxconv.probe`."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the inputs; a symint counts as one entry."""
    seed: int
    """The inputs are made of `fxconv.probe.Numbers` of this seed, from the first on."""
    error: float
    """Largest error ÷ largest magnitude of the original's output; 1 where there is nothing to compare with it."""
    tolerance: float
    """Tolerance at the entry nearest to (or furthest above) it ÷ the same."""


@dataclass(frozen=True)
class Verdict:
    """Plain data: ``dataclasses.asdict`` of it is JSON."""

    status: str
    """"proved" | "confirmed" | "failed" | "unverified"."""
    reason: str = ""
    """What was wrong, with values; of a proof what it covers."""
    probes: tuple[Probe, ...] = ()
    max_error: float = 0.0
    """The largest `Probe.error`."""
    tolerance: float = 0.0
    """The tolerance of the probe that came nearest to its own."""

    def __bool__(self) -> bool:
        return self.status in ("proved", "confirmed")


class _Unfit(Exception):
    """The original does not take inputs of these sizes."""


class _Failed(Exception):
    """The replacement differs; the message is the reason."""


def check_cluster(
    original: Callable[..., Any],
    replacement: Callable[..., Any],
    inputs: Sequence[InputSpec],
    *,
    symbols: Mapping[sympy.Symbol, tuple[int, int | None, int]],
    seed: int = 0,
    basis_bound: int = BASIS_BOUND,
    affine: bool = True,
    positively_homogeneous: bool = False,
    numbers: Numbers | None = None,
) -> Verdict:
    """Compare two float64 callables that take ``inputs`` positionally and return a tuple of tensors.

    ``symbols`` gives every symbol in the inputs' shapes its range (None: unbounded) and the example's value. Sizes at
    which ``original`` raises are skipped; where only ``replacement`` raises it has failed. ``affine=False`` forbids a
    proof, since a basis says nothing then; ``positively_homogeneous=True`` (a ReLU or max-pool inside) adds inputs that
    are shifted far to either side, and forbids it too. ``numbers``, for many checks of one seed, saves drawing them anew.

    Raises OptionError for symbols without a range. Never raises for what the callables do.
    """
    numbers = numbers or Numbers(seed)
    return _Check(original, replacement, inputs, symbols, numbers, basis_bound, affine, positively_homogeneous).run()


class _Check:
    def __init__(
        self,
        original: Callable[..., Any],
        replacement: Callable[..., Any],
        inputs: Sequence[InputSpec],
        symbols: Mapping[sympy.Symbol, tuple[int, int | None, int]],
        numbers: Numbers,
        basis_bound: int,
        affine: bool,
        positively_homogeneous: bool,
    ) -> None:
        self.original = original
        self.replacement = replacement
        self.inputs = tuple(inputs)
        self.sizes = Sizes(self.inputs, symbols)
        self.numbers = numbers
        self.seed = numbers.seed
        self.basis_bound = basis_bound
        self.affine = affine and not positively_homogeneous
        self.shifted = positively_homogeneous
        self.device = _device(original)
        self.probes: list[Probe] = []
        self.worst = Miss(-1.0, (), 0.0, 0.0, 0.0, 0.0)
        self.noise: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        self.work = 0  # multiply-adds of one sample at the example's size, which is probed first
        self.dear = False
        self.alone = True  # a batch of 1 is taken

    def run(self) -> Verdict:
        odd = [str(s.dtype) for s in self.inputs if s.kind == "tensor" and not s.dtype.is_floating_point]
        if odd:
            return Verdict("unverified", f"an input of {odd[0]} cannot be probed in float64")
        try:
            with torch.no_grad():
                done = self._evaluate_all()
        except _Failed as failure:
            return self._verdict("failed", str(failure))
        except _Unfit as error:
            return self._verdict("unverified", f"the original does not run in float64: {error}")
        return self._verdict("proved" if done else "confirmed", done)

    def _verdict(self, status: str, reason: str) -> Verdict:
        error = max((p.error for p in self.probes), default=0.0)
        return Verdict(status, reason, tuple(self.probes), error, self.worst.tolerance)

    def _evaluate_all(self) -> str:
        """Every probe; returns what a basis covers, "" without one."""
        if not self.sizes.batch:
            return self._without_batch()
        first, second = self.sizes.at(2), self.sizes.at(3)
        if self.sizes.spatial:
            full = self._one_sample()
            first = self._small(0, 2, ("zero", "gaussian"), full)
            if self.dear and self.alone:
                second = self._small(1, 1, (SPARSE,), full)
            else:
                second = self._small(1, 3, ("border", "channel", "gaussian"), full)
        else:
            first, second = self._static(first, second)
        if self.shifted:
            self.outputs(second, SHIFTED)
        return "" if self.sizes.spatial else self._basis(first, second)

    def _static(self, *larger: dict[sympy.Symbol, int]) -> tuple[dict[sympy.Symbol, int], ...]:
        """At the only spatial size: one sample, to see what that costs; a batch of 2; of 3 where that is cheap."""
        self._one_sample()
        if self.dear:
            self.outputs(larger[0], ("zero", SPARSE))
        else:
            self.outputs(larger[0], ("zero", "gaussian"))
            self.outputs(larger[1], ("border", "channel", "gaussian"))
        return larger

    def _one_sample(self) -> list[torch.Size]:
        """A Gaussian sample at the example's size, alone unless the original wants company; the outputs' shapes."""
        try:
            shapes = self.outputs(self.sizes.at(1), ("gaussian",))
        except _Unfit:
            if not self.sizes.batch:
                raise
            self.alone = False
            shapes = self.outputs(self.sizes.at(2), ("gaussian",))
        self.dear = self.work > _DEAR
        return shapes

    def _without_batch(self) -> str:
        full = self._one_sample()
        kinds = ["zero", SPARSE] if self.dear else ["zero", "border", "channel"]
        kinds += SHIFTED if self.shifted else ()
        if not self.sizes.spatial:
            for kind in kinds:
                self.outputs({}, (kind,))
            return self._basis({}, {})
        for which in (0, 1):
            values = self._small(which, 1, ("gaussian",), full)
            for kind in kinds[which::2]:
                self.outputs(values, (kind,))
        return ""

    def _small(self, which: int, batch: int, kinds: Sequence[str], full: list[torch.Size]) -> dict[sympy.Symbol, int]:
        """Evaluate at the first small size that the original takes and whose outputs have an interior."""
        largest = None
        for spatial in self.sizes.small(which):
            values = self.sizes.at(batch, spatial)
            try:
                if shapes := self.outputs(values, kinds, interior_of=full):
                    # Small is not small where the example's own images have shrunk to a few pixels.
                    self.dear |= self._work_at(shapes, batch, full) > _DEAR
                    return values
            except _Unfit:
                continue
            largest = values
        if largest is None:
            raise _Unfit(f"no size could be found that it takes with a batch of {batch}")
        self.outputs(largest, kinds)
        return largest

    def _work_at(self, shapes: Sequence[torch.Size], batch: int, full: Sequence[torch.Size]) -> float:
        """Multiply-adds of one sample whose outputs have these shapes, by those of the sample at full size."""
        entries = sum(s.numel() for s in shapes) / max(batch, 1)
        return self.work * entries / max(sum(s.numel() for s in full), 1)

    def outputs(
        self,
        values: Mapping[sympy.Symbol, int],
        kinds: Sequence[str],
        interior_of: Sequence[torch.Size] | None = None,
    ) -> list[torch.Size]:
        """Compare both sides on rows of these kinds; the outputs' shapes. Raises _Failed or _Unfit.

        With ``interior_of``, the outputs' shapes at full size, nothing is compared and the list is empty where an
        output dim that grows with the image is below 3: two borders and something between.
        """
        args = draw(self.inputs, values, kinds, self.numbers, self.device)
        expected = self._run_original(args)
        first = 1 if self.sizes.batch else 0
        for out, full in zip(expected, interior_of or (), strict=False):
            if any(small < min(3, large) for small, large in list(zip(out.shape, full, strict=False))[first:]):
                return []
        return self._compare(args, expected, tuple(kinds), self.seed)

    def _run_original(self, args: list[Any]) -> list[torch.Tensor]:
        try:
            if self.work:
                return _call(self.original, args)
            with Work() as counted:
                out = _call(self.original, args)
            batched = self.sizes.batch and isinstance(args[0], torch.Tensor) and args[0].dim()
            self.work = -(-counted.total // max(args[0].shape[0] if batched else 1, 1))
            return out
        except Exception as error:  # noqa: BLE001 - whatever a graph raises means that it does not take these sizes
            raise _Unfit(_text(error)) from error

    def _compare(self, args: list[Any], expected: list[torch.Tensor], kinds: tuple[str, ...], seed: int) -> list[torch.Size]:
        shapes = tuple(tuple(a.shape) if isinstance(a, torch.Tensor) else (a,) for a in args)
        where = f"on {'/'.join(kinds)} inputs of shape {', '.join(map(str, shapes))}"
        try:
            got = self._same_in_kind(args, expected, where)
        except _Failed:
            self.probes.append(Probe(kinds, shapes, seed, 1.0, 0.0))
            raise
        # Noise only ever allows more, and to measure it is to run the original once more: most probes pass without.
        worst, which = self._worst(expected, got, [None] * len(expected))
        if worst.ratio > 1:
            worst, which = self._worst(expected, got, self._noise(args, kinds, expected))
        if 1 < worst.ratio < _HOPELESS:  # one draw of the noise may be too small by chance: look again, at both sides
            worst, which = self._worst(expected, got, self._noise_of_both(args, expected, got))
        self.probes.append(Probe(kinds, shapes, seed, worst.error, worst.tolerance))
        if worst.ratio > self.worst.ratio:
            self.worst = worst
        if worst.ratio > 1:
            raise _Failed(
                f"output {which} at {worst.index} is {worst.got:.17g} instead of {worst.expected:.17g} {where}: error "
                f"{worst.error:.1e} of the output's magnitude, {worst.ratio:.1e} times what rounding explains"
            )
        return [e.shape for e in expected]

    def _same_in_kind(self, args: list[Any], expected: list[torch.Tensor], where: str) -> list[torch.Tensor]:
        """The replacement's outputs. Raises _Failed where they are not of the number, shapes and dtypes expected."""
        try:
            got = _call(self.replacement, args)
        except Exception as error:  # noqa: BLE001
            raise _Failed(f"the replacement raises {where}, the original does not: {_text(error)}") from error
        if len(got) != len(expected):
            raise _Failed(f"{len(got)} outputs instead of {len(expected)}")
        for k, (e, g) in enumerate(zip(expected, got, strict=True)):
            if e.shape != g.shape:
                raise _Failed(f"output {k} has shape {tuple(g.shape)} instead of {tuple(e.shape)} {where}")
            if e.dtype != g.dtype:
                raise _Failed(f"output {k} is {g.dtype} instead of {e.dtype} {where}")
        return got

    @staticmethod
    def _worst(expected: list[torch.Tensor], got: list[torch.Tensor], noise: Sequence[torch.Tensor | None]) -> tuple[Miss, int]:
        misses = [compare(*pair) for pair in zip(expected, got, noise, strict=True)]
        if not misses:
            return Miss(0.0, (), 0.0, 0.0, 0.0, 0.0), 0
        which = max(range(len(misses)), key=lambda k: misses[k].ratio)
        return misses[which], which

    def _noise(self, args: list[Any], kinds: tuple[str, ...], expected: list[torch.Tensor]) -> list[torch.Tensor]:
        """The original's noise, measured on Gaussian inputs once for each size of a sample; pooled over the batch."""
        first = 1 if self.sizes.batch else 0
        key = (bool(set(kinds) & set(SHIFTED)), *(tuple(e.shape[first:]) for e in expected))
        if key in self.noise and not self.sizes.spatial:
            return self.noise[key]
        noise = _measure(self.original, args, expected, self.seed)
        if first:
            self.noise[key] = [n.amax(0, keepdim=True) if n.dim() and n.numel() else n for n in noise]
        else:
            self.noise[key] = noise
        return noise

    def _noise_of_both(self, args: list[Any], expected: list[torch.Tensor], got: list[torch.Tensor]) -> list[torch.Tensor]:
        """The most of several draws for both sides; a replacement may be noisier than the original up to 8-fold."""
        noise = [torch.zeros_like(e) for e in expected]
        theirs = [torch.zeros_like(e) for e in expected]
        for k in range(_DRAWS):
            for side, outputs, most in ((self.original, expected, noise), (self.replacement, got, theirs)):
                for n, m in zip(_measure(side, args, outputs, self.seed + 1 + k), most, strict=True):
                    torch.maximum(m, n.abs(), out=m)
        return [torch.maximum(n, torch.minimum(t, 8 * n.amax())) if n.numel() else n for n, t in zip(noise, theirs, strict=True)]

    def _basis(self, first: dict[sympy.Symbol, int], second: dict[sympy.Symbol, int]) -> str:
        """Every basis vector of one sample, where that is little work; what it covers, "" when it was too much."""
        if not self.affine or any(s.kind != "tensor" for s in self.inputs):
            return ""
        batch = self.sizes.batch
        shapes = shapes_at(self.inputs, first)
        if not batch:
            count = sum(torch.Size(s).numel() for s in shapes)
            if not 0 < count <= min(self.basis_bound, _ALONE) or count * self.work > _BASIS_WORK:
                return ""
            self._basis_rows(shapes, count, stacked=False)
            return f"every one of {count} basis vectors, at the only size there is"
        if len(batch) > 1 or any(s.shape[:1] != (batch[0],) for s in self.inputs):
            return ""
        count = sum(torch.Size(s[1:]).numel() for s in shapes)
        if not 0 < count <= self.basis_bound or count * self.work > _BASIS_WORK:
            return ""
        if not (self._rows_apart(self.original, first, second) and self._rows_apart(self.replacement, first, second)):
            return ""
        self._basis_rows([s[1:] for s in shapes], count, stacked=True)
        return f"every one of the {count} basis vectors of a sample"

    def _rows_apart(self, side: Callable[..., Any], *choices: Mapping[sympy.Symbol, int]) -> bool:
        """Whether the samples of a batch do not affect each other: basis vectors may then share one.

        By linearity a Gaussian sample beside zeros shows any effect, with probability one.
        """
        for values in choices:
            zeros = draw(self.inputs, values, ("zero",), self.numbers, self.device)
            one = draw(self.inputs, values, ("gaussian",), self.numbers, self.device)
            rows = zeros[0].shape[0]
            if rows < 2:
                return False
            for k in (0, rows - 1):
                lone = [z.clone() for z in zeros]
                for a, b in zip(lone, one, strict=True):
                    a[k] = b[k]
                others = [i for i in range(rows) if i != k]
                for with_one, without in zip(_call(side, lone), _call(side, zeros), strict=True):
                    if with_one.shape[:1] != (rows,) or not torch.equal(with_one[others], without[others]):
                        return False
        return True

    def _basis_rows(self, shapes: list[tuple[int, ...]], count: int, *, stacked: bool) -> None:
        """Compare on e_0 … e_{count-1} of the inputs' entries taken together."""
        numels = [torch.Size(s).numel() for s in shapes]
        step = max(1, _BASIS_CHUNK // count) if stacked else 1
        worst = 0.0
        tolerance = 0.0
        probes = len(self.probes)
        for start in range(0, count, step):
            rows = min(step, count - start)
            # A batch of one is another code path in some kernels, and what a basis vector stands for is not the batch.
            eye = torch.zeros(max(rows, 2) if stacked else 1, count, dtype=torch.float64, device=self.device)
            eye[torch.arange(rows), torch.arange(start, start + rows)] = 1
            args = [
                part.reshape(*(eye.shape[:1] if stacked else ()), *shape)
                for part, shape in zip(eye.split(numels, dim=1), shapes, strict=True)
            ]
            self.noise.clear()
            self._compare(list(args), self._run_original(list(args)), ("basis",), start)
            last = self.probes[-1]
            if last.error >= worst:
                worst, tolerance = last.error, last.tolerance
        del self.probes[probes:]
        self.probes.append(Probe(("basis",), tuple((count, *s) for s in shapes), 0, worst, tolerance))


def _device(side: Callable[..., Any]) -> torch.device:
    if isinstance(side, nn.Module):
        for t in (*side.parameters(), *side.buffers()):
            return t.device
    return torch.device("cpu")


def _text(error: Exception) -> str:
    """The first line of an error: torch appends the trace of the graph."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _call(side: Callable[..., Any], args: Sequence[Any]) -> list[torch.Tensor]:
    """The outputs as a list. Raises RuntimeError where an input was written to: the next side would see it changed."""
    before = [(a, version(a), a.clone() if version(a) is None else a) for a in args if isinstance(a, torch.Tensor)]
    out = side(*args)
    if any(version(a) != count or not (value is a or torch.equal(a, value)) for a, count, value in before):
        raise RuntimeError("it writes to its input")
    return [out] if isinstance(out, torch.Tensor) else list(out)


def _measure(side: Callable[..., Any], args: list[Any], outputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """|f_δ − f| / δ for one draw; 0 where it cannot be measured."""
    mode = Perturb(DELTA, seed + 1)
    noisy = [mode.noisy(a) if isinstance(a, torch.Tensor) else a for a in args]
    with mode:
        moved = _call(side, noisy)
    return [((m - o) / DELTA).abs().nan_to_num(0.0, 0.0) for m, o in zip(moved, outputs, strict=True)]
