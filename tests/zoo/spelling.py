"""One region, several spellings.

A region is written once, as `program(s, *inputs)`, against a `Speller`: `s.conv1(x)` runs the layer registered under
that name,
`s.flatten(x, 1)` a structural operation. What ends up in the graph depends on the spelling:

| spelling | a convolution | BatchNorm | a Linear | flatten |
|---|---|---|---|---|
| module | `self.conv1(x)` | `self.bn(x)` | `self.fc(x)` | `nn.Flatten` |
| functional | `F.conv2d(x, ...)` | `F.batch_norm` | `F.linear` | `torch.flatten` |
| method | `torch.convolution(...)` | `(x - mean) * scale + beta` | `x.matmul(w.t()).add(b)` | `x.view(x.size(0), -1)` |
| aten | `aten.convolution` | `aten._native_batch_norm_legit_no_training` | `aten.addmm`, `aten.matmul` | `aten.view` |

`build(row, spelling)` makes a module with a plain signature (`forward(self, x)` or `forward(self, x, y)`, ...), as fx
and export want.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten
SPELLINGS = ("module", "functional", "method", "aten")
CAPTURES = (
    ("module", "export"),
    ("functional", "export"),
    ("method", "export"),
    ("aten", "export"),
    ("module", "symbolic"),
)
SYMBOLIC = (
    ("functional", "symbolic"),
    ("method", "symbolic"),
)  # on fewer rows: the same spellings in the other dialect
Program = Callable[..., Any]


def _per_channel(p: Tensor, ndim: int) -> Tensor:
    return p.view(1, -1, *[1] * (ndim - 2))


def _bn_eps(m: Any) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]:
    return m.weight, m.bias, m.running_mean, m.running_var, m.eps


class Speller:
    """The operations of a region in one spelling; `s.name(x)` runs the layer `name` of the owner."""

    def __init__(self, owner: nn.Module, spelling: str) -> None:
        self._owner = owner
        self._spelling = spelling

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # copying and pickling ask for these before there is an owner
        layer = getattr(self._owner, name)
        if not isinstance(layer, nn.Module):
            return layer  # a parameter or a buffer
        if self._spelling == "module":
            return layer
        return lambda *xs: self._layer(layer, *xs)

    # --- layers -----------------------------------------------------------------------------------------------------

    def _layer(self, m: Any, x: Tensor, *rest: Any) -> Tensor:
        kind, rank = type(m).__name__, _rank(m)
        if kind.startswith("ConvTranspose"):
            return self._conv_transpose(m, x, rank)
        if kind.startswith("Conv"):
            return self._conv(m, x, rank)
        if kind.startswith("BatchNorm"):
            return self._batch_norm(m, x, rank)
        spelled = getattr(self, "_" + kind.rstrip("123d").lower(), None)
        return m(x, *rest) if spelled is None else spelled(m, x)

    def _conv(self, m: Any, x: Tensor, rank: int) -> Tensor:
        if m.padding_mode != "zeros":
            pads = [p for p in reversed(m.padding) for _ in (0, 1)]
            return getattr(F, f"conv{rank}d")(F.pad(x, pads, m.padding_mode), m.weight, m.bias, m.stride, 0, m.dilation, m.groups)
        if isinstance(m.padding, str) or self._spelling == "functional":
            return getattr(F, f"conv{rank}d")(x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)
        rest = (m.weight, m.bias, m.stride, m.padding, m.dilation, False, [0] * rank, m.groups)
        return aten.convolution.default(x, *map(_listed, rest)) if self._spelling == "aten" else torch.convolution(x, *rest)

    def _conv_transpose(self, m: Any, x: Tensor, rank: int) -> Tensor:
        if self._spelling == "aten":
            rest = (m.weight, m.bias, m.stride, m.padding, m.dilation, True, m.output_padding, m.groups)
            return aten.convolution.default(x, *map(_listed, rest))
        op = getattr(F, f"conv_transpose{rank}d")
        return op(x, m.weight, m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)

    def _batch_norm(self, m: Any, x: Tensor, rank: int) -> Tensor:
        weight, bias, mean, var, eps = _bn_eps(m)
        if self._spelling == "functional":
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        if self._spelling == "aten":
            return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, 0.1, eps)[0]
        ndim = rank + 2 if rank > 1 else 3 if m.sequence else 2
        y = (x - _per_channel(mean, ndim)) / torch.sqrt(_per_channel(var, ndim) + eps)
        y = y if weight is None else y * _per_channel(weight, ndim)
        return y if bias is None else y + _per_channel(bias, ndim)

    def _linear(self, m: Any, x: Tensor) -> Tensor:
        if self._spelling == "functional":
            return F.linear(x, m.weight, m.bias)
        if self._spelling == "method":
            y = x.matmul(m.weight.t())
            return y if m.bias is None else y.add(m.bias)
        if m.bias is not None and x.dim() == 2:
            return aten.addmm.default(m.bias, x, aten.t.default(m.weight))
        y = aten.matmul.default(x, aten.permute.default(m.weight, [1, 0]))
        return y if m.bias is None else aten.add.Tensor(y, m.bias)

    def _flatten(self, m: Any, x: Tensor) -> Tensor:
        return self.flatten(x, m.start_dim)

    def _relu(self, m: Any, x: Tensor) -> Tensor:
        return self.relu(x)

    def _dropout(self, m: Any, x: Tensor) -> Tensor:
        return F.dropout(x, m.p, training=False) if self._spelling == "functional" else torch.dropout(x, m.p, False)

    def _identity(self, m: Any, x: Tensor) -> Tensor:
        return x.contiguous() if self._spelling == "method" else x

    def _avgpool(self, m: Any, x: Tensor) -> Tensor:
        op = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[_rank(m)]
        return op(x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad)

    # --- structure --------------------------------------------------------------------------------------------------

    def flatten(self, x: Tensor, start: int = 1) -> Tensor:
        if self._spelling == "module":
            return nn.Flatten(start)(x) if not isinstance(x, torch.fx.Proxy) else torch.flatten(x, start)
        if self._spelling == "functional":
            return torch.flatten(x, start)
        lead = [x.size(d) for d in range(start)]
        return aten.reshape.default(x, [*lead, -1]) if self._spelling == "aten" else x.reshape(*lead, -1)

    def relu(self, x: Tensor) -> Tensor:
        return {"functional": F.relu, "method": lambda t: t.relu(), "aten": aten.relu.default, "module": torch.relu}[
            self._spelling
        ](x)

    def add(self, a: Any, b: Any) -> Tensor:
        if self._spelling == "functional":
            return torch.add(a, b)
        if self._spelling == "aten":
            return aten.add.Tensor(a, b)
        return a.add(b) if self._spelling == "method" else a + b

    def sub(self, a: Any, b: Any) -> Tensor:
        if self._spelling == "functional":
            return torch.sub(a, b)
        if self._spelling == "aten":
            return aten.sub.Tensor(a, b)
        return a.sub(b) if self._spelling == "method" else a - b

    def mul(self, a: Any, b: Any) -> Tensor:
        if self._spelling == "functional":
            return torch.mul(a, b)
        if self._spelling == "aten":
            return aten.mul.Tensor(a, b)
        return a.mul(b) if self._spelling == "method" else a * b

    def cat(self, xs: Sequence[Tensor], dim: int = 1) -> Tensor:
        if self._spelling == "aten":
            return aten.cat.default(list(xs), dim)
        return torch.concat(tuple(xs), dim=dim) if self._spelling == "functional" else torch.cat(list(xs), dim)

    def reshape(self, x: Tensor, *shape: Any) -> Tensor:
        if self._spelling == "functional":
            return torch.reshape(x, shape)
        if self._spelling == "aten":
            return aten.reshape.default(x, list(shape))
        return x.view(shape) if self._spelling == "method" else x.reshape(*shape)

    def transpose(self, x: Tensor, a: int, b: int) -> Tensor:
        if self._spelling == "functional":
            return torch.swapaxes(x, a, b)
        if self._spelling == "aten":
            return aten.transpose.int(x, a, b)
        return x.movedim(a, b) if self._spelling == "method" and abs(a - b) == 1 else x.transpose(a, b)

    def permute(self, x: Tensor, *dims: int) -> Tensor:
        if self._spelling == "aten":
            return aten.permute.default(x, list(dims))
        return torch.permute(x, dims) if self._spelling == "functional" else x.permute(*dims)

    def global_mean(self, x: Tensor, rank: int = 2) -> Tensor:
        """Mean over the last `rank` dims: (N, C, ...) -> (N, C)."""
        dims = list(range(-rank, 0))
        if self._spelling == "functional":
            pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[rank]
            return torch.flatten(pool(x, 1), 1)
        if self._spelling == "aten":
            return aten.mean.dim(x, dims)
        return x.mean(dims) if self._spelling == "method" else torch.mean(x, dim=dims, keepdim=True).flatten(1)

    def avg_pool(self, x: Tensor, kernel: int, rank: int = 2, stride: int | None = None, padding: int = 0) -> Tensor:
        if self._spelling == "aten" and rank == 2:
            return aten.avg_pool2d.default(x, [kernel] * 2, [stride or kernel] * 2, [padding] * 2)
        op = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
        return op(x, kernel, stride or kernel, padding)

    def pad(self, x: Tensor, pads: Sequence[int]) -> Tensor:
        return aten.constant_pad_nd.default(x, list(pads), 0.0) if self._spelling == "aten" else F.pad(x, list(pads))

    def upsample(self, x: Tensor, factor: int = 2, mode: str = "nearest", align_corners: bool | None = None) -> Tensor:
        if self._spelling == "aten" and mode == "nearest" and x.dim() == 4:
            return aten.upsample_nearest2d.vec(x, None, [float(factor)] * 2)
        return F.interpolate(x, scale_factor=factor, mode=mode, align_corners=align_corners)

    def resize(self, x: Tensor, like: Tensor, mode: str = "bilinear") -> Tensor:
        """Upsample to the spatial size of `like`."""
        if self._spelling == "aten":
            return aten.upsample_bilinear2d.vec(x, [like.size(2), like.size(3)], False, None)
        return F.interpolate(x, size=like.shape[2:], mode=mode, align_corners=False)

    def narrow(self, x: Tensor, dim: int, start: int, length: int) -> Tensor:
        if self._spelling == "aten":
            return aten.slice.Tensor(x, dim, start, start + length)
        if self._spelling == "module":
            return x[(slice(None),) * dim + (slice(start, start + length),)]
        return torch.narrow(x, dim, start, length) if self._spelling == "functional" else x.narrow(dim, start, length)

    def step(self, x: Tensor, dims: Sequence[int], step: int) -> Tensor:
        """Every `step`-th element along each of `dims`."""
        if self._spelling == "aten":
            for d in dims:
                x = aten.slice.Tensor(x, d, 0, None, step)
            return x
        return x[tuple(slice(None, None, step) if d in dims else slice(None) for d in range(max(dims) + 1))]

    def shuffle(self, x: Tensor, groups: int, channels: int) -> Tensor:
        """Channel shuffle, as ShuffleNet writes it or as the operator."""
        if self._spelling == "functional":
            return F.channel_shuffle(x, groups) if hasattr(F, "channel_shuffle") else torch.channel_shuffle(x, groups)
        h, w = x.size(2), x.size(3)
        x = self.reshape(x, x.size(0), groups, channels // groups, h, w)
        return self.transpose(x, 1, 2).reshape(x.size(0), channels, h, w)


def _rank(m: nn.Module) -> int:
    """2 for Conv2d, BatchNorm2d, AvgPool2d, ...; 0 for what has no rank in its name."""
    kind = type(m).__name__
    return int(kind[-2]) if kind[-1] == "d" and kind[-2].isdigit() else 0


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class _Region(nn.Module):
    def __init__(self, layers: Mapping[str, Any], program: Program, spelling: str) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self._program = program
        self._spell = Speller(self, spelling)


class _One(_Region):
    def forward(self, x: Tensor) -> Any:
        return self._program(self._spell, x)


class _Two(_Region):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self._program(self._spell, x, y)


class _Four(_Region):
    def forward(self, x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Any:
        return self._program(self._spell, x, y, z, w)


def build(layers: Mapping[str, Any], program: Program, inputs: int, spelling: str = "module") -> nn.Module:
    """A module that runs `program` over `layers`, in the given spelling."""
    return {1: _One, 2: _Two, 4: _Four}[inputs](layers, program, spelling)


def conv(rank: int) -> Any:
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]


def conv_transpose(rank: int) -> Any:
    return {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[rank]


def bn(channels: int, rank: int = 2, **options: Any) -> nn.Module:
    """BatchNorm over (N, C, ...) with `rank` spatial dims; 0: over (N, C)."""
    norm = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](channels, **options)
    norm.sequence = rank == 1
    return norm
