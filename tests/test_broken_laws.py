"""Laws of a user's that fail, or that propose what cannot be put in the value's place: the model comes out right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import kinds, randomise
from torch import fx, nn

import fxconv
from fxconv import pricing
from fxconv.expr import Map, Value
from fxconv.law import Context, Joint, Law
from fxconv.steps import Step
from fxconv.writer import Writer


def _raises(v: Value, context: Context) -> Iterator[Value]:
    raise KeyError("table")
    yield v


def _nothing(v: Value, context: Context) -> Any:
    return None


def _text(v: Value, context: Context) -> Iterator[Any]:
    yield "conv"


def _other_sizes(v: Value, context: Context) -> Iterator[Value]:
    if isinstance(v.node, Map):
        yield v.node.x


def _joint_of_other_sizes(v: Value, context: Context) -> Iterator[Joint]:
    if isinstance(v.node, Map):
        yield Joint(((v, v.node.x),))


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (_raises, "the law raised KeyError: 'table'"),
        (_nothing, "the law raised TypeError"),
        (_text, "the law proposed a str, not a Value"),
        (_other_sizes, "the law proposed sizes"),
        (_joint_of_other_sizes, "the law proposed sizes"),
    ],
)
def test_a_broken_law_is_reported(apply: Callable[..., Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)), 1)
    x = torch.randn(2, 3, 8, 9)
    result = fxconv.transform(model, x, laws=[Law("broken", apply)])
    report = fxconv.report(result)
    assert report.verified
    assert any(m.law == "broken" and m.reason.startswith(reason) for m in report.missed), report.missed
    assert torch.allclose(result(x), model(x), atol=1e-5)
    assert ("raised at" in caplog.text) == ("raised" in reason)
    caplog.clear()


def test_what_cannot_be_priced_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of fxconv's own costs one rewrite, not the model: the other convolutions still become one."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 7, 3), nn.Conv2d(7, 5, 1)), 1)
    x = torch.randn(2, 3, 8, 9)
    plan_map = pricing.plan_map

    def faulty(m: Map, *args: Any) -> Any:
        if tuple(m.kernel.shape) == (4, 3, 3, 3):
            raise AssertionError("layouts hold different slots")
        return plan_map(m, *args)

    monkeypatch.setattr(pricing, "plan_map", faulty)
    result = fxconv.transform(model, x)
    report = fxconv.report(result)
    assert report.verified and len(report.applied) == 1
    assert any("raised AssertionError: layouts hold different slots" in m.reason for m in report.missed), report.missed
    assert torch.allclose(result(x), model(x), atol=1e-5)
    caplog.clear()


@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_what_cannot_be_written_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capture: str
) -> None:
    """The same where the graph is written: the rewrite is undone alone, and the report says what was raised."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 7, 3), nn.Conv2d(7, 5, 1)), 1)
    x = torch.randn(2, 3, 8, 9)
    write = Writer.write

    def faulty(self: Writer, step: Step, node: fx.Node) -> fx.Node:
        if step.weights and tuple(step.weights[0].shape)[:2] == (4, 3):
            raise ValueError("no input has the size s0")
        return write(self, step, node)

    monkeypatch.setattr(Writer, "write", faulty)
    result = fxconv.transform(model, x, capture=capture)
    report = fxconv.report(result)
    assert report.verified and kinds(result)["conv"] == 3
    refused = [m for m in report.missed if m.reason == "writing it raised ValueError: no input has the size s0"]
    assert len(refused) == 1, report.missed
    assert torch.allclose(result(x), model(x), atol=1e-5)
    caplog.clear()
