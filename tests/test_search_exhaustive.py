"""On small regions the search finds what an exhaustive search finds: every law's every proposal at every value, in any order.

The exhaustive search goes breadth-first over states, each told apart by what its outputs are computed from, up to a bounded
number of them; none of those may cost less than what the search found, by what counts, with the margin that a law asks for,
and with no more launches than the search would pay for that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn

from fxconv.capture import capture
from fxconv.cost import CPU, OBJECTIVES, CostModel, smallest_gain
from fxconv.expr import Value, operands
from fxconv.lift import Lifter
from fxconv.passes import LAWS
from fxconv.records import Step
from fxconv.search import Search
from fxconv.state import State
from fxconv.steps import TARGETS
from fxconv.transform import _roots, example_sizes, symbol_ranges

STATES = 150
"""States that the exhaustive search visits per region."""


HARD = (44, 49)
"""Regions where the way in decides, and where multiply-adds that were saved have to be spent again."""

CONVOLUTIONS = ("conv1", "conv3", "wide", "stride", "depthwise")
KINDS = (*CONVOLUTIONS, "norm", "scale", "add", "pool", "up", "cut", "chunk", "cat", "flip", "crop", "lora", "tokens")


class Region(nn.Module):
    """Up to six random affine operations on a small map; every value that nothing reads is put out at the end."""

    def __init__(self, seed: int, count: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.plan: list[tuple[str, int, int]] = []
        channels = [6]
        for i in range(count):
            kind = draw.choice(KINDS)
            a = draw.randrange(max(0, len(channels) - 2), len(channels))
            n = channels[a]
            b = draw.choice([b for b in range(len(channels)) if channels[b] == n])
            bias = draw.random() < 0.5
            width = {"conv1": draw.choice((4, 6, 12)), "conv3": draw.choice((4, 6, 12)), "wide": 24, "stride": 8}.get(kind, n)
            if kind in ("conv1", "wide"):
                self.add_module(f"op{i}", nn.Conv2d(n, width, 1, bias=bias))
            elif kind in CONVOLUTIONS:
                groups = n if kind == "depthwise" else 1
                self.add_module(f"op{i}", nn.Conv2d(n, width, 3, 1 + (kind == "stride"), padding=1, groups=groups, bias=bias))
            elif kind == "norm":
                self.add_module(f"op{i}", nn.BatchNorm2d(n))
            elif kind == "lora":
                self.add_module(f"op{i}", nn.Conv2d(n, n, 1, bias=bias))
                self.add_module(f"down{i}", nn.Conv2d(n, 2, 1, bias=False))
                self.add_module(f"up{i}", nn.Conv2d(2, n, 1, bias=False))
            elif kind == "tokens":
                self.add_module(f"op{i}", nn.Linear(n, n, bias=bias))
            self.plan.append((kind, a, b))
            channels.append({"cut": max(1, n // 2), "chunk": (n + 1) // 2, "cat": 2 * n}.get(kind, width))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values, read = [x], {0}
        for i, (kind, a, b) in enumerate(self.plan):
            y = values[a]
            if kind in (*CONVOLUTIONS, "norm"):
                y = getattr(self, f"op{i}")(y)
            elif kind == "lora":
                y = getattr(self, f"op{i}")(y) + 0.5 * getattr(self, f"up{i}")(getattr(self, f"down{i}")(y))
            elif kind == "tokens":
                y = getattr(self, f"op{i}")(y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(y.shape)
            elif kind == "scale":
                y = y * 0.5 + 1
            elif kind == "cut":
                y = y[:, -max(1, y.shape[1] // 2) :]
            elif kind == "chunk":
                y = y.chunk(2, 1)[0]
            elif kind == "flip":
                y = y.flip(1)
            elif kind == "crop" and min(y.shape[2:]) > 6:
                y = y[:, :, 1:-1]
            elif kind == "pool" and min(y.shape[2:]) > 6:
                y = nn.functional.avg_pool2d(y, 2)
            elif kind == "up" and max(y.shape[2:]) < 20:
                y = nn.functional.interpolate(y, scale_factor=2, mode="nearest")
            elif kind in ("add", "cat"):
                other = values[b] if values[b].shape == y.shape else y
                read.add(b if values[b].shape == y.shape else a)
                y = y + other if kind == "add" else torch.cat((y, other), 1)
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


def cheapest(search: Search) -> tuple[dict[float, float], int]:
    """Per number of launches, the least of what is asked for in any state that laws reach with no more multiply-adds than the
    start has; and how many states were seen.
    """
    state = search.state
    most = state.total.macs
    best = {state.total.launches: asked_for(state)}
    seen = {fingerprint(state)}
    queue: list[tuple[list[Step], float]] = [([], 0.0)]
    while queue and len(seen) < STATES:
        path, owed = queue.pop(0)
        start = state.mark()
        search._redefine(path)
        alive = sorted(state.uses, key=lambda v: v.id)
        moves = [steps for v in alive if v in state.uses for steps in search._proposals(v, late=True)]
        for steps in moves:
            margin = owed + search._margin(steps)
            mark = state.mark()
            if search._redefine(steps):
                key = fingerprint(state)
                if key not in seen:
                    seen.add(key)
                    queue.append(([*path, *steps], margin))
                    if state.total.macs <= most:
                        launches = state.total.launches
                        best[launches] = min(best.get(launches, math.inf), asked_for(state) + margin)
            state.undo(mark)
        state.undo(start)
    return best, len(seen)


def missed(search: Search, best: dict[float, float]) -> dict[float, float]:
    """The states among those that the search would have gone on to from where it ended, for what they save."""
    found, launches = asked_for(search.state), search.state.total.launches
    least = max(smallest_gain(search.state.objective), 1e-9 * found)
    return {n: b for n, b in best.items() if found - b > least and not search._doubtful(found - b, n - launches)}


@pytest.mark.parametrize("seed", [*range(16), *HARD])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_search_finds_what_an_exhaustive_search_finds(seed: int, objective: str) -> None:
    count = 2 + seed % 5
    best, states = cheapest(load(seed, count, objective))
    search = load(seed, count, objective)
    search.run()
    better = missed(search, best)
    assert not better, f"{asked_for(search.state)} {objective} where {better} are reached, in {states} states"
