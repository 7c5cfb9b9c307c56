"""Structure tests on matrices: diagonal, blocks, Toeplitz, permutation, repeated rows, low rank.

Each test looks at a few entries first and rejects an ordinary dense matrix there; what survives is proved on every
entry. Matrices are in the model's own dtype: equality means equality of the stored values. ``slack`` admits half a unit
in the last place per weight instead (`ulp`), which the caller must label "exact to rounding".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

_SAMPLES = 32
"""Entries looked at before a whole matrix is."""

_RANK_SAMPLE = 192
"""Side of the submatrix whose full rank rejects low rank: ranks from here on are not looked for in larger matrices."""

_SMALL = 2**12
"""Entries up to which a matrix is searched for every sampled value, before shifts are looked for row by row."""

_MANTISSA = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.float64: 53}


def ulp(w: torch.Tensor) -> torch.Tensor:
    """The unit in the last place of each entry, in float64."""
    _, exponent = torch.frexp(w.double())
    return torch.exp2((exponent - _MANTISSA.get(w.dtype, 53)).double())


@dataclass(frozen=True)
class Axis:
    """A pair of factors, one of the rows (``row`` entries inside it) and one of the columns.

    Row index = (outer, o, inner) with o < ``m`` and inner < ``row``; column index = (outer, i, inner) with i < ``n``
    and inner < ``column``. The matrix depends on o and i through ``i − stride·o`` only (Toeplitz), or vanishes where
    they differ (blocks, stride 0).
    """

    row: int
    m: int
    column: int
    n: int
    stride: int


@dataclass(frozen=True)
class Samples:
    """Some nonzero entries: their places and values."""

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


def divisors(n: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


@lru_cache(maxsize=256)
def _spread(n: int, seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to ``count`` of n rows in random order, and two random numbers for each."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n, generator=generator)[:count]
    return rows, torch.rand(len(rows), 2, generator=generator, dtype=torch.float64)


def sample(w: torch.Tensor, seed: int = 0, count: int = _SAMPLES) -> Samples:
    """Nonzero entries from rows that are spread over the matrix, and up to two per row."""
    rows, random = _spread(w.shape[0], seed, count)
    live = w[rows.to(w.device)].nonzero().cpu()
    counts = live[:, 0].bincount(minlength=len(rows))
    starts = counts.cumsum(0) - counts
    picked = (starts[:, None] + (random * counts[:, None]).long())[counts > 0].reshape(-1)
    r, c = rows[live[picked, 0]], live[picked, 1]
    return Samples(r, c, w[r.to(w.device), c.to(w.device)])


def is_zero(w: torch.Tensor) -> bool:
    return not bool(w.reshape(-1)[:1].any()) and not bool(w.any())


# -- Blocks -----------------------------------------------------------------------------------------------------------


def block_axes(w: torch.Tensor, most: int = 3) -> list[Axis]:
    """Ways in which a matrix is block-diagonal, those with the most blocks first; a diagonal matrix has blocks of
    1×1."""
    if bool(w[0].all()):
        return []  # every block has zeros beside it
    s = sample(w)
    if not len(s.rows):
        return []
    entries = list(zip(s.rows.tolist(), s.columns.tolist(), strict=True))
    found: list[Axis] = []
    total: int | None = None
    # A row lies in one of g blocks: all else in it is zero.
    widest = w.shape[1] // int(w[s.rows.to(w.device)].count_nonzero(1).max())
    for g in reversed([g for g in divisors(math.gcd(*w.shape)) if g <= widest]):
        if g == 1 or len(found) == most:
            break
        for row in divisors(w.shape[0] // g):
            for column in divisors(w.shape[1] // g):
                if any(r // row % g != c // column % g for r, c in entries):
                    continue
                axis = Axis(row, g, column, g, 0)
                if any(_finer(f, axis) for f in found):
                    continue
                if total is None:
                    total = int(w.count_nonzero())
                if int(_blocks(w, axis).count_nonzero()) == total:
                    found.append(axis)
    return found[:most]


def _finer(a: Axis, b: Axis) -> bool:
    """Whether b's blocks are unions of a's: then a was found first and says more."""
    rows = a.row <= b.row and a.row * a.m >= b.row * b.m
    return rows and a.column <= b.column and a.column * a.n >= b.column * b.n


def _blocks(w: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The diagonal blocks, ``[row outer, row inner, column outer, column inner, g]``."""
    six = w.reshape(-1, axis.m, axis.row, w.shape[1] // (axis.n * axis.column), axis.n, axis.column)
    return six.diagonal(dim1=1, dim2=4)


def blocks(w: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The diagonal blocks of a block-diagonal matrix: ``[g, row outer, row inner, column outer, column inner]``."""
    return _blocks(w, axis).movedim(-1, 0)


# -- Toeplitz ---------------------------------------------------------------------------------------------------------


def toeplitz_axes(w: torch.Tensor, slack: bool = False, most: int = 2000) -> list[Axis]:
    """Pairs of factors along which a matrix is shift-invariant, the largest first."""
    s = sample(w)
    if not len(s.rows):
        return []
    margin = ulp(s.values).to(w.dtype) if slack else torch.zeros_like(s.values)
    if w.numel() <= _SMALL and _repeated(w, s, margin) < 2:
        return []
    found: list[_Shift] = []
    for row in divisors(w.shape[0])[:-1]:
        for right in _shifts(w, s, margin, row):
            found += _shifts_of(w, row, right, slack, found)
    axes = list(dict.fromkeys(axis for f in found for axis in f.axes()))
    return sorted(axes, key=lambda a: -a.m * a.n)[:most]


@dataclass(frozen=True)
class _Shift:
    """``w[r, c] = w[r + row, c + right]`` wherever both rows lie in one block of ``row·m``, both columns in one of
    ``width``.

    It holds for smaller blocks too, and for every way to write ``right`` as a stride over columns of several entries.
    """

    row: int
    m: int
    right: int
    width: int

    def implies(self, other: _Shift) -> bool:
        """Whether the other one is this one, repeated, within its blocks."""
        times, rest = divmod(other.row, self.row)
        inside = (self.row * self.m) % (other.row * other.m) == 0 and self.width % other.width == 0
        return rest == 0 and other.right == times * self.right and inside

    def axes(self) -> Iterator[Axis]:
        """The same over smaller blocks, which a second axis around it may need: those where windows of at most three
        quarters of the input slide over about all of it."""
        for m, width in itertools.product(divisors(self.m)[1:], divisors(self.width)):
            if self.right < width <= 4 * m * self.right and (m - 1) * self.right < 2 * width:
                for column in divisors(math.gcd(self.right, width)):
                    yield Axis(self.row, m, column, width // column, self.right // column)


def _shifts_of(w: torch.Tensor, row: int, right: int, slack: bool, known: list[_Shift]) -> list[_Shift]:
    """The largest blocks within which a matrix is invariant under one shift, beyond those that are known already."""
    rows, columns = w.shape
    widths = [n for n in divisors(columns) if n > right]
    # Windows that would begin past the end read nothing.
    options = [_Shift(row, m, right, n) for m, n in itertools.product(divisors(rows // row)[1:], widths) if (m - 1) * right < 2 * n]
    options.sort(key=lambda f: -f.m * f.width)
    some = _spread(rows - row, 1, 2 * _SAMPLES)[0].to(w.device)
    few = _Pairs.of(w[some, : columns - right], w[some + row, right:], slack, some)
    every: _Pairs | None = None
    found: list[_Shift] = []
    for f in options:
        if any(k.implies(f) for k in (*known, *found)) or few.broken(f) or not few.shown(f):
            continue
        if every is None:
            every = _Pairs.of(w[:-row, : columns - right], w[row:, right:], slack, None)
        if not every.broken(f):
            found.append(f)
    return found


class _Pairs:
    """Entries and those one shift away: where they differ, and where they are equal and not zero."""

    def __init__(self, differ: torch.Tensor, equal: torch.Tensor) -> None:
        self._differ, self._equal = differ, equal
        self._within: dict[tuple[str, int, int], torch.Tensor] = {}

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, slack: bool, rows: torch.Tensor | None) -> _Pairs:
        """Of two equal-sized parts; ``rows`` says which rows of the matrix a's are, if not the first ones."""
        differ = (a != b).nonzero()
        if slack and len(differ):
            x, y = a[differ[:, 0], differ[:, 1]], b[differ[:, 0], differ[:, 1]]
            differ = differ[(x.double() - y.double()).abs() > ulp(x)]
        equal = (a != 0).nonzero() if rows is not None else differ[:0]
        if rows is not None:
            differ = torch.stack([rows[differ[:, 0]], differ[:, 1]], 1)
            equal = torch.stack([rows[equal[:, 0]], equal[:, 1]], 1)
        return cls(differ, equal)

    def _in_block(self, which: str, f: _Shift) -> bool:
        pairs = self._differ if which == "differ" else self._equal
        mask = None
        for dim, (step, block) in enumerate(((f.row, f.row * f.m), (f.right, f.width))):
            key = (which, dim, block)
            if key not in self._within:
                self._within[key] = pairs[:, dim] % block + step < block
            mask = self._within[key] if mask is None else mask & self._within[key]
        return bool(mask.any()) if mask is not None else False

    def broken(self, f: _Shift) -> bool:
        """Whether two entries in one block differ."""
        return self._in_block("differ", f)

    def shown(self, f: _Shift) -> bool:
        """Whether any entry that is not zero has one to compare with: blocks of zeros are invariant under everything."""
        return self._in_block("equal", f)


def _repeated(w: torch.Tensor, s: Samples, margin: torch.Tensor) -> int:
    """How many of the sampled values occur more than once in the matrix."""
    hits = (w.reshape(-1, 1) - s.values).abs() <= margin
    return int((hits.sum(0) > 1).sum())


def _shifts(w: torch.Tensor, s: Samples, margin: torch.Tensor, row: int) -> list[int]:
    """How far to the right sampled values are found again, ``row`` rows below; the most frequent distances."""
    fits = s.rows + row < w.shape[0]
    if not bool(fits.any()):
        return []
    r, c, v, e = s.rows[fits] + row, s.columns[fits], s.values[fits], margin[fits]
    hits = ((w[r] - v[:, None]).abs() <= e[:, None]).nonzero()
    distance = hits[:, 1] - c[hits[:, 0]]
    distance = distance[distance > 0]
    if not len(distance):
        return []
    values, votes = distance.unique(return_counts=True)
    order = votes.argsort(descending=True, stable=True)[:6]
    enough = max(2, int(fits.sum()) // 8)
    return [int(values[i]) for i in order if int(votes[i]) >= enough]


def toeplitz_sets(w: torch.Tensor, axes: list[Axis], most: int = 3) -> list[tuple[Axis, ...]]:
    """One axis, or two nested in one another (outer first): those with the fewest multiply-adds, by a sample of
    entries."""
    s = sample(w, seed=2, count=16 * _SAMPLES)
    share = {a: _span(s, a) / a.n for a in axes}
    inner: dict[tuple[int, int], Axis] = {}
    for a in axes:
        block = (a.row * a.m, a.column * a.n)
        if block not in inner or share[a] < share[inner[block]]:
            inner[block] = a
    prices: dict[tuple[Axis, ...], float] = {(a,): share[a] for a in axes}
    for a in axes:
        for (rows, columns), b in inner.items():
            if a.row % rows == 0 and a.column % columns == 0:
                prices[a, b] = share[a] * share[b]
    best: dict[Hashable, tuple[Axis, ...]] = {}
    for chosen in sorted(prices, key=lambda chosen: (prices[chosen], len(chosen))):
        # Over smaller blocks at the same price the same shift says nothing more: the largest came first.
        best.setdefault((prices[chosen], *((a.row, a.column, a.stride) for a in chosen)), chosen)
        if len(best) == most:
            break
    return [c for c in best.values() if prices[c] < max(a.m for a in c)]


def _span(s: Samples, a: Axis) -> int:
    """How many taps the sampled entries need."""
    t = (s.columns // a.column) % a.n - a.stride * ((s.rows // a.row) % a.m)
    places = t.unique().tolist()
    distance = math.gcd(*(p - places[0] for p in places)) or 1
    return int(places[-1] - places[0]) // distance + 1


@dataclass(frozen=True)
class Taps:
    """The kernel of a Toeplitz matrix.

    Attributes:
        values: ``[row atoms…, column atoms…]`` with each sliding pair replaced by taps, see `taps`; float64.
        first, step: per sliding pair, which input (relative to stride·o) the first tap reads, and the taps' distance.
        exact: whether it gives every stored value, or each within half a unit in the last place.
    """

    values: torch.Tensor
    first: tuple[int, ...]
    step: tuple[int, ...]
    exact: bool


def atoms(shape: torch.Size, axes: tuple[Axis, ...]) -> tuple[list[int], list[int]]:
    """Row and column factors: outer, (sliding, inner) per axis."""
    row_atoms, column_atoms, rows, columns = [], [], *shape
    for a in axes:
        row_atoms += [rows // (a.m * a.row), a.m]
        column_atoms += [columns // (a.n * a.column), a.n]
        rows, columns = a.row, a.column
    return [*row_atoms, rows], [*column_atoms, columns]


def taps(w: torch.Tensor, axes: tuple[Axis, ...]) -> Taps | None:
    """The kernel ``[outer row, (taps, inner row)…, outer column, inner column…]`` of a matrix, or None if it is none."""
    rows, columns = atoms(w.shape, axes)
    k = w.reshape(*rows, *columns)
    low = high = k.double()
    count = len(axes)
    first: list[int] = []
    step: list[int] = []
    for d, a in enumerate(axes):
        # Column atoms move up by one for every sliding pair that is gone already.
        o_dim, i_dim = 1 + 2 * d, len(rows) + 1 + d
        low, high = _along(low, a, o_dim, i_dim, "amin"), _along(high, a, o_dim, i_dim, "amax")
    value = (low + high) / 2
    for d, a in enumerate(axes):
        dim = 1 + 2 * d
        live = value.abs().movedim(dim, 0).flatten(1).amax(1).nonzero()[:, 0]
        if not len(live):
            return None
        distance = math.gcd(*(int(p - live[0]) for p in live)) or 1
        first.append(int(live[0]) - (a.m - 1) * a.stride)
        step.append(distance)
        index = [slice(None)] * value.dim()
        index[dim] = slice(int(live[0]), int(live[-1]) + 1, distance)
        value, low, high = value[tuple(index)], low[tuple(index)], high[tuple(index)]
    assert value.dim() == len(rows) + len(columns) - count
    exact = torch.equal(low, high)
    if not exact and bool(((high - low) > torch.minimum(_ulp64(low, w.dtype), _ulp64(high, w.dtype))).any()):
        return None
    return Taps(value.contiguous(), tuple(first), tuple(step), exact)


def _ulp64(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return ulp(t.to(dtype))


def _along(k: torch.Tensor, a: Axis, o_dim: int, i_dim: int, how: str) -> torch.Tensor:
    """Least or greatest entries along the lines of equal ``i − stride·o``; their axis takes the place of o's."""
    moved = k.movedim((o_dim, i_dim), (-2, -1))
    line = torch.arange(a.n)[None] - a.stride * torch.arange(a.m)[:, None] + (a.m - 1) * a.stride
    flat = moved.reshape(*moved.shape[:-2], a.m * a.n)
    out = flat.new_zeros(*flat.shape[:-1], (a.m - 1) * a.stride + a.n)
    index = line.reshape(-1).to(k.device).expand(flat.shape)
    return out.scatter_reduce(-1, index, flat, how, include_self=False).movedim(-1, o_dim)


# -- Rows and columns -------------------------------------------------------------------------------------------------


def live_columns(w: torch.Tensor) -> torch.Tensor | None:
    """Indices of the columns that are not all zero, or None where every column is live."""
    some = w[torch.arange(0, w.shape[0], max(1, w.shape[0] // _SAMPLES))]
    suspects = (~some.any(0)).nonzero()[:, 0]
    if not len(suspects):
        return None
    dead = suspects[~w[:, suspects].any(0)]
    if not len(dead):
        return None
    alive = torch.ones(w.shape[1], dtype=torch.bool)
    alive[dead.cpu()] = False
    return alive.nonzero()[:, 0]


def distinct_rows(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(a representative of each distinct row, which representative each row equals), or None where all differ."""
    some = w[:, :: max(1, w.shape[1] // 8)]
    if len(torch.unique(some, dim=0)) == w.shape[0]:
        return None
    _, inverse = torch.unique(w, dim=0, return_inverse=True)
    count = int(inverse.max()) + 1
    if count == w.shape[0]:
        return None
    first = torch.full((count,), w.shape[0], dtype=torch.long)
    first.scatter_reduce_(0, inverse.cpu(), torch.arange(w.shape[0]), "amin")
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count)
    return first[order], rank[inverse.cpu()]


def selection(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The column that each row reads and what it multiplies it with (1 throughout: a permutation, repeated rows), or None
    where some row reads none or several."""
    s = sample(w)
    if not len(s.rows) or len({*zip(s.rows.tolist(), s.columns.tolist(), strict=True)}) != len(s.rows.unique()):
        return None
    if int(w.count_nonzero()) != w.shape[0]:
        return None
    where = w.nonzero()
    if not torch.equal(where[:, 0].cpu(), torch.arange(w.shape[0])):
        return None
    return where[:, 1].cpu(), w[where[:, 0], where[:, 1]]


# -- Rank -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """``left @ right`` is the matrix: exactly (to float64 rounding), or within half a unit in the last place of each
    weight."""

    left: torch.Tensor
    right: torch.Tensor
    exact: bool


def _directions(rows: int, columns: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``side`` of the rows in random order, and a few more directions among the columns."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(rows, generator=generator)[:side], torch.randn(columns, side + 8, generator=generator)


_few_directions = lru_cache(maxsize=64)(_directions)
"""Kept where they are small: drawing them takes longer than all that is done with them."""


def low_rank(w: torch.Tensor, most: int) -> Factors | None:
    """Two factors of rank at most ``most``, or None."""
    if most < 1:
        return None
    rows, columns = w.shape
    side = min(most + 1, rows, columns, _RANK_SAMPLE)
    # Some rows seen through random directions: their rank is the matrix's, up to what they can show.
    chosen, directions = (_few_directions if rows * columns <= _SMALL else _directions)(rows, columns, side)
    directions = directions.to(w.device)
    if side == min(_RANK_SAMPLE, most + 1):
        # In float32 first: independent rows show as such, and most weights are done with here.
        pivots = torch.linalg.qr((w[chosen.to(w.device)].float() @ directions).T, mode="r").R.diagonal().abs()
        if float(pivots.min()) > 1e-3 * float(pivots.max()):
            return None
    directions = directions.double()
    tolerance = 64 * torch.finfo(w.dtype).eps
    sizes = torch.linalg.svdvals(w[chosen.to(w.device)].double() @ directions)
    shown = _count(sizes, tolerance * float(sizes[0]))
    if shown == 0 or shown > most or shown == side == _RANK_SAMPLE:
        return None
    basis = torch.linalg.qr(w.double() @ directions[:, : shown + 8]).Q
    u, s, vh = torch.linalg.svd(basis.T @ w.double(), full_matrices=False)
    u = basis @ u
    spread = float(s[0])
    # Behind the directions that count there may be some that only hold what rounding left.
    for rank in sorted({_count(s, 1e-13 * spread), _count(s, tolerance * spread)}):
        if not 0 < rank <= most:
            continue
        root = s[:rank].sqrt()
        left, right = u[:, :rank] * root, vh[:rank] * root[:, None]
        if float((left @ right - w.double()).abs().max()) <= 1e-13 * spread:
            return Factors(left, right, True)
        if w.dtype != torch.float64 and (factors := within_half_ulp(w, left, right)) is not None:
            return Factors(*factors, False)
    return None


_ROUNDS = 60
"""Passes over the two factors, each a least squares fit."""


def within_half_ulp(w: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Factors near the given ones whose product is within half a unit in the last place of every entry, or None where
    none were found.

    A product that was rounded when it was stored has such factors, but its singular vectors are not them: those weigh
    every entry alike, while a small entry was rounded by little. So each factor in turn is fitted by least squares in
    units of that rounding; what lies within it already counts for next to nothing, and only what lies outside pulls.

    Args:
        w: ``[…, rows, columns]`` as stored; a stack is fitted as a whole.
        left, right: ``[…, rows, rank]`` and ``[…, rank, columns]``, float64.
    """
    most = w.numel() * right.shape[-2] ** 2
    half, target = ulp(w) / 2, w.double()
    if bool((target == 0).any()):
        # A zero was not rounded: it only has to stay small against what is there.
        half = torch.where(target == 0, half.amax() * 2.0**-20, half)
    for step in range(_ROUNDS if most <= 2**26 else 1):
        if step:
            bound = (1 - 0.05 * 0.93**step) * half
            left = _pulled(target, bound, left, right)
            right = _pulled(target.mT, bound.mT, right.mT, left.mT).mT
        if bool(((left @ right - target).abs() <= half).all()):
            return left, right
    return None


def _pulled(target: torch.Tensor, bound: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a`` such that entries of ``a @ b`` are less far outside ``bound`` of the target."""
    error = a @ b - target
    weight = torch.where(error.abs() > bound, 1.0, 0.003) / bound.square()
    wanted = error.clamp(-bound, bound) - error
    normal = torch.einsum("...rj,...ij,...kj->...irk", b, weight, b)
    scale = normal.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp_min(1e-300)
    ridge = 1e-14 * torch.eye(b.shape[-2], dtype=b.dtype, device=b.device)
    moved = torch.einsum("...ij,...kj->...ik", weight * wanted, b)
    return a + torch.linalg.solve(normal / scale + ridge, (moved / scale[..., 0])[..., None])[..., 0]


def _count(s: torch.Tensor, threshold: float) -> int:
    return int((s > threshold).sum())
