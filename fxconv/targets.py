"""Writing a result to a file, in the format that the file's name asks for.

.pt2    torch.export program, with the report inside (`extra_files["fxconv.json"]`)
.onnx   ONNX, through torch.onnx.export's exported-program route
.pte    ExecuTorch, lowered to XNNPACK
.xml    OpenVINO IR, with the weights in a .bin beside it
.json   the report alone
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from .errors import FxconvError, OptionError
from .options import nearest
from .report import Report
from .sources import _need

log = logging.getLogger(__name__)

REPORT_FILE = "fxconv.json"
"""Name under which a .pt2 carries its report."""

DYNAMIC = ("batch", "all", "none")

_ONNX_INLINE_BYTES = 1_500_000_000  # protobuf's limit is 2 GB; weights beyond go into a file beside the model


def export(
    result: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic: str = "batch",
) -> ExportedProgram:
    """`result` as an ExportedProgram (as it is, if it is one), with dynamic first dims, all dims dynamic, or none.

    A batch of 1 is exported at 2, since torch.export takes 0 and 1 for constants. Where the model does not allow the
    sizes to vary, the sizes of `args` are fixed, and a warning is logged.
    Raises FxconvError where torch.export cannot export the module at all.
    """
    if isinstance(result, ExportedProgram):
        return result
    kwargs = dict(kwargs or {})
    attempts: list[tuple[Any, Any, Any]] = []
    if dynamic != "none":
        wide_args, wide_kwargs = pytree.tree_map(_at_least_two, (tuple(args), kwargs))
        spec = pytree.tree_map(lambda t: _dims(t, dynamic), (tuple(args), kwargs))
        attempts.append((wide_args, wide_kwargs, {**_named(result, spec[0]), **spec[1]}))
    attempts.append((tuple(args), kwargs, None))
    failure: Exception | None = None
    for a, k, shapes in attempts:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.export(result, a, k, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch.export raises whatever the model's code met
            failure = error
            if shapes is not None:
                log.warning("cannot export with dynamic sizes (%s): exporting with fixed ones", _first_line(error))
    raise FxconvError(
        f"torch.export cannot export the result: {failure and _first_line(failure)}. A model that was captured in "
        "parts keeps the Python that stopped the capture: save it with torch.save(result, path) instead"
    ) from failure


def write(
    path: str | Path,
    result: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    report: Report,
    dynamic: str | None = None,
) -> None:
    """Write `result` to `path` in the format of its suffix.

    dynamic: which sizes stay variable, "batch", "all" or "none"; by default "batch", and "none" for .pte, whose memory
    is planned ahead. Raises OptionError for an unknown suffix, FxconvError where a needed package is missing.
    """
    path = Path(path)
    writer = writer_for(path)
    if writer is _json:
        path.write_text(report.to_json() + "\n", encoding="utf-8")
        return
    program = export(result, args, kwargs, dynamic or ("none" if path.suffix == ".pte" else "batch"))
    # Exporters print; stdout belongs to the report.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer(path, program, report)


def writer_for(path: str | Path) -> Callable[[Path, ExportedProgram, Report], None]:
    """The writer for this file name. Raises OptionError, which lists the known suffixes, if there is none."""
    suffix = Path(path).suffix
    if suffix not in _WRITERS:
        raise OptionError(f"cannot write {str(path)!r}: unknown suffix {suffix!r}; {nearest(suffix, _WRITERS)}")
    return _WRITERS[suffix]


def embedded_report(path: str | Path) -> Report | None:
    """The report inside a .pt2 that `write` wrote, None where there is none."""
    extra = {REPORT_FILE: ""}
    torch.export.load(str(path), extra_files=extra)
    return Report.from_json(extra[REPORT_FILE]) if extra[REPORT_FILE] else None


def _pt2(path: Path, program: ExportedProgram, report: Report) -> None:
    torch.export.save(program, str(path), extra_files={REPORT_FILE: report.to_json()})


def _onnx(path: Path, program: ExportedProgram, report: Report) -> None:
    _need("onnxscript", "onnx")
    weights = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    onnx_program = torch.onnx.export(program, (), dynamo=True, verbose=False)
    if onnx_program is None:
        raise FxconvError("torch.onnx.export gave no program")
    onnx_program.save(str(path), external_data=weights > _ONNX_INLINE_BYTES)


def _pte(path: Path, program: ExportedProgram, report: Report) -> None:
    exir = _need("executorch.exir", "executorch")
    partition = _need("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    edge = exir.to_edge_transform_and_lower(program, partitioner=[partition.XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)


def _xml(path: Path, program: ExportedProgram, report: Report) -> None:
    openvino = _need("openvino", "openvino")
    # Half-precision weights are save_model's default, and would be an approximation that nobody asked for.
    openvino.save_model(openvino.convert_model(program), str(path), compress_to_fp16=False)


def _json(path: Path, program: ExportedProgram, report: Report) -> None:
    path.write_text(report.to_json() + "\n", encoding="utf-8")


_WRITERS: dict[str, Callable[[Path, ExportedProgram, Report], None]] = {
    ".pt2": _pt2,
    ".onnx": _onnx,
    ".pte": _pte,
    ".xml": _xml,
    ".json": _json,
}


def _at_least_two(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == 1:
        return value.expand(2, *value.shape[1:]).contiguous()
    return value


def _dims(value: Any, dynamic: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return None
    return {d: Dim.AUTO for d in range(value.ndim) if d == 0 or dynamic == "all"}


def _named(module: nn.Module, specs: Sequence[Any]) -> dict[str, Any]:
    """Positional dynamic shapes by parameter name, which is how torch.export wants them beside keyword arguments."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    names = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    fixed = len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)])
    named = dict(zip(names[:fixed], specs[:fixed], strict=False))
    if variadic is not None and len(specs) > fixed:
        named[variadic] = tuple(specs[fixed:])
    return named


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
