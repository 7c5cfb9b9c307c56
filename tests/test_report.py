"""Reports: plain records that survive JSON, pickling and deepcopy, in every kind of result."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fxconv.advice import advice
from fxconv.errors import ArgsError, FxconvError
from fxconv.fingerprint import weights_hash
from fxconv.render import change, number, seconds, to_table
from fxconv.report import Capture, Cost, Remark, Report, Rewrite, attach, plain, read

BEFORE, AFTER = Cost(10_000_000, 1000, 3, 4_000_000, 1e-3), Cost(8_000_000, 900, 2, 3_000_000, 8e-4)


def rewrite(i: int, **changes: Any) -> Rewrite:
    base = Rewrite(
        name=f"features_{i}_fused",
        nodes=(f"conv_{i}", f"bn_{i}"),
        new_nodes=(f"features_{i}_fused",),
        laws=("fold batch norm",),
        before=BEFORE,
        after=AFTER,
        verdict={"status": "proved", "probes": 3, "seeds": (0, 1), "max_error": i * 1e-16, "tolerance": 1e-13},
        where=f"features.{i}",
    )
    return dataclasses.replace(base, **changes)


def example(**changes: Any) -> Report:
    rolled_back = {"status": "rolled back", "max_error": math.inf, "reason": "differs by 0.3 at the border"}
    base = Report(
        model="torchvision:densenet121",
        target="conv",
        capture=Capture("export", ("a bare squeeze() drops the batch at batch 1",), 3.2),
        rewrites=(*(rewrite(i) for i in range(30)), rewrite(77, verdict=rolled_back, laws=("compose", "commute"))),
        missed=tuple(Remark("missed", f"conv_{i}", "compose", f"costs {i} M more", "fewer channels") for i in range(5)),
        advice=(Remark("advice", "softmax", reason="the model ends in Softmax"),),
        barriers={"ReLU is not affine": 121},
        cost_before=BEFORE,
        cost_after=AFTER,
        verification={
            "status": "verified",
            "dtype": "float32",
            "error": 3.1e-7,
            "original_error": 3.3e-7,
            "float64_error": 1.2e-8,
            "factor": 4.0,
            "outputs": ({"name": "output"},),
            "batches": (1, 2),
            "notes": ("strides differ",),
        },
        timings={"capture": 3.2},
        measured={"before_s": 0.0412, "after_s": 0.0351, "ratio": 1.17, "low": 1.15, "high": 1.19, "pairs": 40},
        hashes={"before": "ab", "after": "cd"},
    )
    return dataclasses.replace(base, **changes)


def test_json_gives_back_an_equal_report() -> None:
    report = example()
    assert Report.from_json(report.to_json()) == report
    assert Report.from_dict(report.to_dict()) == report
    assert pickle.loads(pickle.dumps(report)) == report


def test_json_is_strict_where_errors_are_infinite() -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    report = example()
    json.loads(report.to_json(), parse_constant=refuse)
    assert Report.from_json(report.to_json()).rewrites[-1].verdict["max_error"] == math.inf


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "not JSON"),
        ("[1]", "holds a list"),
        ("{}", "schema None"),
        ('{"schema": 1, "model": "m", "extra": 1}', "Report has no extra"),
        ('{"schema": 1}', "model"),
        ('{"schema": 1, "model": "m", "rewrites": [{"name": "n", "colour": 1}]}', "Rewrite has no colour"),
    ],
)
def test_what_is_no_report_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(FxconvError, match=said):
        Report.from_json(text)


def test_a_tensor_cannot_get_into_a_report() -> None:
    with pytest.raises(FxconvError, match="Tensor"):
        plain({"weights": torch.ones(3)})
    assert plain({"error": torch.tensor(0.5), "dtype": torch.float32, "seeds": (1, 2)}) == {
        "error": 0.5,
        "dtype": "float32",
        "seeds": [1, 2],
    }


@pytest.mark.parametrize("build", [lambda: rewrite(0, verdict={"status": "fine"}), lambda: Remark("hint", "x")])
def test_unknown_status_and_kind_are_refused(build: Any) -> None:
    with pytest.raises(FxconvError, match="expected one of"):
        build()


@pytest.mark.parametrize(
    "changes, verified",
    [
        ({}, True),
        ({"verification": {"status": "failed", "reason": "differs"}}, False),
        ({"verification": {"status": "not run"}}, False),
        ({"rewrites": (rewrite(0, verdict={"status": "not run"}),)}, False),
        ({"rewrites": (rewrite(0, verdict={"status": "unverified", "reason": "an int input"}),)}, False),
        ({"rewrites": ()}, True),
    ],
)
def test_verified_means_the_model_and_every_rewrite_in_it(changes: dict[str, Any], verified: bool) -> None:
    assert example(**changes).verified is verified


def test_the_table_counts_like_things_together_and_verbose_does_not() -> None:
    report = example()
    compact, verbose = to_table(report), to_table(report, verbose=True)
    assert "30  features.*" in compact and "features.17" not in compact
    assert "features.17" in verbose and "fewer channels" in verbose
    for said in (
        "differs by 0.3 at the border",
        "rewrites: 30 proved, 1 rolled back",
        "verified largest relative error against the original in float64: 3.1e-07 in float32",
        "note: strides differ",
        "a bare squeeze()",
        "121 ReLU is not affine",
        "the model ends in Softmax",
        "1.17 times faster (1.15 to 1.19)",
        "-20.0 %",
    ):
        assert said in " ".join(compact.split()), said
    assert str(report) == compact


def test_barriers_are_counted_and_listed_only_when_verbose() -> None:
    report = example(missed=(Remark("barrier", "relu_7", reason="ReLU is not affine"),))
    assert "not rewritten: 0" in to_table(report) and "relu_7" not in to_table(report)
    assert "barriers: 121 (121 ReLU is not affine)" in to_table(report)
    assert "relu_7" in to_table(report, verbose=True)


def test_rolled_back_rewrites_are_never_grouped() -> None:
    wrong = tuple(rewrite(i, verdict={"status": "rolled back", "reason": f"wrong by {i}"}) for i in range(15))
    compact = to_table(example(rewrites=wrong))
    assert "features.3 (fold batch norm): wrong by 3" in compact and "… and 3 more rolled back" in compact
    assert "wrong by 14" in to_table(example(rewrites=wrong), verbose=True)


@pytest.mark.parametrize(
    "low, ratio, high, said",
    [(1.1, 1.2, 1.3, "1.20 times faster"), (0.4, 0.5, 0.8, "2.00 times slower"), (0.9, 1.1, 1.2, "no difference seen")],
)
def test_a_measured_ratio_claims_no_more_than_its_interval(low: float, ratio: float, high: float, said: str) -> None:
    assert said in to_table(example(measured={**example().measured, "low": low, "ratio": ratio, "high": high}))


def test_many_kinds_of_remarks_are_cut_and_counted() -> None:
    report = example(missed=tuple(Remark("missed", "n", f"law {chr(97 + i)}", "dear") for i in range(20)))
    assert "… and 8 more kinds" in to_table(report)
    assert "more kinds" not in to_table(report, verbose=True)


def test_html_is_one_page_with_everything_escaped() -> None:
    page = example(model="a<b>", missed=(Remark("refused", "n", "compose", "padding_mode='<reflect>'"),)).to_html()
    assert page.startswith("<!DOCTYPE html>") and "<b>" not in page and "&lt;reflect&gt;" in page
    assert "features.29" in page and "http" not in page


def _modules() -> dict[str, Any]:
    layer = nn.Linear(2, 3)
    return {
        "module": nn.Sequential(layer),
        "graph module": torch.fx.symbolic_trace(nn.Sequential(layer)),
        "exported program": torch.export.export(nn.Sequential(layer), (torch.ones(2, 2),)),
    }


@pytest.mark.parametrize("kind", ["module", "graph module", "exported program"])
def test_a_report_survives_deepcopy(kind: str) -> None:
    report, result = example(), _modules()[kind]
    assert attach(result, report) is result
    again = copy.deepcopy(result)
    assert read(again) == report and again.report == report


@pytest.mark.parametrize("kind", ["module", "graph module"])
def test_a_report_survives_pickling_and_torch_save(kind: str) -> None:
    report, result = example(), attach(_modules()[kind], example())
    buffer = io.BytesIO()
    torch.save(result, buffer)
    buffer.seek(0)
    for again in (pickle.loads(pickle.dumps(result)), torch.load(buffer, weights_only=False)):
        assert read(again) == report and again.report == report


def test_the_meta_is_plain_data() -> None:
    result = attach(_modules()["graph module"], example())
    assert Report.from_json(json.dumps(result.meta["fxconv"], allow_nan=True)) == example()


def test_a_models_own_report_attribute_is_left_alone() -> None:
    class Reporter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.report = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.report(x)

    model = attach(Reporter(), example())
    assert isinstance(model.report, nn.Linear) and read(model) == example()


def test_a_model_without_a_report_says_where_reports_come_from() -> None:
    with pytest.raises(ArgsError, match="fxconv.transform"):
        read(nn.Linear(1, 1))


@pytest.mark.parametrize(
    "end, said",
    [
        (nn.Softmax(1), "drop it before CrossEntropyLoss, which applies it"),
        (nn.LogSoftmax(1), "redundant before CrossEntropyLoss"),
        (nn.Sigmoid(), "prefer BCEWithLogitsLoss on the logits"),
        (nn.ReLU(), None),
        (nn.Sequential(nn.Sigmoid(), nn.Linear(4, 4)), None),
    ],
)
@pytest.mark.parametrize("dialect", ["export", "symbolic"])
def test_advice_on_how_a_model_ends(end: nn.Module, said: str | None, dialect: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), end).eval()
    gm = (
        torch.fx.symbolic_trace(model)
        if dialect == "symbolic"
        else torch.export.export(model, (torch.ones(2, 3),), strict=False).module()
    )
    found = advice(gm)
    assert [r.kind for r in found] == (["advice"] if said else [])
    assert said is None or said in found[0].reason


def test_a_hash_sees_values_names_and_shapes_and_not_strides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    first = weights_hash(model)
    assert weights_hash(copy.deepcopy(model)) == first
    assert weights_hash(copy.deepcopy(model).to(memory_format=torch.channels_last)) == first
    assert weights_hash(torch.export.export(model, (torch.ones(2, 2, 5, 5),))) == first
    renamed = nn.Sequential(*model)
    renamed.add_module("2", nn.Identity())
    assert weights_hash(renamed) == first
    assert weights_hash(copy.deepcopy(model).double()) != first
    assert weights_hash(copy.deepcopy(model).bfloat16()) != first
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight[2, 1, 2, 2] += 1e-6
    assert weights_hash(changed) != first


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (2_834_161_664, "2.83 G"), (-1500, "-1.50 k"), (0.5, "0.50")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("value, text", [(0.0412, "41.2 ms"), (3.04, "3.04 s"), (2.5e-4, "250 us"), (0, "0 s")])
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize("before, after, text", [(10, 8, "-20.0 %"), (5, 5, "0 %"), (0, 3, "new"), (1e6, 1e6 + 1, "+0.0001 %")])
def test_changes(before: float, after: float, text: str) -> None:
    assert change(before, after) == text
