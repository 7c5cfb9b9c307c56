"""The steps that a value is written by: torch operators on one tensor, chains of them, and a view as such a chain.

A *layout* is how a tensor's dims group a value's slots; dims are contiguous in that order. Slots of size 1 may be
unnamed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fxconv.axes import Size, product
from fxconv.expr import (
    View,
)
from fxconv.kernel import Kernel

Layout = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Step:
    """One torch operator on the current tensor.

    Attributes:
        kind: "linear", "conv", "conv_transpose", "scale", "expand", "slice", "pad", "avg_pool", "nearest", "interpolate",
            "adaptive_avg", "mean", "gather", "reshape", "permute", "add", "cat", "apply".
        in_shape, shape: input and output shapes.
        weights: kernels that become parameters, in the operator's order.
        attrs: the operator's other arguments.
        macs: multiply-adds.
    """

    kind: str
    in_shape: tuple[Size, ...]
    shape: tuple[Size, ...]
    weights: tuple[Kernel, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    macs: Size = 0


@dataclass(frozen=True)
class Plan:
    """A chain of steps and the layout of what comes out."""

    steps: tuple[Step, ...]
    layout: Layout


@dataclass(frozen=True)
class Target:
    """What may be emitted: ``linear`` (Linear operators), ``conv`` (convolutions of these dimensionalities)."""

    linear: bool = True
    conv: frozenset[int] = frozenset((1, 2, 3))
    full_kernel: bool = False


TARGETS = {
    None: Target(),
    "conv": Target(linear=False, full_kernel=True),
    "conv2d": Target(linear=False, conv=frozenset((2,)), full_kernel=True),
    "linear": Target(conv=frozenset()),
}


class Chain:
    """Steps under construction, with the current layout of the operand's slots."""

    def __init__(self, sizes: tuple[Size, ...], layout: Layout) -> None:
        self.sizes, self.layout = sizes, layout
        self.steps: list[Step] = []

    def shape(self, layout: Sequence[Sequence[int]] | None = None) -> tuple[Size, ...]:
        groups = self.layout if layout is None else layout
        sizes = self.sizes
        return tuple([sizes[g[0]] if len(g) == 1 else product([sizes[s] for s in g]) for g in groups])

    def order(self, layout: Sequence[Sequence[int]] | None = None) -> list[int]:
        """Slots in memory order, those of size 1 left out."""
        groups = self.layout if layout is None else layout
        return [s for g in groups for s in g if self.sizes[s] != 1]

    def to(self, layout: Sequence[Sequence[int]], free: bool = False) -> None:
        """Reshape, and permute where the order differs, to another grouping of the same slots.

        ``free`` says that the next operator reads the permuted view as it is, without a copy.
        """
        wanted = tuple(tuple(g) for g in layout)
        if wanted == self.layout:
            return
        have, want = self.order(), self.order(wanted)
        if have == want and self.shape(wanted) == self.shape():
            self.layout = wanted
            return
        if sorted(have) != sorted(want):
            raise AssertionError(f"layouts {self.layout} and {wanted} hold different slots")
        before = self.shape()
        if have != want:
            here, there = ([[s for s in g if self.sizes[s] != 1] for g in groups] for groups in (self.layout, wanted))
            runs = _common_runs(here, there)
            fine = tuple(product([self.sizes[s] for s in run]) for run in runs)
            if fine != before:
                self.steps.append(Step("reshape", before, fine))
            by_first = {run[0]: i for i, run in enumerate(runs)}
            order = [by_first[s] for s in want if s in by_first]
            before = tuple(fine[i] for i in order)
            self.steps.append(Step("permute", fine, before, attrs={"dims": tuple(order), "free": free}))
        after = self.shape(wanted)
        if after != before:
            self.steps.append(Step("reshape", before, after))
        self.layout = wanted

    def add(self, kind: str, shape: Sequence[Size], **more: Any) -> None:
        before = self.steps[-1].shape if self.steps else self.shape()
        weights, macs = more.pop("weights", ()), more.pop("macs", 0)
        self.steps.append(Step(kind, before, tuple(shape), tuple(weights), more, macs))

    def done(self, rename: dict[int, int], layout: Sequence[Sequence[int]] | None = None) -> Plan:
        """The plan, its layout renamed from the operand's slots to the result's."""
        groups = self.layout if layout is None else layout
        return Plan(tuple(self.steps), tuple(tuple(rename[s] for s in g if s in rename) for g in groups))


def _common_runs(have: list[list[int]], wanted: list[list[int]]) -> list[list[int]]:
    """Maximal runs within a dim of ``have`` that stay together, in order, in a dim of ``wanted``.

    What is split at all is split before the permutation: a view of a permuted tensor gives a batch of 1 a stride that no
    memory format has, and torch then takes it for a tensor in no format.
    """
    follows = {a: b for g in wanted for a, b in zip(g, g[1:], strict=False)}
    runs: list[list[int]] = []
    for group in have:
        for k, s in enumerate(group):
            if k and follows.get(runs[-1][-1]) == s:
                runs[-1].append(s)
            else:
                runs.append([s])
    return runs


def plan_view(v: View, layout: Layout) -> Plan:
    """A view: nothing at all where the atoms of each slot are already neighbours in memory."""
    starts = list(itertools.accumulate((len(split) for split in v.splits), initial=0))
    atoms = v.atoms
    slot_of = {a: g for g, group in enumerate(v.groups) for a in group}
    dims = [[starts[s] + k for s in g for k in range(len(v.splits[s]))] for g in layout]
    order = [a for d in dims for a in d if a in slot_of]
    wanted: list[int] = []
    for a in order:
        if a not in wanted:
            wanted += [b for b in v.groups[slot_of[a]] if b in order]
    chain = Chain(atoms, tuple(tuple(a for a in d) for d in dims))
    in_place = [a for a in order if atoms[a] != 1] == [a for a in wanted if atoms[a] != 1]
    crossing = any(len({i for i, d in enumerate(dims) for a in g if a in d and atoms[a] != 1}) > 1 for g in v.groups)
    if in_place and not crossing:
        seen: set[int] = set()
        groups: list[tuple[int, ...]] = []
        for d in dims:
            slots: list[int] = []
            for a in d:
                g = slot_of.get(a)
                if g is not None and g not in seen:
                    seen.add(g)
                    slots.append(g)
            groups.append(tuple(slots))
        return Plan((), tuple(groups))
    slots_in_order: list[int] = []
    for a in wanted:
        if slot_of[a] not in slots_in_order:
            slots_in_order.append(slot_of[a])
    chain.to([v.groups[g] for g in slots_in_order])
    return Plan(tuple(chain.steps), tuple((g,) for g in slots_in_order))
