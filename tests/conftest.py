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
def _one_thread_and_a_fixed_seed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    # A law that raises is a refusal to a user; here it is a bug.
    assert not [r for r in caplog.records if r.name == "fxconv" and "raised at" in r.getMessage()]


HERE = Path(__file__).parent
NETWORKS = ("test_timm_reparam.py",)
"""Whole networks; each takes minutes. In an ordinary run torchvision's networks and the rest of the suite stand for them."""
QUICK = ("repvgg_a0", "repghostnet_050")
"""The networks that every run takes anyway."""

HEAVY = (
    "test_torchvision[swin_t]",
    "test_torchvision[inception_v3]",
    "test_torchvision[googlenet]",
    "test_torch_compile[resnet18-_inductor_pass]",
    "test_a_transformed_program[resnet18-aot_inductor]",
)
"""The slowest of torchvision's networks, and what a C++ compiler takes most of a minute for."""

LIGHT = {
    "test_target_conv_leaves_no_linear[mobileone_s0]",
    *(
        f"test_a_transformed_program[mobileone_s0-{runtime}]"
        for runtime in ("saved", "onnx_runtime", "openvino", "openvino_from_onnx", "executorch")
    ),
    "test_pass_manager[mobileone_s0]",
}
"""The pipelines of mobileone_s0 that take the transformed program alone: a minute and a half together."""


def heavy(item: pytest.Item) -> bool:
    """Whether a test is left to `--full`: it takes minutes, and others stand for it in an ordinary run."""
    if item.path.name == "test_pipelines_zoo.py" and "mobileone_s0" in item.name:
        return item.name not in LIGHT  # a thousand operators before it is transformed, to lower or to trace
    if item.path.name in NETWORKS and not any(q in item.name for q in QUICK):
        return True
    return item.name in HEAVY or item.name.startswith("test_no_false_alarm_on_random_regions")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="whole networks and known gaps too (more than an hour)")


def gaps() -> dict[str, str]:
    """Test ids (or their beginnings) that show what fxconv cannot do yet, with the reason: `gaps.txt`."""
    found: dict[str, str] = {}
    for line in (HERE / "gaps.txt").read_text().splitlines():
        ident, _, why = line.partition("#")
        if ident.strip():
            found[ident.strip()] = why.strip()
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what an ordinary run does not take; it is counted as deselected, and `--full` runs it."""
    if config.getoption("--full"):
        return
    known = gaps()
    out = []
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if heavy(item) or any(name.startswith(g) for g in known):
            out.append(item)
    config.hook.pytest_deselected(items=out)
    chosen = set(map(id, out))
    items[:] = [i for i in items if id(i) not in chosen]
