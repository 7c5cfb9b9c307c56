"""CASES.md, wrong results, the algebra: every row that a law or the lifting could get wrong, named with its row.

Each agrees with the original in float64, or is refused with the reason. Rows that concern the model object (hooks,
modes, sharing,
mutation, dtypes, metadata) are in test_cases_hazards.py and test_cases_dtypes.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Outcome, check, draw, n_params, randomise, said
from torch import Tensor, nn
from zoo.regions import Made, only
from zoo.spelling import CAPTURES, SPELLINGS, bn, build, conv_transpose

every_spelling = pytest.mark.parametrize(("spelling", "capture"), CAPTURES)
both_captures = pytest.mark.parametrize("capture", ["export", "symbolic"])
BORDER = "border|padd"


def try_out(made: Made, *shapes: tuple[int, ...], spelling: str = "module", **expect: Any) -> Outcome:
    layers, program = made
    model = randomise(build(layers, program, len(shapes), spelling))
    return check(model, tuple(draw(shape, seed) for seed, shape in enumerate(shapes)), **expect)


def buffer(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) + 0.5


# --- W1, W5: BatchNorm into convolutions ----------------------------------------------------------------------------


@every_spelling
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("widths", [(6, 10), (8, 8)], ids=["distinct", "equal"])
def test_W1_transposed_conv_and_batch_norm(spelling: str, capture: str, groups: int, widths: tuple[int, int]) -> None:
    c_in, c_out = widths
    layers = {"up": nn.ConvTranspose2d(c_in, c_out, (4, 3), 2, 1, groups=groups), "norm": bn(c_out)}
    shape = (2, c_in, 5, 7) if c_in != c_out else (2, 8, 8, 8)
    try_out((layers, lambda s, x: s.norm(s.up(x))), shape, spelling=spelling, capture=capture, **only(conv_transpose=1))


@pytest.mark.parametrize("rank", [1, 3])
def test_W1_transposed_conv_and_batch_norm_other_ranks(rank: int) -> None:
    layers = {"up": conv_transpose(rank)(6, 6, 3, 2, output_padding=1, groups=3), "norm": bn(6, rank)}
    try_out((layers, lambda s, x: s.norm(s.up(x))), (2, 6, *(5, 4, 3)[:rank]), **only(conv_transpose=1))


@every_spelling
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_W5_bias_is_scaled_and_affine_false_is_one_and_zero(spelling: str, capture: str, affine: bool, bias: bool) -> None:
    layers = {"conv": nn.Conv2d(6, 8, 3, bias=bias), "norm": bn(8, affine=affine)}
    try_out((layers, lambda s, x: s.norm(s.conv(x))), (2, 6, 7, 9), spelling=spelling, capture=capture, **only(conv=1))


# --- W2, W11, W19: constants that broadcast along another axis ------------------------------------------------------

OPERATORS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
}


@both_captures
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(1, 6), (6,), (1, 1, 6), (1, 1, 1, 6)], ids=str)
def test_W2_constant_along_the_width_where_width_is_channels(capture: str, operator: str, shape: tuple[int, ...]) -> None:
    """(1, 6) broadcasts along W = 6, although there are 6 channels too: no channel scale, no bias."""
    layers = {"conv": nn.Conv2d(4, 6, 3, padding=1), "c": buffer(*shape)}
    out = try_out((layers, lambda s, x: OPERATORS[operator](s.conv(x), s.c)), (2, 4, 5, 6), capture=capture)
    assert out.kinds["conv"] == 1 and sum(out.kinds[k] for k in OPERATORS) == 1


@both_captures
def test_W2_constant_that_expands_a_width_of_one(capture: str) -> None:
    layers = {"conv": nn.Conv2d(4, 6, 3, padding=(1, 1)), "c": buffer(1, 6)}
    try_out((layers, lambda s, x: s.conv(x) * s.c), (2, 4, 5, 1), capture=capture, sizes=False)


@every_spelling
def test_W11_vector_as_long_as_the_channels_is_no_channel_scale(spelling: str, capture: str) -> None:
    layers = {"conv": nn.Conv2d(4, 8, 1), "c": buffer(8)}
    made = (layers, lambda s, x: s.mul(s.conv(x), s.c))
    try_out(made, (2, 4, 5, 8), spelling=spelling, capture=capture, ops={"conv": 1, "mul+div": 1})


@both_captures
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(1, 8, 1, 7), (3, 8, 1, 1), (1, 1, 1, 1, 1), (2, 1, 1, 1, 1)], ids=str)
def test_W19_constant_that_expands_the_shape(capture: str, operator: str, shape: tuple[int, ...]) -> None:
    """The result is larger than the convolution's: along W, along the batch (of 1), or in rank."""
    layers = {"conv": nn.Conv2d(4, 8, 3, padding=(1, 1)), "c": buffer(*shape)}
    made = (layers, lambda s, x: OPERATORS[operator](s.conv(x), s.c))
    batch = 1 if shape[0] == 3 else 2
    # a width of 1 is deliberate here: export fixes it, so no other sizes
    try_out(made, (batch, 4, 5, 1), capture=capture, sizes=False, batches=(1,) if batch == 1 else (1, 3))


@both_captures
def test_W19_linear_of_one_feature_plus_a_vector(capture: str) -> None:
    layers = {"fc": nn.Linear(6, 1), "c": buffer(5)}
    try_out((layers, lambda s, x: s.fc(x) + s.c), (2, 6), capture=capture)


# --- W3, W12: keywords, and the order of operands -------------------------------------------------------------------

SCALED = {
    "add": lambda s, x: torch.add(s.conv(x), s.c, alpha=2),
    "add_method": lambda s, x: s.conv(x).add(s.c, alpha=-2),
    "add_aten": lambda s, x: torch.ops.aten.add.Tensor(s.conv(x), s.c, alpha=2),
    "sub": lambda s, x: torch.sub(s.conv(x), s.c, alpha=3),
    "sub_method": lambda s, x: s.conv(x).sub(s.c, alpha=3),
    "sub_aten": lambda s, x: torch.ops.aten.sub.Tensor(s.conv(x), s.c, alpha=3),
    "sub_reversed": lambda s, x: torch.sub(s.c, s.conv(x), alpha=3),
    "rsub": lambda s, x: torch.rsub(s.conv(x), s.c, alpha=3),
    "rsub_scalar": lambda s, x: torch.ops.aten.rsub.Scalar(s.conv(x), 2.0, 3.0),
    "add_scalar": lambda s, x: torch.add(s.conv(x), 0.5, alpha=2),
    "minus": lambda s, x: 2 - s.conv(x),
    "over": lambda s, x: s.conv(x) / s.c,
    "neg": lambda s, x: s.c - torch.neg(s.conv(x)),
}


@both_captures
@pytest.mark.parametrize("name", SCALED)
def test_W3_alpha_is_kept(name: str, capture: str) -> None:
    layers = {"conv": nn.Conv2d(6, 8, 3, padding=1), "c": buffer(1, 8, 1, 1)}
    try_out((layers, SCALED[name]), (2, 6, 7, 9), capture=capture, **only(conv=1))


@both_captures
@pytest.mark.parametrize("alpha", [2.0, -0.5])
def test_W3_alpha_between_branches(alpha: float, capture: str) -> None:
    layers = {"a": nn.Conv2d(6, 8, 3, padding=1), "b": nn.Conv2d(6, 8, 1)}
    try_out((layers, lambda s, x: torch.add(s.a(x), s.b(x), alpha=alpha)), (2, 6, 7, 9), capture=capture, **only(conv=1))


ADDMM = {
    "addmm": lambda s, x: torch.addmm(s.c, x, s.w, beta=0.5, alpha=3),
    "addmm_method": lambda s, x: s.c.addmm(x, s.w, beta=0.5, alpha=3),
    "addmm_aten": lambda s, x: torch.ops.aten.addmm.default(s.c, x, s.w, beta=0.5, alpha=3),
    "addmm_beta_0": lambda s, x: torch.addmm(s.c, x, s.w, beta=0),
}


@both_captures
@pytest.mark.parametrize("name", ADDMM)
def test_W3_addmm_beta_and_alpha(name: str, capture: str) -> None:
    layers = {"c": buffer(10), "w": nn.Parameter(torch.randn(24, 10)), "fc": nn.Linear(10, 8)}
    made = (layers, lambda s, x: s.fc(ADDMM[name](s, x)))
    try_out(made, (2, 24), capture=capture, **only(linear=1))  # 240 + 80 -> 192


@every_spelling
def test_W12_constant_minus_linear(spelling: str, capture: str) -> None:
    layers = {"fc": nn.Linear(24, 24), "c": buffer(24)}
    made = (layers, lambda s, x: s.sub(s.c, s.fc(x)))
    try_out(made, (2, 24), spelling=spelling, capture=capture, **only(linear=1))


@both_captures
@pytest.mark.parametrize("numerator", ["vector", "number"])
def test_W12_constant_over_conv_is_not_affine(capture: str, numerator: str) -> None:
    layers = {"conv": nn.Conv2d(6, 6, 1), "c": buffer(1, 6, 1, 1), "after": nn.Conv2d(6, 6, 1)}
    made = (layers, lambda s, x: s.after((s.c if numerator == "vector" else 2.0) / (s.conv(x) ** 2 + 1)))
    try_out(made, (2, 6, 6, 6), capture=capture, ops={"conv": 2})


# --- W4, W10: a norm on another axis than it seems ------------------------------------------------------------------


@every_spelling
@pytest.mark.parametrize(("length", "width"), [(8, 8), (5, 8)], ids=["equal", "distinct"])
def test_W4_batch_norm_acts_on_dim_1_of_tokens(spelling: str, capture: str, length: int, width: int) -> None:
    layers = {"fc": nn.Linear(6, width), "norm": bn(length, 1)}
    made = (layers, lambda s, x: s.norm(s.fc(x)))
    # other lengths are not accepted, except by the ATen operator, which then reads beyond its statistics
    try_out(made, (2, length, 6), spelling=spelling, capture=capture, sizes=False)


@every_spelling
@pytest.mark.parametrize("move", ["transpose", "reshape", "swap_batch", "none"])
def test_W10_matmul_layout_batch_norm_with_equal_sizes(spelling: str, capture: str, move: str) -> None:
    layers = {"fc": nn.Linear(8, 8), "norm": bn(8, 0 if move == "reshape" else 1)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.fc(x)
        if move == "transpose":
            y = s.transpose(y, 1, 2)
        elif move == "reshape":
            y = s.reshape(y, -1, 8)
        elif move == "swap_batch":
            y = s.transpose(s.reshape(s.flatten(y, 1), -1, 8, 8), 1, 2)
        return s.norm(y)

    try_out((layers, program), (2, 8, 8), spelling=spelling, capture=capture, sizes=False)


# --- W6, W7: one layer, several uses --------------------------------------------------------------------------------


@every_spelling
def test_W6_conv_called_twice_one_call_followed_by_bn(spelling: str, capture: str) -> None:
    layers = {"conv": nn.Conv2d(6, 6, 3, padding=1), "norm": bn(6)}

    def program(s: Any, x: Tensor, y: Tensor) -> Tensor:
        return s.relu(s.norm(s.conv(x))) + torch.sigmoid(s.conv(y))

    try_out((layers, program), (2, 6, 6, 6), (2, 6, 6, 6), spelling=spelling, capture=capture, at_most={"conv": 2})


@every_spelling
def test_W6_shared_pair_used_twice(spelling: str, capture: str) -> None:
    layers = {"conv": nn.Conv2d(6, 8, 3, padding=1, bias=False), "norm": bn(8)}

    def program(s: Any, x: Tensor, y: Tensor) -> Tensor:
        return s.relu(s.norm(s.conv(x))) * torch.sigmoid(s.norm(s.conv(y)))

    out = try_out((layers, program), (2, 6, 5, 7), (2, 6, 5, 7), spelling=spelling, capture=capture)
    assert out.kinds["batch_norm"] == 0 and out.kinds["conv"] == 2
    assert n_params(out.result) <= 2 * (8 * 6 * 9 + 8), "more than one copy per use"


@every_spelling
@pytest.mark.parametrize("shape", ["in_a_row", "side_by_side"])
def test_W6_conv_with_two_batch_norms(spelling: str, capture: str, shape: str) -> None:
    layers = {"conv": nn.Conv2d(6, 8, 3, padding=1), "a": bn(8), "b": bn(8)}

    def program(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        return s.b(s.a(y)) if shape == "in_a_row" else s.relu(s.a(y)) + torch.tanh(s.b(y))

    expect = only(conv=1) if shape == "in_a_row" else {"at_most": {"conv": 2}}
    try_out((layers, program), (2, 6, 5, 7), spelling=spelling, capture=capture, **expect)


@every_spelling
@pytest.mark.parametrize("second", ["output", "relu", "shape"])
def test_W7_second_consumer_of_the_conv(spelling: str, capture: str, second: str) -> None:
    layers = {"conv": nn.Conv2d(6, 8, 3, padding=1), "norm": bn(8)}

    def program(s: Any, x: Tensor) -> Any:
        y = s.conv(x)
        z = s.relu(s.norm(y))
        if second == "shape":  # no consumer of the value: the fold may go on
            return z.reshape(y.shape[0], -1)
        return (y, z) if second == "output" else s.relu(y) + z

    out = try_out((layers, program), (2, 6, 5, 7), spelling=spelling, capture=capture)
    if second == "shape":
        assert out.kinds["conv"] == 1 and not out.kinds["batch_norm"] + out.kinds["mul"] + out.kinds["add"]


# --- W13: padding that is not zero, and zero padding of something that is not linear --------------------------------


@both_captures
def test_W13_zero_pad_then_max_pool_of_negative_values(capture: str) -> None:
    layers = {"pool": nn.MaxPool2d(3, 2), "conv": nn.Conv2d(6, 8, 1)}
    made = (layers, lambda s, x: s.conv(s.pool(F.pad(-torch.exp(x) - 1, (1, 1, 1, 1)))))
    try_out(made, (2, 6, 7, 9), capture=capture, ops={"max_pool": 1, "conv": 1})


@both_captures
@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_W13_pad_with_other_values_then_conv(capture: str, mode: str) -> None:
    layers = {"conv": nn.Conv2d(6, 8, 3)}
    value = 1.5 if mode == "constant" else None
    made = (layers, lambda s, x: s.conv(F.pad(x, (1, 1, 2, 1), mode, value)))
    out = try_out(made, (2, 6, 7, 9), capture=capture)
    assert mode == "constant" or out.kinds["conv"] == 1 and said(out.result, mode)


@both_captures
def test_W13_negative_infinity_pad_then_max_pool(capture: str) -> None:
    made: Made = ({"pool": nn.MaxPool2d(3, 2)}, lambda s, x: s.pool(F.pad(x, (1, 1, 1, 1), value=float("-inf"))))
    try_out(made, (2, 6, 7, 9), capture=capture)


# --- W14: groups and concatenations ---------------------------------------------------------------------------------


@every_spelling
@pytest.mark.parametrize("groups", [(4, 4), (2, 4), (1, 4), (8, 2), (8, 8)], ids=str)
def test_W14_parallel_grouped_convolutions(spelling: str, capture: str, groups: tuple[int, int]) -> None:
    layers = {
        "a": nn.Conv2d(8, 16, 3, padding=1, groups=groups[0]),
        "b": nn.Conv2d(8, 16, 1, groups=groups[1]),
    }
    expect = only(conv=1) if groups[0] <= groups[1] else {}  # depthwise 3x3 + 1x1 in 2 groups: 9 + 4, merged 36
    try_out((layers, lambda s, x: s.add(s.a(x), s.b(x))), (2, 8, 7, 9), spelling=spelling, capture=capture, **expect)


@every_spelling
@pytest.mark.parametrize("parts", ["ba", "aab", "abx", "xax"])
def test_W14_order_and_count_of_a_concatenation(spelling: str, capture: str, parts: str) -> None:
    layers = {
        "a": nn.Conv2d(6, 6, 3, padding=1),
        "b": nn.Conv2d(6, 6, 1),
        "out": nn.Conv2d(6 * len(parts), 5, 1, groups=1),
    }

    def program(s: Any, x: Tensor) -> Tensor:
        made = {"a": s.a(x), "b": s.b(x), "x": x}
        return s.out(s.cat([made[p] for p in parts]))

    try_out((layers, program), (2, 6, 6, 6), spelling=spelling, capture=capture, at_most={"conv": 3})


def test_W14_concatenation_into_a_grouped_convolution() -> None:
    layers = {
        "a": nn.Conv2d(6, 4, 1),
        "b": nn.Conv2d(6, 8, 1),
        "out": nn.Conv2d(12, 6, 3, groups=3, padding=1),
    }
    try_out((layers, lambda s, x: s.out(s.cat([s.a(x), s.b(x)]))), (2, 6, 6, 6))


# --- W15, W16: what padding sees ------------------------------------------------------------------------------------


@every_spelling
def test_W15_pointwise_with_bias_before_padded(spelling: str, capture: str) -> None:
    layers = {"a": nn.Conv2d(6, 64, 1), "b": nn.Conv2d(64, 6, 3, padding=1)}
    out = try_out((layers, lambda s, x: s.b(s.a(x))), (2, 6, 7, 9), spelling=spelling, capture=capture)
    assert out.kinds["conv"] == 1 or said(out.result, BORDER)


@every_spelling
def test_W15_batch_norm_before_padded(spelling: str, capture: str) -> None:
    layers = {"norm": bn(6), "conv": nn.Conv2d(6, 8, 3, padding=1)}
    made = (layers, lambda s, x: s.conv(s.norm(s.relu(x))))
    out = try_out(made, (2, 6, 7, 9), spelling=spelling, capture=capture)
    left = sum(out.kinds[k] for k in ("batch_norm", "add", "sub", "mul", "div"))
    assert left == 0 or said(out.result, BORDER)


@every_spelling
def test_W15_normalisation_before_padded(spelling: str, capture: str) -> None:
    layers = {"mean": buffer(1, 3, 1, 1), "std": buffer(1, 3, 1, 1), "conv": nn.Conv2d(3, 8, 3, 2, 1)}
    made = (layers, lambda s, x: s.conv(s.sub(x, s.mean) / s.std))
    out = try_out(made, (2, 3, 9, 12), spelling=spelling, capture=capture)
    left = sum(out.kinds[k] for k in ("add", "sub", "mul", "div"))
    assert left == 0 or said(out.result, BORDER)


@every_spelling
def test_W15_pure_scale_before_padded_is_absorbed(spelling: str, capture: str) -> None:
    """Without a shift the border is zero either way."""
    layers = {"scale": buffer(1, 6, 1, 1), "conv": nn.Conv2d(6, 8, 3, padding=1)}
    made = (layers, lambda s, x: s.conv(s.mul(s.relu(x), s.scale)))
    try_out(made, (2, 6, 7, 9), spelling=spelling, capture=capture, ops={"conv": 1, "mul": 0, "relu": 1})


@every_spelling
@pytest.mark.parametrize("bias", [True, False])
def test_W16_padded_after_padded(spelling: str, capture: str, bias: bool) -> None:
    """5x5 on 4 channels for two 3x3 through 64 would pay (400 for 4,608), and is wrong at the border even without
    bias.
    """
    layers = {"a": nn.Conv2d(4, 64, 3, padding=1, bias=bias), "b": nn.Conv2d(64, 4, 3, padding=1)}
    made = (layers, lambda s, x: s.b(s.a(x)))
    try_out(made, (2, 4, 7, 9), spelling=spelling, capture=capture, ops={"conv": 2}, refused=BORDER)


@every_spelling
def test_W16_padded_before_unpadded_does_merge(spelling: str, capture: str) -> None:
    layers = {"a": nn.Conv2d(4, 64, 3, padding=1), "b": nn.Conv2d(64, 4, 3)}
    made = (layers, lambda s, x: s.b(s.a(x)))
    try_out(made, (2, 4, 7, 9), spelling=spelling, capture=capture, max_macs_ratio=0.1, **only(conv=1))


# --- W20: options of convolutions and pools -------------------------------------------------------------------------

POOLS = {
    "ceil": nn.AvgPool2d(3, 2, ceil_mode=True),
    "ceil_padded": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "no_pad_count": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "pad_count": nn.AvgPool2d(3, 2, 1),
    "divisor": nn.AvgPool2d(2, divisor_override=3),
    "overlapping": nn.AvgPool2d((3, 2), (1, 2)),
    "max_ceil": nn.MaxPool2d(2, ceil_mode=True),
    "adaptive": nn.AdaptiveAvgPool2d((2, 3)),
}


@both_captures
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("bias", [True, False])
def test_W20_pool_options_between_convolutions(name: str, capture: str, bias: bool) -> None:
    layers = {"a": nn.Conv2d(6, 8, 1, bias=bias), "pool": POOLS[name], "b": nn.Conv2d(8, 5, 1)}
    for shape in ((2, 6, 7, 10), (2, 6, 8, 8)):
        try_out((layers, lambda s, x: s.b(s.pool(s.a(x)))), shape, capture=capture)


@both_captures
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_W20_padding_mode(capture: str, mode: str) -> None:
    layers = {"a": nn.Conv2d(4, 48, 3), "b": nn.Conv2d(48, 4, 3, padding=1, padding_mode=mode), "norm": bn(4)}
    made = (layers, lambda s, x: s.norm(s.b(s.a(x))))
    try_out(made, (2, 4, 7, 9), capture=capture, ops={"conv": 2, "batch_norm": 0}, refused=mode)


@both_captures
@pytest.mark.parametrize("kernel", [2, 4, (2, 3), 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_W20_same_padding(capture: str, kernel: int | tuple[int, int], dilation: int) -> None:
    """padding="same" with an even kernel pads one more on the right: no symmetric padding says that."""
    layers = {
        "expand": nn.Conv2d(6, 24, 1, bias=False),
        "conv": nn.Conv2d(24, 8, kernel, padding="same", dilation=dilation),
        "norm": bn(8),
    }
    made = (layers, lambda s, x: s.norm(s.conv(s.expand(x))))
    try_out(made, (2, 6, 7, 9), capture=capture, ops={"conv": 1, "batch_norm": 0})


@both_captures
@pytest.mark.parametrize(("kernel", "stride", "padding", "output_padding"), [(3, 2, 1, 1), (5, 3, 0, 2), (2, 3, 0, 2)])
def test_W20_output_padding(capture: str, kernel: int, stride: int, padding: int, output_padding: int) -> None:
    """Positions that no tap reaches hold the bias alone; a scale and a shift reach them too."""
    layers = {
        "up": nn.ConvTranspose2d(6, 8, kernel, stride, padding, output_padding),
        "norm": bn(8),
        "out": nn.Conv2d(8, 3, 1),
    }
    made = (layers, lambda s, x: s.out(s.norm(s.up(x))))
    try_out(made, (2, 6, 5, 7), capture=capture, **only(conv_transpose=1))


# --- W22: reshapes that mix axes ------------------------------------------------------------------------------------

RESHAPES: dict[str, Any] = {
    "flatten_0": (lambda s, x: torch.flatten(s.conv(x)) * 2, None),
    "flatten_1_2": (lambda s, x: s.fc(torch.flatten(s.conv(x), 1, 2)), 7),
    "flatten_2": (lambda s, x: s.fc(torch.flatten(s.conv(x), 2)), 35),
    "flatten_1": (lambda s, x: s.fc(torch.flatten(s.conv(x), 1)), 280),
    "view_into_batch": (lambda s, x: s.fc(s.conv(x).view(-1, 8)), 8),
    "view_wider_than_a_row": (lambda s, x: s.fc(s.conv(x).view(-1, 56)), 56),
    "view_across_channels": (lambda s, x: s.fc(s.conv(x).reshape(x.shape[0], -1, 14)), 14),
    "channels_last_tokens": (lambda s, x: s.fc(s.conv(x).permute(0, 2, 3, 1).reshape(-1, 8)), 8),
    "mixed_up": (lambda s, x: s.fc(s.conv(x).permute(0, 2, 1, 3).reshape(x.shape[0], -1, 8)), 8),
}


@both_captures
@pytest.mark.parametrize("name", RESHAPES)
def test_W22_reshape_then_linear(capture: str, name: str) -> None:
    program, features = RESHAPES[name]
    layers: dict[str, Any] = {"conv": nn.Conv2d(6, 8, 1)}
    if features:
        layers["fc"] = nn.Linear(features, 5)
    # export limits the width of the permuted reshape by a question about its strides
    try_out((layers, program), (2, 6, 5, 7), capture=capture, batches=(1, 2, 3, 7), sizes=name != "mixed_up")


@both_captures
def test_W22_squeeze_without_dim_at_batch_one(capture: str) -> None:
    """At N = 1 the original drops the batch too: the result does what the original does, and the report warns."""
    layers = {"pool": nn.AdaptiveAvgPool2d(1), "conv": nn.Conv2d(6, 8, 1), "fc": nn.Linear(8, 5)}
    made = (layers, lambda s, x: s.fc(s.conv(s.pool(x)).squeeze()))
    out = try_out(made, (2, 6, 5, 7), capture=capture, batches=(1, 2, 3, 7), **{"ops": {"conv+linear": 1}})
    assert said(out.result, "squeeze")


def test_the_rows_use_every_spelling() -> None:
    assert set(SPELLINGS) == {"module", "functional", "method", "aten"}
