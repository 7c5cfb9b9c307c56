"""CASES.md, wrong results, the model object: hooks, modes, subclasses, sharing, mutation, metadata (W8 to W28).

The rows about algebra are in test_cases_wrong.py, those about dtypes (W23, W24) in test_cases_dtypes.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import kinds
from helpers import Snapshot, check, draw, n_params, randomise, relative_error, run, said
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

import fxconv

both_captures = pytest.mark.parametrize("capture", ["export", "symbolic"])
X = (2, 6, 7, 9)


def net(bias: bool = True, act: nn.Module | None = None) -> nn.Sequential:
    """conv -> BN -> activation -> conv -> BN: two folds that any fuser wants."""
    layers = [
        nn.Conv2d(6, 8, 3, padding=1, bias=bias),
        nn.BatchNorm2d(8),
        act or nn.ReLU(),
        nn.Conv2d(8, 5, 1),
        nn.BatchNorm2d(5),
    ]
    return nn.Sequential(*layers)


# --- W8: hooks and parametrised weights -----------------------------------------------------------------------------


def _scale_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2 + 1


def _scale_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 3 - 1,)


def _swap(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return output.flip(1)


HOOKS: dict[str, Callable[[nn.Sequential], Any]] = {
    "forward_on_conv": lambda m: m[0].register_forward_hook(_scale_output),
    "forward_on_bn": lambda m: m[1].register_forward_hook(_scale_output),
    "pre_on_bn": lambda m: m[1].register_forward_pre_hook(_scale_input),
    "pre_on_second_conv": lambda m: m[3].register_forward_pre_hook(_scale_input),
    "forward_on_container": lambda m: m.register_forward_hook(_scale_output),
    "pre_on_container": lambda m: m.register_forward_pre_hook(_scale_input),
    "with_kwargs": lambda m: m[0].register_forward_hook(_swap, with_kwargs=True),
}


@both_captures
@pytest.mark.parametrize("where", HOOKS)
def test_W8_hook_that_changes_values(where: str, capture: str) -> None:
    model = randomise(net())
    HOOKS[where](model)
    if capture == "symbolic" and "container" in where:  # fx never calls the root itself: the hook is kept, or named
        try:
            check(model, draw(X), capture=capture)
        except fxconv.FxconvError as error:
            assert re.search("hook", str(error))
    else:
        check(model, draw(X), capture=capture)


@both_captures
def test_W8_hook_that_only_watches_is_kept_or_reported(capture: str) -> None:
    model, seen = randomise(net()), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    out = check(model, draw(X), capture=capture)
    seen.clear()
    run(out.result, (draw(X),))
    assert seen or said(out.result, "hook")


@both_captures
def test_W8_global_hooks_stay(capture: str) -> None:
    """A hook on every module (torch.nn.modules.module) must not be left behind, nor removed, by the capture."""
    from torch.nn.modules import module as registry

    before = dict(registry._global_forward_hooks), dict(registry._global_forward_pre_hooks)
    check(randomise(net()), draw(X), capture=capture)
    assert (dict(registry._global_forward_hooks), dict(registry._global_forward_pre_hooks)) == before


def _weight_norm(m: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(m[0])


def _spectral_norm(m: Any) -> None:
    nn.utils.spectral_norm(m[0])


PARAMETRISED: dict[str, Callable[[Any], Any]] = {
    "weight_norm_hook": _weight_norm,
    "spectral_norm_hook": _spectral_norm,
    "weight_norm": lambda m: parametrizations.weight_norm(m[0]),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m[0]),
    "orthogonal": lambda m: parametrizations.orthogonal(m[3]),
    "pruned": lambda m: prune.l1_unstructured(m[0], "weight", amount=0.5),
    "pruned_channels": lambda m: prune.ln_structured(m[3], "weight", amount=0.4, n=2, dim=1),
}


@both_captures
@pytest.mark.parametrize("how", PARAMETRISED)
def test_W8_parametrised_weights(how: str, capture: str) -> None:
    model = randomise(net()).double()
    PARAMETRISED[how](model)
    with torch.no_grad():
        model.eval()(draw(X))  # the hooks compute `weight` once
    check(model, draw(X), capture=capture)


# --- W9: modes ------------------------------------------------------------------------------------------------------


@both_captures
@pytest.mark.parametrize("which", ["all", "one_bn", "dropout"])
def test_W9_training_mode_is_an_error_that_says_eval(which: str, capture: str) -> None:
    model = nn.Sequential(*net(), nn.Dropout(0.5)).eval()
    (model if which == "all" else model[1] if which == "one_bn" else model[5]).train()
    before = Snapshot(model)
    with pytest.raises(fxconv.TrainingModeError, match="eval"):
        fxconv.transform(model, draw(X, dtype=torch.float32), capture=capture)
    before.assert_unchanged()


def test_W9_training_flag_without_batch_norm_or_dropout_is_no_error() -> None:
    """nn.Sequential(Linear, ReLU) is born in training mode and behaves the same in both."""
    model = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 5)).double().train()
    x = draw((2, 6))
    assert relative_error(run(fxconv.transform(model, x), (x,)), run(model, (x,))) < 1e-12


@both_captures
def test_W9_batch_norm_without_running_statistics(capture: str) -> None:
    """In eval mode it still normalises by the batch: not affine."""
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    model = randomise(nn.Sequential(nn.Conv2d(6, 8, 3), norm, nn.Conv2d(8, 5, 1)))
    check(model, draw(X), capture=capture, ops={"conv": 2}, refused="batch|statistic|running")


# --- W17: subclasses with a forward of their own --------------------------------------------------------------------


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SameConv(nn.Conv2d):
    """TensorFlow's "same": the padding depends on the size, and is asymmetric."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, k, s in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // s) - 1) * s + k - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


class LoraLinear(nn.Linear):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out)
        self.down = nn.Linear(c_in, 2, bias=False)
        self.up = nn.Linear(2, c_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * self.up(self.down(x))


class ConvAct(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class NormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d is one: a BatchNorm2d with an activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardtanh(super().forward(x))


class TransposedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(2, 3))


class LeakyReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2)


class NotFlatten(nn.Flatten):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


SUBCLASSES: dict[str, Callable[[], nn.Module]] = {
    "standardised": lambda: nn.Sequential(StandardisedConv(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    "conv_act": lambda: nn.Sequential(ConvAct(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)),
    "norm_act": lambda: nn.Sequential(nn.Conv2d(6, 8, 1), NormAct(8), nn.Conv2d(8, 5, 1)),
    "transposed": lambda: nn.Sequential(TransposedConv(6, 6, 3), nn.BatchNorm2d(6)),
    "leaky": lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), LeakyReLU(), nn.Conv2d(8, 5, 1)),
    "flatten": lambda: nn.Sequential(nn.Conv2d(6, 8, 1), NotFlatten(), nn.Linear(8, 5)),
    "lora": lambda: nn.Sequential(nn.Flatten(2), LoraLinear(63, 10), nn.ReLU()),
}


@both_captures
@pytest.mark.parametrize("name", SUBCLASSES)
def test_W17_subclass_with_its_own_forward(name: str, capture: str) -> None:
    folded = {"ops": {"batch_norm": 0}} if capture == "export" else {}  # a symbolic trace may keep the subclass whole
    check(randomise(SUBCLASSES[name]()), draw(X), capture=capture, **folded)


def test_W17_same_padding_that_depends_on_the_size() -> None:
    model = randomise(nn.Sequential(SameConv(6, 8, 3, 2), nn.BatchNorm2d(8)))
    check(model, draw(X), sizes=False, ops={"batch_norm": 0})


def test_W17_subclass_as_a_leaf_of_the_callers_own_trace() -> None:
    """A GraphModule from a tracer that keeps every subclass whole: the class name says nothing about what it does."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    for make in SUBCLASSES.values():
        model = randomise(make()).double()
        check(fx.GraphModule(model, Tracer().trace(model)), draw(X))


# --- W18: names -----------------------------------------------------------------------------------------------------


@both_captures
def test_W18_new_names_do_not_shadow_old_ones(capture: str) -> None:
    """Whatever the rewrite would call its weights, a model that has those names already keeps its own."""
    first = check(randomise(net()), draw(X), capture=capture).result
    original = set(dict(net().named_parameters())) | set(dict(net().named_buffers()))
    made = [name for name in [*dict(first.named_parameters()), *dict(first.named_buffers())] if name not in original]
    made += [node.name for node in first.graph.nodes if node.op not in ("placeholder", "output")]

    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, child in enumerate(net()):
                self.add_module(str(i), child)
            self.parameters_taken, self.modules_taken = [], []
            for name in made:
                head = name.split(".")[0]
                if not hasattr(self, head):
                    setattr(self, head, nn.Conv2d(5, 5, 1) if "." in name else nn.Parameter(torch.ones(5, 1, 1)))
                    (self.modules_taken if "." in name else self.parameters_taken).append(head)

        def forward(self, x: Tensor) -> Tensor:
            for i in range(5):
                x = getattr(self, str(i))(x)
            for name in self.parameters_taken:
                x = torch.tanh(x + getattr(self, name))
            for name in self.modules_taken:
                x = torch.tanh(getattr(self, name)(x))
            return x

    check(randomise(Taken()), draw(X), capture=capture)


# --- W21: mutation --------------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 1)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _relu_read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.a(x))
    z = y.relu_()
    return m.b(z) + y  # y is z


def _add_to_what_was_read(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.b(y)
    y.add_(1.5)
    return z + m.norm(y)


def _add_branch(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.a(x))
    y += m.b(y)
    return y


def _through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(y.shape[0], -1).mul_(2)
    return m.norm(y)


def _through_a_function(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    torch.relu_(y.transpose(1, 2))
    F.leaky_relu(y.unsqueeze(1)[:, :, 2:], 0.3, inplace=True)
    return m.norm(y)


def _into_out(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.b(y)
    torch.mul(z, 2, out=y)
    return m.norm(y) + z


def _iadd_on_a_part(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.a(x))
    left, right = y.chunk(2, 1)
    left += right
    return m.b(y)


def _set_channel(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.a(x))
    y[:, 0] = 0.5
    return m.b(y)


def _scale_channels(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 1:3] *= 2
    return m.norm(y)


def _fill_border(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[..., 0] = 0
    y[..., -1:] = 1
    return m.b(y)


def _chained(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.norm(m.a(x)), inplace=True).mul_(0.5).add_(1)).sub_(2)


MUTATIONS = {
    f.__name__.strip("_"): f
    for f in (
        _relu_read_twice,
        _add_to_what_was_read,
        _add_branch,
        _through_a_view,
        _through_a_function,
        _chained,
    )
}
WITHOUT_GRAD = {f.__name__.strip("_"): f for f in (_into_out, _iadd_on_a_part)}
SETITEMS = {f.__name__.strip("_"): f for f in (_set_channel, _scale_channels, _fill_border)}


@both_captures
@pytest.mark.parametrize("name", MUTATIONS)
def test_W21_in_place_operations(name: str, capture: str) -> None:
    check(randomise(InPlace(MUTATIONS[name])), draw(X), capture=capture)


@pytest.mark.parametrize("name", WITHOUT_GRAD)
def test_W21_writes_that_autograd_refuses(name: str) -> None:
    """They run under ``no_grad`` only, and torch.export, which traces with gradients, does not take them."""
    check(randomise(InPlace(WITHOUT_GRAD[name])), draw(X), capture="symbolic")


@both_captures
@pytest.mark.parametrize("name", SETITEMS)
def test_W21_assignment_to_a_part(name: str, capture: str) -> None:
    check(randomise(InPlace(SETITEMS[name])), draw(X), capture=capture)


@both_captures
def test_W21_in_place_modules(capture: str) -> None:
    model = randomise(net(act=nn.ReLU(inplace=True)))
    check(model, draw(X), capture=capture, ops={"batch_norm": 0, "conv": 2})


@both_captures
def test_W21_writes_to_the_input_reach_the_caller(capture: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return m.b(m.norm(m.a(x)))

    model = randomise(InPlace(body)).double()
    result = fxconv.transform(model, draw(X), capture=capture)
    mine, theirs = draw(X, 5), draw(X, 5)
    with torch.no_grad():
        assert relative_error(result(mine), model(theirs)) < 1e-12
    assert torch.equal(mine, theirs), "the original doubles its input, the result must too"


# --- W25: nothing to do is nothing done -----------------------------------------------------------------------------

IDEMPOTENT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "net": (net, X),
    "head": (lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Dropout(0.2), nn.Linear(280, 10)), X),
    "upsampled": (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)), X),
    "pooled": (lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.AvgPool2d(2), nn.ReLU(), nn.BatchNorm2d(8)), X),
    "low_rank": (lambda: nn.Sequential(nn.Linear(9, 3), nn.Linear(3, 9)), X),
    "nothing": (lambda: nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 7)), X),
}


def structure(result: Any) -> list[tuple[str, str, str]]:
    return [(n.op, n.name, str(n.target)) for n in result.graph.nodes]


@both_captures
@pytest.mark.parametrize("name", IDEMPOTENT)
def test_W25_transform_of_a_result_changes_nothing(name: str, capture: str) -> None:
    make, shape = IDEMPOTENT[name]
    once = check(randomise(make()), draw(shape), capture=capture).result
    twice = fxconv.transform(once, draw(shape))
    assert not fxconv.report(twice).rewrites
    assert structure(twice) == structure(once)
    assert [p.data_ptr() for p in twice.parameters()] == [p.data_ptr() for p in once.parameters()]


@both_captures
def test_W25_nothing_to_do(capture: str) -> None:
    make, shape = IDEMPOTENT["nothing"]
    out = check(randomise(make()), draw(shape), capture=capture, ops={"linear": 2, "relu": 1})
    assert not out.report.rewrites and sum(out.kinds.values()) == 3
    assert {n for n, _ in out.result.named_parameters()} == {n for n, _ in out.original.named_parameters()}


def test_W25_deterministic() -> None:
    make, shape = IDEMPOTENT["net"]
    first, second = (fxconv.transform(randomise(make()).double(), draw(shape)) for _ in range(2))
    assert structure(first) == structure(second)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


# --- W26: metadata --------------------------------------------------------------------------------------------------


def test_W26_new_nodes_have_metadata() -> None:
    result = check(randomise(net()), draw(X)).result
    for node in result.graph.nodes:
        if node.op in ("call_function", "call_module", "call_method"):
            assert isinstance(node.meta.get("val"), Tensor), f"{node.name} has no meta['val']"
            assert node.meta.get("nn_module_stack"), f"{node.name} has no nn_module_stack"
            assert "stack_trace" in node.meta, f"{node.name} has no stack_trace"
    shapes = [tuple(n.meta["val"].shape)[1:2] for n in result.graph.nodes if n.op == "call_function"]
    assert shapes == [(8,), (8,), (5,)]


# --- W27: dynamic sizes ---------------------------------------------------------------------------------------------


@both_captures
def test_W27_sizes_stay_dynamic(capture: str) -> None:
    result = check(randomise(net()), draw((1, 6, 8, 8)), capture=capture).result
    model = randomise(net()).double()
    for shape in ((1, 6, 3, 4), (5, 6, 31, 17), (2, 6, 1, 1)):
        assert relative_error(run(result, (draw(shape),)), run(model, (draw(shape),))) < 1e-12


def test_W27_exported_program_keeps_its_symbols() -> None:
    dims = (
        {
            0: torch.export.Dim("n", max=64),
            2: torch.export.Dim("h", min=4, max=64),
            3: torch.export.Dim("w", min=4, max=64),
        },
    )
    model = randomise(net()).double()
    program = torch.export.export(model, (draw(X),), dynamic_shapes=dims)
    result = fxconv.transform(program, (draw(X),))
    assert isinstance(result, torch.export.ExportedProgram)
    symbols = {str(k): (int(v.lower), int(v.upper)) for k, v in program.range_constraints.items()}
    assert {str(k): (int(v.lower), int(v.upper)) for k, v in result.range_constraints.items()} == symbols
    for shape in ((1, 6, 4, 5), (7, 6, 20, 11)):
        assert relative_error(run(result, (draw(shape),)), run(model, (draw(shape),))) < 1e-12
    assert fxconv.report(result).verified


# --- W28: the caller's model ----------------------------------------------------------------------------------------


@both_captures
def test_W28_module_is_untouched(capture: str) -> None:
    model = randomise(net()).double()
    model[0].register_forward_hook(_scale_output)
    model[3].weight.requires_grad_(False)
    model.note = {"kept": 1}
    before, want = Snapshot(model), run(model, (draw(X),))
    result = fxconv.transform(model, draw(X), capture=capture)
    with torch.no_grad():  # writing into what the rewrite made must not reach the original
        for name, p in result.named_parameters():
            if name not in dict(model.named_parameters()):
                p.add_(1)
    before.assert_unchanged()
    assert torch.equal(run(model, (draw(X),)), want)


def test_W28_graph_module_is_untouched() -> None:
    model = fx.symbolic_trace(randomise(net()).double())
    before, nodes = Snapshot(model), structure(model)
    result = fxconv.transform(model, draw(X))
    assert isinstance(result, fx.GraphModule) and result is not model
    before.assert_unchanged()
    assert structure(model) == nodes and kinds(model)["batch_norm"] == 2 and kinds(result)["batch_norm"] == 0


def test_W28_exported_program_is_untouched() -> None:
    program = torch.export.export(randomise(net()).double(), (draw(X),))
    before, weights = str(program.graph), {k: v.clone() for k, v in program.state_dict.items()}
    result = fxconv.transform(program, (draw(X),))
    assert isinstance(result, torch.export.ExportedProgram) and result is not program
    assert str(program.graph) == before
    assert all(torch.equal(program.state_dict[k], v) for k, v in weights.items()) and len(weights) == len(program.state_dict)
    assert n_params(result) < n_params(program)
