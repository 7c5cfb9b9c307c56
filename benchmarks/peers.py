"""What a user would pick instead of fxconv, or after it: each turns a module into something to call on the same
tensors."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

Runner = Callable[..., Any]


class NotApplicable(Exception):
    """The peer does not take this model; the text says why."""


def eager(model: nn.Module, args: tuple[Any, ...]) -> Runner:
    """PyTorch as it is."""
    return model


def fx_fuse(model: nn.Module, args: tuple[Any, ...]) -> Runner:
    """torch.fx.experimental.optimization.fuse: BatchNorm into the convolution before it."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(model).eval()
    except Exception as error:  # symbolic_trace raises whatever the model's code met
        raise NotApplicable(f"fuse: {_first_line(error)}") from error


def compiled(model: nn.Module, args: tuple[Any, ...]) -> Runner:
    """torch.compile with freezing."""
    import torch._inductor.config as config

    config.freezing = True
    runner: Runner = torch.compile(model)
    with torch.no_grad():
        try:
            runner(*args)
        except Exception as error:  # no C++ compiler, for one
            raise NotApplicable(f"torch.compile: {_first_line(error)}") from error
    return runner


def reparameterized(model: nn.Module, args: tuple[Any, ...]) -> Runner:
    """timm's reparameterize_model, where a model has it."""
    from timm.utils import reparameterize_model

    methods = ("reparameterize", "switch_to_deploy", "fuse")
    if not any(hasattr(m, name) for m in model.modules() for name in methods):
        raise NotApplicable("reparameterize_model: no module has a method for it")
    runner: Runner = reparameterize_model(model)
    return runner


def onnxruntime(model: nn.Module, args: tuple[Any, ...]) -> Runner:
    """ONNX Runtime, all graph optimisations."""
    return _session(to_onnx(model, args))


def onnxslim(model: nn.Module, args: tuple[Any, ...]) -> Runner:
    """onnxslim, then ONNX Runtime."""
    import onnx

    tool = importlib.import_module("onnxslim")
    with _silence():
        return _session(tool.slim(onnx.load_from_string(to_onnx(model, args))).SerializeToString())


def onnxsim(model: nn.Module, args: tuple[Any, ...]) -> Runner:
    """onnxsim, then ONNX Runtime."""
    import onnx

    tool = importlib.import_module("onnxsim")
    with _silence():
        simplified, _ = tool.simplify(onnx.load_from_string(to_onnx(model, args)))
    return _session(simplified.SerializeToString())


def openvino(model: nn.Module, args: tuple[Any, ...]) -> Runner:
    """OpenVINO on the CPU in float32, from the same ONNX file."""
    import openvino as ov

    core = ov.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(to_onnx(model, args))
        request = core.compile_model(str(path), "CPU", options).create_infer_request()

    def run(*tensors: Any) -> Any:
        return request.infer([t.numpy() for t in pytree.tree_leaves(tensors)], share_inputs=True, share_outputs=True)

    return run


PEERS: dict[str, Callable[[nn.Module, tuple[Any, ...]], Runner]] = {
    "eager": eager,
    "fx_fuse": fx_fuse,
    "reparameterize": reparameterized,
    "onnxruntime": onnxruntime,
    "onnxslim": onnxslim,
    "onnxsim": onnxsim,
    "openvino": openvino,
    "compile": compiled,
}

ONLY_ALONE = frozenset(("fx_fuse", "reparameterize"))
"""Peers that look for modules, of which fxconv's result has none left that they know."""


def to_onnx(model: nn.Module, args: tuple[Any, ...]) -> bytes:
    """The model as ONNX: both sides of a comparison go the same way."""
    failure: Exception | None = None
    for dynamo in (False, True):
        with tempfile.TemporaryDirectory() as folder, _silence(), torch.no_grad():
            path = Path(folder) / "model.onnx"
            try:
                torch.onnx.export(model, args, str(path), dynamo=dynamo, external_data=False, verbose=False)
                return path.read_bytes()
            except Exception as error:  # exporters raise whatever the model's code met
                failure = error
    raise NotApplicable(f"torch.onnx.export: {_first_line(failure)}")


def _session(model: bytes) -> Runner:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*tensors: Any) -> Any:
        return session.run(None, {n: t.numpy() for n, t in zip(names, pytree.tree_leaves(tensors), strict=True)})

    return run


@contextlib.contextmanager
def _silence() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
