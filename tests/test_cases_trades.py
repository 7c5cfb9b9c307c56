"""CASES.md, bad trades: right, and slower or larger. None happens under the default objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import launches
from helpers import check, draw, n_params, randomise
from torch import Tensor, nn
from zoo.regions import Made
from zoo.spelling import CAPTURES, build

import fxconv

every_spelling = pytest.mark.parametrize(("spelling", "capture"), CAPTURES)
COST = "cost|dear|MAC|more|cheap|pay|larger"


def try_out(made: Made, *shapes: tuple[int, ...], spelling: str = "module", **expect: Any) -> Any:
    layers, program = made
    model = randomise(build(layers, program, len(shapes), spelling))
    return check(model, tuple(draw(shape, seed) for seed, shape in enumerate(shapes)), **expect)


@every_spelling
@pytest.mark.parametrize("tokens", [(), (7,)], ids=["vectors", "tokens"])
def test_B1_low_rank_bottleneck_stays(spelling: str, capture: str, tokens: tuple[int, ...]) -> None:
    """512 -> 8 -> 512: 8,192 multiply-adds for 262,144."""
    layers = {"down": nn.Linear(512, 8), "up": nn.Linear(8, 512)}
    made = (layers, lambda s, x: s.up(s.down(x)))
    try_out(made, (2, *tokens, 512), spelling=spelling, capture=capture, ops={"linear": 2}, refused=COST)


@every_spelling
@pytest.mark.parametrize("first", ["depthwise", "pointwise"])
def test_B2_depthwise_and_pointwise_stay_apart(spelling: str, capture: str, first: str) -> None:
    """9 C + C^2 for 9 C^2."""
    depthwise, pointwise = nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 32, 1)
    layers = {"a": depthwise, "b": pointwise} if first == "depthwise" else {"a": pointwise, "b": depthwise}
    made = (layers, lambda s, x: s.b(s.a(x)))
    try_out(made, (2, 32, 14, 18), spelling=spelling, capture=capture, ops={"conv": 2}, refused=COST)


@every_spelling
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "with_norms"])
def test_B3_linear_bottleneck_stays(spelling: str, capture: str, norms: bool) -> None:
    """MobileNetV2: project 96 -> 16, expand 16 -> 96 (3,072 multiply-adds for 9,216), with the norms folded all the
    same.
    """
    layers: dict[str, Any] = {
        "project": nn.Conv2d(96, 16, 1, bias=not norms),
        "expand": nn.Conv2d(16, 96, 1, bias=not norms),
    }
    if norms:
        layers |= {"norm_a": nn.BatchNorm2d(16), "norm_b": nn.BatchNorm2d(96)}
        made: Made = (layers, lambda s, x: s.relu(s.norm_b(s.expand(s.norm_a(s.project(x))))))
    else:
        made = (layers, lambda s, x: s.expand(s.project(x)))
    expect = {"ops": {"conv": 2, "batch_norm": 0, "add": 0, "mul": 0}, "refused": COST}
    try_out(made, (2, 96, 9, 13), spelling=spelling, capture=capture, **expect)


@every_spelling
def test_B4_two_unpadded_3x3_stay(spelling: str, capture: str) -> None:
    """25 taps for 18."""
    layers = {"a": nn.Conv2d(24, 24, 3), "b": nn.Conv2d(24, 24, 3)}
    made = (layers, lambda s, x: s.b(s.a(x)))
    try_out(made, (2, 24, 20, 28), spelling=spelling, capture=capture, ops={"conv": 2}, refused=COST)


@every_spelling
def test_B5_classifier_head_stays_a_linear(spelling: str, capture: str) -> None:
    """VGG's head as a 7x7 convolution made the whole network 2.4 times slower in eager mode on CPU."""
    layers = {"act": nn.ReLU(), "fc": nn.Linear(32 * 7 * 7, 256)}
    made = (layers, lambda s, x: s.relu(s.fc(s.flatten(s.relu(x), 1))))
    out = try_out(made, (2, 32, 7, 7), spelling=spelling, capture=capture, ops={"conv": 0, "linear": 1})
    assert launches(out.result) == 3


@every_spelling
def test_B6_conv_flatten_linear_on_a_large_map_stays(spelling: str, capture: str) -> None:
    """(9*32*4 + 4*256) * 576 multiply-adds for 32*576*256, and 591,104 stored numbers for 4,718,592."""
    layers = {"conv": nn.Conv2d(32, 4, 3, padding=1), "fc": nn.Linear(4 * 24 * 24, 256)}
    made = (layers, lambda s, x: s.fc(s.flatten(s.conv(x), 1)))
    try_out(made, (1, 32, 24, 24), spelling=spelling, capture=capture, ops={"conv": 1, "linear": 1}, refused=COST)


def test_B6_fewer_multiply_adds_but_many_more_weights() -> None:
    """The merged Linear reads 1,228,800 numbers per image where conv and Linear read 41,848, for a tenth fewer
    multiply-adds.
    """
    layers = {"conv": nn.Conv2d(3, 8, 3, 4, padding=1), "fc": nn.Linear(8 * 32 * 32, 5)}
    model = randomise(build(layers, lambda s, x: s.fc(s.flatten(s.conv(x), 1)), 1))
    before = n_params(model)
    out = check(model, draw((1, 3, 128, 128)), objective="params")
    assert n_params(out.result) <= before


def test_B7_siblings_stay_where_the_split_costs_a_copy_each() -> None:
    """Two 64-channel convolutions of a 28 x 28 map, each flattened: merging saves a launch and one read of 800 kB, and
    costs two copies of 800 kB, which softmax makes of what is not contiguous.
    """
    layers = {n: nn.Conv2d(64, 64, 3, padding=1) for n in "ab"}

    def program(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(s.flatten(s.a(x)), 1), torch.log_softmax(s.flatten(s.b(x)), 1)

    out = try_out((layers, program), (2, 64, 28, 28), sizes=False, ops={"conv": 2})
    assert not out.kinds["split"] + out.kinds["slice"] + out.kinds["copy"]


def test_B7_no_more_launches_than_before() -> None:
    """Siblings whose consumers need contiguous values: the launches after must not exceed those before, copies
    included.
    """
    layers: dict[str, Any] = {n: nn.Linear(24, 24) for n in "qkv"}

    def program(s: Any, x: Tensor) -> Tensor:
        q, k, v = (getattr(s, n)(x).view(-1, 24) for n in "qkv")
        return (q * k).softmax(1) * v

    out = try_out((layers, program), (2, 5, 24))
    assert launches(out.result) <= 6


@pytest.mark.parametrize("objective", ["latency", "params", "macs"])
def test_B8_shared_weight_is_not_copied_into_each_user(objective: str) -> None:
    """One head on five pyramid levels, a scale of its own for each (FCOS): five copies of the weight to save five
    scales.
    """

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1)
            self.scales = nn.Parameter(nn.functional.softplus(nn.Linear(5, 1).weight[0]).detach())

        def forward(self, x: Tensor) -> list[Tensor]:
            levels = [F.relu(x)] + [F.max_pool2d(x, 2**i) for i in range(1, 5)]
            return [F.relu(self.conv(level) * self.scales[i]) for i, level in enumerate(levels)]

    model = randomise(Head())
    before = n_params(model)
    out = check(model, draw((1, 64, 32, 32)), sizes=False, objective=objective)
    assert n_params(out.result) <= 1.01 * before


@pytest.mark.parametrize("objective", ["latency", "macs", "params", "launches"])
def test_never_worse_by_the_objective(objective: str) -> None:
    """Whatever is asked for does not grow."""
    layers = {
        "a": nn.Conv2d(6, 24, 1),
        "b": nn.Conv2d(24, 6, 3, padding=1),
        "c": nn.Conv2d(6, 6, 1, bias=False),
        "d": nn.Conv2d(6, 12, 3, padding=1),
        "fc": nn.Linear(12 * 5 * 7, 10),
    }

    def program(s: Any, x: Tensor) -> Tensor:
        return s.fc(s.flatten(s.d(s.c(s.relu(s.add(x, s.b(s.a(x)))))), 1))

    model = randomise(build(layers, program, 1))
    params = n_params(model)
    out = check(model, draw((2, 6, 5, 7)), objective=objective, more_macs=True)
    report = fxconv.report(out.result)
    measure = {"latency": "seconds"}.get(objective, objective)
    assert getattr(report.cost_after, measure) <= getattr(report.cost_before, measure)
    assert objective != "params" or n_params(out.result) <= params
    assert objective != "macs" or out.macs_after <= out.macs_before


@pytest.mark.parametrize("parts", ["split", "chunk"])
def test_parts_that_gain_nothing_anew_stay_as_they_are(parts: str) -> None:
    """A cross-stage block: one half of a split passes through convolutions whose norms are folded. Written as slices,
    the halves took OpenVINO a copy each (CS3Darknet: 0.91).
    """

    class CrossStage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand, self.norm = nn.Conv2d(24, 48, 1, bias=False), nn.BatchNorm2d(48)
            self.inner, self.inner_norm = nn.Conv2d(24, 24, 1, bias=False), nn.BatchNorm2d(24)

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.norm(self.expand(x)))
            a, b = y.split(24, 1) if parts == "split" else y.chunk(2, 1)
            return torch.cat([a + F.silu(self.inner_norm(self.inner(a))), b], 1)

    out = check(randomise(CrossStage()), draw((2, 24, 17, 13)), ops={"conv": 2, "batch_norm": 0, "add": 1, "cat": 1})
    assert out.kinds["split"] + out.kinds["chunk"] == 1 and not out.kinds["slice"]
