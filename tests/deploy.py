"""Deployed runs: one function per runtime, from an ExportedProgram and inputs to a list of output tensors."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

Outputs = list[Tensor]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters print what nobody asked for."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def eager(program: ExportedProgram, inputs: Sequence[Tensor], folder: Path) -> Outputs:
    """PyTorch itself, after saving and loading a .pt2."""
    torch.export.save(program, folder / "model.pt2")
    loaded = torch.export.load(folder / "model.pt2")
    with torch.no_grad():
        return flat(loaded.module()(*inputs))


QUICK = {
    "cpp.vec_isa_ok": True,
    "cpp_cache_precompile_headers": False,
    "compile_threads": 1,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
"""Inductor without checks and optimisations by the C++ compiler that take longer than all that is run here."""


@contextlib.contextmanager
def quick_inductor(cache: Path) -> Iterator[None]:
    """torch.compile with one C++ file a graph, and a cache of its own."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    try:
        with torch._inductor.config.patch(cpp_wrapper=True, **{**QUICK, "aot_inductor.debug_compile": True}):
            yield
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def aot_inductor(program: ExportedProgram, inputs: Sequence[Tensor], folder: Path) -> Outputs:
    """An AOTInductor package."""
    options = {**QUICK, "aot_inductor.precompile_headers": False}
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model_aoti.pt2"), inductor_configs=options)
    return flat(torch._inductor.aoti_load_package(path)(*inputs))


def onnx_file(program: ExportedProgram, folder: Path) -> Path:
    """The program as an ONNX file."""
    path = folder / "model.onnx"
    with quiet():
        onnx_program = torch.onnx.export(program, (), dynamo=True, verbose=False)
    assert onnx_program is not None
    onnx_program.save(str(path))
    return path


def run_onnx(path: Path, inputs: Sequence[Tensor]) -> Outputs:
    """ONNX Runtime on the CPU, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def run_openvino(source: Any, inputs: Sequence[Tensor]) -> Outputs:
    """OpenVINO's CPU plugin, one thread, float32, from an ExportedProgram or the path of an ONNX file."""
    import openvino

    with quiet():
        model = openvino.convert_model(source)
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    result = compiled([x.numpy() for x in inputs])
    return [torch.from_numpy(result[port].copy()) for port in compiled.outputs]


def openvino(program: ExportedProgram, inputs: Sequence[Tensor], folder: Path) -> Outputs:
    """OpenVINO from the exported program."""
    return run_openvino(program, inputs)


def executorch(
    program: ExportedProgram, inputs: Sequence[Tensor], folder: Path, transform_passes: Sequence[Any] | None = None
) -> Outputs:
    """A .pte for XNNPACK, run by ExecuTorch's runtime."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    edge = to_edge_transform_and_lower(program, transform_passes=transform_passes, partitioner=[XnnpackPartitioner()])
    path = folder / "model.pte"
    path.write_bytes(edge.to_executorch().buffer)
    loaded = Runtime.get().load_program(path)
    method = loaded.load_method("forward")
    assert method is not None
    return [y.clone() for y in method.execute(list(inputs))]


def core_ml_operators(program: ExportedProgram) -> dict[str, int]:
    """How many operators of each kind Core ML makes of a program; it cannot run them here."""
    import coremltools

    with quiet():
        package = coremltools.convert(
            program.run_decompositions({}), convert_to="mlprogram", minimum_deployment_target=coremltools.target.iOS17
        )
    kinds: list[str] = []
    for block in package.get_spec().mlProgram.functions["main"].block_specializations.values():
        kinds += [op.type for op in block.operations if op.type != "const"]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def prepared(program: ExportedProgram) -> Any:
    """A program with the observers of PT2E quantisation, for XNNPACK's quantiser."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    return prepare_pt2e(program.module(), quantizer)


def converted(module: Any) -> Any:
    """A prepared and calibrated module in int8."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    return convert_pt2e(module)


def flat(value: Any) -> Outputs:
    """The tensors of a structured output."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def error(outputs: Outputs, reference: Outputs) -> float:
    """Largest difference, relative to the magnitude of the reference's largest entry."""
    assert [tuple(a.shape) for a in outputs] == [tuple(b.shape) for b in reference]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(outputs, reference, strict=True))
