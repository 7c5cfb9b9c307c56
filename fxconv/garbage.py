"""When Python's cyclic garbage collector is kept from walking over a large heap again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


@contextmanager
def collector_skips_the_past() -> Iterator[None]:
    """Let the garbage collector look only at objects made from here on, until the outermost block ends.

    A full collection walks over every object of torch, SymPy and an exported graph, 0.3 s each time, and building graphs
    sets off several. What is garbage already is collected later. Where the process has frozen objects itself (a server
    before it forks), nothing is done: they could not be told apart afterwards.
    """
    global _depth
    if not _depth and gc.get_freeze_count():
        yield
        return
    _depth += 1
    gc.freeze()
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            gc.unfreeze()


@contextmanager
def collector_paused(kept: bool = False) -> Iterator[None]:
    """No collections: for timings, and for what makes many objects and hardly a cycle among them.

    Where they are ``kept``, a block that skips the past skips them too from then on.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if kept and _depth:
            gc.freeze()
        if enabled:
            gc.enable()
