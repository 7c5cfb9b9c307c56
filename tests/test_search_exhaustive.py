"""On small regions the search finds what an exhaustive search finds: every law's every proposal at every value, in any order.

The exhaustive search goes breadth-first over states, each told apart by what its outputs are computed from, up to a bounded
number of them; the search must not cost more than the cheapest of those.
"""

from __future__ import annotations

import random
from collections.abc import Hashable

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn

from fxconv.capture import capture
from fxconv.cost import CPU, OBJECTIVES, CostModel
from fxconv.expr import Value, operands
from fxconv.lift import Lifter
from fxconv.passes import LAWS
from fxconv.search import Search, Step
from fxconv.state import State
from fxconv.steps import TARGETS
from fxconv.transform import _roots, example_sizes, symbol_ranges

STATES = 150
"""States that the exhaustive search visits per region."""


class Region(nn.Module):
    """Up to six random affine operations on a small map; every value that nothing reads is added up at the end."""

    def __init__(self, seed: int, count: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.plan: list[tuple[str, int, int]] = []
        channels = [6]
        for i in range(count):
            kind = draw.choice(("conv1", "conv3", "norm", "scale", "add", "pool", "up", "wide", "cut"))
            a = draw.randrange(max(0, len(channels) - 2), len(channels))
            same = [b for b in range(len(channels)) if channels[b] == channels[a]]
            b = draw.choice(same)
            width = {
                "conv1": draw.choice((4, 6, 12)),
                "conv3": draw.choice((4, 6, 12)),
                "wide": 24,
                "cut": max(1, channels[a] // 2),
            }.get(kind, channels[a])
            if kind in ("conv1", "wide"):
                self.add_module(f"op{i}", nn.Conv2d(channels[a], width, 1, bias=draw.random() < 0.5))
            elif kind == "conv3":
                self.add_module(f"op{i}", nn.Conv2d(channels[a], width, 3, padding=1, bias=draw.random() < 0.5))
            elif kind == "norm":
                self.add_module(f"op{i}", nn.BatchNorm2d(width))
            self.plan.append((kind, a, b))
            channels.append(width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values, read = [x], {0}
        for i, (kind, a, b) in enumerate(self.plan):
            y = values[a]
            if kind in ("conv1", "conv3", "norm", "wide"):
                y = getattr(self, f"op{i}")(y)
            elif kind == "scale":
                y = y * 0.5 + 1
            elif kind == "cut":
                y = y[:, -max(1, y.shape[1] // 2) :]
            elif kind == "pool" and min(y.shape[2:]) > 6:
                y = nn.functional.avg_pool2d(y, 2)
            elif kind == "up" and max(y.shape[2:]) < 20:
                y = nn.functional.interpolate(y, scale_factor=2, mode="nearest")
            elif kind == "add":
                if values[b].shape == y.shape:
                    read.add(b)
                    y = y + values[b]
                else:
                    y = y + y
            read.add(a)
            values.append(y)
        return tuple(v for i, v in enumerate(values) if i not in read)


def load(seed: int, count: int, objective: str) -> Search:
    model = randomise(Region(seed, count))
    captured = capture(model, (torch.randn(2, 6, 8, 10),), mode="export")
    lifter = Lifter(captured.gm, captured.barriers)
    lifter.run()
    symbols = symbol_ranges(captured.gm)
    sizes = example_sizes(captured, {s: hint for s, (_, _, hint) in symbols.items()})
    state = State(lifter, CostModel(CPU, sizes), TARGETS[None], objective)
    state.load(_roots(captured.gm, lifter))
    return Search(state, LAWS)


def fingerprint(state: State) -> Hashable:
    """What the outputs are computed from; the same for two states that compute them alike."""
    known: dict[Value, Hashable] = {}
    for v in sorted(state.uses, key=lambda v: v.id):
        known[v] = v.id if state.unchanged(v) else None
    stack = list(state.roots)
    while stack:
        v = stack[-1]
        if known.get(v) is not None:
            stack.pop()
            continue
        missing = [x for x in operands(v.node) if known.get(x) is None]
        if missing:
            stack += missing
            continue
        node = v.node
        parts = tuple(known[x] for x in operands(node))
        known[v] = hash((type(node).__name__, parts, node))
        stack.pop()
    return tuple(known[v] for v in state.roots)


def asked_for(state: State) -> float:
    """What the objective counts, without the time that decides between equals."""
    return state.score() if state.objective == "latency" else float(getattr(state.total, state.objective))


def cheapest(search: Search) -> tuple[float, int]:
    """The least of what is asked for in any state that laws reach with no more multiply-adds than the start has, and with no
    more launches than the search would pay for what they save; and how many states were seen.
    """
    state = search.state
    most = state.total.macs
    first = state.score(), state.total.launches
    best = asked_for(state)
    seen = {fingerprint(state)}
    queue: list[list[Step]] = [[]]
    while queue and len(seen) < STATES:
        path = queue.pop(0)
        start = state.mark()
        search._redefine(path)
        alive = sorted(state.uses, key=lambda v: v.id)
        moves = [steps for v in alive if v in state.uses for steps in search._proposals(v, late=True)]
        for steps in moves:
            mark = state.mark()
            if search._redefine(steps):
                key = fingerprint(state)
                if key not in seen:
                    seen.add(key)
                    queue.append([*path, *steps])
                    doubtful = search._doubtful(first[0] - state.score(), state.total.launches - first[1])
                    if state.total.macs <= most and not doubtful:
                        best = min(best, asked_for(state))
            state.undo(mark)
        state.undo(start)
    return best, len(seen)


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_search_finds_what_an_exhaustive_search_finds(seed: int, objective: str) -> None:
    count = 2 + seed % 5
    best, states = cheapest(load(seed, count, objective))
    search = load(seed, count, objective)
    search.run()
    found = asked_for(search.state)
    assert found <= best * (1 + 1e-9), f"{found} {objective} where {best} are reached, in {states} states"
