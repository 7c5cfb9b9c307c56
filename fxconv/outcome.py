"""What a transform came to on its way: the searched state, the graph written from it, and the verdicts."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx
from torch.fx.experimental.symbolic_shapes import SymT, symbol_is_type

from fxconv.capture import Captured, restore_inplace
from fxconv.captured import Uncompiled
from fxconv.cost import Price
from fxconv.emit import Cluster, Emitted, Emitter, UnwritableError
from fxconv.identities import remove_identities
from fxconv.measure import Loser
from fxconv.program import fake_mode_of, set_attribute
from fxconv.search import Search
from fxconv.state import State
from fxconv.verify_cluster import Verdict

logger = logging.getLogger("fxconv")

Symbols = dict[sympy.Symbol, tuple[int, "int | None", int]]

_UNKNOWN_SIZE = 16
"""What a size that the values of a tensor decide is taken for in a price."""


@dataclass
class Outcome:
    """Everything one transform came to, before it is handed back."""

    captured: Captured
    state: State
    search: Search
    emitted: Emitted
    before: Price
    after: Price
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    pairs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rolled_back: dict[str, tuple[Cluster, Verdict, tuple[str, ...]]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    slower: list[Loser] = field(default_factory=list)
    refused: list[tuple[Cluster, str]] = field(default_factory=list)
    """Rewrites whose weights the model's dtype could not hold."""


def emit(captured: Captured, state: State) -> Emitted:
    """Write the state's graph anew, into a copy of the captured one. What can't be written is restored."""
    while True:
        try:
            return _written(captured, state)
        except UnwritableError as error:  # the model comes out right without this rewrite, and the report says so
            if error.value in state.unwritable:
                raise
            cause = error.__cause__
            logger.warning("writing what replaces it raised at %s", state.originals[error.value].node, exc_info=cause)
            state.unwritable[error.value] = f"writing it raised {type(cause).__name__}: {cause}"
            state.restore(error.value)


def _written(captured: Captured, state: State) -> Emitted:
    graph = copy.deepcopy(captured.gm.graph)
    gm = Uncompiled(captured.gm, graph, captured.gm.__class__.__name__)
    # A GraphModule copies what its graph reads; a program's signature may name more (num_batches_tracked).
    for name, value in (*captured.gm.named_parameters(), *captured.gm.named_buffers()):
        if not _has(gm, name):
            set_attribute(gm, name, value)
    gm.meta = dict(captured.gm.meta)
    twins = dict(zip(captured.gm.graph.nodes, gm.graph.nodes, strict=True))
    return Emitter(state, gm, twins, captured.dialect).run()


def hand_back(captured: Captured, gm: fx.GraphModule) -> Any:
    """The rewritten graph as the kind of thing that was given."""
    remove_identities(gm, captured.barriers)
    restore_inplace(gm)
    return captured.rebuild(gm)


def _has(gm: fx.GraphModule, path: str) -> bool:
    found: Any = gm
    for part in path.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def parameters_of(emitted: Emitted, cluster: Cluster) -> list[str]:
    """Names of the new parameters that a rewrite reads."""
    read = emitted.parameters_read
    return [name for node in cluster.new_nodes for name in read.get(node, ())]


def symbol_ranges(gm: fx.GraphModule) -> Symbols:
    """Range and example value of every symbol in the graph's sizes.

    A size that the values of a tensor decide has no example; it gets one that it may have.
    """
    mode = fake_mode_of(gm.graph)
    env = getattr(mode, "shape_env", None)
    if env is None:
        return {}
    values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    out: Symbols = {}
    unknown = [s for s in env.var_to_range if s not in values and symbol_is_type(s, SymT.UNBACKED_INT)]
    for symbol, value in [*values.items(), *((s, None) for s in unknown)]:
        interval = env.var_to_range.get(symbol)
        low, high = 2, None
        if interval is not None:
            low = int(interval.lower) if interval.lower.is_Integer else 2
            high = int(interval.upper) if interval.upper.is_Integer and interval.upper < 2**31 else None
        if value is None:
            low = max(low, 2)
            value = max(low, _UNKNOWN_SIZE if high is None else min(high, _UNKNOWN_SIZE))
        out[symbol] = (low, high, int(value))
    return out
