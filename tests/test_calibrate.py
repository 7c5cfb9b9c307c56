"""Device profiles: the fit, the cache, and who uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fxconv
from fxconv.calibrate import cache_file, fit, from_json, local_profile, samples, to_json
from fxconv.cost import CPU, KINDS, CostModel
from fxconv.errors import OptionError
from fxconv.profiles import PROFILES, load_profile


def test_fit_recovers_the_profile_that_made_the_times() -> None:
    model = CostModel(CPU)
    measured = [(s.step, model.price(s.step).seconds) for s in samples()]
    profile = fit(measured, "again", CPU.block)
    again = CostModel(profile)
    for step, seconds in measured:
        # 1×1 and small convolutions read weights no faster than a Linear, by fiat; the rest is exact.
        assert again.price(step).seconds == pytest.approx(seconds, rel=0.02), (again.kind(step), step)


def test_every_kind_is_sampled() -> None:
    model = CostModel(CPU)
    assert {model.kind(s.step) for s in samples()} == set(KINDS) == set(CPU.rates)


def test_samples_are_what_they_are_priced_as() -> None:
    for sample in samples():
        if sample.step.kind in ("conv", "conv_transpose", "linear", "add", "avg_pool", "nearest", "interpolate"):
            out = sample.call()
            assert tuple(out.shape) == sample.step.shape


def test_profiles_survive_json() -> None:
    again = from_json(to_json(CPU))
    assert again.block == CPU.block and again.measured
    assert again.rates["conv"].macs == pytest.approx(CPU.rates["conv"].macs)
    assert again.rates["conv"].written == float("inf")


def test_local_profile_is_only_used_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(OptionError, match="fxconv calibrate"):
        load_profile("local")
    file = cache_file()
    assert file.is_relative_to(tmp_path)
    file.parent.mkdir(parents=True)
    slow = json.loads(to_json(CPU))
    for rates in slow["rates"].values():
        rates["launch"] = 1.0
    file.write_text(json.dumps(slow))
    assert local_profile().rates["conv"].launch == 1.0
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU()).eval(), torch.randn(2, 4)
    assert fxconv.explain(model, x).cost_before.seconds < 1e-3
    assert fxconv.explain(model, x, options={"profile": "local"}).cost_before.seconds > 1.0
    file.write_text("{}")
    with pytest.raises(OptionError, match="does not hold a profile"):
        load_profile("local")


@pytest.mark.parametrize("name", ["arm", "cuda"])
def test_a_report_says_that_a_profile_was_not_measured(name: str) -> None:
    assert not PROFILES[name].measured
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    report = fxconv.explain(model, torch.randn(1, 3, 8, 8), options={"profile": name})
    assert any("nobody measured" in note for note in report.capture.notes)


def test_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match="'abacus'; known: default, x86, arm, cuda, local"):
        load_profile("abacus")
