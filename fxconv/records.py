"""What a search tries, takes and leaves: steps, the routes by which they were found, and why others were not taken."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxconv.cost import Price
from fxconv.expr import Value

Step = tuple[Value, Value | None, str]
"""A value, what it is redefined as (None for what it was in the original graph), and the law that says so."""


Route = list[tuple[int, int]]
"""Where steps were found: per level, at which of the values in focus, and which of the proposals there."""

Trial = tuple[float, Price, list[Step], tuple[int, int]]
"""What a move led to: the score, everything's price, the move, and where it was found."""

Found = tuple[float, list[Step], Route]
"""The best that an exploration came to: score, steps, and where they were found."""


@dataclass(frozen=True)
class Missed:
    """A candidate that was not taken: where, by which law, and why."""

    value: Value
    law: str
    reason: str
    would_fire_if: str = ""


@dataclass(frozen=True)
class Outcome:
    """What the search at a value came to: by which route what was gained, or, without one, which moves did not pay; and
    which laws refused there."""

    route: Route | None
    gained: float = 0.0
    untaken: dict[str, Missed] = field(default_factory=dict)
    refusing: frozenset[str] = frozenset()


@dataclass
class Records:
    """What a search did and did not do.

    Attributes:
        refusals: what laws refused, by value, law and reason.
        applied: per value, the laws that made it what it is.
        untaken: per value, what was legal and did not pay.
        taken: the steps that were taken, in order.
    """

    refusals: dict[tuple[int, str, str], Missed] = field(default_factory=dict)
    applied: dict[Value, list[str]] = field(default_factory=dict)
    untaken: dict[Value, dict[str, Missed]] = field(default_factory=dict)
    taken: list[Step] = field(default_factory=list)
