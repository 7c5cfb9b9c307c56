"""The garbage collector is left as it was found, whatever a transform did with it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import fxconv
from fxconv.errors import NotAModuleError
from fxconv.garbage import collector_paused, collector_skips_the_past


def _pair() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).eval()


def test_transform_leaves_the_collector_as_it_was() -> None:
    assert gc.isenabled() and gc.get_freeze_count() == 0
    fxconv.transform(_pair(), torch.randn(4, 5))
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with pytest.raises(NotAModuleError):
        fxconv.transform(torch.relu, torch.randn(4, 5))
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_what_the_caller_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        fxconv.transform(_pair(), torch.randn(4, 5))
        assert 0.9 * count < gc.get_freeze_count() <= count  # those that are deleted meanwhile do not count
    finally:
        gc.unfreeze()


def test_nested_blocks_skip_what_the_outer_one_made() -> None:
    with collector_skips_the_past():
        before = gc.get_freeze_count()
        made = [[i] for i in range(1000)]
        with collector_skips_the_past():
            assert gc.get_freeze_count() >= before + len(made)
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_what_is_kept_is_skipped_from_then_on() -> None:
    with collector_skips_the_past():
        before = gc.get_freeze_count()
        with collector_paused(kept=True):
            made = [[i] for i in range(1000)]
        assert gc.isenabled() and gc.get_freeze_count() >= before + len(made)
    with collector_paused(kept=True):
        pass
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        fxconv.transform(_pair(), torch.randn(4, 5))
        assert not gc.isenabled()
    finally:
        gc.enable()
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
