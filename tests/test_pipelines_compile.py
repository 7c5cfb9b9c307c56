"""torch.compile, in both directions: weights that change, gradients, dynamic batches. Inductor's pass and its cache."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxconv
from fxconv.errors import OptionError
from fxconv.pipelines.bound import find_weights, placeholders, qualified_name


class Net(nn.Module):
    """Conv, BatchNorm, a buffer, a plain tensor, ReLU in place, a tied Linear: every kind of weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.register_buffer("k", torch.rand(4) + 0.5)
        self.t = torch.rand(4) + 0.5
        self.fc = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.fc.weight
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.5, 2.0)
        nn.init.normal_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)) * self.k[:, None, None] * self.t[:, None, None]
        return self.again(self.fc(y.relu_().mean((2, 3))).relu())


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(inner: Any = "eager", dynamic: bool | None = None, **options: Any) -> tuple[Any, Any, Any]:
    model = Net().eval()
    backend = fxconv.backend(inner, **options)
    return model, backend, torch.compile(model, backend=backend, dynamic=dynamic)


def agrees(fast: Any, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_dynamo_graph_is_rewritten_at_every_batch(dynamic: bool | None) -> None:
    seen: list[torch.fx.GraphModule] = []
    model, backend, fast = compiled(lambda gm, inputs: (seen.append(gm), gm.forward)[1], dynamic)
    for batch in (2, 3, 1, 5):
        agrees(fast, model, torch.randn(batch, 3, 6, 6))
    assert len(backend.reports) <= 3, "one static graph, one dynamic one, and one for a batch of 1"
    assert all(report.verified and len(report.applied) == 1 for report in backend.reports)
    for gm in seen:
        names = [str(n.target) for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
        assert sum("conv2d" in n for n in names) == 1 and not any("batch_norm" in n or "mul" in n for n in names)


def test_weights_are_found_and_named() -> None:
    found: list[str] = []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nodes = placeholders(gm.graph)
        found.extend(qualified_name(nodes[i]) for i in find_weights(gm.graph, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(Net().eval(), backend=look)(torch.randn(2, 3, 5, 5))
    assert set(found) >= {"conv.weight", "conv.bias", "bn.running_var", "bn.weight", "k", "t", "fc.weight"}


@pytest.mark.parametrize("dynamic", [None, True])
def test_changed_weights_are_folded_anew(dynamic: bool | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model, backend, fast = compiled(counter, dynamic)
    x = torch.randn(4, 3, 6, 6)
    agrees(fast, model, x)
    done, compilations = len(backend.reports), counter.frame_count  # 2 where Dynamo begins again with floats inlined
    with torch.no_grad():
        model.conv.weight.mul_(-1.5)  # version
    agrees(fast, model, x)
    assert len(backend.reports) == done + 1 and counter.frame_count == compilations, "the compiled code is kept"
    model.bn.running_mean = torch.randn(4)  # identity
    agrees(fast, model, x)
    assert len(backend.reports) == done + 2 and counter.frame_count == compilations
    agrees(fast, model, x)
    assert len(backend.reports) == done + 2, "nothing has changed"
    model.load_state_dict(Net().state_dict())
    agrees(fast, model, x)
    model.bn.eps = 0.3
    agrees(fast, model, x)


def test_other_weights_that_allow_other_rewrites_are_compiled_again(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)
            self.register_buffer("scale", torch.rand(4, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * self.scale)

    model = Scaled().eval()
    backend = fxconv.backend("eager")
    fast = torch.compile(model, backend=backend, dynamic=True)
    agrees(fast, model, torch.randn(2, 3, 5, 5))
    with torch.no_grad():
        model.scale.copy_(torch.tensor([1.0, -1.0, 0.0, 2.0]).view(4, 1, 1))
    for batch in (2, 3):
        agrees(fast, model, torch.randn(batch, 3, 5, 5))


def test_a_write_through_data_is_seen_by_hash_alone() -> None:
    x = torch.randn(2, 3, 6, 6)
    for check, seen in (("version", False), ("hash", True)):
        torch._dynamo.reset()
        model, backend, fast = compiled(check=check)
        agrees(fast, model, x)
        model.conv.weight.data.mul_(2)
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5) is seen


def test_writes_that_move_no_version_are_seen_where_memory_or_buffers_show_them() -> None:
    x = torch.randn(4, 3, 6, 6)
    model, backend, fast = compiled()
    agrees(fast, model, x)
    model.conv.weight.data = torch.randn(4, 3, 3, 3)
    agrees(fast, model, x)
    nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in model.parameters())), model.parameters())
    agrees(fast, model, x)
    before = model.bn.running_mean._version
    with torch.no_grad():
        model.train()(x)
        model.eval()
    assert model.bn.running_mean._version == before, "BatchNorm counts its updates now: no need to compare by value"
    agrees(fast, model, x)
    assert len(backend.reports) == 4
    agrees(fast, model, x)
    assert len(backend.reports) == 4, "nothing has changed"


class Random(nn.Module):
    """Two Linears to fuse, and dropout behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x.mean(1).flatten(1)[:, :6])
        return result


@pytest.mark.parametrize("make", [Net, Random])
def test_in_training_mode_the_graph_is_left_alone(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    from fxconv.pipelines import InductorPass

    model, x = make().train(), torch.randn(4, 3, 6, 6)
    twin, expected = copy.deepcopy(model), []
    backend, ours = fxconv.backend("eager"), InductorPass(model)
    run = [torch.compile(model, backend=backend), torch.compile(model, backend=by_pass(ours, []))]
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="fxconv"):
        for call in (*run, *run):
            torch.manual_seed(1)
            outputs = call(x)
            torch.manual_seed(1)
            expected.append(twin(x))
            torch.testing.assert_close(outputs, expected[-1])
            torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert not backend.reports and not ours.reports and caplog.text.count("runs in training mode") == 2
    model.eval()
    agrees(run[0], model, x)
    assert len(backend.reports) == 1


def test_weights_that_count_no_versions_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 3, 6, 6)
    for check in ("version", "hash"):
        torch._dynamo.reset()
        with torch.inference_mode(), caplog.at_level(logging.WARNING, logger="fxconv"):
            model, backend, fast = compiled(check=check)
            agrees(fast, model, x)
            model.conv.weight.mul_(2)
            agrees(fast, model, x)
        assert bool(backend.reports) is (check == "hash")
    assert caplog.text.count("torch.inference_mode()") == 1
    with torch.inference_mode():
        result = fxconv.transform(model, x)
        assert fxconv.report(result).verified and fxconv.report(result).applied
        torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)


def test_with_gradients_the_graph_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model, backend, fast = compiled("aot_eager")
    x = torch.randn(2, 3, 6, 6)
    with caplog.at_level(logging.WARNING, logger="fxconv"):
        fast(x).sum().backward()
    assert not backend.reports and "torch.no_grad()" in caplog.text
    assert model.conv.weight.grad is not None and model.conv.weight.grad.abs().sum() > 0
    agrees(fast, model, x)
    assert len(backend.reports) == 1
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_name_is_registered_and_takes_options() -> None:
    assert "fxconv" in torch._dynamo.list_backends()
    with pytest.raises(OptionError, match="did you mean 'objective'"):
        fxconv.backend("inductor", objektive="macs")
    model, backend, fast = compiled(deny=["*"])
    agrees(fast, model, torch.randn(2, 3, 6, 6))
    assert not backend.reports[0].applied
    with pytest.raises(Exception, match="did you mean 'target'"), torch.no_grad():
        torch.compile(model, backend="fxconv", options={"targett": "conv"})(torch.randn(2, 3, 6, 6))


def test_a_mode_goes_on_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh process Inductor's compiler is not imported yet: no attribute of torch's may be taken for granted."""
    monkeypatch.delattr(torch._inductor, "compile_fx", raising=False)
    monkeypatch.delitem(sys.modules, "torch._inductor.compile_fx", raising=False)
    fake, seen = types.ModuleType("torch._inductor.compile_fx"), []
    fake.compile_fx = lambda gm, inputs, config_patches: (seen.append(config_patches), gm.forward)[1]  # type: ignore
    monkeypatch.setitem(sys.modules, "torch._inductor.compile_fx", fake)
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    agrees(torch.compile(model, backend="fxconv", mode="max-autotune-no-cudagraphs"), model, x)
    assert seen == [{"max_autotune": True, "coordinate_descent_tuning": True}]
    for inner, mode, said in (("eager", "max-autotune", "is for Inductor; the inner"), ("inductor", "fast", "mode=fast")):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=said), torch.no_grad():
            torch.compile(model, backend=fxconv.backend(inner), mode=mode)(x)


def test_frozen_weights_are_folded() -> None:
    """With Inductor's freezing the weights stay in the graph's module, and Dynamo takes them for constants."""
    x = torch.randn(2, 3, 6, 6)
    with torch._inductor.config.patch(freezing=True):
        model, backend, fast = compiled("aot_eager")
        agrees(fast, model, x)
        assert len(backend.reports) == 1 and backend.reports[0].verified and backend.reports[0].applied


_SECOND_PROCESS = """
import sys
from test_pipelines_compile import run_pass
print(*run_pass(int(sys.argv[1])))
"""

_QUICK = {"cpp_cache_precompile_headers": False, "compile_threads": 1, "cpp.vec_isa_ok": True}
"""Checks and preparations of Inductor's that take longer than all that is compiled here."""


def run_pass(seed: int, owner: nn.Module | None = None) -> tuple[str, int]:
    """Compile a model with its `InductorPass`, or another's: whether the cache had it, how many graphs were rewritten."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    from fxconv.pipelines import InductorPass

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(seed)
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    ours = InductorPass(owner or model)
    with torch.no_grad(), config.patch(pre_grad_custom_pass=ours, **_QUICK):
        torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=1e-5, atol=1e-5)
    return "hit" if counters["aot_autograd"]["autograd_cache_hit"] else "miss", len(ours.reports)


def test_inductor_in_both_directions_its_pass_and_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert run_pass(1) == ("miss", 1)
    assert run_pass(1) == ("hit", 0), "the same weights again"
    torch.manual_seed(1)
    assert run_pass(2, owner=Net().eval()) == ("miss", 0), "a twin meets the pass of the first model, and its cache"
    # The same architecture with other weights must not get the folded weights of the first.
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", _SECOND_PROCESS, "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == ["miss", "1"]

    torch._dynamo.reset()
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    with config.patch(**_QUICK):
        agrees(torch.compile(fxconv.transform(model, x)), model, x)
        fast = torch.compile(model, backend="fxconv", dynamic=True)
        for batch in (2, 3):
            agrees(fast, model, torch.randn(batch, 3, 6, 6))
        with torch.no_grad():
            model.conv.weight.mul_(-2)
        agrees(fast, model, x)


def by_pass(ours: Any, uuids: list[str]) -> Any:
    """A backend that runs Inductor's pass on the graph, and asks for its uuid where Inductor does; the rest is eager."""
    from torch._dynamo.backends.common import aot_autograd

    def ask(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        uuids.append(ours.uuid())
        return gm

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        aot_autograd(fw_compiler=ask)(gm, inputs)
        ours(gm.graph)
        gm.recompile()
        return gm.forward

    return look


def test_the_pass_of_one_model_leaves_others_alone() -> None:
    """Its weights are found by identity: a twin of other weights reads tensors of the same names and shapes."""
    from fxconv.pipelines import InductorPass

    class Holder(nn.Module):
        def __init__(self, held: nn.Module) -> None:
            super().__init__()
            self.held = held

        def forward(self, x: Tensor) -> Tensor:
            return self.held(x) + 1

    model, twin, x = Net().eval(), Net().eval(), torch.randn(2, 3, 6, 6)
    ours, uuids, seen = InductorPass(model), [], []
    cases: list[nn.Module] = [model, twin, Holder(model), Holder(twin), nn.Sequential(model.conv, model.bn), Holder(model.conv)]
    for case in cases:
        torch._dynamo.reset()
        agrees(torch.compile(case, backend=by_pass(ours, uuids)), case, x)
        seen.append(len(ours.reports))
    assert seen == [1, 1, 2, 2, 3, 4], "the last two hold parts of the model, under other names"
    assert uuids[0] == uuids[2] and uuids[1] == uuids[3] and len(set(uuids)) == 4

    torch._dynamo.reset()
    fast = torch.compile(lambda x, weight: nn.functional.conv2d(x, weight) * 2, backend=by_pass(ours, uuids))
    with torch.no_grad():
        for weight in (model.conv.weight, twin.conv.weight):
            torch.testing.assert_close(fast(x, weight), nn.functional.conv2d(x, weight) * 2)
    assert len(ours.reports) == 4, "an argument is no weight, even if it is the weight of a model"


def test_the_uuid_covers_options_and_every_weight() -> None:
    from fxconv.pipelines import InductorPass

    model = Net().eval()
    first = InductorPass(model).uuid()
    assert InductorPass(model).uuid() == first != InductorPass(model, objective="macs").uuid()
    for tensor in (model.conv.weight.data, model.bn.running_var, model.k, model.t):
        tensor[0] += 1
        second = InductorPass(model).uuid()
        assert second != first
        first = second
