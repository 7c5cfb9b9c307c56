"""Cheaper layers fitted to a Linear or convolution by least squares, in closed form, from second moments of its inputs.

For inputs with covariance Σ the error of Ŵ in place of W is ``tr((W − Ŵ) Σ (W − Ŵ)ᵀ)``, so a fit needs Σ only, and no
pass over the data. The bias takes up the mean: ``b̂ = b + (W − Ŵ) μ``. Convolutions are matrices on their patches.

Low rank: the best one is a projection on the leading eigenvectors of ``W Σ Wᵀ`` (Eckart and Young; reduced-rank
regression). Toeplitz, blocks and small kernels: normal equations. Filters with a full-length layer behind them: the
filters are the leading right singular vectors of the weight's patches, weighted by the patches' covariance; the layer
behind is then fitted by the normal equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Moments:
    """Streaming second moments of vectors: how many, their sum and the sum of their outer products, in float64."""

    size: int
    count: int = 0
    total: torch.Tensor | None = None
    outer: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Vectors ``[count, size]``."""
        rows = rows.detach().double()
        self.total = rows.sum(0) + (self.total if self.total is not None else 0)
        self.outer = rows.T @ rows + (self.outer if self.outer is not None else 0)
        self.count += len(rows)

    @property
    def mean(self) -> torch.Tensor:
        assert self.total is not None
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        assert self.outer is not None
        mean = self.mean
        return self.outer / self.count - mean[:, None] * mean[None]

    @property
    def second(self) -> torch.Tensor:
        assert self.outer is not None
        return self.outer / self.count


@dataclass(frozen=True)
class Candidate:
    """A cheaper layer.

    Attributes:
        family: "low rank", "blocks", "toeplitz", "filters", "small kernel".
        detail: its parameters in words.
        weight: the matrix that it stands for, as the original's; bias likewise. float64.
        macs: multiply-adds per row (Linear) or output position (convolution).
        params: weights and biases.
        build: makes the module.
    """

    family: str
    detail: str
    weight: torch.Tensor
    bias: torch.Tensor
    macs: float
    params: int
    build: Callable[[], nn.Module]

    @property
    def launches(self) -> int:
        """Operators that a call runs; views are free."""
        return 1 if self.family in ("blocks", "small kernel") else 2

    def error(self, weight: torch.Tensor, bias: torch.Tensor, moments: Moments) -> float:
        """Root mean square error of the output ÷ root mean square of the output, on data with these moments."""
        return math.sqrt(_energy(self.weight - weight, self.bias - bias, moments) / _energy(weight, bias, moments))


def _energy(w: torch.Tensor, b: torch.Tensor, m: Moments) -> float:
    value = ((w @ m.second) * w).sum() + 2 * (b * (w @ m.mean)).sum() + (b * b).sum()
    return max(float(value), 1e-300)


class Along(nn.Module):
    """Convolutions along the last dim of ``(…, features)``, seen as ``channels`` rows; the result is flattened again."""

    def __init__(self, channels: int, layers: nn.Module) -> None:
        super().__init__()
        self.channels, self.layers = channels, layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.channels, x.shape[-1] // self.channels)
        return self.layers(rows).reshape(*x.shape[:-1], -1)


def _solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``b a⁻¹`` for a covariance a; directions without variance are left out."""
    values, vectors = torch.linalg.eigh((a + a.T) / 2)
    keep = values > 1e-10 * values[-1].clamp_min(1e-300)
    inverse = torch.where(keep, 1 / values.clamp_min(1e-300), torch.zeros_like(values))
    return ((b @ vectors) * inverse) @ vectors.T


def _set(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor) -> nn.Module:
    layer = layer.to(like.device, like.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))  # type: ignore[operator, arg-type]
        if bias is not None:
            layer.bias.copy_(bias)  # type: ignore[operator]
    return layer


def _ladder(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, … up to ``most``."""
    steps = sorted({b << e for e in range(most.bit_length() + 1) for b in (1, 3)} | {most})
    return [s for s in steps if 1 <= s <= most]


def _corrected(w: torch.Tensor, b: torch.Tensor, fitted: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return b + (w - fitted) @ mean


# -- Linear -----------------------------------------------------------------------------------------------------------


def linear_candidates(layer: nn.Linear, m: Moments) -> Iterator[Candidate]:
    """Cheaper layers for a Linear, with the Linear's input and output shape."""
    w = layer.weight.detach().double()
    b = layer.bias.detach().double() if layer.bias is not None else w.new_zeros(w.shape[0])
    yield from _low_rank(layer, w, b, m)
    yield from _blocks(layer, w, b, m)
    yield from _toeplitz(layer, w, b, m)
    yield from _filters(layer, w, b, m)


def _leading(w: torch.Tensor, m: Moments) -> torch.Tensor:
    """Eigenvectors of the output's covariance, leading ones first: ``[rows, rows]``."""
    return torch.linalg.eigh(w @ m.covariance @ w.T)[1].flip(1)


def _factors(w: torch.Tensor, b: torch.Tensor, m: Moments) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Left and right factors of every rank that saves multiply-adds, with the bias corrected for what they lose."""
    rows, columns = w.shape
    vectors = _leading(w, m)
    for r in _ladder((rows * columns - 1) // (rows + columns)):
        left = vectors[:, :r]
        right = left.T @ w
        yield left, right, _corrected(w, b, left @ right, m.mean)


def _low_rank(layer: nn.Linear, w: torch.Tensor, b: torch.Tensor, m: Moments) -> Iterator[Candidate]:
    rows, columns = w.shape
    for left, right, bias in _factors(w, b, m):
        r = left.shape[1]

        def build(left: torch.Tensor = left, right: torch.Tensor = right, bias: torch.Tensor = bias) -> nn.Module:
            r = left.shape[1]
            first = _set(nn.Linear(columns, r, bias=False), right, None, layer.weight)
            return nn.Sequential(first, _set(nn.Linear(r, rows), left, bias, layer.weight))

        count = r * (rows + columns)
        yield Candidate("low rank", f"rank {r}", left @ right, bias, count, count + rows, build)


def _blocks(layer: nn.Linear, w: torch.Tensor, b: torch.Tensor, m: Moments) -> Iterator[Candidate]:
    rows, columns = w.shape
    for g in range(2, min(math.gcd(rows, columns), 32) + 1):
        if math.gcd(rows, columns) % g:
            continue
        fitted, parts = torch.zeros_like(w), []
        for i in range(g):
            r, c = slice(i * rows // g, (i + 1) * rows // g), slice(i * columns // g, (i + 1) * columns // g)
            part = _solve(m.covariance[c, c], w[r] @ m.covariance[:, c])
            fitted[r, c] = part
            parts.append(part)
        bias = _corrected(w, b, fitted, m.mean)

        def build(g: int = g, parts: list[torch.Tensor] = parts, bias: torch.Tensor = bias) -> nn.Module:
            conv = _set(nn.Conv1d(columns, rows, 1, groups=g), torch.cat(parts), bias, layer.weight)
            return Along(columns, conv)

        count = rows * columns // g
        yield Candidate("blocks", f"{g} blocks", fitted, bias, count, count + rows, build)


def _toeplitz(layer: nn.Linear, w: torch.Tensor, b: torch.Tensor, m: Moments) -> Iterator[Candidate]:
    rows, columns = w.shape
    for ci in (1, 2, 3, 4, 8, 16):
        for co in (1, 2, 3, 4, 8, 16):
            if columns % ci or rows % co:
                continue
            n, out = columns // ci, rows // co
            for s in range(1, 9):
                for k in (3, 5, 9, 17, 33):
                    p = (k - 1) // 2
                    if out < 4 or k > n or (n + 2 * p - k) // s + 1 != out:
                        continue
                    yield _toeplitz_fit(layer, w, b, m, ci, co, s, k, p)


def _toeplitz_fit(
    layer: nn.Linear, w: torch.Tensor, b: torch.Tensor, m: Moments, ci: int, co: int, s: int, k: int, p: int
) -> Candidate:
    rows, columns = w.shape
    n, out = columns // ci, rows // co
    cov, target = m.covariance, (w @ m.covariance).reshape(co, out, columns)
    a, rhs = w.new_zeros(ci * k, ci * k), w.new_zeros(co, ci * k)
    places = []
    for o in range(out):
        i = torch.arange(k, device=w.device) + o * s - p
        inside = (i >= 0) & (i < n)
        taps = (torch.arange(ci, device=w.device)[:, None] * k + torch.arange(k, device=w.device)[inside]).reshape(-1)
        index = (torch.arange(ci, device=w.device)[:, None] * n + i[inside]).reshape(-1)
        a[taps[:, None], taps] += cov[index[:, None], index]
        rhs[:, taps] += target[:, o, index]
        places.append((taps, index))
    theta = _solve(a, rhs)
    fitted = torch.zeros_like(w).reshape(co, out, columns)
    for o, (taps, index) in enumerate(places):
        fitted[:, o, index] = theta[:, taps]
    fitted = fitted.reshape(rows, columns)
    # One bias per row, as the Linear has: behind the flattened convolution.
    bias = _corrected(w, b, fitted, m.mean)

    def build() -> nn.Module:
        conv = _set(nn.Conv1d(ci, co, k, stride=s, padding=p, bias=False), theta, None, layer.weight)
        return nn.Sequential(Along(ci, conv), Shift(bias.to(layer.weight)))

    detail = f"Conv1d({ci}, {co}, {k}, stride {s})"
    return Candidate("toeplitz", detail, fitted, bias, co * out * ci * k, co * ci * k + rows, build)


class Shift(nn.Module):
    """Adds a bias per feature."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias


def _filters(layer: nn.Linear, w: torch.Tensor, b: torch.Tensor, m: Moments) -> Iterator[Candidate]:
    """Conv1d(1, r, k, stride s), then a full-length Conv1d(r, K)."""
    rows, columns = w.shape
    for k in (2, 3, 4, 6, 8, 12, 16, 24, 32):
        for s in sorted({k, max(k // 2, 1)}, reverse=True):
            if k >= columns or (columns - k) % s:
                continue
            places = (columns - k) // s + 1
            patches = w.unfold(1, k, s).reshape(-1, k)  # [rows · places, k]
            index = torch.arange(places, device=w.device)[:, None] * s + torch.arange(k, device=w.device)
            cov = m.covariance[index[:, :, None], index[:, None]].mean(0)
            values, vectors = torch.linalg.eigh(cov)
            root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
            right = torch.linalg.svd(patches @ root, full_matrices=False).Vh
            unweighted = _solve(root, right)
            for r in _ladder(k):
                macs = places * r * (k + rows)
                if macs >= 0.9 * rows * columns:
                    break
                yield _filters_fit(layer, w, b, m, unweighted[:r], s, places, macs)


def _filters_fit(
    layer: nn.Linear, w: torch.Tensor, b: torch.Tensor, m: Moments, theta: torch.Tensor, s: int, places: int, macs: int
) -> Candidate:
    (rows, columns), (r, k) = w.shape, theta.shape
    f = w.new_zeros(r, places, columns)
    for o in range(places):
        f[:, o, o * s : o * s + k] = theta
    f = f.reshape(r * places, columns)
    cov = m.covariance
    last = _solve(f @ cov @ f.T, w @ cov @ f.T)  # [rows, r · places]
    fitted = last @ f
    bias = _corrected(w, b, fitted, m.mean)

    def build() -> nn.Module:
        first = _set(nn.Conv1d(1, r, k, stride=s, bias=False), theta, None, layer.weight)
        return Along(1, nn.Sequential(first, _set(nn.Conv1d(r, rows, places), last, bias, layer.weight)))

    detail = f"Conv1d(1, {r}, {k}, stride {s}) → Conv1d({r}, {rows}, {places})"
    return Candidate("filters", detail, fitted, bias, macs, r * k + rows * r * places + rows, build)


# -- Convolutions -----------------------------------------------------------------------------------------------------------


def conv_candidates(layer: nn.Conv1d | nn.Conv2d, m: Moments) -> Iterator[Candidate]:
    """Cheaper layers for an ungrouped convolution, whose moments are those of its patches ``[C·k]`` or ``[C·k·k]``."""
    w = layer.weight.detach().double().flatten(1)
    b = layer.bias.detach().double() if layer.bias is not None else w.new_zeros(w.shape[0])
    rows, columns = w.shape
    make = type(layer)
    options = {"stride": layer.stride, "dilation": layer.dilation}
    for left, right, bias in _factors(w, b, m):
        r = left.shape[1]

        def build(left: torch.Tensor = left, right: torch.Tensor = right, bias: torch.Tensor = bias) -> nn.Module:
            r = left.shape[1]
            size, padding = layer.kernel_size, layer.padding
            first = make(layer.in_channels, r, size, padding=padding, bias=False, **options)  # type: ignore[arg-type]
            _set(first, right, None, layer.weight)
            return nn.Sequential(first, _set(make(r, rows, 1), left, bias, layer.weight))

        count = r * (rows + columns)
        yield Candidate("low rank", f"rank {r}", left @ right, bias, count, count + rows, build)
    yield from _small_kernels(layer, w, b, m)


def _small_kernels(layer: nn.Conv1d | nn.Conv2d, w: torch.Tensor, b: torch.Tensor, m: Moments) -> Iterator[Candidate]:
    """The middle of the kernel: of 7×7 taps 5×5, 3×3 and 1; of 4×4 taps 2×2; of 1×7 taps 1×5, …"""
    if isinstance(layer.padding, str):
        return
    whole, padding = layer.kernel_size, layer.padding
    for most in range(1, max(whole)):
        # As many taps go on one side as on the other.
        size = tuple(n if n <= most else most - (n - most) % 2 for n in whole)
        cut = [(n - k) // 2 for n, k in zip(whole, size, strict=True)]
        less = tuple(p - c * d for p, c, d in zip(padding, cut, layer.dilation, strict=True))
        if max(size) != most or min(size) < 1 or min(less) < 0:
            continue
        grid = torch.arange(w.shape[1], device=w.device).reshape(layer.in_channels, *whole)
        middle = (slice(None), *(slice(c, c + k) for c, k in zip(cut, size, strict=True)))
        index = grid[middle].reshape(-1)
        cov = m.covariance
        theta = _solve(cov[index[:, None], index], w @ cov[:, index])
        fitted = torch.zeros_like(w)
        fitted[:, index] = theta
        bias = _corrected(w, b, fitted, m.mean)

        def build(
            theta: torch.Tensor = theta,
            bias: torch.Tensor = bias,
            size: tuple[int, ...] = size,
            less: tuple[int, ...] = less,
        ) -> nn.Module:
            channels = (layer.in_channels, layer.out_channels)
            conv = type(layer)(*channels, size, layer.stride, less, layer.dilation)  # type: ignore[arg-type]
            return _set(conv, theta, bias, layer.weight)

        detail = f"{'×'.join(map(str, size))} for {'×'.join(map(str, whole))}"
        yield Candidate("small kernel", detail, fitted, bias, theta.numel(), theta.numel() + len(b), build)
