"""The command line as a stage of a shell pipeline: a saved program in, a deployable file out, an exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import deploy
import torch
from factories import small_cnn

from fxconv.report import Report


def test_a_saved_program_becomes_an_onnx_file_without_linears(tmp_path: Path) -> None:
    import onnx

    model, x = small_cnn(), torch.randn(2, 3, 9, 7)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), tmp_path / "in.pt2")
    script = Path(sys.executable).with_name("fxconv")
    line = f"set -e; {script} transform in.pt2 --out out.onnx --target conv --report r.json --no-time --quiet"
    unverified = f"{script} transform in.pt2 --out out.pt2 --verify off --no-time --quiet"
    done = subprocess.run(
        ["/bin/bash", "-c", f"{line}; {unverified} || echo code $?"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("code 1"), "an unverified result must not look like success"
    report = Report.from_json((tmp_path / "r.json").read_text())
    assert report.verified and report.target == "conv"
    kinds = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert "Conv" in kinds and "BatchNormalization" not in kinds and not {"Gemm", "MatMul"} & set(kinds)
    for batch in (1, 2, 4):
        y = torch.randn(batch, 3, 9, 7)
        torch.testing.assert_close(deploy.run_onnx(tmp_path / "out.onnx", [y])[0], model(y), rtol=1e-4, atol=1e-5)
