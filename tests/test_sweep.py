"""The sweep's own machinery, and its small subset: captured, verified, right at batch 3, affine operators lifted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from benchmarks import sweep  # noqa: E402
from benchmarks.families import CI, TIMM  # noqa: E402

SHARE = 0.95
"""Of each model: at least this part of its affine operators is lifted."""


@pytest.mark.parametrize("name", CI)
def test_subset(name: str) -> None:
    row = sweep.measure(name)
    if name.startswith("torchvision:quantized"):
        assert row["status"] == "refused" and "quantised" in row["reason"], row
        return
    assert sweep.outcome(row) == "ok", row
    assert row["share"] >= SHARE, row["not_lifted"]
    assert row["macs"][1] <= row["macs"][0]


def test_names() -> None:
    names = sweep.names()
    assert len(names) == len(set(names)) and {n for n in CI if n.startswith("torchvision:")} <= set(names)
    assert len(TIMM) >= 130


@pytest.mark.parametrize(
    ("name", "limits", "status", "reason"),
    [
        ("torchvision:no_such_model", {"seconds": 300, "gigabytes": 8}, "not made", "no_such_model"),
        ("torchvision:resnet18", {"seconds": 0.5, "gigabytes": 8}, "timeout", "more than"),
        ("torchvision:resnet18", {"seconds": 300, "gigabytes": 0.01}, "not made", "Error"),
    ],
)
def test_a_failure_is_a_row(name: str, limits: dict[str, Any], status: str, reason: str) -> None:
    row = sweep.run(name, **limits)
    assert row["status"] == status and reason in row["reason"]
    assert sweep.outcome(row).startswith(status)
    assert name in sweep.table({name: row})


def test_a_crash_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.sys, "executable", "false")
    row = sweep.run("torchvision:resnet18", seconds=60, gigabytes=8)
    assert row["status"] == "crash" and "exit code 1" in row["reason"]


def test_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(name: str, seconds: float, gigabytes: float) -> dict[str, Any]:
        asked.append(name)
        return {"model": name, "status": "timeout", "reason": "more than 1 s", "wall": 1.0}

    monkeypatch.setattr(sweep, "run", run)
    path = tmp_path / "rows.json"
    limits = {"seconds": 1.0, "gigabytes": 1.0, "jobs": 1, "minutes": 1.0}
    sweep.sweep(["a", "b"], path, **limits)
    rows = sweep.sweep(["a", "b", "c"], path, **limits)
    assert asked == ["a", "b", "c"] and set(rows) == set(json.loads(path.read_text())) == {"a", "b", "c"}
    assert set(sweep.sweep(["d"], path, **{**limits, "minutes": 0.0})) == {"a", "b", "c"}


def test_a_model_without_enough_memory_has_another_turn(tmp_path: Path) -> None:
    """By itself, with most of the machine's: beside others there may not have been enough."""
    turns: list[tuple[str, float]] = []

    def measured(name: str, seconds: float, gigabytes: float) -> dict[str, Any]:
        turns.append((name, gigabytes))
        enough = name == "small" or gigabytes > 0.5
        return {"model": name, "status": "transformed" if enough else "crash", "reason": "" if enough else "can't allocate memory"}

    def run() -> dict[str, dict[str, Any]]:
        chosen = ["large", "small"]
        path = tmp_path / "rows.json"
        return sweep.sweep(
            chosen, path, seconds=1, gigabytes=0.5, jobs=1, minutes=1, measured=measured, say=lambda row: row["status"]
        )

    assert {n: r["status"] for n, r in run().items()} == {"large": "transformed", "small": "transformed"}
    assert [n for n, _ in turns] == ["large", "small", "large"]
    run()
    assert len(turns) == 3
