"""The search: which laws are applied where, by cost.

Best-first search over whole regions exhausts any budget, because independent choices multiply. Instead each value is
looked at with its neighbourhood: a step that lowers the cost is taken at once; where there is none, steps that cost
something on the way are tried to a small depth, each followed by the improving steps that it enables, and the best
outcome is kept. Repeated until nothing changes. Deterministic: values are visited in graph order; in a small graph against
it too, from the same start, and the better of the two is kept.

Networks repeat their blocks: what was found at one value is done again at those like it (`likeness`), by the same route
and only where it gains as much, without trying what else there is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from fxconv.cost import OBJECTIVES, Price, score, smallest_gain
from fxconv.expr import Apply, Const, Leaf, Map, Sum, Value, View, operands, view
from fxconv.law import Context, Joint, Law, Refusal
from fxconv.likeness import Likeness
from fxconv.normal_form import normal
from fxconv.pricing import IMPOSSIBLE
from fxconv.raw import as_value
from fxconv.records import Found, Missed, Outcome, Records, Step, Trial
from fxconv.refs import make_sum
from fxconv.state import State
from fxconv.sums import concatenated

logger = logging.getLogger("fxconv")

SMALL = 16
"""Values of a graph up to which it is searched from its outputs too, and the better of the two ends kept."""

LAUNCH_WORTH = 40.0
"""Microseconds that every additional operator must gain: in eager mode LeViT got slower by steps that predicted 24 each."""


@dataclass(frozen=True)
class Budget:
    """Bounds of the search.

    Attributes:
        depth: how many steps that do not pay by themselves may be taken in a row.
        beam: how many of them are followed per level.
        trials: how many tentative steps one value may cause.
        looks: how many times the laws may be asked on behalf of one value.
        readers: how many readers of a value may be looked at after a step at that value; of more, none are.
        reach: how much a step may cost on the way, in prices of the value that it starts at, its readers, and what they are
            computed from within as many steps as depth; of launches, in those of the value with what was made for it.
    """

    depth: int = 3
    beam: int = 3
    trials: int = 160
    looks: int = 48
    readers: int = 4
    reach: float = 3.0


def _substituted(v: Value, old: Value, new: Value) -> Value:
    """The value with one operand replaced; a sum takes up the terms of a sum."""
    node = v.node
    if isinstance(node, Sum):
        added = new.node.terms if isinstance(new.node, Sum) else (new,)
        return make_sum([*added, *(t for t in node.terms if t is not old)])
    if isinstance(node, Map):
        return normal(new, node.roles, node.kernel)
    assert isinstance(node, View)
    return as_value(view(new, node.splits, node.groups))


WEIGHED = frozenset(("compose", "merge branches", "distribute", "commute", "merge siblings"))
"""Laws whose legal proposals are reported where they do not pay; the others only ever help another one."""


@dataclass
class Search:
    """One search over a state."""

    state: State
    laws: Sequence[Law]
    budget: Budget = field(default_factory=Budget)
    _records: Records = field(default_factory=Records)
    _tried: list[Trial] = field(default_factory=list)
    _path: set[Value] = field(default_factory=set)
    _refusing: set[tuple[Value, str]] = field(default_factory=set)
    _trials: int = 0
    _looks: int = 0
    _reach: float = 0.0
    _most_macs: float = 0.0
    _at_first: float = 0.0
    _launches: float = 0.0
    _noise: float = 0.0
    _known: dict[Hashable, Outcome] = field(default_factory=dict)
    _likeness: Likeness | None = None

    def __post_init__(self) -> None:
        state = self.state
        from fxconv.passes import BY_NAME  # which import what is imported here

        # Anybody's laws may look at numbers, or at what lies far away.
        if all(BY_NAME.get(law.name) is law for law in self.laws):
            self._likeness = Likeness(state, self.laws)
        self.context = Context(
            lambda v: state.uses.get(v, 0), state.users_of, state.model.count, lambda v: v in state.folding and state.unchanged(v)
        )

    @property
    def refusals(self) -> dict[tuple[int, str, str], Missed]:
        return self._records.refusals

    @property
    def applied(self) -> dict[Value, list[str]]:
        return self._records.applied

    @property
    def untaken(self) -> dict[Value, dict[str, Missed]]:
        return self._records.untaken

    def run(self) -> None:
        """Rewrite until no value has a step that pays."""
        # Not relative to a score with penalties for what the target forbids: all that merging saves would vanish beside them.
        self._noise = 1e-9 * score(self.state.honest_total(), self.state.objective)
        self._at_first = self.state.total.macs
        start = self.state.mark()
        self._attempt(lambda values: values)
        if sum(not isinstance(v.node, (Leaf, Const)) for v in self.state.originals) <= SMALL:
            # Where steps exclude each other the first one taken decides, so that the way in decides.
            forwards, reached, launches = self._records, self.state.score(), self.state.total.launches
            self.state.undo(start)
            self._records = Records()
            self._attempt(lambda values: values[::-1])
            gained, more = reached - self.state.score(), self.state.total.launches - launches
            if gained <= max(smallest_gain(self.state.objective), self._noise) or self._doubtful(gained, more):
                self.state.undo(start)
                for x, new, _ in forwards.taken:
                    self._set(x, new)
                self._records = forwards
        self._leave_alone()
        for v, by_law in self.untaken.items():
            if v in self.state.uses:
                for law, missed in by_law.items():
                    self.refusals.setdefault((v.id, law, "does not pay"), missed)

    def _attempt(self, ordered: Callable[[list[Value]], list[Value]]) -> None:
        """The search of the whole graph from where it stands, values visited in the given order of theirs."""
        laws = self.laws
        self.laws = [law for law in laws if not law.late]
        self._run(ordered([v for v in self._order() if not isinstance(v.node, (Leaf, Const))]))
        late, self.laws = [law for law in laws if law.late], laws
        if late:
            self._run(
                ordered([v for v in self._order() if any(not isinstance(o, Refusal) for w in late for o in w(v, self.context))])
            )

    def _run(self, queue: list[Value]) -> None:
        queued = set(queue)
        self._known = {}
        while queue:
            v = queue.pop(0)
            queued.discard(v)
            if v not in self.state.uses:
                continue
            changed = self._improve(v)
            for u in changed:
                if u in self.state.uses and u not in queued and not isinstance(u.node, (Leaf, Const)):
                    queue.append(u)
                    queued.add(u)

    def _leave_alone(self) -> None:
        """Take back what was written anew on the way to something else and saves nothing: the original's spelling stays.

        A part of a split that became a slice costs the same, and OpenVINO no longer finds that the parts are views.
        """
        state = self.state
        for x in sorted(state.restated & state.originals.keys(), key=lambda x: x.id):
            start, mark = state.score(), state.mark()
            if x in state.uses and self._set(x, None) and state.score() <= start + self._noise:
                self.applied.pop(x, None)
            else:
                state.undo(mark)

    def _order(self) -> list[Value]:
        return sorted(self.state.uses, key=lambda v: v.id)

    def laws_of(self, v: Value) -> tuple[str, ...]:
        """The laws that made v what it is, in order."""
        laws = list(self.applied.get(v, ()))
        for x in self._made(v):
            laws += self.applied.get(x, ())
        return tuple(laws) or ("restate",)

    # -- one value ----------------------------------------------------------------------------------------------------

    def _improve(self, v: Value) -> list[Value]:
        """Take the best sequence of steps that starts at v, if one pays; returns the values to look at again."""
        state = self.state
        self._trials = self._looks = 0
        # A sum of slices costs no multiply-adds, and little time, beside what computes them; launches it has as many.
        around = state.price_after(v) if state.objective == "launches" else self._price_around(v)
        self._reach = self.budget.reach * max(score(around, state.objective), 1e-9)
        # A step may trade time for launches, never for multiply-adds: a launch-heavy model would densify its pools. What
        # earlier steps saved here may be spent again, so that the order of steps does not decide.
        self._launches = state.total.launches
        self._most_macs = state.total.macs * (1 + 1e-9)
        if state.objective == "launches":
            self._most_macs = max(1.1 * state.total.macs, min(state.total.macs + self._saved_around(v), self._at_first))
        alike = self._likeness.around(v) if self._likeness is not None else None
        known = self._known.get(alike)
        touched = self._repeat(v, known) if known is not None else None
        if touched is None:
            touched, outcome = self._search(v)
            if alike is not None:
                self._known[alike] = outcome
        return self._neighbourhood(touched)

    def _price_around(self, v: Value) -> Price:
        """What v and its readers cost, and what they are computed from within as many steps as the search takes."""
        level = [v, *self._few_readers(v)]
        total, seen = Price(), set(level)
        for _ in range(self.budget.depth + 1):
            for x in level:
                total = total + self.state.prices.get(x, Price())
            level = [y for y in dict.fromkeys(y for x in level for y in self.state.reads(x)) if y not in seen]
            seen.update(level)
        return total

    def _saved_around(self, v: Value) -> float:
        """Multiply-adds that the original graph spends on v, within as many steps as the search takes, and that are not now."""
        state, level, seen = self.state, [v], {v}
        saved = -state.price_after(v).macs
        for _ in range(self.budget.depth + 1):
            for x in level:
                if x in state.originals and (x is v or x not in state.uses):
                    saved += state.originals[x].price.macs
            below = (y for x in level if x in state.originals for y in state.originals[x].reads)
            level = [y for y in dict.fromkeys(below) if y not in seen]
            seen.update(level)
        return max(saved, 0.0)

    def _search(self, v: Value) -> tuple[list[Value], Outcome]:
        """Explore from v and take what pays best: the values touched, and what a value like v need not search for."""
        state = self.state
        start, mark = state.score(), state.mark()
        self._refusing.clear()
        best = self._explore([v], self.budget.depth, start)
        state.undo(mark)
        if best is None or best[0] > start - self._least_gain(v, best[1]):
            self.untaken[v] = self._losses(v)
            return [], Outcome(None, 0.0, self.untaken[v], frozenset(law for x, law in self._refusing if x is v))
        self.untaken.pop(v, None)
        touched, gained = self._take(v, best[1])
        if touched:
            logger.debug("%s: %s, %.6g → %.6g", v, [s[2] for s in best[1]], start, best[0])
        return touched, Outcome(best[2] if touched else None, gained)

    def _repeat(self, v: Value, known: Outcome) -> list[Value] | None:
        """Do at v what was done at a value like it: the values touched, or None where it does not come to the same.

        What gains as much there needs no second judgement: neither how much is enough nor what is doubtful has changed.
        """
        state = self.state
        if known.route is None:
            if known.refusing:  # whose reasons speak of v's own numbers
                self._proposals(v, late=True, only=known.refusing)
            self.untaken[v] = {law: replace(missed, value=v) for law, missed in known.untaken.items()}
            return []
        start, mark, path = state.score(), state.mark(), self._path
        focus, joint, found, complete = [v], list[Value](), list[Step](), False
        for level, (at, which) in enumerate(known.route):
            proposals = self._proposals(focus[at], late=level == 0) if at < len(focus) else []
            if which >= len(proposals) or not self._redefine(proposals[which]):
                break
            found += proposals[which]
            focus, joint = self._next(proposals[which], joint)
            self._path = self._path | {x for x, _, _ in proposals[which]}
        else:
            complete = abs(start - state.score() - known.gained) <= 1e-6 * known.gained
        self._path = path
        if not complete:
            state.undo(mark)
            return None
        self.untaken.pop(v, None)
        return self._record(found)

    def _take(self, v: Value, steps: Sequence[Step]) -> tuple[list[Value], float]:
        """Take steps, unless what they gain is doubtful: the values touched, none where nothing was taken; and the gain."""
        state = self.state
        start, mark, launches = state.score(), state.mark(), state.total.launches
        least = self._least_gain(v, steps)
        for x, new, _ in steps:
            self._set(x, new)
        gained = start - state.score()
        doubtful = self._doubtful(gained, state.total.launches - launches)
        # What a slice costs depends on who reads it, and on the way here that may have been someone else.
        if doubtful or gained < 0.5 * least:
            state.undo(mark)
            return [], 0.0
        return self._record(steps), gained

    def _record(self, steps: Sequence[Step]) -> list[Value]:
        """Note steps that were taken; returns the values touched."""
        self._records.taken += steps
        touched: list[Value] = []
        for x, new, law in steps:
            if new is None:
                self.applied.pop(x, None)
            else:
                self.applied.setdefault(x, []).append(law)
            touched += [x, *self._made(x)]
        return touched

    def _doubtful(self, gained: float, more: float) -> bool:
        """Whether a gain is too small for so many more operators: there the model of a device is least to be trusted."""
        return self.state.objective == "latency" and more > 0 and gained < LAUNCH_WORTH * more

    def _least_gain(self, v: Value, steps: Sequence[Step]) -> float:
        """What steps must gain; the same expression in another spelling of as many operators, a tenth of what it costs."""
        state = self.state
        least = smallest_gain(state.objective)
        if any(law != "restate" for _, _, law in steps):
            return least
        mark, launches = state.mark(), state.total.launches
        self._redefine(steps)
        fewer = state.total.launches < launches  # constants that the model computes at every call are folded
        state.undo(mark)
        return least if fewer else max(least, 0.1 * score(state.prices[v], state.objective))

    def _losses(self, v: Value) -> dict[str, Missed]:
        """Per law, the best of the moves at v that were legal and did not pay, with what it would have cost."""
        state, out = self.state, dict[str, Missed]()
        now = Price()
        for x in (v, *state.reads(v)):
            now = now + state.prices.get(x, Price())
        for s, total, steps, _ in self._tried:
            law = steps[0][2]
            impossible = total.launches - state.total.launches > IMPOSSIBLE.launches / 2
            loses = s > state.score() + smallest_gain(state.objective) or total.macs > self._most_macs
            if law not in WEIGHED or law in out or impossible or not loses:
                continue
            before, then = now, now + (total - state.total)
            if min(then.seconds, then.macs, then.params, then.launches) < 0:  # it made others needless that lie further away
                before, then = state.total, total
            what = [f"{before.macs:,.0f} → {then.macs:,.0f} multiply-adds"]
            what.append(f"{before.seconds * 1e6:.1f} → {then.seconds * 1e6:.1f} µs")
            if state.objective in ("params", "launches"):
                unit = {"params": "parameters", "launches": "launches"}[state.objective]
                a, b = getattr(before, state.objective), getattr(then, state.objective)
                what.insert(0, f"{a:,.0f} → {b:,.0f} {unit}")
            others = [o for o in OBJECTIVES if o != state.objective and score(then, o) < score(before, o) - smallest_gain(o)]
            would = f"objective={others[0]!r}" if others else ""
            out[law] = Missed(v, law, f"does not pay: {', '.join(what)}", would)
        return out

    def _set(self, x: Value, new: Value | None) -> bool:
        """Redefine a value, as what it was in the original graph for None; whether that changes anything."""
        return self.state.revert(x) if new is None else self.state.redefine(x, new)

    def _made(self, x: Value) -> list[Value]:
        """Values below x that the original graph does not compute, nearest first."""
        out: list[Value] = []
        stack = list(operands(x.node))
        while stack and len(out) < 12:
            y = stack.pop(0)
            if self.state.unchanged(y) or y in out or isinstance(y.node, (Leaf, Const)):
                continue
            out.append(y)
            stack.extend(operands(y.node))
        return out

    def _neighbourhood(self, touched: Iterable[Value]) -> list[Value]:
        out: dict[Value, None] = {}
        for x in touched:
            out[x] = None
            for u in self.state.users.get(x, ()):
                out[u] = None
                for w in self.state.users.get(u, ()):
                    out[w] = None
            for y in self.state.reads(x):
                out[y] = None
        return list(out)

    def _few_readers(self, x: Value) -> list[Value]:
        """The values that read x, and of a view of x who reads that; none of more than a few moves could follow a step at x."""
        found: list[Value] = []
        for u in self.state.users.get(x, ()):
            found.append(u)
            if isinstance(u.node, View):
                found += self.state.users.get(u, ())
        return found if len(found) <= self.budget.readers else []

    def _proposals(self, v: Value, late: bool, only: frozenset[str] | None = None) -> list[list[Step]]:
        """The steps that the laws (``only`` those named) propose at v; those of a list are taken together.

        Late laws come first or not at all.
        """
        found: list[list[Step]] = []
        laws = [law for law in self.laws if only is None or law.name in only]
        for law in laws:
            if law.late and not late:
                continue
            for outcome in law(v, self.context):
                if isinstance(outcome, Refusal):
                    self._refused(v, law, outcome)
                elif isinstance(outcome, Joint):
                    found.append([(x, new, law.name) for x, new in outcome.pairs])
                else:
                    found.append([(v, outcome, law.name)])
        written_anew = v in self.state.restated and v not in self._path
        if written_anew or late and v in self.state.originals and not self.state.unchanged(v):
            # What was worth it with other neighbours may not be any more.
            found.append([(v, None, "restore")])
            if dead := self._dead_below(v):
                found.append([*found[-1], *((x, None, "restore") for x in dead)])
        return [*found, *self._inner_proposals(v, laws)]

    def _refused(self, v: Value, law: Law, refusal: Refusal) -> None:
        self._refusing.add((v, law.name))
        key = (v.id, law.name, refusal.reason)
        if key not in self.refusals:
            self.refusals[key] = Missed(v, law.name, refusal.reason, refusal.would_fire_if)

    def _dead_below(self, v: Value) -> list[Value]:
        """What the original graph computes v from and nothing reads at present, as far as it was redefined before."""
        state, found, stack = self.state, list[Value](), [v]
        while stack:
            for x in state.originals[stack.pop()].reads:
                if x in state.originals and x not in state.uses and not state.unchanged(x) and x not in found:
                    found.append(x)
                    stack.append(x)
        return found

    def _inner_proposals(self, v: Value, laws: Sequence[Law]) -> list[list[Step]]:
        """Steps inside a value that an original node computes as a whole: a convolution's map, without its bias.

        Its inner values are not alive, so rewriting them is rewriting v; restating v first would cost a level of depth.
        Views are no operations, so what an inner view is of is as near.
        """
        state = self.state
        if not state.unchanged(v) or isinstance(v.node, Apply):
            return []
        found: list[list[Step]] = []
        # A part of a concatenation whose tensor others read too gains nothing by itself: the copy of it stays.
        read_elsewhere = {
            t
            for _, group in (concatenated(v.node) if isinstance(v.node, Sum) else ())
            for t in group
            if isinstance(t.node, Map) and state.uses.get(t.node.x, 0) > 1
        }
        for t in operands(v.node):
            x = t.node.x if isinstance(t.node, View) and self._inside(t) else t
            if t in read_elsewhere or not self._inside(x) or not isinstance(x.node, (Map, Sum)):
                continue
            for law in laws:
                if law.name == "restate" or law.late:
                    continue
                for outcome in law(x, self.context):
                    if isinstance(outcome, Refusal):
                        self._refused(v, law, outcome)
                    elif isinstance(outcome, Value):
                        within = outcome if x is t else _substituted(t, x, outcome)
                        found.append([(v, _substituted(v, t, within), law.name)])
        return found

    def _inside(self, x: Value) -> bool:
        """Whether x is computed as a part of an original node's value only."""
        return x not in self.state.uses and x not in self.state.originals

    def _margin(self, steps: Sequence[Step]) -> float:
        """What a move must save before it counts."""
        state = self.state
        margin = next((law.margin for law in self.laws if law.name == steps[0][2]), 0.0)
        if not margin or state.objective != "latency":
            return 0.0
        replaced = [x for x, _, _ in steps]
        replaced += [x.node.x for x in replaced if isinstance(x.node, Apply)]  # which goes with the function
        return margin * sum(score(state.prices.get(x, Price()), "latency") for x in replaced)

    def _redefine(self, steps: Sequence[Step]) -> bool:
        """Take steps for a trial; False where they change nothing, or can't be priced: the caller takes them back."""
        changed = False
        for x, new, law in steps:
            try:
                changed |= self._set(x, new)
            except Exception as error:  # the model comes out right without this step, and the report says so
                logger.warning("what the law %r proposes raised at %s", law, x, exc_info=True)
                reason = f"what the law proposes raised {type(error).__name__}: {error}"
                self.refusals.setdefault((x.id, law, reason), Missed(x, law, reason))
                return False
        return changed

    def _explore(self, focus: Sequence[Value], depth: int, start: float, joint: list[Value] | None = None) -> Found | None:
        """The best outcome of up to ``depth`` moves on the values in focus; the state is left as found.

        ``joint`` is what several values that were redefined together on the way have around them.
        """
        state = self.state
        tried: list[Trial] = []
        seen: set[tuple[int, int, object]] = set()
        for at, x in enumerate(focus):
            if x not in state.uses or self._looks >= self.budget.looks:
                continue
            self._looks += 1
            for which, steps in enumerate(self._proposals(x, late=depth == self.budget.depth)):
                if self._trials >= self.budget.trials:
                    break
                # Wide sums are dear to price: a trial counts by what it makes.
                first, new, law = steps[0]
                self._trials += 1 + (len(operands(new.node)) // 4 if new is not None else 0)
                margin = self._margin(steps)
                mark = state.mark()
                if self._redefine(steps):
                    key = (first.id, len(steps), first.node if law != "restate" else "restate")
                    if key not in seen:
                        seen.add(key)
                        tried.append((state.score() + margin, state.total, steps, (at, which)))
                state.undo(mark)
        tried.sort(key=lambda t: t[0])
        if depth == self.budget.depth:
            self._tried = tried
        best: Found | None = None
        for s, total, steps, where in tried[: self.budget.beam]:
            allowed = total.macs <= self._most_macs and not self._doubtful(start - s, total.launches - self._launches)
            if allowed and (best is None or s < best[0]):
                best = (s, list(steps), [where])
        if depth > 1:
            for reached, _, steps, where in tried[: self.budget.beam]:
                if self._trials >= self.budget.trials or self._looks >= self.budget.looks:
                    break
                if reached > start + self._reach or steps[0][2] == "restore" and len(steps) > 1:
                    continue
                margin = self._margin(steps)
                mark = state.mark()
                self._redefine(steps)
                path = self._path
                self._path = path | {x for x, _, _ in steps}
                nearby, beside = self._next(steps, joint or [])
                deeper = self._explore(nearby, depth - 1, start, beside)
                self._path = path
                state.undo(mark)
                if deeper is not None and (best is None or deeper[0] + margin < best[0] - self._noise):
                    best = (deeper[0] + margin, [*steps, *deeper[1]], [where, *deeper[2]])
        return best

    def _next(self, steps: Sequence[Step], joint: list[Value]) -> tuple[list[Value], list[Value]]:
        """The values to look at after steps, and what later steps look at too because these redefine several values.

        What each of several values allows then takes a step of its own, far from the others.
        """
        nearby = self._nearby(steps)
        return [*nearby, *(x for x in joint if x not in nearby)], nearby if len(steps) > 1 else joint

    def _nearby(self, steps: Sequence[Step]) -> list[Value]:
        """The values to look at after steps: those redefined, what was made for them, and who reads them."""
        nearby = [x for x, _, _ in steps]
        nearby += [y for x in nearby[:] for y in self._made(x) if y not in nearby]
        nearby += [u for x, _, _ in steps for u in self._few_readers(x) if u not in nearby]
        return nearby
