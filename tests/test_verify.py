"""The verifier per cluster, on pairs written by hand: right rewrites pass, planted bugs do not, reasons are useful."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from fxconv.errors import OptionError
from fxconv.probe import InputSpec, Sizes
from fxconv.tolerance import UNIT_ROUNDOFF, UNITS, compare
from fxconv.verify import Verdict, check_cluster, check_rounding

N, H, W = sympy.symbols("N H W", integer=True, positive=True)
SYMBOLS: dict[sympy.Symbol, tuple[int, int | None, int]] = {N: (1, None, 2), H: (1, None, 28), W: (1, None, 28)}
Side = Callable[..., Any]


def weights(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Float64 weights of unit gain; a name that begins with "var" is positive."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        t = torch.randn(shape, generator=g, dtype=torch.float64)
        made[name] = 0.5 + t.abs() if name.startswith("var") else t / math.sqrt(max(math.prod(shape[1:]), 1))
    return made


# --- clusters: an original and its right replacement, which the planted bugs are variations of ------------------------


@dataclass(frozen=True)
class Pair:
    """An original, a right replacement made from a state, and that state, into which bugs are planted."""

    original: Side
    replacement: Callable[..., Side]
    state: dict[str, Any]
    inputs: tuple[InputSpec, ...]
    proved: bool = False
    ph: bool = False

    def check(self, replacement: Side | None = None, **changes: Any) -> Verdict:
        side = replacement or self.replacement(**{**self.state, **changes})
        return check_cluster(self.original, side, self.inputs, symbols=SYMBOLS, affine=not self.ph, positively_homogeneous=self.ph)


def image(channels: int, height: Any = H, width: Any = W) -> InputSpec:
    return InputSpec("tensor", (N, channels, height, width), channel_dim=1)


def conv_bn(ci: int = 6, co: int = 8, k: int = 3, stride: int = 1, var: float | None = None, groups: int = 1) -> Pair:
    w = weights(1, w=(co, ci // groups, k, k), b=(co,), mean=(co,), var=(co,), gamma=(co,), beta=(co,))
    if var is not None:
        w["var"] = torch.full_like(w["var"], var)
    eps = 1e-5
    at: dict[str, Any] = {"stride": stride, "padding": k // 2, "groups": groups}

    def original(x: Tensor) -> tuple[Tensor]:
        y = F.conv2d(x, w["w"], w["b"], **at)
        return (F.batch_norm(y, w["mean"], w["var"], w["gamma"], w["beta"], False, 0.0, eps),)

    scale = w["gamma"] / (w["var"] + eps).sqrt()

    def replacement(weight: Tensor, bias: Tensor, **how: Any) -> Side:
        return lambda x: (F.conv2d(x, weight, bias, **{**at, **how}),)

    state = {"weight": w["w"] * scale[:, None, None, None], "bias": (w["b"] - w["mean"]) * scale + w["beta"]}
    return Pair(original, replacement, state, (image(ci),))


def deconv_bn() -> Pair:
    w = weights(2, w=(5, 5, 4, 4), mean=(5,), var=(5,), gamma=(5,), beta=(5,))

    def original(x: Tensor) -> tuple[Tensor]:
        y = F.conv_transpose2d(x, w["w"], stride=2, padding=1)
        return (F.batch_norm(y, w["mean"], w["var"], w["gamma"], w["beta"], False, 0.0, 1e-3),)

    scale = w["gamma"] / (w["var"] + 1e-3).sqrt()

    def replacement(weight: Tensor, bias: Tensor, **how: Any) -> Side:
        return lambda x: (F.conv_transpose2d(x, weight, bias, **{"stride": 2, "padding": 1, **how}),)

    state = {"weight": w["w"] * scale[None, :, None, None], "bias": w["beta"] - w["mean"] * scale}
    return Pair(original, replacement, state, (image(5),))


def two_linears() -> Pair:
    w = weights(3, a=(20, 12), b=(20,), c=(12, 20), d=(12,))
    return Pair(
        lambda x: (F.linear(F.linear(x, w["a"], w["b"]), w["c"], w["d"]),),
        lambda weight, bias: lambda x: (F.linear(x, weight, bias),),
        {"weight": w["c"] @ w["a"], "bias": w["c"] @ w["b"] + w["d"]},
        (InputSpec("tensor", (N, 12)),),
        proved=True,
    )


def pad_conv() -> Pair:
    w = weights(4, w=(8, 6, 3, 5), b=(8,))
    return Pair(
        lambda x: (F.conv2d(F.pad(x, (2, 2, 1, 1)), w["w"], w["b"]),),
        lambda weight, bias, **how: lambda x: (F.conv2d(x, weight, bias, **{"padding": (1, 2), **how}),),
        {"weight": w["w"], "bias": w["b"]},
        (image(6),),
    )


def upsample() -> Pair:
    w = weights(5, w=(6, 4, 1, 1))
    return Pair(
        lambda x: (F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), w["w"]),),
        lambda weight, **how: lambda x: (F.conv_transpose2d(x, weight, **{"stride": 2, **how}),),
        {"weight": w["w"].transpose(0, 1).expand(4, 6, 2, 2).clone()},
        (image(4),),
    )


def flatten_linear() -> Pair:
    """conv 3x3 (padded) → flatten → Linear as one Linear: a dense matrix, materialised by evaluation."""
    w = weights(6, w=(5, 3, 3, 3), b=(5,), l=(7, 5 * 4 * 6), m=(7,))

    def original(x: Tensor) -> tuple[Tensor]:
        return (F.linear(F.conv2d(x, w["w"], w["b"], padding=1).flatten(1), w["l"], w["m"]),)

    eye = torch.eye(3 * 4 * 6, dtype=torch.float64).view(-1, 3, 4, 6)
    offset = original(torch.zeros_like(eye[:1]))[0]
    return Pair(
        original,
        lambda weight, bias: lambda x: (F.linear(x.flatten(1), weight, bias),),
        {"weight": (original(eye)[0] - offset).T.contiguous(), "bias": offset[0]},
        (image(3, 4, 6),),
        proved=True,
    )


def branches() -> Pair:
    """3x3 + 1x1 + identity, as RepVGG has them."""
    w = weights(7, a=(6, 6, 3, 3), b=(6,), c=(6, 6, 1, 1))
    kernel = w["a"] + F.pad(w["c"], (1, 1, 1, 1))
    kernel[torch.arange(6), torch.arange(6), 1, 1] += 1
    return Pair(
        lambda x: (F.conv2d(x, w["a"], w["b"], padding=1) + F.conv2d(x, w["c"]) + x,),
        lambda weight, bias: lambda x: (F.conv2d(x, weight, bias, padding=1),),
        {"weight": kernel, "bias": w["b"]},
        (image(6),),
    )


def qkv() -> Pair:
    w = weights(8, q=(10, 16), k=(10, 16), v=(14, 16))
    return Pair(
        lambda x: (F.linear(x, w["q"]), F.linear(x, w["k"]), F.linear(x, w["v"])),
        lambda weight, sizes: lambda x: F.linear(x, weight).split(sizes, -1),
        {"weight": torch.cat([w["q"], w["k"], w["v"]]), "sizes": [10, 10, 14]},
        (InputSpec("tensor", (N, H, 16), channel_dim=2),),
    )


def cat_conv() -> Pair:
    w = weights(9, w=(6, 7, 1, 1), b=(6,))
    return Pair(
        lambda x, y: (F.conv2d(torch.cat([x, y], 1), w["w"], w["b"]),),
        lambda left, right, bias: lambda x, y: (F.conv2d(x, left, bias) + F.conv2d(y, right),),
        {"left": w["w"][:, :3], "right": w["w"][:, 3:], "bias": w["b"]},
        (image(3), image(4)),
    )


def homogeneous() -> Pair:
    """A positive scale through ReLU and max-pool."""
    w = weights(10, w=(6, 4, 3, 3), b=(6,), vars=(6,))
    scale = w["vars"][:, None, None]
    return Pair(
        lambda x: (scale * F.max_pool2d(F.relu(F.conv2d(x, w["w"], w["b"], padding=1)), 2),),
        lambda weight, bias: lambda x: (F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1)), 2),),
        {"weight": w["w"] * w["vars"][:, None, None, None], "bias": w["b"] * w["vars"]},
        (image(4),),
        ph=True,
    )


def shifted_pool() -> Pair:
    """Any shift passes through max-pool; without padding, since padding is -inf and not shifted."""
    w = weights(11, b=(4,))
    return Pair(
        lambda x: (F.max_pool2d(x + w["b"][:, None, None], 3, 1, 1),),
        lambda bias: lambda x: (F.max_pool2d(x, 3, 1, 1) + bias[:, None, None],),
        {"bias": w["b"]},
        (image(4),),
        ph=True,
    )


def windows() -> Pair:
    """Patches through a Linear as a strided convolution; the view needs sizes, which come as symints."""
    w = weights(12, w=(8, 3 * 4 * 4), b=(8,))
    h, v = sympy.floor(H / 4), sympy.floor(W / 4)

    def original(x: Tensor, n: int, rows: int, columns: int) -> tuple[Tensor]:
        patches = x.view(n, 3, rows, 4, columns, 4).permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, 48)
        return (F.linear(patches, w["w"], w["b"]),)

    return Pair(
        original,
        lambda weight, bias: lambda x, n, rows, columns: (F.conv2d(x, weight, bias, 4).flatten(2).transpose(1, 2),),
        {"weight": w["w"].view(8, 3, 4, 4), "bias": w["b"]},
        (image(3), InputSpec("symint", (N,)), InputSpec("symint", (h,)), InputSpec("symint", (v,))),
    )


def downsampled() -> Pair:
    """1x1 stride 2 after 3x3 stride 1 unpadded: one 3x3 stride 2."""
    w = weights(13, a=(6, 5, 3, 3), b=(6,), c=(4, 6, 1, 1), d=(4,))
    return Pair(
        lambda x: (F.conv2d(F.conv2d(x, w["a"], w["b"]), w["c"], w["d"], stride=2),),
        lambda weight, bias, **how: lambda x: (F.conv2d(x, weight, bias, **{"stride": 2, **how}),),
        {
            "weight": torch.einsum("om,mikl->oikl", w["c"][:, :, 0, 0], w["a"]),
            "bias": w["c"][:, :, 0, 0] @ w["b"] + w["d"],
        },
        (image(5),),
    )


def static() -> Pair:
    """No symbol at all, and too large to prove."""
    pair = conv_bn(8, 8)
    return dataclasses.replace(pair, inputs=(InputSpec("tensor", (2, 8, 14, 14)),))


PAIRS = {
    "conv_bn": conv_bn(),
    "conv_bn_7x7": conv_bn(k=7),
    "conv_bn_strided": conv_bn(stride=2),
    "conv_bn_depthwise": conv_bn(8, 8, groups=8),
    "conv_bn_var_1e-8": conv_bn(var=1e-8),
    "conv_bn_var_0": conv_bn(var=0.0),
    "deconv_bn": deconv_bn(),
    "two_linears": two_linears(),
    "pad_conv": pad_conv(),
    "upsample": upsample(),
    "flatten_linear": flatten_linear(),
    "branches": branches(),
    "qkv": qkv(),
    "cat_conv": cat_conv(),
    "homogeneous": homogeneous(),
    "shifted_pool": shifted_pool(),
    "windows": windows(),
    "downsampled": downsampled(),
    "static": static(),
}


@pytest.mark.parametrize("name", PAIRS)
def test_right_rewrites_pass(name: str) -> None:
    pair = PAIRS[name]
    verdict = pair.check()
    assert verdict.status == ("proved" if pair.proved else "confirmed"), verdict.reason
    assert verdict.max_error < 1e-12 and 0 < verdict.tolerance < 1e-9
    json.dumps(dataclasses.asdict(verdict))


def test_badly_conditioned_is_no_false_alarm() -> None:
    """The mean is 10,000 times the data: the folded bias cancels, on either side, and both lose eight digits."""
    pair = conv_bn()
    w = weights(1, w=(8, 6, 3, 3), b=(8,), mean=(8,), var=(8,), gamma=(8,), beta=(8,))
    w["mean"] *= 1e4
    scale = w["gamma"] / (w["var"] + 1e-5).sqrt()

    def original(x: Tensor) -> tuple[Tensor]:
        y = F.conv2d(x, w["w"], w["b"] + w["mean"], padding=1)
        return (F.batch_norm(y, w["mean"], w["var"], w["gamma"], w["beta"], False, 0.0, 1e-5),)

    assert dataclasses.replace(pair, original=original).check(bias=w["b"] * scale + w["beta"])


def late(t: Tensor, factor: float = 1 + 1e-6) -> Tensor:
    """The last entry along dim 0 is off a little."""
    t = t.clone()
    t[-1] *= factor
    return t


def border(side: Side, at: tuple[slice | int, ...], factor: float = 1 + 1e-6) -> Side:
    """``side`` with the first output wrong in one place."""

    def wrong(*args: Any) -> tuple[Tensor, ...]:
        y, *rest = side(*args)
        y = y.clone()
        y[at] *= factor
        return (y, *rest)

    return wrong


def right(name: str) -> Side:
    return PAIRS[name].replacement(**PAIRS[name].state)


S = slice(None)
_conv, _lin, _flat = PAIRS["conv_bn"].state, PAIRS["two_linears"].state, PAIRS["flatten_linear"].state
_up, _cat, _ph, _qkv = (PAIRS[n].state for n in ("upsample", "cat_conv", "homogeneous", "qkv"))
_eps = 1 + 0.5e-5 / (0.5 + 1.0)  # what the loss of eps does to a weight whose variance is 1.5
_f32 = torch.float32

# name of the pair, what is changed: the state's entries, or the whole replacement
BUGS: dict[str, tuple[str, dict[str, Any] | Side]] = {
    "bias not scaled": ("conv_bn", {"bias": _conv["bias"] * 1.1}),
    "beta lost": ("conv_bn", {"bias": _conv["bias"] - weights(1, w=(8, 6, 3, 3), b=(8,))["b"]}),
    "eps lost": ("conv_bn", {"weight": _conv["weight"] * _eps, "bias": _conv["bias"]}),
    "eps lost in one channel": ("conv_bn", {"weight": late(_conv["weight"], _eps)}),
    "bias of one channel off by 1e-9": ("conv_bn", {"bias": late(_conv["bias"], 1 + 1e-9)}),
    "composed in float32": ("conv_bn", {"weight": _conv["weight"].to(_f32).double()}),
    "bias composed in float32": ("conv_bn", {"bias": _conv["bias"].to(_f32).double()}),
    "composed in float32, proved": ("two_linears", {"weight": _lin["weight"].to(_f32).double()}),
    "one weight in float32": ("flatten_linear", {"weight": late(_flat["weight"], 1 + 2.0**-24)}),
    "kernel flipped": ("conv_bn", {"weight": _conv["weight"].flip(-1)}),
    "kernel transposed": ("conv_bn", {"weight": _conv["weight"].transpose(2, 3)}),
    "weight transposed": ("two_linears", {"weight": _lin["weight"].T}),
    "scale on the other axis": ("deconv_bn", {"weight": PAIRS["deconv_bn"].state["weight"].transpose(0, 1)}),
    "height and width swapped": ("pad_conv", {"padding": (2, 1), "weight": _conv["weight"][:, :, :3, :3]}),
    "padding on the other axis": ("pad_conv", {"padding": (2, 1)}),
    "input transposed": ("windows", lambda x, *n: right("windows")(x.transpose(2, 3), *n)),
    "flatten order": ("flatten_linear", lambda x: right("flatten_linear")(x.transpose(2, 3).contiguous().view_as(x))),
    "padding off by one": ("conv_bn_7x7", {"padding": 2}),
    "stride on one axis": ("downsampled", {"stride": (2, 1)}),
    "stride, where the size hides it": ("downsampled", {"stride": (2, 3)}),
    "dilation": ("conv_bn", {"dilation": 2, "padding": 2}),
    "output_padding": ("deconv_bn", {"output_padding": 1}),
    "groups permuted": ("conv_bn_depthwise", {"weight": PAIRS["conv_bn_depthwise"].state["weight"].flip(0)}),
    "groups lost": ("conv_bn_depthwise", {"weight": torch.ones(8, 8, 3, 3, dtype=torch.float64), "groups": 1}),
    "dropped branch": ("branches", {"weight": PAIRS["branches"].state["weight"] - torch.eye(6)[:, :, None, None]}),
    "branch twice": ("branches", lambda x: (right("branches")(x)[0] + x,)),
    "branch dropped of a cat": ("cat_conv", {"right": _cat["right"] * 0}),
    "cat order": ("cat_conv", {"left": _cat["left"].flip(1)}),
    "bias twice": ("cat_conv", lambda x, y: (right("cat_conv")(x, y)[0] + _cat["bias"][:, None, None],)),
    "one late channel": ("conv_bn", {"weight": late(_conv["weight"], 1 + 1e-8)}),
    "one late tap": ("conv_bn", {"weight": _conv["weight"] + F.pad(torch.full((8, 6, 1, 1), 1e-9), (2, 0, 2, 0))}),
    "one border row": ("conv_bn", border(right("conv_bn"), (S, S, 0))),
    "last border column": ("conv_bn_strided", border(right("conv_bn_strided"), (S, S, S, -1))),
    "corner of one channel": ("conv_bn_7x7", border(right("conv_bn_7x7"), (S, 5, -1, -1))),
    "corner, second sample": ("conv_bn", border(right("conv_bn"), (-1, 0, 0, 0))),
    "upsampling half a pixel off": ("upsample", {"weight": _up["weight"].roll(1, -1) * torch.tensor([0, 2.0])}),
    "outputs in another order": ("qkv", lambda x: right("qkv")(x)[::-1]),
    "rows in another order": ("qkv", {"weight": _qkv["weight"].roll(1, 0)}),
    "split elsewhere": ("qkv", {"sizes": [10, 14, 10]}),
    "one output missing": ("qkv", lambda x: right("qkv")(x)[:2]),
    "negative scale through ReLU": (
        "homogeneous",
        {"weight": late(_ph["weight"], -1.0), "bias": late(_ph["bias"], -1.0)},
    ),
    "bias not scaled through ReLU": ("homogeneous", {"bias": _ph["bias"] * 1.01}),
    "ReLU dropped": ("homogeneous", lambda x: (F.max_pool2d(F.conv2d(x, _ph["weight"], _ph["bias"], 1, 1), 2),)),
    "clipped": ("homogeneous", lambda x: (right("homogeneous")(x)[0].clamp(max=50.0),)),
    "pool padded with zeros": (
        "shifted_pool",
        lambda x: (F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1) + weights(11, b=(4,))["b"][:, None, None],),
    ),
    "a size that is baked in": ("conv_bn", lambda x: right("conv_bn")(x[:, :, :28, :28].reshape(-1, 6, 28, 28))),
    "a batch that is baked in": ("two_linears", lambda x: right("two_linears")(x.view(2, 12))),
    "ceil where floor was": ("downsampled", lambda x: right("downsampled")(F.pad(x, (0, 1, 0, 1)))),
    "constant along W for one along C": (
        "conv_bn",
        lambda x: (right("conv_bn")(x)[0] + 1e-3 * torch.arange(x.shape[3]),),
    ),
    "batch mixed": ("two_linears", lambda x: (right("two_linears")(x)[0] + 1e-6 * x.roll(1, 0),)),
    "static kernel": ("static", {"weight": late(_conv["weight"]).repeat(1, 2, 1, 1)[:, :8]}),
    "static, one tap": ("static", {"weight": late(PAIRS["static"].state["weight"], 1 + 1e-9)}),
    "dtype": ("two_linears", lambda x: (right("two_linears")(x)[0].float(),)),
    "not finite": ("two_linears", {"bias": late(_lin["bias"], math.inf)}),
    "not a number": ("conv_bn", {"weight": late(_conv["weight"], math.nan)}),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(name: str) -> None:
    pair, change = BUGS[name]
    verdict = PAIRS[pair].check(**change) if isinstance(change, dict) else PAIRS[pair].check(change)
    assert verdict.status == "failed", f"{name} was not caught: {verdict}"
    assert verdict.reason


def test_failure_says_where_and_how_much() -> None:
    reason = PAIRS["conv_bn"].check(border(right("conv_bn"), (S, 3, 0, 0), 2.0)).reason
    assert "output 0 at (" in reason and ", 3, 0, 0)" in reason and "gaussian inputs of shape (1, 6, 28, 28)" in reason
    assert "raises" in PAIRS["two_linears"].check(lambda x: 1 / 0).reason


def test_random_chains_are_no_false_alarm() -> None:
    """Chains of unpadded convolutions and BatchNorms, some with tiny variances and large means, as one convolution."""
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        channels = [int(torch.randint(1, 9, (), generator=g)) for _ in range(4)]
        layers = []
        kernel = torch.eye(channels[0], dtype=torch.float64)[:, :, None, None]
        bias = torch.zeros(channels[0], dtype=torch.float64)
        for ci, co in zip(channels, channels[1:], strict=False):
            k = int(torch.randint(1, 4, (), generator=g))
            w = weights(seed + k, w=(co, ci, k, k), b=(co,), mean=(co,), var=(co,), gamma=(co,))
            w["var"] *= 10.0 ** -int(torch.randint(0, 12, (), generator=g))
            w["mean"] *= 10.0 ** int(torch.randint(0, 4, (), generator=g))
            layers.append(w)
            scale = w["gamma"] / (w["var"] + 1e-5).sqrt()
            this = w["w"] * scale[:, None, None, None]
            bias = torch.einsum("oikl,i->o", this, bias) + (w["b"] - w["mean"]) * scale
            # Composition is convolution of the kernels, full and flipped.
            kernel = F.conv2d(kernel.transpose(0, 1), this.flip(2, 3), padding=k - 1).transpose(0, 1)

        def original(x: Tensor, layers: list[dict[str, Tensor]] = layers) -> tuple[Tensor]:
            for w in layers:
                x = F.batch_norm(F.conv2d(x, w["w"], w["b"]), w["mean"], w["var"], w["gamma"], None, False, 0.0, 1e-5)
            return (x,)

        def one(x: Tensor, kernel: Tensor = kernel, bias: Tensor = bias) -> tuple[Tensor]:
            return (F.conv2d(x, kernel, bias),)

        def rounded(x: Tensor, kernel: Tensor = kernel, bias: Tensor = bias) -> tuple[Tensor]:
            return (F.conv2d(x, kernel.float().double(), bias),)

        inputs = (image(channels[0]),)
        assert (verdict := check_cluster(original, one, inputs, symbols=SYMBOLS, seed=seed)), f"{seed}: {verdict}"
        verdict = check_cluster(original, rounded, inputs, symbols=SYMBOLS, seed=seed)
        assert not verdict, f"{seed}: composition in float32 was missed"


# --- sizes, bounds, misuse --------------------------------------------------------------------------------------------


def test_probed_sizes_tell_axes_apart_and_the_example_is_run_once() -> None:
    shapes = [p.shapes[0] for p in PAIRS["conv_bn"].check().probes]
    assert [s for s in shapes if s[2:] == (28, 28)] == [(1, 6, 28, 28)]
    assert {s[0] for s in shapes} == {1, 2, 3}
    small = [s for s in shapes if s[2:] != (28, 28)]
    assert all(h != w and h < 12 and w < 12 for _, _, h, w in small)
    assert {h % 2 for _, _, h, _ in small} == {w % 2 for _, _, _, w in small} == {0, 1}


def test_sizes_are_solved_for_the_clusters_own_dims() -> None:
    """Four strides of two above: the least image whose map has 5 rows."""
    deep = (H - 1) // 2 + 1
    for _ in range(3):
        deep = (deep - 1) // 2 + 1
    spec = InputSpec("tensor", (N, 4, deep, 7))
    sizes = Sizes([spec], {N: (1, None, 2), H: (32, 512, 224)})
    assert next(sizes.small(0))[H] == 65


def test_a_cluster_that_refuses_small_sizes_is_probed_at_larger_ones() -> None:
    w = weights(0, w=(4, 3, 8, 8))

    def original(x: Tensor) -> tuple[Tensor]:
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise RuntimeError("multiples of 4 only")
        return (F.conv2d(x, w["w"], stride=4),)

    def wrong_when_small(x: Tensor) -> tuple[Tensor]:
        return (original(x)[0] * (1.0 if x.shape[2] == 28 else 1.001),)

    verdict = check_cluster(original, original, [image(3)], symbols=SYMBOLS)
    assert verdict and any(p.shapes[0][2] < 28 for p in verdict.probes)
    assert not check_cluster(original, wrong_when_small, [image(3)], symbols=SYMBOLS)


@pytest.mark.parametrize("bound, status", [(12, "proved"), (11, "confirmed")])
def test_basis_bound(bound: int, status: str) -> None:
    pair = PAIRS["two_linears"]
    verdict = check_cluster(pair.original, right("two_linears"), pair.inputs, symbols=SYMBOLS, basis_bound=bound)
    assert verdict.status == status


def test_no_proof_where_samples_mix_or_nothing_is_affine() -> None:
    """A basis vector in each row of a batch proves something only if rows do not affect each other."""
    mixing = [lambda x: (x + x.roll(1, 0),), lambda x: (x.sum(0, keepdim=True).expand_as(x),)]
    for side in mixing:
        assert check_cluster(side, side, [InputSpec("tensor", (N, 4))], symbols=SYMBOLS).status == "confirmed"
    pair = PAIRS["two_linears"]
    again = check_cluster(pair.original, right("two_linears"), pair.inputs, symbols=SYMBOLS, affine=False)
    assert again.status == "confirmed"


def test_static_and_small_is_proved_one_vector_at_a_time() -> None:
    pair = PAIRS["two_linears"]
    spec = [InputSpec("tensor", (1, 12))]
    assert check_cluster(pair.original, right("two_linears"), spec, symbols={}).status == "proved"


def test_what_cannot_be_compared_is_unverified() -> None:
    def raises(x: Tensor) -> tuple[Tensor]:
        raise RuntimeError("not today")

    verdict = check_cluster(raises, raises, [image(3)], symbols=SYMBOLS)
    assert verdict.status == "unverified" and "not today" in verdict.reason and not verdict
    ids = [InputSpec("tensor", (N, 4), torch.int64)]
    assert "int64" in check_cluster(raises, raises, ids, symbols=SYMBOLS).reason


def test_inputs_written_to() -> None:
    pair = PAIRS["two_linears"]
    assert "writes to its input" in pair.check(lambda x: right("two_linears")(x.mul_(1))).reason


def test_misuse() -> None:
    with pytest.raises(OptionError, match="no range and hint.*N"):
        check_cluster(abs, abs, [InputSpec("tensor", (N, 3))], symbols={})
    with pytest.raises(OptionError, match="kind"):
        InputSpec("array", (1,))
    with pytest.raises(OptionError, match="channel_dim 4"):
        InputSpec("tensor", (1, 2), channel_dim=4)


def test_same_seed_same_verdict() -> None:
    assert PAIRS["conv_bn"].check() == PAIRS["conv_bn"].check()


def test_tolerance_is_local() -> None:
    """Beside a channel of magnitude 1 an error of 1e-14 is nothing; in a channel of magnitude 1e-3 it is."""
    y = torch.ones(1, 2, 4, 4, dtype=torch.float64)
    y[:, 1] = 1e-2
    off = y.clone()
    off[0, 1, 2, 2] += 1e-13
    assert compare(y, off, torch.zeros_like(y)).ratio > 1
    assert compare(y, off, torch.zeros_like(y)).index == (0, 1, 2, 2)
    off = y.clone()
    off[0, 0, 2, 2] += 1e-13
    assert compare(y, off, torch.zeros_like(y)).ratio < 1
    assert compare(y, y, y).ratio == 0
    assert UNITS * UNIT_ROUNDOFF < 1e-12


# --- rounding ---------------------------------------------------------------------------------------------------------


def rounding(weight: Tensor, dtype: torch.dtype, emitted: Tensor | None = None) -> Verdict:
    return check_rounding({"weight": weight}, {"weight": weight.to(dtype) if emitted is None else emitted}, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_once_passes(dtype: torch.dtype) -> None:
    w = weights(0, w=(16, 8, 3, 3), b=(16,))
    exact = {**w, "steps": torch.tensor(3)}
    emitted = {"w": w["w"].to(dtype), "b": w["b"].to(dtype), "steps": torch.tensor(3)}
    assert check_rounding(exact, emitted, dtype)
    assert not check_rounding(exact, {**emitted, "steps": torch.tensor(4)}, dtype)


def test_rounding_refusals() -> None:
    w = weights(0, w=(16, 64))["w"]
    wrong = w.float()
    wrong[3, 5] = torch.nextafter(wrong[3, 5], torch.tensor(9.0))
    assert "weight[3, 5] is" in rounding(w, torch.float32, wrong).reason
    assert not rounding(w, torch.bfloat16, w.to(torch.float16).to(torch.bfloat16)), "rounded twice"
    assert "overflows torch.float16" in rounding(w * 1e6, torch.float16).reason
    assert rounding(w * 1e6, torch.bfloat16)
    assert "too small for torch.float16" in rounding(w * 1e-6, torch.float16).reason
    one_row = w.clone()
    one_row[7] *= 1e-6
    assert "too small" in rounding(one_row, torch.float16).reason
    assert rounding(one_row, torch.float32) and rounding(w * 1e-6, torch.bfloat16)
    assert "instead of torch.float16" in rounding(w, torch.float16, w.float()).reason
    assert "on one side only" in check_rounding({"weight": w}, {}, torch.float32).reason
    with pytest.raises(OptionError, match="int64"):
        rounding(w, torch.int64)


def test_rounding_of_a_small_bias_is_harmless() -> None:
    bias = weights(0, b=(16,))["b"]
    bias[3] = 1e-7
    assert check_rounding({"bias": bias}, {"bias": bias.half()}, torch.float16)


def test_rounding_rows_of_a_transposed_convolution() -> None:
    w = weights(0, w=(16, 8, 3, 3))["w"]
    w[:, 2] *= 1e-7
    assert check_rounding({"w": w}, {"w": w.half()}, torch.float16)
    assert not check_rounding({"w": w}, {"w": w.half()}, torch.float16, channel_dims={"w": 1})


def test_rounding_of_zeros_is_exact_and_of_what_becomes_zero_is_not() -> None:
    zero = torch.zeros(6, 4, dtype=torch.float64)
    assert check_rounding({"w": zero}, {"w": zero.half()}, torch.float16).max_error == 0.0
    assert not check_rounding({"w": zero + 1e-12}, {"w": zero.half()}, torch.float16)
