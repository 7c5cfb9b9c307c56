"""Random affine DAGs: the result equals the original, and never costs more by what was asked for.

Weights and inputs are small integers, which float64 adds exactly; only what divides rounds at all: an exactly low-rank weight in
two factors, and at other sizes than the program's an average.
"""

from __future__ import annotations

import pytest
import torch
from helpers import Snapshot, macs, n_params, relative_error, run, with_batch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from zoo.random_dag import Model, Program, programs

import fxconv

EXAMPLES = 50


def integers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


def compare(program: Program, objective: str, capture: str) -> None:
    model = Model(program)
    note(f"compare(\n    {program},\n    {objective!r}, {capture!r},\n)")
    x = integers(program.shape, program.seed)
    before = Snapshot(model)
    result = fxconv.transform(model, x, objective=objective, capture=capture)
    before.assert_unchanged()
    note(str(result.graph))

    report = fxconv.report(result)
    assert not report.rolled_back, "a law was wrong, and the verifier had to take it back"
    assert report.verified
    # An exactly low-rank weight in two factors rounds; nothing else does at these sizes.
    rounded = 1e-12 if any("recover" in r.laws for r in report.applied) else 0.0
    for batch in (2, 1, 3):
        (trial,) = with_batch((x,), batch)
        trial = integers(tuple(trial.shape), batch)
        got, want = run(result, (trial,)), run(model, (trial,))
        for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want)), strict=True):
            assert a.shape == b.shape and relative_error(a, b) <= rounded, f"batch {batch}: {relative_error(a, b):g}"
    for sizes in ((5, 9), (12, 7), (8, 8), (13, 14)):
        trial = integers((*program.shape[:2], *sizes), sizes[0])
        try:
            want = run(model, (trial,))
        except RuntimeError:
            continue  # the original does not take these sizes
        try:
            got = run(result, (trial,))
        except AssertionError as error:
            assert "captured for" in str(error)
            continue
        for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want)), strict=True):
            assert a.shape == b.shape and relative_error(a, b) < 1e-12, f"{sizes}: {relative_error(a, b):g}"

    if objective == "macs":
        assert macs(result, (x,)) <= macs(model, (x,))
    elif objective == "params":
        assert n_params(result) <= n_params(model)
    else:
        assert report.cost_after.seconds <= report.cost_before.seconds * (1 + 1e-12)  # sums of the same prices in another order


@settings(max_examples=EXAMPLES)
@given(program=programs())
def test_random_dag_by_latency(program: Program) -> None:
    compare(program, "latency", "export")


@settings(max_examples=EXAMPLES // 2)
@given(program=programs(), capture=st.sampled_from(["export", "symbolic"]), objective=st.sampled_from(["macs", "params"]))
def test_random_dag_by_other_objectives(program: Program, capture: str, objective: str) -> None:
    compare(program, objective, capture)


@settings(max_examples=EXAMPLES // 2)
@given(program=programs(max_steps=9))
def test_random_larger_dag_in_the_module_dialect(program: Program) -> None:
    compare(program, "latency", "symbolic")


@pytest.mark.parametrize("seed", range(3))
def test_random_weights_are_what_the_oracle_needs(seed: int) -> None:
    """Sums of integers and of quarters are exact in float64 however they are associated."""
    x = integers((2, 3, 4, 4), seed)
    assert torch.equal((x / 4).sum((2, 3)), x.sum((2, 3)) / 4)
