"""Shared set-up: one thread per worker (two workers on two cores), fixed seeds, one Hypothesis profile."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parent))  # `helpers`, `graphs` and `zoo`, under every pytest import mode

settings.register_profile(
    "fxconv",
    deadline=None,  # an export takes between 0.1 and 3 seconds, mostly the first one in a process
    derandomize=True,  # CI must not fail on a new example; run with --hypothesis-seed=random to look for one
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes; ask for it with --hypothesis-profile=shrink
)
settings.register_profile("shrink", settings.get_profile("fxconv"), phases=tuple(Phase))
settings.load_profile("fxconv")


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
