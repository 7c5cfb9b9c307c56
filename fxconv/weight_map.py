"""Weights both ways: a checkpoint of the original in the result's names and shapes, and back.

A conversion without merging (Linear ⇄ convolution) only reshapes, permutes or flips a weight. The kernels of the
emitted parameters say how they were made, so the way there and back can be read off them. ``Options(trainable=True)``
restricts the rewrites to those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxconv.errors import ArgsError
from fxconv.kernel import Kernel

if TYPE_CHECKING:
    from fxconv.emit import Emitted

KEY = "_fxconv_weights"

TRAINABLE_LAWS = ("restate", "full length")
"""Laws that never mix weights."""


@dataclass(frozen=True)
class Entry:
    """How one parameter of the result is made.

    Attributes:
        name: the parameter (or buffer) of the result.
        source: that of the original, "" where it is made of several or of changed values.
        shape: the original's shape.
        steps: ("reshape", shape), ("permute", dims) and ("flip", dims), applied to the original's in this order.
    """

    name: str
    source: str
    shape: tuple[int, ...] = ()
    steps: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """The original's tensor as the result's."""
        for kind, numbers in self.steps:
            t = t.permute(numbers) if kind == "permute" else t.flip(numbers) if kind == "flip" else t.reshape(numbers)
        return t

    def backward(self, t: torch.Tensor) -> torch.Tensor:
        """The result's tensor (or its gradient) as the original's."""
        shapes = [self.shape]
        for kind, numbers in self.steps:
            last = shapes[-1]
            shapes.append(tuple(last[d] for d in numbers) if kind == "permute" else numbers if kind == "reshape" else last)
        for (kind, numbers), before in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
            if kind == "permute":
                inverse = [0] * len(numbers)
                for i, d in enumerate(numbers):
                    inverse[d] = i
                t = t.permute(inverse)
            else:
                t = t.flip(numbers) if kind == "flip" else t.reshape(before)
        return t


@dataclass(frozen=True)
class WeightMap:
    """Between the state dicts of an original and its result.

    Attributes:
        entries: one per parameter that fxconv made.
        original: names in the original's state dict.
        result: names in the result's.
        tied: names of the original that stand for one tensor.
    """

    entries: tuple[Entry, ...]
    original: tuple[str, ...]
    result: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...] = ()

    @property
    def merged(self) -> tuple[str, ...]:
        """Parameters of the result that no single weight of the original gives."""
        return tuple(e.name for e in self.entries if not e.source)

    def to_result(self, checkpoint: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict of the original as one of the result (or gradients by name, or optimiser moments).

        Raises:
            ArgsError: some weights were merged, or the checkpoint lacks one.
        """
        self._check(checkpoint, [e.source for e in self.entries if e.source])
        made = {e.name: e.forward(checkpoint[e.source]).contiguous() for e in self.entries}
        return {n: made[n] if n in made else checkpoint[n] for n in self.result if n in made or n in checkpoint}

    def to_original(self, checkpoint: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict of the result as one of the original.

        Raises:
            ArgsError: some weights were merged, or the checkpoint lacks one.
        """
        self._check(checkpoint, [e.name for e in self.entries])
        made = {e.source: e.backward(checkpoint[e.name]).contiguous() for e in self.entries}
        for names in self.tied:
            found = [made[n] for n in names if n in made]
            made.update(dict.fromkeys(names, found[0]) if found else {})
        return {n: made[n] if n in made else checkpoint[n] for n in self.original if n in made or n in checkpoint}

    def _check(self, checkpoint: Mapping[str, torch.Tensor], needed: list[str]) -> None:
        if self.merged:
            raise ArgsError(
                f"{', '.join(self.merged)} were merged from several weights, and there is no way back: transform with "
                "options={'trainable': True}, which leaves out such rewrites"
            )
        missing = [n for n in needed if n not in checkpoint]
        if missing:
            raise ArgsError(f"the checkpoint lacks {', '.join(missing)}: give the other side's state dict, complete")


def entry(name: str, k: Kernel) -> Entry:
    """How a parameter's kernel was made from a stored weight."""
    steps: list[tuple[str, tuple[int, ...]]] = []
    while True:
        if k.spec == "reshape":
            steps.append(("reshape", tuple(int(s) for s in k.shape)))
        elif isinstance(k.spec, tuple) and k.spec and k.spec[0] in ("permute", "flip"):
            steps.append((k.spec[0], tuple(k.spec[1])))
        else:
            break
        k = k.parents[0]
    path = k._facts.get("path")
    if not isinstance(path, str):
        return Entry(name, "")
    return Entry(name, path, tuple(int(s) for s in k.shape), tuple(reversed(steps)))


def record_weights(model: Any, result: Any, emitted: Emitted) -> None:
    """Keep the map with the result, as plain data that survives pickling."""
    made = {}
    for name, k in emitted.parameters.items():
        value: Any = emitted.gm
        for part in name.split("."):
            value = getattr(value, part, None)
        if isinstance(value, torch.Tensor):
            made[id(value)] = k, value
    tensors = result.state_dict(keep_vars=True) if isinstance(result, nn.Module) else result.state_dict
    entries = [entry(name, made[id(t)][0]) for name, t in tensors.items() if id(t) in made]
    names = model.state_dict if not isinstance(model, nn.Module) else model.state_dict(keep_vars=True)
    same: dict[int, list[str]] = {}
    for name, value in names.items():
        same.setdefault(id(value), []).append(name)
    holder = result if isinstance(result, nn.Module) else result.graph_module
    holder.__dict__[KEY] = {
        "entries": [(e.name, e.source, e.shape, e.steps) for e in entries],
        "original": tuple(names),
        "result": tuple(tensors),
        "tied": tuple(tuple(group) for group in same.values() if len(group) > 1),
    }


def weight_map(result: Any) -> WeightMap:
    """How the weights of a transformed model and of its original map onto one another.

    Args:
        result: what `fxconv.transform` returned.

    Returns:
        The map; its ``to_result`` and ``to_original`` convert state dicts. Where weights were merged they raise.

    Raises:
        ArgsError: the model does not come from `fxconv.transform`.
    """
    holder = getattr(result, "graph_module", result)
    data = getattr(holder, "__dict__", {}).get(KEY)
    if data is None:
        raise ArgsError(
            f"this {type(result).__name__} carries no weight map: give what fxconv.transform returned (a saved and "
            "reloaded program has lost it)"
        )
    return WeightMap(tuple(Entry(*e) for e in data["entries"]), tuple(data["original"]), tuple(data["result"]), tuple(data["tied"]))


def reversible(emitted: Emitted, names: list[str]) -> bool:
    """Whether every one of these parameters is a single weight of the original, in another shape."""
    return all(entry(n, emitted.parameters[n]).source for n in names)
