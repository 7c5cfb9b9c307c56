"""Every affine region of the table reaches its cheapest exact form, under every spelling and both captures."""

from __future__ import annotations

import pytest
import torch
from graphs import graph_of, is_tensor, kinds, name_of
from helpers import Outcome, check, draw, n_params, randomise, relative_error, run, said
from torch import nn
from zoo.exchanges import TABLES as EXCHANGES
from zoo.moves import TABLES, normalised, relu_bn_pool_conv
from zoo.regions import BRANCHES, CHAINS, DBB, Row, chain, only
from zoo.spelling import SYMBOLIC, bn, build, conv, conv_transpose

import fxconv

ROWS = (*CHAINS, *BRANCHES, *(row for table in (TABLES | EXCHANGES).values() for row in table))
CASES = [
    pytest.param(row, spelling, capture, id=f"{row.name}-{spelling}-{capture}")
    for row in ROWS
    for spelling, capture in row.spellings
]


def transform_row(row: Row, spelling: str, capture: str) -> Outcome:
    inputs = tuple(draw(shape, seed) for seed, shape in enumerate(row.shapes))
    return check(randomise(row.model(spelling), 1), inputs, capture=capture, **row.want)


@pytest.mark.parametrize(("row", "spelling", "capture"), CASES)
def test_region(row: Row, spelling: str, capture: str) -> None:
    transform_row(row, spelling, capture)


IN_BOTH_DIALECTS = (
    "collapsible_residual",
    "conv_flatten_linear",
    "linear_chain_tokens",
    "mobileone",
    "repmixer",
    "mean_of_two_heads",
    "lora",
    "pointwise_avgpool",
    "yolo_neck",
    "shuffle_then_pointwise",
    "conv_then_strided_slice",
    "attention_logits",
    "bn_flatten_linear",
    "scalars_between_convs",
)


@pytest.mark.parametrize(("spelling", "capture"), SYMBOLIC)
@pytest.mark.parametrize("name", IN_BOTH_DIALECTS)
def test_region_in_a_symbolic_trace(name: str, spelling: str, capture: str) -> None:
    (row,) = (row for row in ROWS if row.name == name)
    transform_row(row, spelling, capture)


def test_row_names_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


# --- rows that need more than a table ------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])
@pytest.mark.parametrize("stride", [1, 2])
def test_diverse_branch_block(in_place: bool, stride: int) -> None:
    # 9 + 1 (at stride 1), 1x1 and 1x1 -> 3x3 of the same widths: (540 + 60 + 60 + 36 + 540) -> 540
    model = randomise(DBB(in_place=in_place, stride=stride))
    check(model, (draw((2, 6, 9, 13)),), **only(conv=1))


class SumOfChunks(nn.Module):
    """Thirds of one convolution's channels, added with weights."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](8, 30, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = self.conv(x).chunk(3, 1)
        return a + 2 * b - c


@pytest.mark.parametrize("objective", ["latency", "macs"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_sum_of_chunks_is_one_convolution_of_fewer_channels(rank: int, objective: str) -> None:
    """Merged, the chunks are read by one map, which costs more until the convolution takes it in."""
    x = draw((2, 8, 9, 7, 6)[: rank + 2])
    check(randomise(SumOfChunks(rank)), (x,), objective=objective, max_macs_ratio=1 / 3, **only(conv=1))


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.full, self.down, self.up = nn.Linear(32, 24), nn.Linear(32, 4, bias=False), nn.Linear(4, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.full(x) + 0.3 * self.up(self.down(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_branches_that_cost_more_until_they_are_merged(stride: int) -> None:
    """Multiply-adds rise before they fall: two factors become one, an average pooling a convolution."""
    check(randomise(LowRank()), (draw((5, 32)),), objective="macs", max_macs_ratio=768 / 992, **only(linear=1))
    block = randomise(DBB(c_in=8, c_out=12, stride=stride))
    check(block, (draw((2, 8, 15, 18)),), objective="macs", **only(conv=1))


CUTS = {
    "every_second": slice(None, None, 2),
    "from_1_every_second": slice(1, None, 2),
    "between_every_second": slice(1, -1, 2),
    "but_the_last_every_second": slice(None, -1, 2),
    "but_the_last_3_every_third": slice(2, -3, 3),
    "between": slice(2, -3),
}


class Cut(nn.Module):
    def __init__(self, rows: slice, stride: int) -> None:
        super().__init__()
        self.conv, self.rows = nn.Conv2d(8, 16, 3, stride), rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)[:, :, self.rows, ::2]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rows", CUTS.values(), ids=CUTS)
def test_slices_of_a_convolution_are_taken_in_at_any_height(rows: slice, stride: int) -> None:
    """Where a slice with a step ends hangs on what height and end leave over."""
    x = draw((2, 8, 27, 29))
    out = check(randomise(Cut(rows, stride)), (x,), max_macs_ratio=0.52, ops={"conv": 1}, at_most={"slice": 2})
    for height in range(21, 33):
        x = draw((1, 8, height, 16), height).double()
        assert relative_error(run(out.result, (x,)), run(out.original, (x,))) < 1e-12, height


def test_pointwise_with_bias_before_padded_is_one_conv_or_refused() -> None:
    """The border needs the bias: a border map if that pays, else a refusal that says so."""
    model = randomise(chain_model(a=nn.Conv2d(16, 64, 1), b=nn.Conv2d(64, 16, 3, padding=1)))
    out = check(model, (draw((2, 16, 9, 13)),), at_most={"conv": 2})
    assert out.kinds["conv"] == 1 or said(out.result, "border|padd")


def test_normalisation_before_padded_is_absorbed_or_refused() -> None:
    layers, program = normalised(padding=1)
    out = check(randomise(build(layers, program, 1)), (draw((2, 3, 9, 13)),), at_most={"conv": 1})
    assert not out.kinds["sub"] + out.kinds["add"] or said(out.result, "border|padd")


@pytest.mark.parametrize("padding", [0, 1])
def test_negative_scale_does_not_pass_max_pool(padding: int) -> None:
    """With one BatchNorm weight below zero, max-pool would pick other elements: only what is legal."""
    layers, program = relu_bn_pool_conv(padding)
    model = randomise(build(layers, program, 1))
    with torch.no_grad():
        model.norm.weight[3] = -0.7
    out = check(model, (draw((2, 8, 10, 13)),))
    assert said(out.result, "positive|negative|scale|γ|gamma|weight")


def test_positive_scale_passes_to_a_padded_conv_but_the_shift_does_not() -> None:
    layers, program = relu_bn_pool_conv(padding=1)
    check(randomise(build(layers, program, 1)), (draw((2, 8, 10, 13)),), at_most={"conv": 1, "batch_norm+add+mul": 1})


@pytest.mark.parametrize("norm", ["layer", "group", "rms"])
def test_norm_affine_goes_into_the_next_weight(norm: str) -> None:
    """Fewer numbers to store: under objective="params" the norm's affine is gone."""
    if norm == "group":
        model: nn.Module = chain_model(norm=nn.GroupNorm(4, 16), conv=nn.Conv2d(16, 12, 1))
        x, weights = draw((2, 16, 5, 7)), 16 * 12 + 12
    else:
        model = chain_model(norm=nn.LayerNorm(16) if norm == "layer" else nn.RMSNorm(16), fc=nn.Linear(16, 12))
        x, weights = draw((2, 5, 16)), 16 * 12 + 12
    out = check(randomise(model), (x,), objective="params", at_most={"conv+linear": 1, "mul": 0, "add": 0})
    assert n_params(out.result) == weights


def chain_model(**layers: nn.Module) -> nn.Module:
    return build(*chain(**layers), 1)


# --- composition of two windows ------------------------------------------------------------------------------------

# (kernel, stride, padding, dilation) twice; the width between is large, so that merging always pays where it is legal.
LEGAL = {
    "k3_k3": ((3, 1, 0, 1), (3, 1, 0, 1)),
    "k3s2p1_k3": ((3, 2, 1, 1), (3, 1, 0, 1)),
    "k1_k3s2p1": ((1, 1, 0, 1), (3, 2, 1, 1)),
    "k1p1_k3p1": ((1, 1, 1, 1), (3, 1, 1, 1)),
    "k3p1_k1": ((3, 1, 1, 1), (1, 1, 0, 1)),
    "k3p1_k2s2": ((3, 1, 1, 1), (2, 2, 0, 1)),
    "full_k3_then_padded": ((3, 1, 2, 1), (3, 1, 1, 1)),
    "dilated_k3_k3": ((3, 1, 0, 2), (3, 1, 0, 1)),
    "k3_dilated_k3": ((3, 1, 1, 1), (3, 1, 0, 2)),
    "k2s2_k2s2": ((2, 2, 0, 1), (2, 2, 0, 1)),
    "k1s2_k3": ((1, 2, 0, 1), (3, 1, 0, 1)),
}
ILLEGAL = {
    "k3p1_k3p1": ((3, 1, 1, 1), (3, 1, 1, 1)),
    "k3_k3p1": ((3, 1, 0, 1), (3, 1, 1, 1)),
    "k3s2p1_k3p1": ((3, 2, 1, 1), (3, 1, 1, 1)),
    "k3p1_k1p1": ((3, 1, 1, 1), (1, 1, 1, 1)),
}


def two_convs(rank: int, first: tuple[int, ...], second: tuple[int, ...], bias: bool = False) -> nn.Module:
    (k1, s1, p1, d1), (k2, s2, p2, d2) = first, second
    a = conv(rank)(4, 48, k1, s1, p1, d1, bias=bias or not p2)
    return randomise(chain_model(a=a, b=conv(rank)(48, 5, k2, s2, p2, d2)))


def wide_input(rank: int) -> torch.Tensor:
    return draw((2, 4, *(13, 10, 9)[:rank]))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", LEGAL)
def test_two_windows_compose(name: str, rank: int) -> None:
    check(two_convs(rank, *LEGAL[name]), (wide_input(rank),), **only(conv=1))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", ILLEGAL)
def test_two_windows_do_not_compose_across_padding(name: str, rank: int) -> None:
    """The second one's zeros are not the first one's outputs there."""
    check(two_convs(rank, *ILLEGAL[name]), (wide_input(rank),), ops={"conv": 2}, refused="border|padd")


def test_asymmetric_strides_dilations_and_paddings_compose() -> None:
    a = nn.Conv2d(4, 48, (3, 1), (2, 1), (1, 0), (1, 1))
    b = nn.Conv2d(48, 5, (1, 4), (1, 3), 0, (1, 2))
    check(randomise(chain_model(a=a, b=b)), (draw((2, 4, 12, 17)),), **only(conv=1))


def test_patches_then_padded_conv_compose_where_sizes_are_fixed() -> None:
    """kernel = stride before a padded convolution: exact while the stride divides the size, so only if it is fixed."""
    model = two_convs(2, (2, 2, 0, 1), (3, 1, 1, 1))
    batch_only = ({0: torch.export.Dim("n", max=64)},)
    check(model, (draw((2, 4, 8, 12)),), sizes=False, dynamic_shapes=batch_only, **only(conv=1))


def test_patches_then_padded_conv_do_not_compose_at_any_size() -> None:
    check(two_convs(2, (2, 2, 0, 1), (3, 1, 1, 1)), (draw((2, 4, 8, 12)),))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_windows_compose(rank: int) -> None:
    x = draw((2, 4, *(7, 6, 5)[:rank]))
    before = chain_model(a=conv(rank)(4, 48, 1, bias=False), up=conv_transpose(rank)(48, 5, 4, 2, 1))
    after = chain_model(up=conv_transpose(rank)(4, 48, 4, 2, 1), b=conv(rank)(48, 5, 1))
    wide = chain_model(up=conv_transpose(rank)(4, 48, 4, 2, 1), b=conv(rank)(48, 5, 3))
    for model in (before, after, wide):
        check(randomise(model), (x,), **only(conv_transpose=1))


def test_strided_conv_then_transposed_conv_is_periodic() -> None:
    """down 2, then up 2: shift-invariant with period 2 only, so no one window."""
    model = chain_model(down=nn.Conv2d(4, 8, 3, 2, 1), up=nn.ConvTranspose2d(8, 4, 4, 2, 1))
    check(randomise(model), (draw((2, 4, 8, 12)),))


# --- BatchNorm into everything -------------------------------------------------------------------------------------

FOLDS = {
    "1d": (conv(1)(6, 8, 3, padding=1), 1),
    "2d": (conv(2)(6, 8, (3, 5), (2, 1), (1, 0), bias=False), 2),
    "3d": (conv(3)(6, 8, 3, dilation=(1, 2, 1)), 3),
    "grouped": (conv(2)(6, 9, 3, groups=3), 2),
    "depthwise": (conv(2)(6, 12, 3, groups=6, bias=False), 2),
    "same": (conv(2)(6, 8, 4, padding="same"), 2),
    "circular": (conv(2)(6, 8, 3, padding=1, padding_mode="circular"), 2),
    "transposed_1d": (conv_transpose(1)(6, 8, 4, 2, 1), 1),
    "transposed_2d": (conv_transpose(2)(6, 6, 4, 2, 1, bias=False), 2),
    "transposed_3d": (conv_transpose(3)(6, 8, 3, 2, output_padding=1), 3),
    "transposed_grouped": (conv_transpose(2)(6, 9, 3, groups=3), 2),
}


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_folds_into_its_producer(name: str, affine: bool) -> None:
    layer, rank = FOLDS[name]
    model = randomise(chain_model(conv=layer, norm=bn(layer.out_channels, rank, affine=affine), act=nn.ReLU()))
    # circular padding may stay a pad of its own
    check(model, (draw((2, 6, *(9, 8, 7)[:rank])),), ops={"batch_norm": 0, "mul": 0, "add": 0, "conv+conv_transpose": 1})


# --- must not fire, and says why -----------------------------------------------------------------------------------


def between(name: str, middle: nn.Module, **expect: object) -> object:
    model = lambda: chain_model(a=nn.Conv2d(6, 8, 1), mid=middle, b=nn.Conv2d(8, 5, 1))  # noqa: E731
    return pytest.param(model, (2, 6, 5, 7), expect, id=name)


COST = "cost|dear|MAC|more|cheap|pay"
MUST_NOT_FIRE = [
    between("relu", nn.ReLU(), ops={"conv": 2}, refused="relu"),
    between("sigmoid", nn.Sigmoid(), ops={"conv": 2}, refused="sigmoid"),
    between("gelu", nn.GELU(), ops={"conv": 2}, refused="gelu"),
    between("max_pool", nn.MaxPool2d(2), ops={"conv": 2}, refused="max.?pool"),
    between("instance_norm", nn.InstanceNorm2d(8), ops={"conv": 2}, refused="instance"),
    between("group_norm", nn.GroupNorm(2, 8), ops={"conv": 2}, refused="group.?norm"),
    between("softmax", nn.Softmax(1), ops={"conv": 2}, refused="softmax"),
    pytest.param(
        lambda: chain_model(a=nn.Linear(64, 4), b=nn.Linear(4, 64)),
        (2, 64),
        {"ops": {"linear": 2}, "refused": COST},
        id="low_rank",
    ),
    pytest.param(
        lambda: chain_model(a=nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), b=nn.Conv2d(32, 32, 1)),
        (2, 32, 14, 18),
        {"ops": {"conv": 2}, "refused": COST},
        id="depthwise_then_pointwise",
    ),
]


@pytest.mark.parametrize(("make", "shape", "expect"), MUST_NOT_FIRE)
@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_must_not_fire(make: object, shape: tuple[int, ...], expect: dict[str, object], capture: str) -> None:
    check(randomise(make()), (draw(shape),), capture=capture, **expect)


@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)], ids=["dynamic batch", "dynamic batch, height and width"])
def test_a_convolution_behind_attention_stays_one_of_images(dynamic: tuple[int, ...]) -> None:
    """What attention makes has one dim of positions; the convolution of it as an image goes on as one, next to what is added
    and to the next convolution, without a reshape in between that runtimes can't fuse through (slower on ONNX Runtime)."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.project, self.norm = nn.Conv2d(6, 18, 1), nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
            self.next = nn.Conv2d(6, 9, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, c, h, w = x.shape
            q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
            y = v @ (q.transpose(1, 2) @ k).softmax(1)
            y = x + self.norm(self.project(y.reshape(b, c, h, w)))
            return self.next(y.relu())

    model, x = randomise(Attention(), 3).double(), draw((3, 6, 8, 10), 1)
    result = fxconv.transform(model, x, dynamic_shapes=({d: torch.export.Dim.AUTO for d in dynamic},))
    assert fxconv.report(result).verified and relative_error(run(result, (x,)), run(model, (x,))) < 1e-12
    assert not kinds(result)["batch_norm"]
    nodes = [n for n in graph_of(result).graph.nodes if n.op == "call_function"]
    (add,) = (n for n in nodes if name_of(n, graph_of(result)) == "add" and is_tensor(n))
    assert {name_of(i, graph_of(result)) for i in add.all_input_nodes if i.op != "placeholder"} == {"conv2d"}
    assert {name_of(u, graph_of(result)) for u in add.users if is_tensor(u)} == {"relu"}


@pytest.mark.parametrize(
    ("mode", "by"), [("bilinear", "size"), ("bicubic", "size"), ("nearest", "size"), ("nearest", "scale_factor")]
)
def test_what_an_interpolation_reads_is_a_convolution(mode: str, by: str) -> None:
    """Linear and convolution cost the same here, but ONNX Runtime interpolates a convolution's result several times faster."""

    class Head(nn.Module):
        """SegFormer's decode head: the second stage is projected at its own size."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.project, self.fuse = nn.LayerNorm(32), nn.Linear(32, 32), nn.Conv2d(56, 32, 1)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            n, c, h, w = b.shape
            y = self.project(self.norm(b.flatten(2).transpose(1, 2))).transpose(1, 2).reshape(n, c, h, w)
            to = {"size": a.shape[2:]} if by == "size" else {"scale_factor": 2.0}
            return torch.relu(self.fuse(torch.cat([nn.functional.interpolate(y, mode=mode, **to), a], 1)))

    inputs = draw((1, 24, 24, 36), 0), draw((1, 32, 12, 18), 1)
    check(randomise(Head(), 1), inputs, **only(conv=2, layer_norm=1, interpolate=1, add=1, relu=1))


@pytest.mark.parametrize("verify", ["rollback", "off"])
def test_a_view_of_a_linear_of_permuted_tokens(verify: str) -> None:
    """Weights cut out of one parameter at every call are folded, and the Linear then reads tokens in the order of their
    memory; a reader that views its result needs the order of the original's."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(36, 12)), nn.Parameter(torch.zeros(36))
            self.place = nn.Parameter(torch.zeros(12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, n, c = x.shape
            tokens = (x + self.place).permute(1, 0, 2)
            q, k, v = (nn.functional.linear(tokens, w, b) for w, b in zip(self.weight.chunk(3), self.bias.chunk(3), strict=True))
            q, k, v = (t.view(n, b * 3, c // 3).transpose(0, 1) for t in (q, k, v))
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    model, x = randomise(Heads(), 3).double(), draw((2, 7, 12), 1)
    result = fxconv.transform(model, x, verify=verify)
    assert relative_error(run(result, (x,)), run(model, (x,))) < 1e-12
    assert not fxconv.report(result).rolled_back and not kinds(result)["constant"]


LATER = {
    "element": lambda linear, x: (linear(x)[:, 0].relu(), x[:, 0]),
    "element of an element": lambda linear, x: (linear(x)[:, 1, 2].relu(), x.sin(), x[:, 1, 2]),
    "rows": lambda linear, x: (linear(x)[:, :, 1:3].relu(), x[:, :, 1:3].sigmoid()),
    "permuted": lambda linear, x: (linear(x)[:, 0].relu(), (x[:, 0].transpose(-1, -2) * 2).transpose(-1, -2)),
    "a linear of it": lambda linear, x: (linear(x)[:, 0].relu(), linear(x[:, 0] * 2).tanh()),
}


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("name", LATER)
def test_a_rewrite_may_read_what_the_original_computes_later(name: str, capture: str) -> None:
    """Taking an element before the Linear gives a value that the graph has already, but only behind the Linear."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 5)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return LATER[name](self.linear, x)

    check(randomise(Model()), (draw((2, 3, 4, 7)),), capture=capture, max_macs_ratio=0.67, objective="macs", sizes="spatial")


@pytest.mark.parametrize("pool", [torch.nn.AvgPool2d(2), torch.nn.AvgPool2d((3, 2), (2, 1)), torch.nn.AdaptiveAvgPool2d((2, 3))])
def test_a_pool_behind_and_beside_a_convolution_is_one_pool(pool: nn.Module) -> None:
    """The convolution changes places with the pool, which then computes what the model computes as well."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.pool = nn.Conv2d(6, 24, 1), pool

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.pool(self.wide(x)).relu(), self.pool(x).tanh()

    result = check(randomise(Beside()), (draw((2, 6, 12, 14)),), max_macs_ratio=0.5).result
    assert kinds(result)["avg_pool"] + kinds(result)["mean"] == 1


def test_a_pool_in_front_of_a_convolution_with_its_activation_stays_there() -> None:
    """Behind it the pool would be smaller, but the shift and the ReLU could no longer be computed in the convolution."""

    class PoolProjection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.conv = nn.AvgPool2d(3, 1, 1), nn.Conv2d(96, 64, 1, bias=False)
            self.bn = nn.BatchNorm2d(64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(self.pool(x))).relu()

    check(randomise(PoolProjection()), (draw((1, 96, 17, 15)),), before=("avg_pool", "conv"), ops={"batch_norm": 0, "add": 0})


def test_the_half_of_shuffled_channels_is_sliced() -> None:
    """As a selection of channels before the shuffle it takes as many operators, and a runtime shuffles and slices faster."""

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(24, 24, 1, bias=False), nn.BatchNorm2d(24)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            both = torch.cat((x.relu(), y.relu()), 1)
            shuffled = both.view(-1, 2, 24, *both.shape[2:]).transpose(1, 2).contiguous().view(both.shape)
            kept, computed = shuffled.chunk(2, dim=1)
            return torch.cat((kept, self.bn(self.conv(computed)).relu()), 1)

    inputs = draw((1, 24, 28, 26)), draw((1, 24, 28, 26), 1)
    result = check(randomise(Unit()), inputs, ops={"conv": 1, "batch_norm": 0}).result
    assert "index_select" not in str(result.graph)


def test_single_elements_are_concatenated_where_they_are() -> None:
    """A dim of size 1 has a place in memory that no stride tells: it is the one that is concatenated along."""

    class Grid(nn.Module):
        def forward(self, points: torch.Tensor) -> torch.Tensor:
            x, y = points.split([1, 1], dim=-1)
            return torch.cat((x.tanh() - 1, y.tanh() - 3), dim=-1).relu()

    result = check(Grid(), (draw((6, 7, 5, 2)),), ops={"cat": 1, "add+sub": 1}).result
    assert "reshape" not in str(result.graph) and "view" not in str(result.graph)


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize(("second", "activations"), [("relu", 1), ("leaky_relu", 2)])
def test_siblings_with_the_same_activation_are_one_convolution_with_one(second: str, activations: int, capture: str) -> None:
    """A split in front of the activations would keep runtimes from computing them in the convolution."""

    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(6, n, 1) for n in (5, 9, 4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            a, b, c = (conv(x) for conv in self.convs)
            return a.relu().sin(), getattr(nn.functional, second)(b).cos(), c.relu().tanh()

    out = check(randomise(Siblings()), (draw((2, 6, 8, 10)),), capture=capture, objective="launches", ops={"conv": 1})
    names = [name_of(n, graph_of(out.result)) for n in graph_of(out.result).graph.nodes if is_tensor(n)]
    assert sum(str(name).rstrip("_") in ("relu", "leaky_relu") for name in names) == activations, names


# --- size and time of the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(0,), (0, 2, 3)], ids=["dynamic batch", "dynamic batch, height and width"])
def test_batch_norm_behind_a_convolution_on_windows_of_an_image(dims: tuple[int, ...]) -> None:
    """The convolution is one of images of 7 x 7 to the graph, and of windows of 14 x 14 to an expression. With height
    and width dynamic, the sizes are remainders of them. (Of latency alone, the copy of windows with more channels, where
    the first convolution would go, may cost more than its BatchNorm.)"""
    from timm.models.efficientvit_msra import LocalWindowAttention

    block = randomise(LocalWindowAttention(12, 4, num_heads=2, attn_ratio=1.5, resolution=14, window_resolution=7), 2).double()
    x = draw((3, 12, 14, 14), 0)
    dynamic = ({d: torch.export.Dim.AUTO for d in dims},)
    result = fxconv.transform(block, x, dynamic_shapes=dynamic, objective="launches")
    assert fxconv.report(result).verified and relative_error(run(result, (x,)), run(block, (x,))) < 1e-12
    assert not kinds(result)["batch_norm"] and not kinds(result)["addcmul"]


def test_a_chain_of_200_linears_is_one_linear() -> None:
    model = randomise(nn.Sequential(*(nn.Linear(8, 8) for _ in range(200))), gain=1.0)
    check(model, (draw((2, 8)),), **only(linear=1))


def test_100_siblings_are_one() -> None:
    """A sum of 100 Linears of one input."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(8, 6) for _ in range(100))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(branch(x) for branch in self.branches)

    check(randomise(Wide()), (draw((2, 8)),), **only(linear=1))
