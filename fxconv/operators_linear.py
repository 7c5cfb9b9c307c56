"""Canonical operators → expressions: convolution, Linear, matrix products."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import fx

from fxconv import kernel as kernels
from fxconv.axes import Size, common_refinement, is_static, same, split_like
from fxconv.expr import Kept, New, Role, Shared, Window
from fxconv.kernel import Kernel
from fxconv.operators import add_along, operand_constant, out_shape, rule, scale
from fxconv.refs import LiftError, Ref, arrange, make_map, make_sum
from fxconv.window import Filter, conv_filter, transposed_filter

if TYPE_CHECKING:
    from fxconv.lift import Lifter
    from fxconv.spelling import Op


@rule("conv")
def _conv(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    x, weight, bias = op.inputs
    a = op.attrs
    k = operand_constant(lifter, weight, "the kernel")
    nd = len(k.shape) - 2
    transposed, groups = bool(a["transposed"]), int(a["groups"])
    taps = [int(s) for s in k.shape[2:]]
    if transposed:
        filters = [
            transposed_filter(taps[i], a["stride"][i], a["padding"][i][0], a["dilation"][i], a["output_padding"][i])
            for i in range(nd)
        ]
    else:
        per_axis = zip(taps, a["stride"], a["padding"], a["dilation"], strict=True)
        filters = [conv_filter(t, s, lo, hi, d) for t, s, (lo, hi), d in per_axis]
    ref = lifter.ref(x)
    if transposed:
        c_in, per_group = int(k.shape[0]), int(k.shape[1])
        k = kernels.flip(k, range(2, 2 + nd))
        # [G·Cg, Og, k…] → [G, Cg, Og, k…] → [G, Og, Cg, k…]
        k = kernels.reshape(k, (groups, c_in // groups, per_group, *taps))
        k = kernels.permute(k, (0, 2, 1, *range(3, 3 + nd)))
    else:
        c_in, per_group = int(k.shape[1]) * groups, int(k.shape[0]) // groups
        k = kernels.reshape(k, (groups, per_group, c_in // groups, *taps))
    out = slide(ref, k, filters, out_shape(node))
    if bias is not None:
        out = add_along(out, operand_constant(lifter, bias, "the bias"), len(out.dims) - nd - 1)
    return out


def slide(ref: Ref, k: Kernel, filters: Sequence[Filter], shape: tuple[Size, ...]) -> Ref:
    """A grouped convolution: kernel ``[G, O/G, C/G, taps…]`` over the last dims of a tensor, channels before them.

    Args:
        ref: the input, ``[…, C, spatial…]``.
        k: the kernel.
        filters: one per spatial dim.
        shape: the output's shape (only its spatial sizes are read).
    """
    nd = len(filters)
    channel = len(ref.dims) - nd - 1
    groups, per_group, in_group = (int(s) for s in k.shape[:3])
    have = [s for s in ref.atoms(channel) if s != 1]
    fine = common_refinement(have, [s for s in (groups, in_group) if s != 1])
    parts = split_like([groups, in_group], fine) if fine is not None else None
    if parts is None:
        raise LiftError(f"{groups} groups do not divide the channel axes {have}")
    n_in = ref.shape[channel + 1 :]
    n_out = shape[len(shape) - nd :]
    idle = [f.is_identity or (n_in[i] == 1 and n_out[i] == 1) for i, f in enumerate(filters)]
    wanted: list[Sequence[Size] | None] = [None] * channel
    wanted.append((*parts[0], *parts[1]))
    wanted += [None if idle[i] else (n_in[i],) for i in range(nd)]
    x, slots = arrange(ref, wanted)

    roles: list[Role] = []
    dims: list[list[int]] = []

    def emit(new: list[Role]) -> None:
        dims.append(list(range(len(roles), len(roles) + len(new))))
        roles.extend(new)

    for d in range(channel):
        emit([Kept(s) for s in slots[d]])
    shared = slots[channel][: len(parts[0])]
    out_channels: list[Role] = [Shared(s) for s in shared]
    if per_group != 1:
        out_channels.append(New(per_group))
    emit(out_channels)
    for i, f in enumerate(filters):
        source = slots[channel + 1 + i]
        if not idle[i]:
            emit([Window(source[0], f, n_out[i])])
            continue
        emit([Kept(s) for s in source])
        if not f.is_identity:
            # One element in, one out: the tap that reads it, or none.
            tap, rest = divmod(f.offset, f.dilation)
            if rest or not 0 <= tap < f.taps:
                raise LiftError("a convolution that reads nothing but padding")
            k = kernels.take(k, 3 + i, tap, tap + 1)
    # [G, O/G, C/G, taps…] → [G atoms, O/G, taps that slide…, C/G atoms]
    order = [0, 1, *(3 + i for i in range(nd)), 2]
    k = kernels.permute(k, order)
    taps = [filters[i].taps for i in range(nd) if not idle[i]]
    k = kernels.reshape(k, (*parts[0], *([per_group] if per_group != 1 else []), *taps, *parts[1]))
    return Ref(make_map(x, roles, k), tuple(tuple(d) for d in dims))


@rule("linear")
def _linear(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    x, weight, bias = op.inputs
    ref = lifter.ref(x)
    k = operand_constant(lifter, weight, "the weight")
    if len(k.shape) == 1:
        raise LiftError("a Linear with a vector for a weight")
    batch = string.ascii_lowercase[2 : 2 + len(ref.dims) - 1]
    out = contract(ref, f"{batch}b", k, "ab", f"{batch}a")
    if bias is not None:
        out = add_along(out, operand_constant(lifter, bias, "the bias"), len(out.dims) - 1)
    return out


def contract(ref: Ref, labels: str, k: Kernel, k_labels: str, out: str) -> Ref:
    """``einsum(labels, k_labels → out)`` of a tensor with a constant.

    A label of the tensor is kept (in out, not in k), shared (in both), contracted (in k only) or summed (in neither); a
    label of the kernel alone is a new axis (in out) or is summed.
    """
    for label in k_labels:
        if label not in labels and label not in out:
            axis = k_labels.index(label)
            source, k_labels = k, k_labels.replace(label, "")
            k = _summed(source, axis)
    for position, label in enumerate(labels):
        if label not in out and label not in k_labels:
            size = ref.shape[position]
            if not is_static(size):
                raise LiftError("a sum over an axis of dynamic size")
            k = kernels.expand(kernels.reshape(k, (*k.shape, 1)), (*k.shape, size))
            k_labels += label
    for label in k_labels:
        if label in labels and not same(k.shape[k_labels.index(label)], ref.shape[labels.index(label)]):
            raise LiftError(f"broadcasting in a product over {label!r}")
    x = ref.value
    slots = {label: list(ref.dims[i]) for i, label in enumerate(labels)}
    atoms = {label: [x.sizes[s] for s in slots[label]] for label in labels}
    for label in k_labels:
        if label not in atoms:
            size = k.shape[k_labels.index(label)]
            atoms[label] = [size] if size != 1 else []
    k = kernels.reshape(k, [s for label in k_labels for s in atoms[label]])
    axis_of: dict[tuple[str, int], int] = {}
    for label in k_labels:
        for i in range(len(atoms[label])):
            axis_of[label, i] = len(axis_of)
    roles: list[Role] = []
    axes: list[int] = []
    dims: list[tuple[int, ...]] = []
    for label in out:
        start = len(roles)
        for i, size in enumerate(atoms[label]):
            if label not in labels:
                roles.append(New(size))
                axes.append(axis_of[label, i])
            elif label in k_labels:
                roles.append(Shared(slots[label][i]))
                axes.append(axis_of[label, i])
            else:
                roles.append(Kept(slots[label][i]))
        dims.append(tuple(range(start, len(roles))))
    columns = sorted((s, axis_of[label, i]) for label in labels if label not in out for i, s in enumerate(slots[label]))
    listed = {s for label in labels for s in slots[label]}
    if len(listed) < x.rank:
        # Slots of size 1 that no dim names: contracted away.
        spare = [s for s in range(x.rank) if s not in listed]
        k = kernels.reshape(k, (*k.shape, *(1 for _ in spare)))
        columns = sorted([*columns, *((s, len(axis_of) + i) for i, s in enumerate(spare))])
    k = kernels.permute(k, [*axes, *(axis for _, axis in columns)])
    return Ref(make_map(x, roles, k), tuple(dims))


def _summed(k: Kernel, axis: int) -> Kernel:
    shape = tuple(s for i, s in enumerate(k.shape) if i != axis)
    return kernels.derive(shape, ("sum", (axis,), 1.0), (k,), lambda: k.tensor().sum(axis))


@rule("matmul")
def _matmul(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    a, b = op.inputs
    if lifter.is_constant(b) and not lifter.is_constant(a):
        return _product(lifter.ref(a), lifter.kernel(b), flip=False)
    if lifter.is_constant(a) and not lifter.is_constant(b):
        return _product(lifter.ref(b), lifter.kernel(a), flip=True)
    raise LiftError("a product of two activations is not affine")


def _product(ref: Ref, k: Kernel, flip: bool) -> Ref:
    """``x @ k``, or ``k @ x`` where flipped, as `torch.matmul` broadcasts them."""
    n, m = len(ref.dims), len(k.shape)
    batch = string.ascii_lowercase[: max(n, m) - 2] if max(n, m) > 2 else ""
    x_batch = batch[len(batch) - max(n - 2, 0) :]
    k_batch = batch[len(batch) - max(m - 2, 0) :]
    # Batch axes of size 1 in the kernel are no axes.
    keep = [i for i in range(len(k_batch)) if k.shape[i] != 1]
    k = kernels.reshape(k, [*(k.shape[i] for i in keep), *k.shape[len(k_batch) :]])
    k_batch = "".join(k_batch[i] for i in keep)
    if any(label not in x_batch for label in k_batch):
        raise LiftError("a matrix product that adds batch axes")
    row, inner, column = "x", "y", "z"
    if flip:
        x_labels = x_batch + (inner + column if n > 1 else inner)
        k_labels = k_batch + (row + inner if m > 1 else inner)
        out = batch + (row if m > 1 else "") + (column if n > 1 else "")
    else:
        x_labels = x_batch + (row + inner if n > 1 else inner)
        k_labels = k_batch + (inner + column if m > 1 else inner)
        out = batch + (row if n > 1 else "") + (column if m > 1 else "")
    return contract(ref, x_labels, k, k_labels, out)


@rule("addmm")
def _addmm(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    from fxconv.operators import align

    c, a, b = op.inputs
    beta, alpha = float(op.attrs["beta"]), float(op.attrs["alpha"])
    if lifter.is_constant(b):
        out = _product(lifter.ref(a), lifter.kernel(b), flip=False)
    elif lifter.is_constant(a):
        out = _product(lifter.ref(b), lifter.kernel(a), flip=True)
    else:
        raise LiftError("a product of two activations is not affine")
    out = scale(out, alpha) if alpha != 1.0 else out
    if beta == 0.0:
        return out
    added = lifter.ref(c)
    added = scale(added, beta) if beta != 1.0 else added
    values, dims = align([out, added], out_shape(node))
    return Ref(make_sum(values), dims)


@rule("einsum")
def _einsum(lifter: Lifter, node: fx.Node, op: Op) -> Ref:
    equation = str(op.attrs["equation"]).replace(" ", "")
    if "." in equation:
        raise LiftError(f"einsum with an ellipsis: {equation}")
    left, _, out = equation.partition("->")
    terms = left.split(",")
    if "->" not in equation:
        out = "".join(sorted(c for c in set(left) if c != "," and left.count(c) == 1))
    if any(len(set(t)) != len(t) for t in terms):
        raise LiftError(f"einsum with a repeated index: {equation}")
    variable = [i for i, operand in enumerate(op.inputs) if not lifter.is_constant(operand)]
    if len(variable) != 1 or len(terms) > 2:
        raise LiftError("a product of two activations is not affine")
    i = variable[0]
    ref = lifter.ref(op.inputs[i])
    if len(terms) == 1:
        return contract(ref, terms[0], kernels.uniform((), 1.0), "", out)
    return contract(ref, terms[i], lifter.kernel(op.inputs[1 - i]), terms[1 - i], out)
