"""References: a value together with how a torch tensor's dims group its slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxconv import kernel as kernels
from fxconv.axes import Size, common_refinement, product, same_shape, split_like
from fxconv.constant_images import map_constant, view_constant
from fxconv.expr import Const, Map, Role, Sum, Value, View, view
from fxconv.kernel import Kernel
from fxconv.normal_form import normal
from fxconv.raw import as_value


class LiftError(Exception):
    """An operator that cannot be lifted, and why; it becomes a barrier with that reason."""


@dataclass(frozen=True)
class Ref:
    """A tensor: dims as ordered products of a value's slots; dims of size 1 are empty products.

    Slots of static size 1 may be named by no dim.
    """

    value: Value
    dims: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(product([self.value.sizes[s] for s in d]) for d in self.dims)

    def atoms(self, dim: int) -> tuple[Size, ...]:
        return tuple(self.value.sizes[s] for s in self.dims[dim])


def make_view(x: Value, splits: Sequence[Sequence[Size]], groups: Sequence[Sequence[int]]) -> Value:
    """A view of a value; of a constant, its value."""
    out = as_value(view(x, tuple(map(tuple, splits)), tuple(map(tuple, groups))))
    if isinstance(out.node, View) and isinstance(out.node.x.node, Const):
        return Value(view_constant(out.node, out.node.x.node))
    return out


def make_map(x: Value, roles: Sequence[Role], kernel: Kernel) -> Value:
    """A map of a value in normal form; of a constant, its value where that can be had.

    Raises:
        LiftError: the map of a constant has no closed form (a border of dynamic size).
    """
    if isinstance(x.node, Const):
        result = map_constant(Map(x, tuple(roles), kernel), x.node)
        if isinstance(result, str):
            raise LiftError(result)
        return Value(result)
    return normal(x, roles, kernel)


def make_sum(terms: Sequence[Value]) -> Value:
    """A sum; sums of constants are evaluated, and zero adds nothing."""
    terms = [t for t in terms if not _is_zero(t)] or terms[:1]
    constants = [t for t in terms if isinstance(t.node, Const)]
    if len(constants) > 1:
        others = [t for t in terms if not isinstance(t.node, Const)]
        folded = add_constants([t.node for t in constants if isinstance(t.node, Const)])
        terms = [*others, *([] if folded.kernel.uniform == 0.0 and others else [Value(folded)])]
    return terms[0] if len(terms) == 1 else Value(Sum(tuple(terms)))


def _is_zero(t: Value) -> bool:
    return isinstance(t.node, Const) and t.node.kernel.uniform == 0.0


def add_constants(constants: Sequence[Const]) -> Const:
    """The sum of constants of equal sizes."""
    varies = tuple(any(c.varies[i] for c in constants) for i in range(len(constants[0].sizes)))
    sizes = constants[0].sizes
    full = [s for s, v in zip(sizes, varies, strict=True) if v]
    parts = []
    for c in constants:
        inserted = [s if c.varies[i] else 1 for i, s in enumerate(sizes) if varies[i]]
        parts.append(kernels.expand(kernels.reshape(c.kernel, inserted), full))
    return Const(sizes, varies, kernels.add(parts))


def arrange(ref: Ref, wanted: Sequence[Sequence[Size] | None]) -> tuple[Value, list[list[int]]]:
    """A value whose slots run in dims order, each dim's slots of the wanted sizes (None: as they are).

    Returns the value and, per dim, the slots. Ones in ``wanted`` become slots of size 1.

    Raises:
        LiftError: sizes with no common refinement.
    """
    x = ref.value
    fine: dict[int, tuple[Size, ...]] = {}
    plan: list[list[list[tuple[int, int]]]] = []  # dim -> slot -> (old slot, piece)
    for d, slots in enumerate(ref.dims):
        target = wanted[d]
        if target is None:
            plan.append([[(s, 0)] for s in slots])
            continue
        have = [x.sizes[s] for s in slots]
        joint = common_refinement(have, target)
        by_slot = split_like(have, joint) if joint is not None else None
        by_target = split_like(target, joint) if joint is not None else None
        if by_slot is None or by_target is None:
            raise LiftError(f"axes {_show(have)} do not regroup as {_show(target)}")
        pieces = [(s, k) for s, part in zip(slots, by_slot, strict=True) for k in range(len(part))]
        for s, part in zip(slots, by_slot, strict=True):
            fine[s] = part
        out = []
        for part in by_target:
            out.append(pieces[: len(part)])
            pieces = pieces[len(part) :]
        plan.append(out)
    splits = [fine.get(s, (x.sizes[s],)) for s in range(x.rank)]
    number: dict[tuple[int, int], int] = {}
    for s, split in enumerate(splits):
        for k in range(len(split)):
            number[s, k] = len(number)
    groups = [[number[p] for p in slot] for dim in plan for slot in dim]
    value = make_view(x, splits, groups)
    slots_of: list[list[int]] = []
    count = 0
    for dim in plan:
        slots_of.append(list(range(count, count + len(dim))))
        count += len(dim)
    return value, slots_of


def refine_together(refs: Sequence[Ref], dim_of: Sequence[Sequence[int | None]]) -> list[tuple[Size, ...]]:
    """Common atoms per output dim of several tensors; ``dim_of[r][d]`` is tensor r's dim for output dim d, or None.

    Raises:
        LiftError: dims with no common refinement.
    """
    result: list[tuple[Size, ...]] = []
    for d in range(len(dim_of[0]) if dim_of else 0):
        joint: tuple[Size, ...] | None = None
        for ref, dims in zip(refs, dim_of, strict=True):
            source = dims[d]
            if source is None:
                continue
            have = ref.atoms(source)
            if joint is None:
                joint = tuple(s for s in have if s != 1)
                continue
            finer = common_refinement(joint, have)
            if finer is None:
                raise LiftError(f"axes {_show(joint)} and {_show(have)} do not regroup")
            joint = finer
        result.append(joint or ())
    return result


def regroup_dims(ref: Ref, shape: Sequence[Size]) -> Ref:
    """The reference after a view to another shape; slots that a dim boundary cuts are split.

    Raises:
        LiftError: shapes with no common refinement (6·6 → 4·9).
    """
    x = ref.value
    order = [s for d in ref.dims for s in d]
    have = [x.sizes[s] for s in order]
    joint = common_refinement(have, shape)
    by_slot = split_like(have, joint) if joint is not None else None
    by_dim = split_like(shape, joint) if joint is not None else None
    if by_slot is None or by_dim is None:
        raise LiftError(f"a view from {_show(ref.shape)} to {_show(shape)} cuts across axes")
    if all(len(p) <= 1 for p in by_slot):
        flat = [s for s, p in zip(order, by_slot, strict=True) if p]
        value = x
    else:
        splits: list[tuple[Size, ...]] = [(s,) for s in x.sizes]
        for s, part in zip(order, by_slot, strict=True):
            splits[s] = part
        number: dict[tuple[int, int], int] = {}
        for s, split in enumerate(splits):
            for k in range(len(split)):
                number[s, k] = len(number)
        value = make_view(x, splits, [[i] for i in range(len(number))])
        flat = [number[s, k] for s, part in zip(order, by_slot, strict=True) for k in range(len(part))]
    dims: list[tuple[int, ...]] = []
    for part in by_dim:
        dims.append(tuple(flat[: len(part)]))
        flat = flat[len(part) :]
    return Ref(value, tuple(dims))


def check_shape(ref: Ref, shape: Sequence[Size]) -> None:
    """Raises LiftError where a lifted value has not the shape that the graph says."""
    if not same_shape(ref.shape, shape):
        raise LiftError(f"lifted shape {_show(ref.shape)} is not the graph's {_show(shape)}")


def _show(sizes: Sequence[Size]) -> str:
    return "·".join(map(str, sizes)) or "1"
