"""README's recipes, run as they are written, on a small model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import deploy
import pytest
import torch
from factories import small_cnn

import fxconv
from fxconv.cli import OK, main
from fxconv.report import Report

README = (Path(__file__).parent.parent / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


RECIPES: dict[str, str] = {
    head.split(",")[0].rstrip("."): body
    for head, body in re.findall(r"^\*\*(.+?)\*\*(.*?)(?=^\*\*|\Z)", section("Recipes"), flags=re.DOTALL | re.MULTILINE)
}


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a recipe takes for granted, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    model, x = small_cnn(), torch.randn(2, 3, 9, 7)
    program = torch.export.export(model, (x,))
    return {
        "torch": torch, "fxconv": fxconv, "model": model, "x": x, "other_model": small_cnn(), "program": program,
        "graph_module": torch.fx.symbolic_trace(model),
    }  # fmt: skip


def ran(recipe: str, names: dict[str, Any]) -> dict[str, Any]:
    (code,) = blocks(RECIPES[recipe], "python")
    with deploy.quiet():
        exec(code, names)
    return names


def close(outputs: Any, names: dict[str, Any]) -> None:
    torch.testing.assert_close(outputs, names["model"](names["x"]), rtol=1e-4, atol=1e-5)


def test_every_recipe_is_run_here() -> None:
    tested = {"torch.compile", "Inductor's own pass", "fx pass managers", "torch.export", "ExecuTorch", "Quantisation"}
    assert set(RECIPES) == tested | {"A build script"}


def test_in_python(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = section("In Python")
    (code,) = blocks(text, "python")
    exec(code, names)
    close(names["fast"](names["x"]), names)
    close(names["conv"](names["x"]), names)
    assert "rewrites: 2" in capsys.readouterr().out and fxconv.report(names["conv"]).target == "conv"
    (table,) = blocks(text, "toml")
    Path("pyproject.toml").write_text(table)
    assert fxconv.Options.from_toml("pyproject.toml").deny == ("head.*",)


def test_torch_compile(names: dict[str, Any]) -> None:
    """Dynamo's part; `test_pipelines_compile.py` compiles with Inductor."""
    torch._dynamo.reset()
    found: list[Any] = []

    def compile(model: Any, backend: Any = "inductor") -> Any:
        found.append(backend)
        return torch.compile(model, backend="eager" if backend == "inductor" else fxconv.backend("eager"))

    class Torch:
        """torch, but for `compile`."""

        def __getattr__(self, name: str) -> Any:
            return compile if name == "compile" else getattr(torch, name)

    (code,) = blocks(RECIPES["torch.compile"], "python")
    scope = {**names, "torch": Torch()}
    for line in code.splitlines():
        exec(line, scope)
        with torch.no_grad():
            close(scope["fast"](names["x"]), names)
    assert found[:2] == ["inductor", "fxconv"] and isinstance(found[2], fxconv.pipelines.Backend)
    assert (found[2].inner, found[2].options.objective) == ("inductor", "macs") and "fxconv" in torch._dynamo.list_backends()


def test_inductor_pass(names: dict[str, Any]) -> None:
    with torch._inductor.config.patch(pre_grad_custom_pass=None):
        ran("Inductor's own pass", names)
        assert torch._inductor.config.pre_grad_custom_pass.model is names["model"]


def test_pass_manager(names: dict[str, Any]) -> None:
    result = ran("fx pass managers", names)["result"]
    assert result.modified
    close(result.graph_module(names["x"]), names)


def test_export(names: dict[str, Any], tmp_path: Path) -> None:
    with torch._inductor.config.patch({**deploy.QUICK, "aot_inductor.precompile_headers": False}):
        ran("torch.export", names)
    assert fxconv.report(names["program"]).applied
    saved, package = torch.export.load("model.pt2").module(), torch._inductor.aoti_load_package("model_aoti.pt2")
    for batch in (1, 2, 5):
        names["x"] = x = torch.randn(batch, 3, 9, 7)
        close(saved(x), names)
        close(package(x), names)
        close(deploy.run_onnx(tmp_path / "model.onnx", [x])[0], names)
    close(deploy.run_openvino("model.onnx", [x])[0], names)


def test_executorch(names: dict[str, Any]) -> None:
    ran("ExecuTorch", names)


def test_quantisation(names: dict[str, Any]) -> None:
    ran("Quantisation", names)
    with torch.no_grad():
        expected = names["model"](names["x"])
        assert float((names["quantised"](names["x"]) - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_build_script(names: dict[str, Any]) -> None:
    torch.export.save(names["program"], "in.pt2")
    (line,) = blocks(RECIPES["A build script"], "sh")
    command, *arguments = shlex.split(line)
    assert command == "fxconv" and main([*arguments, "--no-time", "--quiet"]) == OK
    assert Path("out.onnx").is_file() and Report.from_json(Path("r.json").read_text()).verified
