"""The package as others get it: `passes/` is `fxconv.passes`, editable or plainly installed, and never loaded twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fxconv
from fxconv.version import __version__

ROOT = Path(__file__).resolve().parent.parent
IMPORT = "import fxconv, fxconv.passes, fxconv.pipelines as p; print(fxconv.passes.__file__); print(p.__file__)"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(list(map(str, command)), cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=300)


def checked(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is installed from here: builds leave their traces in it, not in the real checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("fxconv", "passes"):
        for source in (ROOT / folder).rglob("*"):
            if source.suffix == ".py" or source.name == "py.typed":
                target = copy / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


def install(checkout: Path, target: Path, *options: str) -> Path:
    """pip install into a prefix of its own, with this environment's setuptools; returns its site-packages."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    checked(*pip, "--prefix", target, "--ignore-installed", *options, checkout, cwd=checkout)
    (site,) = target.rglob("site-packages")
    return site


@pytest.fixture(scope="module")
def plain(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(checkout, tmp_path_factory.mktemp("plain"))


def test_plain_install_has_the_laws_inside_the_package(plain: Path, tmp_path: Path) -> None:
    out = checked(sys.executable, "-c", IMPORT, cwd=tmp_path, PYTHONPATH=str(plain)).split()
    assert [Path(p) for p in out] == [
        plain / "fxconv" / "passes" / "__init__.py",
        plain / "fxconv" / "pipelines" / "__init__.py",
    ]


def test_plain_install_is_complete_and_nothing_else(plain: Path) -> None:
    def modules(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*.py")}

    assert modules(plain / "fxconv") == modules(ROOT / "fxconv") | {f"passes/{m}" for m in modules(ROOT / "passes")}
    assert (plain / "fxconv" / "py.typed").exists()
    assert {p.name for p in plain.iterdir()} == {"fxconv", f"fxconv-{__version__}.dist-info"}
    metadata = (plain / f"fxconv-{__version__}.dist-info" / "METADATA").read_text()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line]
    assert [re.split(r"[:\s<>=]+", line)[1] for line in required] == ["torch", "tabulate"]
    assert "License-Expression: Apache-2.0" in metadata


def test_editable_install_imports_from_anywhere(checkout: Path, tmp_path: Path) -> None:
    site = install(checkout, tmp_path / "prefix", "--editable")
    assert not list(site.glob("fxconv/*")), "not editable"
    enter = f"import site; site.addsitedir({str(site)!r}); "
    expected = [checkout / "passes" / "__init__.py", checkout / "fxconv" / "pipelines" / "__init__.py"]
    for cwd in (tmp_path, checkout, checkout / "tests", checkout / "passes"):
        cwd.mkdir(exist_ok=True)
        # -S: without this environment's own fxconv; its other packages come by path, after the finder of this install.
        path = os.pathsep.join([str(site), *(p for p in sys.path if p.endswith("site-packages"))])
        out = checked(sys.executable, "-S", "-c", enter + IMPORT, cwd=cwd, PYTHONPATH=path).split()
        assert [Path(p) for p in out] == expected, cwd


def test_this_environment_is_an_editable_install(tmp_path: Path) -> None:
    out = checked(sys.executable, "-c", IMPORT, cwd=tmp_path).split()
    assert Path(out[0]) == ROOT / "passes" / "__init__.py", "README's command installs with -e"


def test_a_second_copy_of_the_laws_cannot_load(checkout: Path) -> None:
    done = run(sys.executable, "-c", "import passes", cwd=checkout)
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "import fxconv.passes" in done.stderr


def test_the_console_script_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("fxconv")
    assert checked(script, "--version", cwd=tmp_path) == f"fxconv {__version__}\n"


def test_versions_agree() -> None:
    assert fxconv.__version__ == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_torch_floor_is_what_runs_here() -> None:
    import torch

    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert floor and torch.__version__.startswith(floor[1]), "the floor is a version that these tests run on"


def test_ci_runs_the_readmes_command() -> None:
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("apt-get ")]
    assert len(commands) == 2, "one line sets up and runs the main job, one the tests"
    assert "fxconv transform torchvision:" in commands[0] and "pytest" in commands[1]
    assert all("pip install -e" in c for c in commands)


def test_the_readmes_law_works() -> None:
    """The example under "Writing a law" runs as it stands, and what it proposes is taken and verified."""
    import torch
    from torch import nn

    text = (ROOT / "README.md").read_text().split("## Writing a law")[1].split("\n## ")[0]
    code = text.split("```python\n")[1].split("```")[0]
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3)).double().eval()
    names = {"model": model, "x": torch.randn(4, 6, dtype=torch.float64)}
    exec(code.replace("laws=[*LAWS, ", "laws=["), names)  # on its own, so that no other law does its work
    assert fxconv.report(names["fast"]).verified
    exec(code, names)
    assert fxconv.report(names["fast"]).verified
    assert torch.allclose(names["fast"](names["x"]), model(names["x"]), rtol=1e-12)
