"""What ExportedPrograms are deployed for, on one small model: symbolic sizes, passes in other dialects, quantised graphs.

`test_pipelines_zoo.py` runs every pipeline on four whole networks.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deploy
import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxconv
from fxconv import sources
from fxconv.errors import CaptureError
from fxconv.options import _toml_loads


class Small(nn.Module):
    """Two branches with BatchNorm, flatten, two Linears: every kind of rewrite that a deployed graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.c, self.d = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 4)
        sources.randomise(self)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.b(self.a(x)) + self.d(self.c(x)))
        return self.second(self.first(y.flatten(1))), y


def small(batch: int = 2, dynamic: bool = True) -> tuple[Small, Tensor, ExportedProgram, ExportedProgram]:
    model, x = Small(), torch.randn(batch, 3, 4, 4)
    shapes = ({0: Dim.AUTO},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    return model, x, program, fxconv.transform(program)


def operators(program: ExportedProgram) -> list[str]:
    return [str(n.target).split(".")[-2].rsplit("::")[-1] for n in program.graph.nodes if n.op == "call_function"]


def close(outputs: Any, expected: Any) -> None:
    for a, b in zip(deploy.flat(outputs), deploy.flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_onnx_keeps_symbolic_sizes(tmp_path: Path) -> None:
    model, x, _, after = small()
    path = deploy.onnx_file(after, tmp_path)
    gm = fxconv.transform(model, x)
    with deploy.quiet():
        onnx_program = torch.onnx.export(gm, (x,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    assert onnx_program is not None
    other = tmp_path / "module.onnx"
    onnx_program.save(str(other))
    for file in (path, other):
        for batch in (1, 2, 5):
            y = torch.randn(batch, 3, 4, 4)
            close(deploy.run_onnx(file, [y]), model(y))


@pytest.mark.parametrize("target", [None, "conv"])
def test_executorch_pass_in_the_edge_dialect(target: str | None, tmp_path: Path) -> None:
    from executorch.exir import to_edge_transform_and_lower

    from fxconv.pipelines import ExecuTorchPass

    model, x, before, _ = small(1, dynamic=False)
    ours = ExecuTorchPass(target=target)
    edge = to_edge_transform_and_lower(before, transform_passes=[ours]).exported_program()
    assert ours.report is not None and ours.report.verified and ours.report.applied
    names = operators(edge)
    assert "_native_batch_norm_legit_no_training" not in names and ("addmm" in names) is (target is None)
    weights = [n for n in edge.graph.nodes if n.op == "placeholder"]
    assert all(n.users for n in weights) and len(weights) == len(edge.graph_signature.input_specs)
    close(deploy.executorch(before, [x], tmp_path, transform_passes=[ExecuTorchPass(target=target)]), model(x))


def test_executorch_pass_leaves_alone_what_it_does_not_change() -> None:
    from executorch.exir import to_edge

    from fxconv.pipelines import ExecuTorchPass

    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    program = torch.export.export(plain, (torch.randn(1, 3, 8, 8),))
    edge = to_edge(program).exported_program()
    before = str(edge.graph)
    result = ExecuTorchPass()(edge)
    assert not result.modified and result.exported_program is edge and str(edge.graph) == before


def test_core_ml_converts_with_fewer_operators() -> None:
    _, _, before, after = small(1, dynamic=False)
    old, new = map(deploy.core_ml_operators, (before, after))
    assert old["conv"] == 2 and new["conv"] == 1 and old["linear"] == 2 and new["linear"] == 1
    assert "add" in old and "add" not in new and sum(new.values()) < sum(old.values())


# --- quantisation --------------------------------------------------------------------------------------------------


def test_a_transformed_graph_is_quantised(tmp_path: Path) -> None:
    model, _, before, after = small(1, dynamic=False)
    calibration = [torch.randn(1, 3, 4, 4) for _ in range(16)]
    errors, quantised = [], []
    for program in (before, after):
        prepared = deploy.prepared(program)
        for x in calibration:
            prepared(x)
        converted = deploy.converted(prepared)
        kernels = [n for n in converted.graph.nodes if "dequantize_per_channel" in str(n.target)]
        assert len(kernels) == (4 if program is before else 2), "every weight is quantised per channel"
        errors.append(max(float((converted(x)[0] - model(x)[0]).abs().max()) for x in calibration))
        quantised.append(converted)
    scale = max(float(model(x)[0].abs().max()) for x in calibration)
    assert errors[1] <= 2 * errors[0] + 0.02 * scale, "fusing costs no accuracy in int8"
    x = calibration[0]
    deployed = deploy.executorch(torch.export.export(quantised[1], (x,)), [x], tmp_path)
    assert deploy.error(deployed[:1], [model(x)[0].double()]) < 0.1


def test_observed_and_quantised_graphs_are_refused() -> None:
    _, x, before, _ = small(1, dynamic=False)
    prepared = deploy.prepared(before)
    prepared(x)
    with pytest.raises(CaptureError, match="prepared for quantisation .*Observer"):
        fxconv.transform(prepared, x)
    converted = deploy.converted(prepared)
    with pytest.raises(CaptureError, match="the graph is quantised .*quantized_decomposed"):
        fxconv.transform(converted, x)
    with pytest.raises(CaptureError, match="the graph is quantised"):
        fxconv.transform(torch.export.export(converted, (x,)))

    from executorch.exir import to_edge

    from fxconv.pipelines import ExecuTorchPass

    with pytest.raises(CaptureError, match="the graph is quantised .*quantized_decomposed"):
        ExecuTorchPass()(to_edge(torch.export.export(converted, (x,))).exported_program())


def test_weights_of_quantize_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """torchao's `quantize_` leaves Linears, whose weights are no plain tensors; a compiled model must still run."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval(), torch.randn(2, 32)
    quantize_(model, Int8WeightOnlyConfig())
    for given, args in ((model, (x,)), (torch.export.export(model, (x,)), ())):
        with pytest.raises(CaptureError, match="0.weight is no plain tensor but a torchao.*transform the float model"):
            fxconv.transform(given, *args)
    backend = fxconv.backend("eager")
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert not backend.reports and "0.weight is no plain tensor" in caplog.text


# --- what the runs above need -----------------------------------------------------------------------------------------


def test_everything_that_an_extra_names_is_installed() -> None:
    """A runtime that is missing fails here, whatever else it does; the tests install all extras."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    extras = _toml_loads()(text)["project"]["optional-dependencies"]
    installs = set(re.findall(r"[\w-]+", extras["test"][0].partition("[")[2]))
    assert installs == set(extras) - {"test"} >= {"onnx", "openvino", "executorch", "coreml"}
    for extra in extras.values():
        for requirement in map(Requirement, extra):
            if requirement.name != "fxconv" and (requirement.marker is None or requirement.marker.evaluate()):
                assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement
