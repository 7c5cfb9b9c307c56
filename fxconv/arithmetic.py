"""Running a module in another arithmetic: in float64 whatever dtypes are baked into it, or with every result rounded.

Two uses. `as_float64` and `Promote` give the reference against which a model in float32, bfloat16 or float16 is
judged. `Perturb` is Monte Carlo arithmetic (Parker, *Monte Carlo Arithmetic*, 1997): each operation's result is
multiplied, entry by entry, by 1 + δr with r random of variance 1, so that the output moves by what rounding at a unit
roundoff of δ would do to it. This measures accumulated rounding, cancellation included, for any graph of any operators,
and needs no bound on weights. See `fxconv.tolerance`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = [
    "WHOLE", "Perturb", "Promote", "Watch", "Work", "as_float64", "float64_copy", "float64_fits", "float64_run",
    "own_dtype", "reference_arithmetic", "undisturbed",
]  # fmt: skip

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}

# Operators whose rounding matters in a whole model: they sum many terms or divide by a small number. Index arithmetic
# in floating point (grids, rotary positions, floor) must not be perturbed: 3.0 becoming 2.999 would flip an index.
_SUMS = frozenset(
    """convolution _convolution mkldnn_convolution cudnn_convolution miopen_convolution slow_conv_transpose2d
    mm addmm bmm baddbmm addbmm mv addmv dot matmul linear
    native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm native_layer_norm
    native_group_norm _fused_rms_norm sum mean var var_mean std norm linalg_vector_norm prod cumsum
    avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
    _softmax _log_softmax _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _native_multi_head_attention
    _transformer_encoder_layer_fwd logsumexp gelu grid_sampler_2d""".split()
)

# Their result is a copy of data or a constant: nothing is rounded.
_EXACT = frozenset("copy_ fill_ zero_ zeros_like ones_like full_like empty_like lift_fresh lift_fresh_copy".split())


class Perturb(TorchDispatchMode):
    """Multiply every float64 result by ``1 + δ·r``, r uniform in ±√3 (variance 1), entry by entry.

    ``everywhere=False`` does so for operators that sum or normalise only, see `_SUMS`. Vectors that an operator reads
    (biases, BatchNorm statistics) are perturbed too, since an operator may cancel them against each other in itself.
    Matrices and kernels are not: perturbing the data entering a sum moves it exactly as perturbing the weights would.
    """

    def __init__(self, delta: float, seed: int = 0, *, everywhere: bool = True) -> None:
        super().__init__()
        self.delta = delta
        self.everywhere = everywhere
        self._generator = torch.Generator().manual_seed(seed)

    def noisy(self, t: torch.Tensor) -> torch.Tensor:
        """A perturbed copy of ``t``; anything but float64 comes back as it is."""
        return self._perturb(t.clone()) if t.dtype == torch.float64 and t.numel() else t

    def _perturb(self, t: torch.Tensor) -> torch.Tensor:
        """``t``, multiplied in place. Fresh numbers for every entry would cost more than many an operator."""
        numbers = _random_numbers(t.device)
        step = numbers.numel() // 2
        if t.is_contiguous():
            for part in t.view(-1).split(step):
                part.addcmul_(part, self._some(numbers, part.numel()), value=self.delta)
        else:
            some = self._some(numbers, min(t.numel(), step))
            repeats = -(-t.numel() // some.numel())
            t.addcmul_(t, some.repeat(repeats)[: t.numel()].view(t.shape), value=self.delta)
        return t

    def _some(self, numbers: torch.Tensor, count: int) -> torch.Tensor:
        start = int(torch.randint(numbers.numel() - count, (), generator=self._generator))
        return numbers[start : start + count]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        rounds = (self.everywhere or name in _SUMS) and name not in _EXACT and not func.is_view
        if not rounds or not any(isinstance(a, torch.Tensor) for a in pytree.arg_tree_leaves(*args, **kwargs)):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            out = func(*args, **kwargs)
            for t in pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor) and t.dtype == torch.float64 and t.numel():
                    self._perturb(t)
            return out
        args = tuple(self.noisy(a) if isinstance(a, torch.Tensor) and a.dim() == 1 else a for a in args)
        return pytree.tree_map_only(torch.Tensor, self.noisy, func(*args, **kwargs))


@functools.cache
def _random_numbers(device: torch.device) -> torch.Tensor:
    """A million numbers of mean 0 and variance 1, bounded by √3, of which every perturbation takes a stretch."""
    generator = torch.Generator().manual_seed(0)
    return ((torch.rand(2**20, generator=generator, dtype=torch.float64) * 2 - 1) * 3**0.5).to(device)


class Work(TorchDispatchMode):
    """Count multiply-adds, and one for each entry of a result that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            self.total += sum(t.numel() for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) // 2
        return out


class Promote(TorchDispatchMode):
    """Let no floating tensor below float64 come into being: baked-in dtypes and factories are widened as they run.

    A float64 copy of a model still says ``.to(torch.float32)``, ``.float()``, ``dtype=torch.float32`` or
    ``torch.zeros(3)`` in places, in its graph or in its Python. All pass through the dispatcher.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*_widened(args), **{k: _widened(v) for k, v in (kwargs or {}).items()})
        return out if func._schema.is_mutable else _widened(out)


class PromoteParameters(TorchFunctionMode):
    """Widen parameters as a function is called on them: many check before they dispatch that dtypes agree."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__") or name.endswith("_") and not name.endswith("__"):
            return func(*args, **(kwargs or {}))  # an attribute, or something that writes

        return func(*_widened(args, nn.Parameter), **{k: _widened(v, nn.Parameter) for k, v in (kwargs or {}).items()})


def _widened(x: Any, kind: type = torch.Tensor) -> Any:
    """Arguments or results with the tensors of a kind widened, and if that is all tensors, dtypes; itself if nothing is to do.

    An operator's hold tensors in lists at the most, and a run asks this of every one: pytree takes several times as long.
    """
    if isinstance(x, kind):
        return x.to(_WIDER[x.dtype]) if x.dtype in _WIDER else x  # type: ignore[attr-defined]
    if isinstance(x, (list, tuple)):
        new = [_widened(y, kind) for y in x]
        if all(a is b for a, b in zip(new, x, strict=True)):
            return x
        return type(x)(*new) if hasattr(x, "_fields") else type(x)(new)
    return _WIDER.get(x, x) if isinstance(x, torch.dtype) and kind is torch.Tensor else x


class Watch(TorchDispatchMode):
    """Note what a verdict wants to know of a run.

    Operators that draw random numbers, squeezes that removed nothing, whether anything was narrower than float64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.random: list[str] = []
        self.squeezes: list[str] = []
        self.narrow = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        # Attention is tagged as random for the sake of its dropout, which is off in eval mode.
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name and name not in self.random:
            self.random.append(name)
        if not self.narrow:
            self.narrow = any(isinstance(t, torch.Tensor) and t.dtype in _WIDER for t in pytree.tree_leaves(out))
        if name == "squeeze" and len(args) == 2 and isinstance(args[1], int) and out.dim() == args[0].dim() > 0:
            dim = args[1]
            text = f"squeeze({dim}) removed nothing: dim {dim % out.dim()} has size {out.shape[dim]}"
            if text not in self.squeezes:
                self.squeezes.append(text)
        return out


WHOLE = 2**25
"""Bytes up to which a float64 copy of a model has all its parameters.

Of a larger one some are widened as they are read, at every run, so that what the run itself needs fits beside the copy.
"""

HELD = 0.8
"""Share of a larger model's bytes that are copied: its largest parameters, which would take longest to widen each time."""

LARGEST = 2**32
"""Bytes that the copy of any model takes at most."""


def as_float64(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with every floating tensor in float64, sharing no tensor with it. Run it under `Promote`.

    Each tensor is copied once, straight to float64: the peak is one float64 model. Tied parameters stay tied. Complex
    tensors become complex128; integers and booleans are copied. Raises TypeError where deepcopy does not take it.
    """
    return _copied(module, {id(t): _float64(t) for t in _tensors(module)})


@contextlib.contextmanager
def float64_copy(module: nn.Module, *, whole: bool = True) -> Iterator[nn.Module]:
    """`as_float64`, whose memory is free again when the block ends: a graph module waits for the garbage collector.

    ``whole=False`` copies buffers and the largest parameters, and shares the others: run it under `float64_run`, which widens
    those as they are read.
    """
    tensors = {id(t): t for t in _tensors(module)}
    shared = {} if whole else _widened_as_read(tensors)
    made = {key: _float64(t) for key, t in tensors.items() if key not in shared}
    try:
        yield _copied(module, {**made, **shared})
    finally:
        for t in made.values():
            t.data = torch.empty(0, dtype=t.dtype, device=t.device)


def _widened_as_read(tensors: Mapping[int, torch.Tensor]) -> dict[int, nn.Parameter]:
    """The parameters that do not fit into `HELD` of the bytes, nor into `LARGEST`, after those that are larger."""
    parameters = {key: t for key, t in tensors.items() if isinstance(t, nn.Parameter)}
    left = min(HELD * 8 * sum(t.numel() for t in parameters.values()), LARGEST)
    for key in sorted(parameters, key=lambda k: -parameters[k].numel()):
        if (size := 8 * parameters[key].numel()) <= left:
            left -= size
            del parameters[key]
    return parameters


@contextlib.contextmanager
def float64_run(*, whole: bool = True) -> Iterator[None]:
    """The arithmetic that a float64 copy is to be run in."""
    with Promote(), contextlib.nullcontext() if whole else PromoteParameters():
        yield


def float64_fits(module: nn.Module) -> bool:
    """Whether a float64 copy of everything takes at most `WHOLE` bytes."""
    return sum(t.numel() for t in {id(t): t for t in _tensors(module)}.values()) * 8 <= WHOLE


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # deepcopy raises whatever the module's attributes raise
        raise TypeError(f"{type(module).__name__} cannot be copied: {type(error).__name__}: {error}") from error


def _float64(t: torch.Tensor) -> torch.Tensor:
    data = t.detach().to(_WIDER.get(t.dtype, t.dtype), copy=True)
    return nn.Parameter(data, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else data


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """All tensors that the modules hold: parameters, buffers, plain attributes, and those in lists and dicts."""
    for m in module.modules():
        for value in vars(m).values():
            yield from _in_containers(value, depth=3)


def _in_containers(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for v in value.values():
            yield from _in_containers(v, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for v in value:
            yield from _in_containers(v, depth - 1)


def own_dtype(module: nn.Module, inputs: Sequence[Any] = ()) -> torch.dtype:
    """The floating dtype that most entries of the parameters and buffers have; of the inputs when there are none."""
    counts: dict[torch.dtype, int] = {}
    for tensors in ([*module.parameters(), *module.buffers()], [x for x in inputs if isinstance(x, torch.Tensor)]):
        for t in tensors:
            if t.dtype.is_floating_point:
                counts[t.dtype] = counts.get(t.dtype, 0) + t.numel()
        if counts:
            return max(counts, key=lambda d: counts[d])
    return torch.get_default_dtype()


def version(tensor: torch.Tensor) -> int | None:
    """How often a tensor has been written to; None for one made under ``torch.inference_mode()``, which does not count."""
    return None if tensor.is_inference() else tensor._version


@contextlib.contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave no trace: buffers that the block changes are restored, and so are the random number generators.

    Yields a function that restores the buffers at once, so that each of several runs begins in the same state.
    """
    buffers = list({id(b): b for m in modules for b in m.buffers()}.values())
    values = [b.detach().clone() for b in buffers]
    versions = [version(b) for b in buffers]
    devices = sorted({b.device.index or 0 for b in buffers if b.device.type == "cuda"})

    def restore() -> None:
        with torch.no_grad():
            for k, (buffer, value) in enumerate(zip(buffers, values, strict=True)):
                if version(buffer) != versions[k] or (versions[k] is None and not torch.equal(buffer, value)):
                    buffer.copy_(value)
                    versions[k] = version(buffer)

    try:
        with torch.random.fork_rng(devices=devices):
            yield restore
    finally:
        restore()


@contextlib.contextmanager
def reference_arithmetic() -> Iterator[None]:
    """No gradients, and no TensorFloat32: with it a float32 convolution would be as inaccurate as one in float16."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.cuda.is_available():
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
            matmul = torch.backends.cuda.matmul
            stack.callback(setattr, matmul, "allow_tf32", matmul.allow_tf32)
            matmul.allow_tf32 = False
        yield
