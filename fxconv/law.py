"""The protocol of laws: pure functions from a value's expression to equal ones, or the reason why there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fxconv.axes import Size, same_shape
from fxconv.expr import Map, Value, View

logger = logging.getLogger("fxconv")


@dataclass(frozen=True)
class Refusal:
    """A law that looked at a candidate and did not apply.

    Attributes:
        reason: what stood in the way, with the offending value in it.
        would_fire_if: what would make the law apply; "" where nothing would.
    """

    reason: str
    would_fire_if: str = ""


@dataclass(frozen=True)
class Context:
    """What a law may ask about a value's surroundings; it sees no fx node and changes nothing.

    Attributes:
        uses: how many users a value has at present.
        users: the values that read a value at present.
        count: the number of elements of a tensor of given sizes, dynamic ones taken at the example's values.
        folds: whether the original computes a constant of a value from parameters at every call (a mask, a table of
            relative positions), which writing the value anew would store.
    """

    uses: Callable[[Value], int]
    users: Callable[[Value], list[Value]]
    count: Callable[[tuple[Size, ...]], float]
    folds: Callable[[Value], bool] = lambda v: False


@dataclass(frozen=True)
class Joint:
    """Several values redefined in one step: siblings that become rows of one map pay together, none of them alone.

    Attributes:
        pairs: per value, what it is redefined as.
    """

    pairs: tuple[tuple[Value, Value], ...]


Outcome = Value | Joint | Refusal


@dataclass(frozen=True)
class Law:
    """A named rewrite.

    Attributes:
        name: how options and the report call it.
        apply: given a value and its surroundings, the equal values that the law proposes instead, and its refusals.
            It must be pure, and exact over the reals: a proposal that is not equal is found by the verifier and
            taken back.
        late: whether the law is only tried where the others have nothing left to do: its result hides structure that
            they could use.
        margin: what share of the time of what it replaces a move must save, where the cost model does not see all that
            it brings about.
        numbers: of a value whose weights' numbers decide what the law proposes there, what it sees in them. The search
            at one of many blocks that are alike stands for all of them where these are equal too.
    """

    name: str
    apply: Callable[[Value, Context], Iterable[Outcome]]
    late: bool = False
    margin: float = 0.0
    numbers: Callable[[Value], Hashable] | None = None

    def __call__(self, v: Value, context: Context) -> Iterator[Outcome]:
        """What the law proposes; one that fails or proposes what cannot be put in v's place has refused."""
        try:
            for outcome in self.apply(v, context):
                wrong = _misfit(v, outcome)
                yield outcome if wrong is None else Refusal(wrong)
        except Exception as error:  # anybody's code: the model comes out right without it, and the report says so
            logger.warning("the law %r raised at %s", self.name, v, exc_info=True)
            yield Refusal(f"the law raised {type(error).__name__}: {error}")


def _misfit(v: Value, outcome: Any) -> str | None:
    """What is wrong with a law's outcome at v, whatever the law computes."""
    if isinstance(outcome, Refusal):
        return None
    pairs = outcome.pairs if isinstance(outcome, Joint) else ((v, outcome),)
    for old, new in pairs:
        if not isinstance(new, Value):
            return f"the law proposed a {type(new).__name__}, not a Value, a Joint or a Refusal"
        if not same_shape(new.sizes, old.sizes):
            return f"the law proposed sizes {new.sizes} for {old.sizes}"
    return None


def through_view(x: Value) -> tuple[View | None, Value]:
    """A value as (view, what it views); (None, itself) where it is no view."""
    if isinstance(x.node, View):
        return x.node, x.node.x
    return None, x


def mapped_operand(v: Value) -> tuple[Map, View | None, Value] | None:
    """A map with its operand, looked at through a view; None where v is not a map."""
    if not isinstance(v.node, Map):
        return None
    view, x = through_view(v.node.x)
    return v.node, view, x


__all__ = ["Context", "Joint", "Law", "Outcome", "Refusal", "mapped_operand", "through_view"]
