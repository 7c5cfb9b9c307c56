"""Deployed results of transformed models, in every runtime, against the deployed results of the originals.

Both are measured against the original in float64: the transformed model may be off by what rounding makes of the original,
not by more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deploy
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxconv
from fxconv import sources
from fxconv.errors import CaptureError


class Head(nn.Module):
    """SegFormer's decode head on four feature maps."""

    def __init__(self) -> None:
        super().__init__()
        built = sources.load("hf:SegformerForSemanticSegmentation:depths=[1,1,1,1],num_labels=19").model
        assert isinstance(built, nn.Module)
        self.head = built.get_submodule("decode_head")

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        result: Tensor = self.head([a, b, c, d])
        return result


def _vgg11() -> nn.Module:
    import torchvision

    model = torchvision.models.vgg11()
    # 119 million weights less, in Linears of the same kind.
    model.classifier[0], model.classifier[3] = nn.Linear(25088, 64), nn.Linear(64, 64)
    model.classifier[6] = nn.Linear(64, 10)
    sources.randomise(model)
    return model.eval()


def _named(text: str) -> Callable[[], nn.Module]:
    def load() -> nn.Module:
        model = sources.load(text).model
        assert isinstance(model, nn.Module)
        return model

    return load


IMAGE = ((3, 64, 64),)
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], str | None]] = {
    "resnet18": (_named("torchvision:resnet18"), IMAGE, None),
    "mobileone_s0": (_named("timm:mobileone_s0"), IMAGE, None),
    "segformer_head": (Head, ((32, 16, 16), (64, 8, 8), (160, 4, 4), (256, 2, 2)), None),
    "vgg11": (_vgg11, IMAGE, "conv"),
}


@dataclass
class Case:
    """A model as programs of fixed size 1, before and after, and what it should compute."""

    name: str
    inputs: tuple[Tensor, ...]
    before: ExportedProgram
    after: ExportedProgram
    reference: list[Tensor]


@pytest.fixture(scope="module", params=list(ZOO))
def case(request: pytest.FixtureRequest) -> Case:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build, shapes, target = ZOO[request.param]
    model = build()
    inputs = tuple(torch.randn(1, *shape) for shape in shapes)
    with torch.no_grad():
        before = torch.export.export(model, inputs)
        after = fxconv.transform(before, target=target)
        assert isinstance(after, ExportedProgram)
        reference = deploy.flat(model.double()(*(x.double() for x in inputs)))
        model.float()
    report = fxconv.report(after)
    assert report.verified and report.applied
    return Case(request.param, inputs, before, after, reference)


DEPLOYED_BEFORE = ("segformer_head", "vgg11")
"""Originals that are deployed too. The others take minutes to lower; PyTorch's own rounding stands in for them."""


def as_accurate(case: Case, run: Callable[[ExportedProgram], list[Tensor]]) -> None:
    before = run(case.before) if case.name in DEPLOYED_BEFORE else deploy.flat(case.before.module()(*case.inputs))
    old, new = deploy.error(before, case.reference), deploy.error(run(case.after), case.reference)
    assert new <= 4 * old + 2e-6, f"{case.name}: off by {new:.1e}, the original by {old:.1e}"


def test_numbers_survive(case: Case, tmp_path: Path) -> None:
    if case.name == "vgg11":
        names = {str(n.target) for n in case.after.graph.nodes}
        assert "aten.linear.default" not in names and "aten.addmm.default" not in names
    as_accurate(case, lambda p: deploy.eager(p, case.inputs, tmp_path))
    as_accurate(case, lambda p: deploy.openvino(p, case.inputs, tmp_path))
    as_accurate(case, lambda p: deploy.executorch(p, case.inputs, tmp_path))

    def onnx(program: ExportedProgram) -> list[Tensor]:
        path = deploy.onnx_file(program, tmp_path)
        runs = deploy.run_onnx(path, case.inputs), deploy.run_openvino(str(path), case.inputs)
        return max(runs, key=lambda outputs: deploy.error(outputs, case.reference))

    as_accurate(case, onnx)


# --- one small model, for what need not be run on large ones -------------------------------------------------------


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


def test_aot_inductor_package(tmp_path: Path) -> None:
    model, x, _, after = small()
    close(deploy.aot_inductor(after, [x], tmp_path), model(x))


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
    import coremltools

    _, _, before, after = small(1, dynamic=False)
    counts = []
    for program in (before, after):
        with deploy.quiet():
            package = coremltools.convert(program.run_decompositions({}), convert_to="mlprogram",
                                          minimum_deployment_target=coremltools.target.iOS17)  # fmt: skip
        kinds: list[str] = []
        for block in package.get_spec().mlProgram.functions["main"].block_specializations.values():
            kinds += [op.type for op in block.operations if op.type != "const"]
        counts.append({kind: kinds.count(kind) for kind in set(kinds)})
    old, new = counts
    assert old["conv"] == 2 and new["conv"] == 1 and old["linear"] == 2 and new["linear"] == 1
    assert "add" in old and "add" not in new and sum(new.values()) < sum(old.values())


# --- quantisation --------------------------------------------------------------------------------------------------


def _prepare(program: ExportedProgram) -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    return prepare_pt2e(program.module(), quantizer)


def test_a_transformed_graph_is_quantised(tmp_path: Path) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    model, _, before, after = small(1, dynamic=False)
    calibration = [torch.randn(1, 3, 4, 4) for _ in range(16)]
    errors, quantised = [], []
    for program in (before, after):
        prepared = _prepare(program)
        for x in calibration:
            prepared(x)
        converted = convert_pt2e(prepared)
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
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    _, x, before, _ = small(1, dynamic=False)
    prepared = _prepare(before)
    prepared(x)
    with pytest.raises(CaptureError, match="prepared for quantisation .*Observer"):
        fxconv.transform(prepared, x)
    converted = convert_pt2e(prepared)
    with pytest.raises(CaptureError, match="the graph is quantised .*quantized_decomposed"):
        fxconv.transform(converted, x)
    with pytest.raises(CaptureError, match="the graph is quantised"):
        fxconv.transform(torch.export.export(converted, (x,)))
