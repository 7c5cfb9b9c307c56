"""Affine expressions over named axes: `Map`, `Sum` and `Const`, with `View` for layout and `Leaf`/`Apply` at the edges.

A `Value` is a tensor with *slots*: its atomic axes, in a fixed order, each of one size. How a torch tensor's dims group
the slots is layout (`Ref`), not an operation. Static axes of size 1 have no slot, so ``(N, 1, 100)`` and ``(N, 100)`` are
the same value, and a 1×1 convolution after global pooling is a Linear.

Nodes are frozen; a `Value` is a cell whose node the search may replace by an equal one. That keeps a rewrite local: the
users of a value need not be rebuilt, and a value that came from the fx graph is still the value of that fx node.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fxconv import kernel as kernels
from fxconv.axes import Size, product, same, same_shape
from fxconv.kernel import Kernel
from fxconv.resample import PICK
from fxconv.window import Filter

_ids = itertools.count()


class Value:
    """A tensor-valued cell: the sizes of its slots, and the node that defines it at present."""

    __slots__ = ("node", "sizes", "id", "origin")

    def __init__(self, node: Node, origin: Any = None) -> None:
        self.node = node
        self.sizes: tuple[Size, ...] = sizes_of(node)
        self.id = next(_ids)
        self.origin = origin

    @property
    def rank(self) -> int:
        return len(self.sizes)

    def __repr__(self) -> str:
        return f"v{self.id}:{type(self.node).__name__}[{', '.join(map(str, self.sizes))}]"


@dataclass(frozen=True)
class Kept:
    """The output slot is input slot ``src``, untouched."""

    src: int


@dataclass(frozen=True)
class Shared:
    """The output slot is input slot ``src``, and the kernel varies along it: a scale, or groups."""

    src: int


@dataclass(frozen=True)
class New:
    """The kernel's rows: an output slot that no input slot corresponds to."""

    size: Size


@dataclass(frozen=True)
class Window:
    """The output slot slides a filter along input slot ``src``; the kernel has an axis of taps."""

    src: int
    filter: Filter
    size: Size


@dataclass(frozen=True)
class Resample:
    """Interpolation or adaptive pooling along ``src``: a fixed matrix that depends on the sizes only.

    ``kind`` and ``parameters`` name the matrix (see `resample.matrix`); every kind maps a constant to itself.
    """

    src: int
    kind: str
    parameters: tuple[Any, ...]
    size: Size


Role = Kept | Shared | New | Window | Resample


@dataclass(frozen=True)
class Leaf:
    """A value that comes from outside the affine region: an input, or the result of a barrier."""

    name: str
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class Map:
    """One linear map.

    ``kernel`` has one axis per output slot that is shared, new or a window (in the order of ``roles``; the size of a
    window's axis is its taps), followed by one per contracted input slot (those that no role names), ascending.
    """

    x: Value
    roles: tuple[Role, ...]
    kernel: Kernel

    def __post_init__(self) -> None:
        sources = [r.src for r in self.roles if not isinstance(r, New)]
        if len(set(sources)) != len(sources) or any(not 0 <= s < self.x.rank for s in sources):
            raise ValueError(f"roles {self.roles} do not name distinct slots of {self.x}")
        expected = kernel_shape(self.roles, self.x.sizes)
        if len(expected) != len(self.kernel.shape) or not all(same(a, b) for a, b in zip(expected, self.kernel.shape, strict=True)):
            raise ValueError(f"roles {self.roles} on {self.x} need a kernel {expected}, not {self.kernel.shape}")

    @cached_property
    def contracted(self) -> tuple[int, ...]:
        named = {r.src for r in self.roles if not isinstance(r, New)}
        return tuple(i for i in range(self.x.rank) if i not in named)

    @cached_property
    def selects(self) -> bool:
        """Whether the map pads, crops or strides and does nothing else: kept slots and one-tap windows of weight 1.

        So does one that picks entries of axes, as windows can't where the size is dynamic; it does nothing but that.
        """
        if self.kernel.uniform != 1.0 or self.contracted:
            return False
        active = [r for r in self.roles if not isinstance(r, Kept)]
        windows = all(isinstance(r, Window) and r.filter.is_selection for r in active)
        return bool(active) and (windows or all(isinstance(r, Resample) and r.kind == PICK for r in active))


@dataclass(frozen=True)
class Sum:
    """Addition of values with the same slots; concatenation is a sum of selections into disjoint places."""

    terms: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a sum needs a term")
        first = self.terms[0].sizes
        for t in self.terms[1:]:
            if not same_shape(t.sizes, first):
                raise ValueError(f"terms of a sum differ in shape: {first} and {t.sizes}")


@dataclass(frozen=True)
class Const:
    """A constant: ``varies`` says along which slots; the kernel has one axis for each of those."""

    sizes: tuple[Size, ...]
    varies: tuple[bool, ...]
    kernel: Kernel

    def __post_init__(self) -> None:
        expected = tuple(s for s, v in zip(self.sizes, self.varies, strict=True) if v)
        if len(expected) != len(self.kernel.shape):
            raise ValueError(f"a constant of slots {self.sizes} varying {self.varies} has a kernel {self.kernel.shape}")


@dataclass(frozen=True)
class View:
    """Layout: each input slot splits into atoms, and each output slot is an ordered product of atoms.

    Atoms are numbered through the input slots in order; those of size 1 may be left out or come from nowhere (an empty
    product), every other one is used exactly once.
    """

    x: Value
    splits: tuple[tuple[Size, ...], ...]
    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        atoms = self.atoms
        if len(self.splits) != self.x.rank:
            raise ValueError(f"{len(self.splits)} splits for {self.x}")
        used = sorted(a for g in self.groups for a in g)
        needed = [i for i, s in enumerate(atoms) if s != 1]
        if len(set(used)) != len(used) or not set(needed) <= set(used):
            raise ValueError(f"view groups {self.groups} do not use each of the atoms {atoms} once")

    @property
    def atoms(self) -> tuple[Size, ...]:
        return tuple(s for split in self.splits for s in split)

    def slots_behind(self, order: list[int]) -> list[int]:
        """The operand's slots in the order in which they first appear among the given slots of the view."""
        slot_of = [slot for slot, split in enumerate(self.splits) for _ in split]
        return list(dict.fromkeys(slot_of[a] for s in order for a in self.groups[s]))


@dataclass(frozen=True)
class Apply:
    """A nonlinear function that a positive scale passes through: ReLU, LeakyReLU, PReLU, max-pooling.

    ``op`` is the canonical operator that emission writes again; ``kept`` names the slots that it treats one by one
    (all for an activation, all but the spatial ones for pooling); ``shifts`` says whether it commutes with adding a
    constant per kept slot (max-pooling does).
    """

    x: Value
    op: Any
    sizes: tuple[Size, ...]
    kept: tuple[bool, ...]
    shifts: bool


Node = Leaf | Map | Sum | Const | View | Apply


def kernel_shape(roles: tuple[Role, ...], x_sizes: tuple[Size, ...]) -> tuple[Size, ...]:
    """The shape that a map's kernel must have."""
    shape: list[Size] = []
    named = set()
    for r in roles:
        if not isinstance(r, New):
            named.add(r.src)
        if isinstance(r, Shared):
            shape.append(x_sizes[r.src])
        elif isinstance(r, New):
            shape.append(r.size)
        elif isinstance(r, Window):
            shape.append(r.filter.taps)
    return (*shape, *(s for i, s in enumerate(x_sizes) if i not in named))


def role_size(role: Role, x_sizes: tuple[Size, ...]) -> Size:
    if isinstance(role, (Kept, Shared)):
        return x_sizes[role.src]
    return role.size


def sizes_of(node: Node) -> tuple[Size, ...]:
    """The slot sizes of the value that a node defines."""
    if isinstance(node, Map):
        return tuple(role_size(r, node.x.sizes) for r in node.roles)
    if isinstance(node, Sum):
        return node.terms[0].sizes
    if isinstance(node, View):
        atoms = node.atoms
        return tuple(product([atoms[a] for a in g]) for g in node.groups)
    return node.sizes


def operands(node: Node) -> tuple[Value, ...]:
    if isinstance(node, Sum):
        return node.terms
    if isinstance(node, (Map, View, Apply)):
        return (node.x,)
    return ()


def axis_positions(m: Map) -> dict[int, int]:
    """Kernel axis of each output slot that has one (shared, new, window)."""
    positions: dict[int, int] = {}
    for o, r in enumerate(m.roles):
        if isinstance(r, (Shared, New, Window)):
            positions[o] = len(positions)
    return positions


def has_resample(m: Map) -> bool:
    return any(isinstance(r, Resample) for r in m.roles)


def identity_map(x: Value) -> Map:
    return Map(x, tuple(Kept(i) for i in range(x.rank)), kernels.uniform((), 1.0))


def is_identity(node: Node) -> bool:
    """A map that changes nothing (its value is its operand)."""
    return isinstance(node, Map) and node.kernel.uniform == 1.0 and node.roles == tuple(Kept(i) for i in range(node.x.rank))


def is_selection(node: Node) -> bool:
    """Zero padding, cropping, strided slicing: see `Map.selects`."""
    return isinstance(node, Map) and node.selects


def is_multiple(node: Node) -> bool:
    """A map that multiplies all of its operand by one number."""
    return (
        isinstance(node, Map)
        and node.kernel.shape == ()
        and node.kernel.uniform is not None
        and all(isinstance(r, Kept) and r.src == o for o, r in enumerate(node.roles))
    )


# -- Views ------------------------------------------------------------------------------------------------------------


def view(x: Value, splits: tuple[tuple[Size, ...], ...], groups: tuple[tuple[int, ...], ...]) -> View | Value:
    """A view in normal form: nested views are one, and a view that changes nothing is its operand."""
    node = View(x, splits, groups)
    if isinstance(x.node, View):
        flat = _compose_views(node, x.node)
        if flat is not None:
            node = flat
    node = _without_idle_splits(node)
    if node.groups == tuple((i,) for i in range(node.x.rank)) and all(len(s) <= 1 for s in node.splits):
        return node.x
    return node


def split_view(x: Value, splits: tuple[tuple[Size, ...], ...]) -> View | Value:
    """Split slots into atoms that stay in place; every atom becomes a slot."""
    count = sum(len(s) for s in splits)
    return view(x, splits, tuple((i,) for i in range(count)))


def permute_view(x: Value, order: tuple[int, ...]) -> View | Value:
    """Output slot k is input slot ``order[k]``; slots left out must have size 1."""
    return view(x, tuple((s,) for s in x.sizes), tuple((i,) for i in order))


def _without_idle_splits(v: View) -> View:
    """Merge atoms that were split off one slot and are grouped together again in the same order."""
    starts = list(itertools.accumulate((len(s) for s in v.splits), initial=0))
    position = {a: (g, k) for g, group in enumerate(v.groups) for k, a in enumerate(group)}
    splits: list[tuple[Size, ...]] = []
    renumber: dict[int, int | None] = {}
    count = 0
    for slot, split in enumerate(v.splits):
        out: list[Size] = []
        previous: int | None = None
        for k, size in enumerate(split):
            a = starts[slot] + k
            if size == 1 and len(split) > 1 and a not in position:
                renumber[a] = None
                continue
            if previous is not None and a in position and previous in position:
                (g0, k0), (g1, k1) = position[previous], position[a]
                if g0 == g1 and k1 == k0 + 1:
                    out[-1] = product([out[-1], size])
                    renumber[a] = None
                    previous = a
                    continue
            out.append(size)
            renumber[a] = count
            count += 1
            previous = a
        splits.append(tuple(out))
    groups = tuple(tuple(n for a in g if (n := renumber[a]) is not None) for g in v.groups)
    return View(v.x, tuple(splits), groups)


def _compose_views(outer: View, inner: View) -> View | None:
    from fxconv.axes import common_refinement, split_like

    atoms = inner.atoms
    inner_parts: dict[int, tuple[Size, ...]] = {}
    outer_pieces: list[list[list[tuple[int, int]]]] = []  # per middle slot, per outer atom: its (inner atom, piece)
    for slot, split in enumerate(outer.splits):
        members = inner.groups[slot]
        sizes = [atoms[a] for a in members]
        fine = common_refinement(sizes, split)
        if fine is None:
            return None
        by_inner, by_outer = split_like(sizes, fine), split_like(split, fine)
        if by_inner is None or by_outer is None:
            return None
        flat: list[tuple[int, int]] = []
        for a, part in zip(members, by_inner, strict=True):
            inner_parts[a] = part
            flat.extend((a, k) for k in range(len(part)))
        pieces = []
        for part in by_outer:
            pieces.append(flat[: len(part)])
            flat = flat[len(part) :]
        outer_pieces.append(pieces)
    splits: list[tuple[Size, ...]] = []
    number: dict[tuple[int, int], int] = {}
    a = 0
    for split in inner.splits:
        out: list[Size] = []
        for size in split:
            part = inner_parts.get(a, (size,))
            for k, s in enumerate(part):
                number[a, k] = len(number)
                out.append(s)
            a += 1
        splits.append(tuple(out))
    per_atom = [p for pieces in outer_pieces for p in pieces]
    groups = tuple(tuple(number[piece] for atom in g for piece in per_atom[atom]) for g in outer.groups)
    return View(inner.x, tuple(splits), groups)


def walk(roots: list[Value]) -> Iterator[Value]:
    """Every value reachable from the roots, operands before users."""
    seen: set[int] = set()
    stack = [(v, False) for v in reversed(roots)]
    while stack:
        v, done = stack.pop()
        if done:
            yield v
        elif v.id not in seen:
            seen.add(v.id)
            stack.append((v, True))
            stack.extend((o, False) for o in operands(v.node))
