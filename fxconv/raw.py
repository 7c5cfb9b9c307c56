"""Raw maps: roles and a kernel over input slots of given sizes, no value attached; and how their slots split into atoms."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from fxconv import kernel as kernels
from fxconv.axes import Size, common_refinement, is_static
from fxconv.expr import Kept, Map, New, Node, Resample, Role, Shared, Value, Window, kernel_shape, role_size
from fxconv.kernel import Kernel
from fxconv.resample import matrix
from fxconv.window import Filter, affine_pairs

Splits = tuple[tuple[Size, ...], ...]


@dataclass(frozen=True)
class Raw:
    """A linear map by itself: as `Map`, on input slots of the given sizes."""

    in_sizes: tuple[Size, ...]
    roles: tuple[Role, ...]
    kernel: Kernel

    @property
    def out_sizes(self) -> tuple[Size, ...]:
        return tuple(role_size(r, self.in_sizes) for r in self.roles)

    @property
    def contracted(self) -> tuple[int, ...]:
        named = {r.src for r in self.roles if not isinstance(r, New)}
        return tuple(i for i in range(len(self.in_sizes)) if i not in named)

    @property
    def acting(self) -> tuple[int, ...]:
        """The input slots that the map does something to."""
        return (*self.contracted, *dict.fromkeys(r.src for r in self.roles if not isinstance(r, (New, Kept))))

    def axes(self) -> list[tuple[str, int]]:
        """What each kernel axis belongs to: ("out", output slot) or ("in", contracted input slot)."""
        outs = [("out", o) for o, r in enumerate(self.roles) if isinstance(r, (Shared, New, Window))]
        return outs + [("in", i) for i in self.contracted]


def raw(m: Map) -> Raw:
    return Raw(m.x.sizes, m.roles, m.kernel)


def as_value(x: Value | Node) -> Value:
    return x if isinstance(x, Value) else Value(x)


def moved(role: Role, src: int) -> Role:
    """The role with another source slot."""
    if isinstance(role, Kept):
        return Kept(src)
    if isinstance(role, Shared):
        return Shared(src)
    if isinstance(role, Window):
        return Window(src, role.filter, role.size)
    if isinstance(role, Resample):
        return Resample(src, role.kind, role.parameters, role.size)
    return role


# -- Windows as matrices ----------------------------------------------------------------------------------------------


def places(f: Filter, n_in: int, n_out: int) -> torch.Tensor:
    """Which input entry each tap reads at each output: [taps, outputs, inputs], 1 where it does."""
    table = torch.zeros(f.taps, n_out, n_in, dtype=torch.float64)
    for t in range(f.taps):
        pairs = affine_pairs(f.up, f.down, t * f.dilation - f.offset, n_out, n_in)
        if pairs is not None:
            outputs = torch.arange(pairs.y.start, pairs.y.stop, pairs.y.step)
            table[t, outputs, torch.arange(pairs.i.start, pairs.i.stop, pairs.i.step)] = 1
    return table


def banded(k: Kernel, axis: int, f: Filter, n_in: int, n_out: int) -> Kernel:
    """An axis of taps as one of outputs, and one of inputs that comes last."""
    shape = (*k.shape[:axis], n_out, *k.shape[axis + 1 :], n_in)

    def numbers() -> torch.Tensor:
        taps = k.tensor()
        return torch.tensordot(taps.movedim(axis, -1), places(f, n_in, n_out).to(taps.device), 1).movedim(-2, axis)

    return kernels.derive(shape, ("banded", axis, f, n_in, n_out), (k,), numbers)


# -- Refinement -------------------------------------------------------------------------------------------------------


def refine(m: Raw, in_splits: Splits | None, out_splits: Splits | None) -> tuple[Raw, Splits, Splits] | str:
    """Split slots of a map into atoms (new ⇒ new × new, contracted ⇒ contracted × contracted, kept on both sides).

    Returns the refined map and the splits of its input and output slots, which can be finer than those asked for where
    a kept slot was split differently on its two sides; or the reason why it can't be done.
    """
    whole_ins, whole_outs = tuple([(s,) for s in m.in_sizes]), tuple([(s,) for s in m.out_sizes])
    if in_splits in (None, whole_ins) and out_splits in (None, whole_outs):
        return m, whole_ins, whole_outs
    ins: list[tuple[Size, ...]] = list(whole_ins if in_splits is None else in_splits)
    outs: list[tuple[Size, ...]] = list(whole_outs if out_splits is None else out_splits)
    for o, role in enumerate(m.roles):
        if isinstance(role, (Kept, Shared)):
            if role_size(role, m.in_sizes) == 1:
                ins[role.src] = outs[o] = ins[role.src] if len(ins[role.src]) < len(outs[o]) else outs[o]
                continue
            fine = common_refinement(ins[role.src], outs[o])
            if fine is None:
                return f"axes {ins[role.src]} and {outs[o]} have no common refinement"
            ins[role.src] = outs[o] = fine
        elif isinstance(role, (Window, Resample)):
            if len(outs[o]) > 1 or len(ins[role.src]) > 1:
                return "a window slides along an axis that is split here"
            if not ins[role.src]:
                ins[role.src] = (1,)
            if not outs[o]:
                outs[o] = (1,)
    start = list(itertools.accumulate((len(s) for s in ins), initial=0))
    roles: list[Role] = []
    shape: list[Size] = []
    for o, role in enumerate(m.roles):
        if isinstance(role, New):
            roles += [New(s) for s in outs[o]]
            shape += outs[o]
        elif isinstance(role, (Kept, Shared)):
            for k in range(len(outs[o])):
                roles.append(moved(role, start[role.src] + k))
            if isinstance(role, Shared):
                shape += outs[o]
        else:
            roles.append(moved(role, start[role.src]))
            if isinstance(role, Window):
                shape.append(role.filter.taps)
    for i in m.contracted:
        shape += ins[i]
    in_sizes = tuple(s for split in ins for s in split)
    return Raw(in_sizes, tuple(roles), kernels.reshape(m.kernel, shape)), tuple(ins), tuple(outs)


def densify_resampling(m: Raw, slots: set[int]) -> Raw | str:
    """Write resampling along the given output slots as a dense matrix (contracted input, new output)."""
    for o in sorted(slots, reverse=True):
        role = m.roles[o]
        assert isinstance(role, Resample)
        n_in = m.in_sizes[role.src]
        if not (is_static(n_in) and is_static(role.size)):
            return f"resampling as a matrix needs static sizes, not {n_in} → {role.size}"
        roles = (*m.roles[:o], New(role.size), *m.roles[o + 1 :])
        before = Raw(m.in_sizes, m.roles, m.kernel).axes()
        after = Raw(m.in_sizes, roles, m.kernel).axes()
        position_out, position_in = after.index(("out", o)), after.index(("in", role.src))
        shape = kernel_shape(roles, m.in_sizes)

        def numbers(
            m: Raw = m,
            role: Resample = role,
            n_in: int = int(n_in),
            out: int = position_out,
            inp: int = position_in,
        ) -> torch.Tensor:
            table = matrix(role.kind, role.parameters, n_in, int(role.size))
            k = m.kernel.tensor()
            full = k[..., None, None] * table.to(k.device)
            first, second = (out, inp) if out < inp else (inp, out)
            if out > inp:
                full = full.transpose(-1, -2)
            return full.movedim((-2, -1), (first, second))

        assert len(after) == len(before) + 2
        m = Raw(m.in_sizes, roles, kernels.derive(shape, ("resample", o, m.roles, m.in_sizes), (m.kernel,), numbers))
    return m
