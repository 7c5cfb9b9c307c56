"""The questions that this project started from, as their askers wrote them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from graphs import kinds
from helpers import check, draw, n_params, randomise, relative_error, run, said
from torch import Tensor

import fxconv


def only_weight(result: Any, *shape: int) -> Tensor:
    """The one weight of that shape in a result."""
    tensors = [p for p in [*result.parameters(), *result.buffers()] if tuple(p.shape) == shape]
    assert len(tensors) == 1, [tuple(p.shape) for p in result.parameters()]
    return tensors[0]


# --- 1: Linear on (N, 1, 100) as a Conv1d ---------------------------------------------------------------------------


class LinearOneOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(100, 1)

    def forward(self, input: Tensor) -> Tensor:
        output = self.linear(input.squeeze(1))
        return output.unsqueeze(1)


class LinearTenOutputs(nn.Module):
    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(100, outputs)

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(input)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("make", [LinearOneOutput, LinearTenOutputs], ids=["one", "ten"])
def test_Q1_linear_is_a_conv1d_of_kernel_100(make: type[nn.Module], batch: int) -> None:
    model = randomise(make())
    out = check(
        model,
        draw((batch, 1, 100)),
        target="conv",
        batches=(1, 3, 5),
        sizes=False,
        ops={"conv": 1, "linear": 0, "matmul": 0},
    )
    outputs = model.linear.out_features
    weight = only_weight(out.result, outputs, 1, 100)
    assert torch.equal(weight[:, 0], model.linear.weight)
    bias = only_weight(out.result, outputs)
    assert torch.equal(bias, model.linear.bias)


def test_Q1_more_than_one_output_costs_the_same_multiply_adds() -> None:
    """The folklore is that more outputs make the conversion impossible or inefficient."""
    for outputs in (1, 10, 100):
        out = check(
            randomise(LinearTenOutputs(outputs)),
            draw((2, 1, 100)),
            target="conv",
            sizes=False,
            ops={"conv": 1, "linear": 0},
        )
        assert out.macs_after == out.macs_before == 2 * 100 * outputs


# --- 2: the common attempt that is something else -------------------------------------------------------------------


def test_Q2_small_kernel_is_another_function() -> None:
    class LinearModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(100, 10)

        def forward(self, input: Tensor) -> Tensor:
            return self.linear(input.squeeze(1))

    class ConvModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 10, kernel_size=10)

        def forward(self, input: Tensor) -> Tensor:
            return self.conv(input).squeeze(1)

    x = torch.randn(1, 1, 100)
    verdict = fxconv.verify(LinearModel().eval(), ConvModel().eval(), x)
    text = str(verdict)
    assert not verdict
    assert "(1, 10)" in text and "(1, 10, 91)" in text
    assert "squeeze(1)" in text and "removed nothing" in text.replace("removes", "removed")


def test_Q2_verify_agrees_where_models_agree() -> None:
    model = randomise(LinearTenOutputs())
    assert fxconv.verify(model, fxconv.transform(model, torch.randn(2, 1, 100), target="conv"), torch.randn(2, 1, 100))


# --- 3: 28 x 28 images ----------------------------------------------------------------------------------------------


class Mnist(nn.Module):
    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.linear = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(1, 1, 784) if self.flat else x.view(-1, 784)
        return self.linear(x)


def test_Q3_linear_784_through_a_view() -> None:
    """One channel of 784, or one of 28 x 28: the same numbers, reshaped."""
    model = randomise(Mnist(flat=True))
    out = check(model, draw((1, 1, 28, 28)), target="conv", batches=(1,), sizes=False, ops={"conv": 1, "linear": 0})
    weight = next(p for p in out.result.parameters() if p.numel() == 7840)
    assert tuple(weight.shape) in ((10, 1, 784), (10, 1, 28, 28), (10, 784, 1))
    assert torch.equal(weight.reshape(10, 784), model.linear.weight)


@pytest.mark.parametrize("target", ["conv", "conv2d"])
def test_Q3_linear_784_on_a_batch_of_images(target: str) -> None:
    model = randomise(Mnist(flat=False))
    out = check(model, draw((2, 1, 28, 28)), target=target, sizes=False, ops={"conv": 1, "linear": 0, "matmul": 0})
    weight = next(p for p in out.result.parameters() if p.numel() == 7840)
    assert torch.equal(weight.reshape(10, 784), model.linear.weight)
    if target == "conv2d":
        assert weight.ndim == 4


# --- 4: conv, squeeze, linear ---------------------------------------------------------------------------------------


class ConvSqueezeLinear(nn.Module):
    def __init__(self, channels: int = 3, bias: bool = True, sigmoid: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 5, 4, bias=bias)
        self.sigmoid = sigmoid
        self.fc = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.squeeze()
        if self.sigmoid:
            x = torch.sigmoid(x)
        return self.fc(x)


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("channels", [3, 512])
@pytest.mark.parametrize("bias", [True, False])
def test_Q4_conv_squeeze_linear_is_one_op(channels: int, bias: bool, capture: str) -> None:
    out = check(
        randomise(ConvSqueezeLinear(channels, bias)),
        draw((2, channels, 4, 4)),
        capture=capture,
        batches=(1, 2, 7),
        sizes=False,  # a bare squeeze() fixes the size: at 8 x 8 it removes nothing, and the Linear takes the width
        ops={"conv+linear": 1, "add": 0},
    )
    assert said(out.result, "squeeze")
    assert tuple(run(out.result, (draw((1, channels, 4, 4)),)).shape) == (5,), "the original drops a batch of 1"


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_Q4_sigmoid_in_between_is_named(capture: str) -> None:
    model = randomise(ConvSqueezeLinear(sigmoid=True))
    expect = {"ops": {"sigmoid": 1, "conv+linear": 2}, "refused": "sigmoid"}
    check(model, draw((2, 3, 4, 4)), capture=capture, batches=(1, 2, 7), sizes=False, **expect)


# --- 5: flatten -> Linear and the full-kernel convolution -----------------------------------------------------------


def test_Q5_flatten_linear_is_a_full_kernel_convolution() -> None:
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(6 * 5 * 7, 10)))
    out = check(model, draw((2, 6, 5, 7)), target="conv", sizes=False, ops={"conv": 1, "linear": 0, "matmul": 0})
    weight = only_weight(out.result, 10, 6, 5, 7)
    assert torch.equal(weight.flatten(1), model[1].weight)


def test_Q5_full_kernel_convolution_is_a_flatten_linear() -> None:
    """A head that is only a convolution keeps [N, K, 1, 1]."""
    model = randomise(nn.Sequential(nn.Conv2d(6, 10, (5, 7))))
    fixed = ({0: torch.export.Dim("n", max=64)},)
    out = check(model, draw((2, 6, 5, 7)), target="linear", dynamic_shapes=fixed, sizes=False, ops={"conv": 0, "linear": 1})
    assert tuple(run(out.result, (draw((3, 6, 5, 7)),)).shape) == (3, 10, 1, 1)
    assert torch.equal(only_weight(out.result, 10, 210), model[0].weight.flatten(1))


def test_Q5_a_convolution_head_keeps_its_shape_by_default() -> None:
    out = check(randomise(nn.Sequential(nn.ReLU(), nn.Conv2d(6, 10, (5, 7)))), draw((2, 6, 5, 7)))
    assert tuple(run(out.result, (draw((3, 6, 5, 7)),)).shape) == (3, 10, 1, 1)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2)], ids=str)
def test_Q5_the_flatten_order_is_never_wrong(order: tuple[int, ...]) -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6 * 5 * 7, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.permute(order).flatten(1))

    check(randomise(Permuted()), draw((2, 6, 5, 7)), target="conv", ops={"conv": 1, "linear": 0})


# --- 6: a convolution as one Linear ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        nn.Conv2d(4, 4, (3, 2), (1, 2), (2, 0), groups=4, bias=False),
        nn.ConvTranspose2d(3, 4, 3, 2, 1, 1),
        nn.Conv1d(3, 4, 3, padding=1),
    ],
    ids=["plain", "padded", "everything", "depthwise", "transposed", "1d"],
)
def test_Q6_a_convolution_is_one_linear_on_the_flattened_input(conv: nn.Module) -> None:
    rank = conv.weight.ndim - 2
    c_in = conv.in_channels
    shape = (2, c_in, *(6, 8)[:rank])
    fixed = ({0: torch.export.Dim("n", max=64)},)
    check(
        randomise(nn.Sequential(conv)),
        draw(shape),
        target="linear",
        dynamic_shapes=fixed,
        sizes=False,
        more_macs=True,
        ops={"conv": 0, "conv_transpose": 0, "linear": 1},
    )


def test_Q6_too_large_a_linear_is_refused_with_the_size() -> None:
    """3*64*64 inputs, 16*64*64 outputs: 805,306,368 entries, above 2^26."""
    fixed = ({0: torch.export.Dim("n", max=64)},)
    model = randomise(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1)))
    check(
        model,
        draw((2, 3, 64, 64)),
        target="linear",
        dynamic_shapes=fixed,
        sizes=False,
        ops={"conv": 1},
        refused=r"805[,_ ]?306[,_ ]?368|2\^26|2²⁶|67[,_ ]?108[,_ ]?864",
    )


# --- 7: models that end in a softmax --------------------------------------------------------------------------------

ENDS: dict[str, tuple[nn.Module, str, Any]] = {
    "softmax": (nn.Softmax(dim=1), "CrossEntropyLoss", lambda p, t: F.cross_entropy(p, t.argmax(1))),
    "log_softmax": (nn.LogSoftmax(dim=1), "redundant|CrossEntropyLoss", lambda p, t: F.nll_loss(p, t.argmax(1))),
    "sigmoid": (nn.Sigmoid(), "BCEWithLogitsLoss", lambda p, t: F.binary_cross_entropy(p, t)),
}


@pytest.mark.parametrize("end", ENDS)
def test_Q7_remark_loss_and_gradients(end: str) -> None:
    layer, advice, loss = ENDS[end]
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5), layer))
    out = check(model, draw((2, 3, 5, 6)), ops={"batch_norm": 0}, refused=advice)

    target = torch.rand(4, 5, dtype=torch.float64)
    losses, gradients = [], []
    for network in (out.original, out.result):
        x = draw((4, 3, 5, 6), 9).requires_grad_()
        value = loss(network(x), target)
        value.backward()
        losses.append(value.detach())
        gradients.append(x.grad)
    assert relative_error(losses[1], losses[0]) < 1e-12
    assert relative_error(gradients[1], gradients[0]) < 1e-12
    head = out.original[4].weight.grad
    matching = [p.grad for p in out.result.parameters() if p.grad is not None and p.shape == head.shape]
    assert matching, "the untouched Linear has no gradient"


@pytest.mark.parametrize("target", ["conv", "conv2d"])
def test_target_conv_leaves_no_linear_on_tokens_and_patches(target: str) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3 * 16, 24)
            self.a, self.b = nn.Linear(24, 48), nn.Linear(48, 24)
            self.head = nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(n, (h // 4) * (w // 4), c * 16)
            x = self.embed(x)
            x = x + self.b(F.gelu(self.a(x)))
            return self.head(F.relu(x).mean(1))

    check(randomise(Mixer()), draw((2, 3, 8, 12)), target=target, ops={"linear": 0, "matmul": 0})


def test_target_conv_merges_branches_above_a_linear() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.a(x) + self.b(x)).mean((2, 3)))

    check(randomise(Branches()), draw((2, 3, 8, 8)), target="conv", ops={"conv": 2, "linear": 0})


class Mixing(nn.Module):
    """A Linear over the tokens, with a function behind it and maybe another Linear, as MLP-Mixer and gMLP have them."""

    def __init__(self, act: nn.Module, second: bool) -> None:
        super().__init__()
        self.a, self.act = nn.Linear(12, 20), act
        self.b = nn.Linear(20, 12) if second else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[N, 12, C] → [N, 12 or 20, C]."""
        return torch.tanh(self.b(self.act(self.a(torch.tanh(x).transpose(1, 2)))).transpose(1, 2))


@pytest.mark.parametrize("target", ["conv", "conv2d"])
@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.ReLU6(), nn.Softplus(beta=2), nn.ReLU()], ids=str)
@pytest.mark.parametrize("second", [False, True])
def test_token_mixing_is_convolutions_without_transposes(act: nn.Module, second: bool, target: str) -> None:
    """A function of each entry takes any layout: nothing is permuted between the convolutions on its sides."""
    out = check(Mixing(act, second), draw((2, 12, 9)), target=target, ops={"linear": 0, "conv": 1 + second, "permute": 0})
    assert not [n for n in out.result.graph.nodes if "transpose" in str(n.target)]


def test_transform_without_args_where_shapes_are_known_or_not_needed() -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    )
    result = fxconv.transform(model.double())
    assert kinds(result)["batch_norm"] == 0
    assert fxconv.report(result).verification["status"] == "not run"
    assert all(rewrite.status in ("proved", "confirmed") for rewrite in fxconv.report(result).applied)
    for shape in ((1, 6, 5, 7), (3, 6, 9, 9)):
        assert relative_error(run(result, (draw(shape),)), run(model, (draw(shape),))) < 1e-12


def test_explain_changes_nothing_and_says_what_would_be_done() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)))
    before = n_params(model)
    report = fxconv.explain(model, draw((2, 6, 7, 9), dtype=torch.float32))
    assert report.applied and n_params(model) == before and isinstance(model[1], nn.BatchNorm2d)
