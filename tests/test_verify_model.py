"""The verifier of whole models, `fxconv.verify`, and who is to blame."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Outputs, randomise
from lies import COMPOSING, numbers, spoiling
from torch import Tensor, nn

import fxconv
from fxconv import rollback
from fxconv.arithmetic import as_float64
from fxconv.errors import ArgsError, NotAModuleError
from fxconv.verify import Verdict, check_model, verify

# --- whole models -----------------------------------------------------------------------------------------------------


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
    return model.to(dtype).eval()


def folded(model: nn.Sequential, eps: float = 1e-5, within: torch.dtype = torch.float64) -> nn.Sequential:
    """``net`` with its BatchNorms folded."""
    layers: list[nn.Module] = []
    for m in model:
        if isinstance(m, nn.BatchNorm2d):
            conv = layers[-1]
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            new = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)  # type: ignore[arg-type]
            scale = m.weight.to(within) / (m.running_var.to(within) + eps).sqrt()  # type: ignore[union-attr]
            new.weight = nn.Parameter((conv.weight.to(within) * scale[:, None, None, None]).to(conv.weight.dtype))
            bias = (conv.bias.to(within) - m.running_mean.to(within)) * scale + m.bias.to(within)  # type: ignore[union-attr]
            new.bias = nn.Parameter(bias.to(conv.weight.dtype))
            layers[-1] = new
        else:
            layers.append(m)
    return nn.Sequential(*layers).eval()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_verified(dtype: torch.dtype) -> None:
    model = net(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    verdict = check_model(model, folded(model), (torch.randn(1, 3, 16, 12).to(dtype),))
    assert verdict, verdict
    assert verdict.dtype == str(dtype).removeprefix("torch.") and verdict.batches[:2] == (1, 2)
    assert verdict.passes["original"] <= 4 and verdict.passes["original64"] <= 4
    assert 0 < verdict.original_error and verdict.error <= verdict.limit
    json.dumps(verdict.to_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if dtype == torch.float64:
        assert verdict.limit < 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "bug",
    [
        lambda m: folded(m, eps=1e-3),
        lambda m: nn.Sequential(*folded(m), nn.ReLU()),
        lambda m: nn.Sequential(*list(folded(m))[1:]),
        lambda m: folded(net(m[0].weight.dtype, seed=1)),
        lambda m: nn.Sequential(nn.Identity(), *list(folded(m))[:-1], nn.Linear(32, 5, dtype=m[0].weight.dtype)),
    ],
)
def test_model_failed(bug: Callable[[nn.Sequential], nn.Module], dtype: torch.dtype) -> None:
    model = net(dtype)
    verdict = check_model(model, bug(model), (torch.randn(1, 3, 16, 12, dtype=dtype),))
    assert verdict.status == "failed" and not verdict and verdict.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_was_not_rewritten_runs_in_float64_only_where_a_bit_differs(dtype: torch.dtype) -> None:
    model, x = net(dtype), (torch.randn(1, 3, 16, 12).to(dtype),)
    same = check_model(model, copy.deepcopy(model), x, unrewritten=True)
    assert same and same.passes["original64"] == 0 and same.batches == (1, 2), same
    assert same.notes == ("nothing was rewritten, and every output is bit for bit the original's",)
    assert check_model(model, folded(model), x, unrewritten=True).outputs  # that it was rewritten shows in its last bits
    wrong = copy.deepcopy(model)
    next(wrong.parameters()).data.mul_(1.5)
    assert check_model(model, wrong, x, unrewritten=True).status == "failed"


def test_a_transform_that_rewrites_nothing_compares_bits() -> None:
    model = randomise(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    verification = fxconv.report(fxconv.transform(model, torch.randn(2, 6))).verification
    assert verification["status"] == "verified" and verification["passes"]["original64"] == 0
    longer = nn.Sequential(*model, randomise(nn.Linear(3, 4)))
    assert fxconv.report(fxconv.transform(longer, torch.randn(2, 6))).verification["passes"]["original64"]


def test_float32_composition_shows_in_a_float64_model_only() -> None:
    """Why clusters are compared before rounding: in a float32 model this bug is as large as rounding itself."""
    x = torch.randn(1, 3, 16, 12)
    single, double = net(), net(torch.float64)
    assert check_model(single, folded(single, within=torch.float32), (x,))
    assert not check_model(double, folded(double, within=torch.float32), (x.double(),))


def test_single_output_models_are_no_false_alarm() -> None:
    """One number per sample: its error may be zero by chance, on either side."""
    for seed in range(40):
        torch.manual_seed(seed)
        a, b = nn.Linear(40, 30), nn.Linear(30, 1)
        one = nn.Linear(40, 1)
        with torch.no_grad():
            one.weight.copy_(b.weight.double() @ a.weight.double())
            one.bias.copy_(b.weight.double() @ a.bias.double() + b.bias.double())
        verdict = check_model(nn.Sequential(a, b), one, (torch.randn(1, 40),), seed=seed)
        assert verdict, f"{seed}: {verdict}"


@dataclass
class Boxes:
    scores: Tensor
    labels: Tensor


@pytest.mark.parametrize(
    "a, b, words",
    [
        (lambda x: (x, x), lambda x: [x, x], "structure differs"),
        (lambda x: {"a": x}, lambda x: {"b": x}, "structure differs"),
        (lambda x: (x, x), lambda x: (x, x.double()), "dtypes of output[1] differ"),
        (lambda x: (x, 3), lambda x: (x, 4), "values of output[1] differ: 3 against 4"),
        (lambda x: (x, None), lambda x: (x, x), "differ"),
        (lambda x: {"a": x}, lambda x: {"a": x + 1e-3}, "output['a']"),
        (lambda x: Boxes(x, x.argmax(1)), lambda x: Boxes(x, x.argmin(1)), "labels"),
        (lambda x: x, lambda x: x[:, :3], "shapes differ: (1, 4) against (1, 3)"),
        (lambda x: x, lambda x: 1 / 0, "ZeroDivisionError"),
        (lambda x: x, lambda x: x / 0, "overflows"),
        (lambda x: (x - 9).log(), lambda x: x, "where the original is nan"),
        (lambda x: x / 0 * x.abs(), lambda x: x.abs() / 0, "is inf where the original is"),
        (lambda x: x.sum().item(), lambda x: x.sum().item() * 1.001, "times its limit"),
        (lambda x: x, lambda x: x.view(1, 4), "raises on the example and a Gaussian sample in a batch of 2"),
    ],
)
def test_model_structure(a: Callable[[Tensor], Any], b: Callable[[Tensor], Any], words: str) -> None:
    verdict = check_model(Outputs(a), Outputs(b), (torch.randn(1, 4),))
    assert verdict.status == "failed" and words in str(verdict), verdict


@pytest.mark.parametrize(
    "how",
    [
        lambda x: {"a": (x, [x * 2]), "n": 3},
        lambda x: Boxes(x, x.argmax(1)),
        lambda x: torch.fft.fft(x),
        lambda x: x.sum(),
        lambda x: (x, None),
        lambda x: x > 0,
        lambda x: x.sum().item(),
        lambda x: x.to_sparse(),
        lambda x: torch.where(x > 0, x, torch.nan),
        lambda x: x / 0,
        lambda x: None,
    ],
)
def test_model_outputs_of_any_kind(how: Callable[[Tensor], Any]) -> None:
    assert check_model(Outputs(how), Outputs(how), (torch.randn(1, 4),))


@pytest.mark.parametrize("how", [lambda x: x[:, :0], lambda x: x * 0])
def test_an_output_that_shows_nothing_is_noted(how: Callable[[Tensor], Any]) -> None:
    verdict = check_model(Outputs(how), Outputs(how), (torch.randn(1, 4),))
    assert verdict and "says nothing" in str(verdict)


class Detector(nn.Module):
    """Scores of 4,000 places, the best first: places swap for scores that lie closer than rounding."""

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 1)
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        scores = self.b(self.a(x))[..., 0]
        return x[0, self.keep(scores[0])][None]


@pytest.mark.parametrize(
    "keep, words",
    [
        (lambda s: (s * 1e6 + torch.arange(4000) % 2 * 0.05).sort().indices, "the original itself is off by"),
        (lambda s: ((s * 1e6 % 1.0) < 0.5).nonzero()[:, 0], "size hangs on rounding"),
    ],
)
def test_outputs_that_hang_on_rounding(keep: Callable[[Tensor], Tensor], words: str) -> None:
    """Only float64 with the unrounded weights can tell; it then can tell a wrong one."""
    model, result = Detector(keep), Detector(keep)
    weight = result.a.weight.detach().double()
    weight[0] *= 1.001
    x = torch.randn(1, 4000, 64)
    verdict = check_model(model, result, (x,), batch_dims=None)
    assert verdict.status == "not verifiable" and words in verdict.reason, verdict
    right = check_model(model, result, (x,), batch_dims=None, exact={"a.weight": result.a.weight.double()})
    assert right and "float64 only" in str(right), right
    assert not check_model(model, result, (x,), batch_dims=None, exact=lambda: {"a.weight": weight})


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_a_transform_whose_output_hangs_on_rounding_is_judged_with_the_unrounded_weights(
    capture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Detector(lambda s: (s * 1e6 + torch.arange(4000) % 2 * 0.05).sort().indices)
    x = torch.randn(1, 4000, 64)
    report = fxconv.report(fxconv.transform(model, x, capture=capture))
    assert report.verified and report.applied and "float64 only" in str(report.verification["notes"])
    # Were it not for the check of each rewrite, this would find a wrong one, and which.
    monkeypatch.setattr(rollback, "check_cluster", lambda *_, **__: Verdict("confirmed"))
    lie = spoiling(COMPOSING, "lie", numbers("rounded", lambda t, m: t.half().double()), everywhere=True)
    report = fxconv.report(fxconv.transform(model, x, capture=capture, laws=lie))
    assert report.verified and report.rolled_back, report.rewrites
    assert "the whole model is wrong with it" in report.rolled_back[0].verdict["reason"]


def test_exact_weights_are_judged_at_float64_rounding() -> None:
    """A composition in float32 hides behind the rounding of a float32 model, unless its weights are given."""
    model = net()
    x = torch.randn(1, 3, 16, 12)
    wide = net().double()
    for within, right in ((torch.float64, True), (torch.float32, False)):
        exact = {k: v for k, v in folded(wide, within=within).state_dict().items() if v.dtype == torch.float64}
        verdict = check_model(model, folded(model), (x,), exact=exact)
        assert bool(verdict) == right, verdict
        assert verdict.passes["original64"] <= 4
    with pytest.raises(ArgsError, match="no weight nothing"):
        check_model(model, folded(model), (x,), exact={"nothing": torch.ones(1)})


@pytest.mark.parametrize(
    "module, op",
    [
        (Outputs(lambda x: F.dropout(x)), "bernoulli"),
        (Outputs(lambda x: x + torch.rand_like(x)), "rand_like"),
        (Outputs(lambda x: x.softmax(-1).multinomial(1)), "multinomial"),
    ],
)
def test_random_models_cannot_be_verified(module: nn.Module, op: str) -> None:
    torch.manual_seed(0)
    verdict = check_model(module, module, (torch.randn(1, 64),))
    assert verdict.status == "not verifiable" and op in verdict.reason


@pytest.mark.parametrize("how", [lambda x: F.dropout(x, training=True), lambda x: x + torch.rand_like(x)])
@pytest.mark.parametrize("capture", ["auto", "symbolic"])
def test_a_model_that_is_random_in_eval_mode_is_transformed_and_said_to_be(how: Callable[[Tensor], Any], capture: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)), Outputs(how)).eval()
    report = fxconv.report(fxconv.transform(model, torch.randn(2, 3, 8, 8), capture=capture))
    assert report.applied, "what is not random is rewritten"
    assert report.verification["status"] == "not verifiable" and not report.verified
    assert "bernoulli" in report.verification["reason"] or "rand_like" in report.verification["reason"]


def test_a_number_that_was_computed_is_judged_as_one() -> None:
    class Number(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> float:
            return self.b(self.a(x)).sum().item()

    report = fxconv.report(fxconv.transform(Number().eval(), torch.randn(2, 3, 8, 8)))
    assert report.verified and report.applied and not report.rolled_back


def test_random_generators_and_buffers_are_left_alone() -> None:
    class Counts(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x * self.seen

    model = Counts()
    state = torch.get_rng_state()
    assert check_model(model, model, (torch.randn(1, 3),))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check_model(Outputs(F.dropout), Outputs(F.dropout), (torch.ones(1, 9),))
    assert torch.equal(torch.get_rng_state(), state)
    assert float(model.seen) == 0


def test_inputs_are_left_alone() -> None:
    x = torch.randn(1, 4)
    before = x.clone()
    assert check_model(nn.ReLU(inplace=True), nn.ReLU(), (x,))
    assert torch.equal(x, before)


class Baked(nn.Module):
    """Dtypes written out, in code and in a plain attribute; a factory without one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.plain = torch.full((4,), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.float()).to(torch.float32) + torch.arange(4, dtype=torch.float32) + torch.ones(4) / 3
        return (y * self.plain + torch.tensor(0.1)).to(x.dtype)


def test_baked_in_dtypes() -> None:
    model = Baked()
    traced = torch.fx.symbolic_trace(model)
    exported = torch.export.export(model, (torch.randn(3, 6),))
    for other in (traced, exported):
        verdict = verify(model, other, torch.randn(3, 6))
        # Not 1e-15: a graph keeps torch.tensor(0.1) rounded to float32, where the module widens 0.1 itself.
        assert verdict and verdict.float64_error < 1e-8, verdict


def test_mixed_precision_inside_a_float64_model() -> None:
    """What is computed in float32 within a float64 model counts as the original's own error."""

    class Mixed(nn.Module):
        def __init__(self, scale: float = 1.0) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32).double()
            self.norm = nn.LayerNorm(32)
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x * self.scale).float()).double()

    torch.manual_seed(0)
    model, other = Mixed(), Mixed()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.linear.weight.mul_(1 + 1e-15)
    assert (v := check_model(model, other, (torch.randn(1, 32, dtype=torch.float64),))), v
    with torch.no_grad():
        other.linear.weight[0].mul_(1 + 1e-5)
    assert not check_model(model, other, (torch.randn(1, 32, dtype=torch.float64),))


def test_tied_weights_and_views_survive_the_float64_copy() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.head(self.embed(ids))
            return y if mask is None else y * mask[..., None]

    model = Tied()
    ids = torch.randint(0, 20, (2, 5))
    assert check_model(model, model, (ids,), {"mask": torch.ones(2, 5, dtype=torch.bool)})
    copy = as_float64(model)
    assert isinstance(copy, Tied)
    assert copy.head.weight is copy.embed.weight and copy.head.weight.dtype == torch.float64
    assert model.head.weight.dtype == torch.float32


def test_batch_dims() -> None:
    x = torch.randn(5, 1, 4)  # the batch is dim 1
    fixed = Outputs(lambda x: x.view(5, 4))
    assert check_model(fixed, fixed, (x,)).batches == (1, 1), "no other batch is taken, so the example's is used"
    assert check_model(fixed, fixed, (x,), batch_dims=None)
    along = Outputs(lambda x: x.sum(2))
    assert check_model(along, along, (x,), batch_dims=[1]).batches == (1, 2)
    with pytest.raises(ArgsError, match="2 entries"):
        check_model(along, along, (x,), batch_dims=[1, None])


def test_strides_are_reported() -> None:
    a, b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    b.load_state_dict(a.state_dict())
    b.to(memory_format=torch.channels_last)
    verdict = check_model(a, b, (torch.randn(1, 3, 8, 8),))
    assert verdict and any("strides" in n for n in verdict.notes)


def test_verify_names_the_squeeze_that_did_nothing() -> None:
    """The folklore Conv1d for a Linear(100, 10)."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(100, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.squeeze(1))

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 10, kernel_size=10)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).squeeze(1)

    for conv in (Conv(), torch.fx.symbolic_trace(Conv()), torch.export.export(Conv(), (torch.randn(1, 1, 100),))):
        verdict = verify(Linear(), conv, torch.randn(1, 1, 100))
        assert not verdict
        assert "shapes differ: (1, 10) against (1, 10, 91)" in str(verdict)
        assert "squeeze(1) removed nothing: dim 1 has size 10" in str(verdict)


def test_verify_misuse() -> None:
    with pytest.raises(NotAModuleError):
        verify(nn.ReLU(), lambda x: x, torch.ones(1))
    with pytest.raises(ArgsError, match="list"):
        verify(nn.ReLU(), nn.ReLU(), [torch.ones(1)])


def test_a_model_that_cannot_be_widened_is_said_to_be() -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise TypeError("float32 only")
            return x

    verdict = check_model(Raises(), Raises(), (torch.randn(1, 3),))
    assert verdict.status == "not verifiable" and "float32 only" in verdict.reason


def test_residual_blocks_that_become_one_convolution_each_are_no_false_alarm() -> None:
    """x + f(x) hands on x exactly, and one convolution that computes both rounds a sum of 144 products."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand, self.squeeze = nn.Conv2d(16, 256, 3, padding=1, bias=False), nn.Conv2d(256, 16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.squeeze(self.expand(x)) + x)

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(5))).eval(), torch.randn(1, 16, 96, 96)
    report = fxconv.report(fxconv.transform(model, x))
    assert report.verified and not report.rolled_back and len(report.applied) == 5
