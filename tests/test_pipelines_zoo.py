"""Every pipeline on four networks: the deployed result of the transformed model against that of the original.

Both are measured against the original in float64. A runtime rounds in its own way, and may round the transformed model
as much as it rounds the original, up to a factor; it may not do worse.
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
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_manager import PassManager

import fxconv
from fxconv import sources
from fxconv.pipelines import ExecuTorchPass, InductorPass, TransformPass


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

SLOW = ("mobileone_s0",)
"""Networks of a thousand operators before they are transformed and a hundred after."""


@dataclass
class Case:
    """A model and its programs of fixed size 1, before and after, and what they should compute."""

    name: str
    model: nn.Module
    target: str | None
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
    return Case(request.param, model, target, inputs, before, after, reference)


def test_target_conv_leaves_no_linear(case: Case) -> None:
    if case.target == "conv":
        names = {str(n.target) for n in case.after.graph.nodes}
        assert not names & {"aten.linear.default", "aten.addmm.default", "aten.mm.default", "aten.matmul.default"}


# --- how each runtime runs a program ---------------------------------------------------------------------------------

Deploy = Callable[[ExportedProgram, tuple[Tensor, ...], Path], list[Tensor]]


def _onnx_runtime(program: ExportedProgram, inputs: tuple[Tensor, ...], folder: Path) -> list[Tensor]:
    return deploy.run_onnx(deploy.onnx_file(program, folder), inputs)


def _openvino_from_onnx(program: ExportedProgram, inputs: tuple[Tensor, ...], folder: Path) -> list[Tensor]:
    return deploy.run_openvino(str(deploy.onnx_file(program, folder)), inputs)


RUNTIMES: dict[str, Deploy] = {
    "saved": deploy.eager,
    "aot_inductor": deploy.aot_inductor,
    "onnx_runtime": _onnx_runtime,
    "openvino": deploy.openvino,
    "openvino_from_onnx": _openvino_from_onnx,
    "executorch": deploy.executorch,
}

FACTOR, FLOOR = 4, 2e-6
"""How many times the original's error the transformed model's may be, and what is always allowed: some roundoffs of float32."""


class Deployed:
    """Errors of deployed originals, each found once."""

    def __init__(self, everything: bool) -> None:
        self.everything = everything
        self.errors: dict[tuple[str, str], float] = {}

    def error(self, case: Case, runtime: str, folder: Path) -> float:
        if not self.everything and (runtime == "aot_inductor" or case.name in SLOW):
            runtime = "saved"  # PyTorch's own rounding stands in for that of an original that takes a minute to lower
        key = case.name, runtime
        if key not in self.errors:
            self.errors[key] = deploy.error(RUNTIMES[runtime](case.before, case.inputs, folder), case.reference)
        return self.errors[key]


@pytest.fixture(scope="module")
def deployed(request: pytest.FixtureRequest) -> Deployed:
    return Deployed(bool(request.config.getoption("--full")))


def as_accurate(case: Case, outputs: list[Tensor], original: float) -> None:
    new = deploy.error(outputs, case.reference)
    assert new <= FACTOR * original + FLOOR, f"{case.name}: off by {new:.1e}, the original by {original:.1e}"


@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_a_transformed_program(case: Case, runtime: str, deployed: Deployed, tmp_path: Path) -> None:
    as_accurate(case, RUNTIMES[runtime](case.after, case.inputs, tmp_path), deployed.error(case, runtime, tmp_path))


# --- where fxconv runs inside of a pipeline --------------------------------------------------------------------------


def _transformed_module(case: Case) -> Any:
    return torch.compile(fxconv.transform(case.model, case.inputs, target=case.target))


def _backend(case: Case) -> Any:
    return torch.compile(case.model, backend=fxconv.backend("inductor", target=case.target))


def _inductor_pass(case: Case) -> Any:
    ours = InductorPass(case.model, target=case.target)
    compiled = torch.compile(case.model)

    def call(*inputs: Tensor) -> Any:
        with torch._inductor.config.patch(pre_grad_custom_pass=ours):
            outputs = compiled(*inputs)
        assert len(ours.reports) == 1 and ours.reports[0].verified and ours.reports[0].applied
        return outputs

    return call


@pytest.mark.parametrize("how", [_transformed_module, _backend, _inductor_pass])
def test_torch_compile(case: Case, how: Callable[[Case], Any], deployed: Deployed, tmp_path: Path) -> None:
    torch._dynamo.reset()
    with torch.no_grad(), deploy.quick_inductor(tmp_path):
        outputs = deploy.flat(how(case)(*case.inputs))
    torch._dynamo.reset()
    as_accurate(case, outputs, deployed.error(case, "aot_inductor", tmp_path))


def test_pass_manager(case: Case, deployed: Deployed, tmp_path: Path) -> None:
    ours = TransformPass(case.inputs, target=case.target)
    result = PassManager(passes=[ours])(case.before.module())
    assert result.modified and ours.report is not None and ours.report.verified
    with torch.no_grad():
        outputs = deploy.flat(result.graph_module(*case.inputs))
    as_accurate(case, outputs, deployed.error(case, "saved", tmp_path))


def test_executorch_pass(case: Case, deployed: Deployed, tmp_path: Path) -> None:
    from executorch.exir import to_edge_transform_and_lower

    ours = ExecuTorchPass(target=case.target)
    edge = to_edge_transform_and_lower(case.before, transform_passes=[ours]).exported_program()
    assert ours.report is not None and ours.report.verified and ours.report.applied
    with torch.no_grad():
        outputs = deploy.flat(edge.module()(*case.inputs))
    as_accurate(case, outputs, deployed.error(case, "saved", tmp_path))


# --- what cannot be run here, or rounds on purpose -------------------------------------------------------------------


def test_core_ml(case: Case) -> None:
    new = deploy.core_ml_operators(case.after)
    assert "batch_norm" not in new
    convolutions = [n for n in case.after.graph.nodes if n.op == "call_function" and "conv" in str(n.target)]
    assert new.get("conv", 0) + new.get("conv_transpose", 0) == len(convolutions)
    if case.target == "conv":
        assert not {"linear", "matmul"} & set(new)
    old = deploy.core_ml_operators(case.before)
    weighted = [sum(ops.get(kind, 0) for kind in ("conv", "linear", "matmul", "batch_norm")) for ops in (old, new)]
    assert weighted[1] <= weighted[0]


def test_quantised(case: Case) -> None:
    errors = []
    for program in (case.before, case.after):
        prepared = deploy.prepared(program)
        prepared(*case.inputs)
        with torch.no_grad():
            errors.append(deploy.error(deploy.flat(deploy.converted(prepared)(*case.inputs)), case.reference))
    assert errors[1] <= 2 * errors[0] + 0.02, "fusing costs no accuracy in int8"
