"""Spellings of operators that only move, select or regroup elements, and of those that do nothing in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxconv.spelling_common import SILENT, Barrier, Context, Op, Unspellable, spelling
from fxconv.spelling_math import max_pool

Size = int | torch.SymInt


def known(size: Any) -> int | None:
    """The size as an int where it is the same for every input, else None. Never asks a SymInt a question: that
    would add a guard."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if expr.is_number else None
    return int(size)


def same_size(a: Any, b: Any) -> bool:
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        left = a.node.expr if isinstance(a, torch.SymInt) else a
        right = b.node.expr if isinstance(b, torch.SymInt) else b
        return bool(left == right)
    return bool(a == b)


# ----------------------------------------------------------------- reshape and permute


def make_reshape(c: Context, x: Any, shape: Any = None, **attrs: Any) -> Op:
    return c.make("reshape", (x,), shape=shape, **attrs)


def sizes_as_written(c: Context, shape: Sequence[Any]) -> tuple[Any, ...] | None:
    """The sizes of a ``view``/``reshape`` call: ints or nodes; None for a ``torch.Size`` node (``x.view(y.shape)``)."""
    items: Sequence[Any] = shape
    if len(items) == 1 and isinstance(items[0], (list, tuple)):
        items = items[0]
    if len(items) == 1 and isinstance(items[0], fx.Node) and not isinstance(c.value(items[0]), (int, torch.SymInt)):
        return None
    return tuple(items)


@spelling("reshape", "view", "view_copy", "_unsafe_view", "aten._reshape_alias", "_reshape_copy")
def reshape(c: Context, input: Any, *shape: Any, size: Any = None, stride: Any = None) -> Op | Barrier:
    written = (size,) if size is not None else shape
    if c.opname.startswith("_reshape_alias"):
        written = written[:1]
    if written and isinstance(written[0], torch.dtype):
        return Barrier(f"view as {written[0]} reinterprets the bits")
    return make_reshape(c, input, sizes_as_written(c, written))


@spelling("torch.reshape")
def torch_reshape(c: Context, input: Any, shape: Any) -> Op:
    return make_reshape(c, input, sizes_as_written(c, (shape,)))


@spelling("flatten", "unflatten", "unsqueeze", "view_as", "reshape_as", "ravel", "unsqueeze_copy", "aten.atleast_2d")
def regroup(c: Context, input: Any, *args: Any, **kwargs: Any) -> Op:
    return make_reshape(c, input)


@spelling("squeeze", "squeeze_copy")
def squeeze(c: Context, input: Any, dim: Any = None) -> Op:
    """``bare_squeeze`` marks one whose result rank depends on the input size: it removes a dim that is dynamic and
    happens to be 1 (``squeeze()`` at batch 1), so nothing may move across it that would see another rank."""
    sizes = c.tensor(input).shape
    dims = range(len(sizes)) if dim is None else c.dims(input, dim)
    return make_reshape(c, input, bare_squeeze=any(known(sizes[d]) is None for d in dims))


@spelling("permute", "permute_copy")
def permute(c: Context, input: Any, *dims: Any, **kwargs: Any) -> Op:
    order = dims or (kwargs["dims"],)
    items = order[0] if len(order) == 1 and isinstance(order[0], (list, tuple)) else order
    return c.make("permute", (input,), dims=c.dims(input, tuple(items)))


@spelling("transpose", "swapaxes", "swapdims", "transpose_copy")
def transpose(c: Context, input: Any, dim0: Any = None, dim1: Any = None, axis0: Any = None, axis1: Any = None) -> Op:
    a = c.dim(input, dim0 if axis0 is None else axis0)
    b = c.dim(input, dim1 if axis1 is None else axis1)
    order = list(range(c.rank(input)))
    order[a], order[b] = order[b], order[a]
    return c.make("permute", (input,), dims=tuple(order))


@spelling("t", "t_copy", "mT", "matrix_transpose", "aten.mT", "aten.adjoint")
def transpose_last(c: Context, input: Any) -> Op:
    order = list(range(c.rank(input)))
    order[-2:] = reversed(order[-2:])
    return c.make("permute", (input,), dims=tuple(order))


@spelling("aten.numpy_T")
def transpose_all(c: Context, input: Any) -> Op:
    return c.make("permute", (input,), dims=tuple(reversed(range(c.rank(input)))))


@spelling("movedim", "moveaxis")
def movedim(c: Context, input: Any, source: Any, destination: Any) -> Op:
    moved, places = c.dims(input, source), c.dims(input, destination)
    order: list[int | None] = [None] * c.rank(input)
    for dim, place in zip(moved, places, strict=True):
        order[place] = dim
    rest = iter(d for d in range(c.rank(input)) if d not in moved)
    return c.make("permute", (input,), dims=tuple(next(rest) if d is None else d for d in order))


@spelling("expand", "expand_as", "broadcast_to", "expand_copy")
def expand(c: Context, input: Any, *size: Any, **kwargs: Any) -> Op:
    return c.make("expand", (input,), shape=tuple(c.size(s) for s in c.out.shape))


@spelling("operator.getattr", "builtins.getattr")
def getattribute(c: Context, input: Any, name: str) -> Op | Barrier:
    if name in ("T", "mT", "H", "mH") and isinstance(c.value(input), torch.Tensor):
        return transpose_all(c, input) if name in ("T", "H") else transpose_last(c, input)
    if name == "real":
        return c.make("identity", (input,))
    return SILENT if name in ("shape", "device", "dtype", "ndim") else Barrier(f"attribute {name!r} of a tensor")


# ----------------------------------------------------------------- select, slice, index


def slice_bounds(c: Context, size: Any, start: Any, end: Any, step: Any) -> tuple[Size, Size | None, int] | None:
    """Normalised (start, end, step) of a python slice of a dim of ``size``; end None means to the end.

    None where the slice keeps everything. Bounds that clamp for some input sizes only are refused.
    """
    count = known(size)
    start = 0 if start is None else c.size(start)
    end = None if end is None else c.size(end)
    step = 1 if step is None else c.integer(step)
    if isinstance(end, int) and end >= 2**62:
        end = None
    if isinstance(start, int) and start < 0:
        start = start + size if count is None else max(start + count, 0)
    if isinstance(end, int) and end < 0:
        end = end + size if count is None else max(end + count, 0)
    if count is not None:
        start = min(start, count) if isinstance(start, int) else start
        end = None if isinstance(end, int) and end >= count else end
    if end is not None and same_size(end, size):
        end = None
    if isinstance(start, int) and start == 0 and end is None and step == 1:
        return None
    return start, end, step


def refuse_clamped(shape: Sequence[Any]) -> None:
    for size in shape:
        if isinstance(size, torch.SymInt) and any(f in str(size.node.expr) for f in ("Min", "Max", "Piecewise")):
            raise Unspellable(f"a slice whose bounds are clamped for some input sizes (size {size.node.expr})")


def make_slice(c: Context, x: Any, dim: int, start: Any, end: Any, step: Any = 1) -> Op:
    bounds = slice_bounds(c, c.tensor(x).shape[dim], start, end, step)
    if bounds is None:
        return c.make("identity", (x,))
    refuse_clamped(c.out.shape)
    return c.make("slice", (x,), dim=dim, start=bounds[0], end=bounds[1], step=bounds[2])


@spelling("aten.slice", "aten.slice_copy")
def slice_(c: Context, input: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> Op:
    return make_slice(c, input, c.dim(input, dim), start, end, step)


@spelling("narrow", "narrow_copy")
def narrow(c: Context, input: Any, dim: Any, start: Any, length: Any) -> Op:
    dim = c.dim(input, dim)
    start = c.size(start)
    if isinstance(start, int) and start < 0:
        start = start + c.tensor(input).shape[dim]
    return make_slice(c, input, dim, start, start + c.size(length))


def make_select(c: Context, x: Any, dim: int, index: Any) -> Op:
    index = c.size(index)
    if isinstance(index, int) and index < 0:
        size = c.tensor(x).shape[dim]
        count = known(size)
        index = index + (size if count is None else count)
    return c.make("select", (x,), dim=dim, index=index)


@spelling("select", "select_copy")
def select(c: Context, input: Any, dim: Any, index: Any) -> Op:
    return make_select(c, input, c.dim(input, dim), index)


@spelling("slice_scatter")
def slice_scatter(c: Context, input: Any, src: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> Op:
    dim = c.dim(input, dim)
    bounds = slice_bounds(c, c.tensor(input).shape[dim], start, end, step)
    if bounds is None:
        return c.make("identity", (src,))
    refuse_clamped(c.tensor(src).shape)
    return c.make("write", (input, src), dim=dim, start=bounds[0], step=bounds[2], select=False)


@spelling("select_scatter")
def select_scatter(c: Context, input: Any, src: Any, dim: Any, index: Any) -> Op:
    dim = c.dim(input, dim)
    place = make_select(c, input, dim, index).attrs["index"]
    return c.make("write", (input, src), dim=dim, start=place, step=1, select=True)


def make_gather(c: Context, x: Any, dim: int, index: Any) -> Op | Barrier:
    """Entries of one dim by a vector of indices."""
    t = c.tensor(index)
    if t.dim() != 1 or t.dtype == torch.bool:
        return Barrier(f"indexing by a tensor of {t.dtype} of rank {t.dim()}")
    return c.make("index_select", (x, index), dim=dim, index=None)


@spelling("index_select")
def index_select(c: Context, input: Any, dim: Any, index: Any) -> Op | Barrier:
    return make_gather(c, input, c.dim(input, dim), index)


@spelling("aten.index")
def aten_index(c: Context, input: Any, indices: Any) -> Op | Barrier:
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1:
        return Barrier(f"indexing by {len(given)} tensors")
    return make_gather(c, input, *given[0])


def _alone(keys: list[Any], k: Any) -> bool:
    """Whether every other index takes a whole dim."""
    return all(other is k or other == slice(None) for other in keys if other is not k)


def tensor_getitem(c: Context, x: Any, key: Any) -> Op | Barrier:
    """Basic python indexing of a tensor: ints, slices, None, Ellipsis."""
    keys = list(key) if isinstance(key, tuple) else [key]
    rank = c.rank(x)
    used = sum(k is not None and k is not Ellipsis for k in keys)
    if not any(k is Ellipsis for k in keys):
        keys.append(Ellipsis)
    place = next(i for i, k in enumerate(keys) if k is Ellipsis)
    keys[place : place + 1] = [slice(None)] * (rank - used)
    items: list[tuple[Any, ...]] = []
    dim = 0
    for k in keys:
        if k is None:
            items.append(("new",))
            continue
        size = c.tensor(x).shape[dim]
        if isinstance(k, slice):
            items.append(("slice", *(slice_bounds(c, size, k.start, k.stop, k.step) or (0, None, 1))))
        elif isinstance(k, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in k) and _alone(keys, k):
            return c.make("index_select", (x,), dim=dim, index=tuple(k))
        elif isinstance(k, bool) or isinstance(k, (list, torch.Tensor)):
            return Barrier(f"indexing by a {type(k).__name__}")
        elif isinstance(k, fx.Node) and isinstance(c.value(k), torch.Tensor):
            return make_gather(c, x, dim, k) if _alone(keys, k) else Barrier("indexing by a tensor and something else")
        else:
            items.append(("select", make_select(c, x, dim, k).attrs["index"]))
        dim += 1
    refuse_clamped(c.out.shape)
    return c.make("index", (x,), items=tuple(items))


@spelling("operator.getitem", "method.__getitem__")
def getitem(c: Context, input: Any, key: Any) -> Op | Barrier:
    if isinstance(input, fx.Node) and isinstance(input.meta.get("val"), torch.Tensor):
        return tensor_getitem(c, input, key)
    if not isinstance(input, fx.Node) or not isinstance(key, int):
        return SILENT
    if not isinstance(c.node.meta.get("val"), torch.Tensor):
        return SILENT
    from fxconv.spelling import base_name

    name = base_name(input, c.gm)
    part = _PARTS.get(name)
    return SILENT if part is None else part(c, input, key)


def _arguments(node: fx.Node, *names: str) -> list[Any]:
    """Arguments of a producer by position or name; missing ones are None."""
    values = list(node.args) + [None] * (len(names) - len(node.args))
    for i, name in enumerate(names):
        for alias in name.split("|"):
            if alias in node.kwargs:
                values[i] = node.kwargs[alias]
    return values[: len(names)]


def _split_part(c: Context, source: fx.Node, key: int) -> Op:
    """Part ``key`` of split, chunk or tensor_split: where it starts follows from the sizes of the parts before it."""
    x, _, dim = _arguments(source, "input|self|tensor", "split_size|chunks|sections|indices", "dim")
    dim = c.dim(x, 0 if dim is None else dim)
    parts = source.meta["val"]
    index = key % len(parts)
    start: Any = 0
    for part in parts[:index]:
        start = start + part.shape[dim]
    return make_slice(c, x, dim, start, start + parts[index].shape[dim])


def _unbind_part(c: Context, source: fx.Node, key: int) -> Op:
    x, dim = _arguments(source, "input|self", "dim")
    return make_select(c, x, c.dim(x, 0 if dim is None else dim), key % len(source.meta["val"]))


def _first_of(name: str, *arguments: str) -> Any:
    def part(c: Context, source: fx.Node, key: int) -> Op | Barrier:
        if key != 0:
            return Barrier(f"output {key} of {name}")
        from fxconv.spelling import base_name

        return _native(replace(c, opname=base_name(source, c.gm)), name, _arguments(source, *arguments))

    return part


def _native(c: Context, name: str, a: list[Any]) -> Op | Barrier:
    from fxconv.spelling_math import make_batch_norm, make_norm

    if name == "batch_norm":
        return make_batch_norm(c, a[0], a[1], a[2], a[3], a[4], a[5], a[7])
    if name == "batch_norm_no_training":
        return make_batch_norm(c, a[0], a[1], a[2], a[3], a[4], False, a[6])
    if name == "layer_norm":
        return make_norm(c, name, a[0], a[2], a[3], a[4], normalized_shape=tuple(c.integer(s) for s in a[1]))
    if name == "group_norm":
        return make_norm(c, name, a[0], a[1], a[2], a[7], groups=c.integer(a[6]))
    if name == "dropout":
        return Barrier("dropout with train=True") if a[2] else c.make("identity", (a[0],))
    kept = [v for v in a[1:] if v is not None]
    return max_pool(c, a[0], *kept)


_POOL = ("self|input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_BN = ("input", "weight", "bias", "running_mean", "running_var")
_PARTS: dict[str, Any] = {
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split_part),
    **dict.fromkeys(("unsafe_split", "unsafe_chunk"), _split_part),
    "unsafe_split_with_sizes": _split_part,
    "unbind": _unbind_part,
    "native_batch_norm": _first_of("batch_norm", *_BN, "training", "momentum", "eps"),
    "_native_batch_norm_legit": _first_of("batch_norm", *_BN, "training", "momentum", "eps"),
    "_native_batch_norm_legit_no_training": _first_of("batch_norm_no_training", *_BN, "momentum", "eps"),
    "native_layer_norm": _first_of("layer_norm", "input", "normalized_shape", "weight", "bias", "eps"),
    "native_group_norm": _first_of("group_norm", "input", "weight", "bias", "N", "C", "HxW", "group", "eps"),
    "native_dropout": _first_of("dropout", "input", "p", "train"),
    "max_pool1d_with_indices": _first_of("max_pool", *_POOL),
    "max_pool2d_with_indices": _first_of("max_pool", *_POOL),
    "max_pool3d_with_indices": _first_of("max_pool", *_POOL),
}


# ----------------------------------------------------------------- pad, cat, roll, flip, patches


def make_pad(c: Context, x: Any, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> Op:
    """``pad`` as torch writes it: (lo, hi) of the last dim first."""
    rank = c.rank(x)
    pairs = [(c.integer(pad[i]), c.integer(pad[i + 1])) for i in range(0, len(pad), 2)]
    pads = [(0, 0)] * (rank - len(pairs)) + pairs[::-1]
    return c.make("pad", (x,), pads=tuple(pads), mode=mode, value=float(c.number(value or 0)))


@spelling("aten.pad", "F.pad", "torch.constant_pad_nd", "aten.constant_pad_nd")
def pad(c: Context, input: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Op:
    if not isinstance(mode, str):  # constant_pad_nd(x, pad, value)
        mode, value = "constant", mode
    return make_pad(c, input, pad, mode, value)


@spelling("aten.reflection_pad1d", "aten.reflection_pad2d", "aten.reflection_pad3d")
def reflection_pad(c: Context, input: Any, padding: Any) -> Op:
    return make_pad(c, input, padding, "reflect")


@spelling("aten.replication_pad1d", "aten.replication_pad2d", "aten.replication_pad3d")
def replication_pad(c: Context, input: Any, padding: Any) -> Op:
    return make_pad(c, input, padding, "replicate")


@spelling("cat", "concat", "concatenate")
def cat(c: Context, tensors: Any, dim: Any = 0, axis: Any = None) -> Op | Barrier:
    if not isinstance(tensors, (list, tuple)):
        return Barrier("cat of a sequence that is itself a value of the graph")
    shapes = [c.tensor(t).shape for t in tensors]
    if any(len(s) == 1 and known(s[0]) == 0 for s in shapes):
        return Barrier("cat with an empty tensor, which torch skips whatever its rank")
    return c.make("cat", tensors, dim=c.dim(tensors[0], dim if axis is None else axis))


@spelling("stack")
def stack(c: Context, tensors: Any, dim: Any = 0, axis: Any = None) -> Op | Barrier:
    if not isinstance(tensors, (list, tuple)):
        return Barrier("stack of a sequence that is itself a value of the graph")
    dim = c.integer(dim if axis is None else axis)
    return c.make("stack", tensors, dim=dim + c.out.dim() if dim < 0 else dim)


@spelling("zeros", "zeros_like", "new_zeros")
def zeros(c: Context, *sizes: Any, **options: Any) -> Op:
    return c.make("full", (), value=0.0)


@spelling("ones", "ones_like", "new_ones")
def ones(c: Context, *sizes: Any, **options: Any) -> Op:
    return c.make("full", (), value=1.0)


@spelling("full_like", "aten.full", "torch.full")
def full(c: Context, input: Any, fill_value: Any, **options: Any) -> Op:
    return c.make("full", (), value=float(c.number(fill_value)))


@spelling("new_full")
def new_full(c: Context, input: Any, size: Any, fill_value: Any, **options: Any) -> Op:
    return c.make("full", (), value=float(c.number(fill_value)))


@spelling("roll")
def roll(c: Context, input: Any, shifts: Any, dims: Any = ()) -> Op | Barrier:
    moved = dims if isinstance(dims, (list, tuple)) else (dims,)
    if not moved:
        return Barrier("roll without dims (over the flattened tensor)")
    amounts = shifts if isinstance(shifts, (list, tuple)) else (shifts,)
    return c.make("roll", (input,), shifts=tuple(c.integer(s) for s in amounts), dims=c.dims(input, tuple(moved)))


@spelling("flip")
def flip(c: Context, input: Any, *dims: Any, **kwargs: Any) -> Op:
    order = dims or (kwargs["dims"],)
    items = order[0] if len(order) == 1 and isinstance(order[0], (list, tuple)) else order
    return c.make("flip", (input,), dims=c.dims(input, tuple(items)))


@spelling("fliplr", "flipud")
def flip_named(c: Context, input: Any) -> Op:
    return c.make("flip", (input,), dims=(1 if c.opname == "fliplr" else 0,))


@spelling("pixel_shuffle")
def pixel_shuffle(c: Context, input: Any, upscale_factor: Any) -> Op:
    return c.make("pixel_shuffle", (input,), factor=c.integer(upscale_factor))


@spelling("pixel_unshuffle")
def pixel_unshuffle(c: Context, input: Any, downscale_factor: Any) -> Op:
    return c.make("pixel_unshuffle", (input,), factor=c.integer(downscale_factor))


@spelling("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(c: Context, input: Any, groups: Any) -> Op:
    return c.make("channel_shuffle", (input,), groups=c.integer(groups))


def _sliding(c: Context, name: str, input: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Op:
    """An operator on the patches of an image under a sliding kernel."""
    numbers = {"kernel": kernel, "dilation": dilation, "padding": padding, "stride": stride}
    return c.make(name, (input,), **{key: c.integers(value, 2) for key, value in numbers.items()})


@spelling("F.unfold", "aten.im2col")
def im2col(c: Context, input: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Op | Barrier:
    if c.rank(input) != 4:
        return Barrier(f"unbatched unfold input of rank {c.rank(input)}")
    return _sliding(c, "im2col", input, kernel_size, dilation, padding, stride)


@spelling("F.fold", "aten.col2im")
def col2im(
    c: Context, input: Any, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Op | Barrier:
    if c.rank(input) != 3:
        return Barrier(f"unbatched fold input of rank {c.rank(input)}")
    return _sliding(c, "col2im", input, kernel_size, dilation, padding, stride)


@spelling("method.unfold", "aten.unfold", "aten.unfold_copy")
def tensor_unfold(c: Context, input: Any, dimension: Any, size: Any, step: Any) -> Op:
    return c.make("tensor_unfold", (input,), dim=c.dim(input, dimension), size=c.integer(size), step=c.integer(step))


# ----------------------------------------------------------------- nothing happens


@spelling("detach", "detach_copy")
def detach(c: Context, input: Any) -> Barrier:
    """An identity on values, but gradients through the result must be those of the original."""
    return Barrier("detach() stops the gradient")


@spelling("contiguous", "clone", "alias", "lift_fresh", "lift_fresh_copy", "alias_copy")
@spelling("aten._conj", "resolve_conj", "resolve_neg")
def identity(c: Context, input: Any, *args: Any, **kwargs: Any) -> Op:
    return c.make("identity", (input,))


@spelling("to", "type_as", "float", "double", "half", "bfloat16", "type", "cpu", "cuda", "aten._to_copy")
def cast(c: Context, input: Any, *args: Any, **kwargs: Any) -> Op | Barrier:
    before, after = c.tensor(input), c.out
    if before.dtype != after.dtype:
        return Barrier(f"cast from {_short(before.dtype)} to {_short(after.dtype)}")
    if before.device != after.device:
        return Barrier(f"move from {before.device} to {after.device}")
    return c.make("identity", (input,))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@spelling("F.dropout", "F.alpha_dropout", "F.dropout1d", "F.dropout2d", "F.dropout3d", "F.feature_alpha_dropout")
def f_dropout(c: Context, input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> Op | Barrier:
    if p and c.boolean(training):
        return Barrier(f"{c.opname} with training=True is random")
    return c.make("identity", (input,))


@spelling("torch.dropout", "aten.dropout", "aten.alpha_dropout", "aten.feature_dropout", "aten.feature_alpha_dropout")
def dropout(c: Context, input: Any, p: Any, train: Any) -> Op | Barrier:
    return f_dropout(c, input, p, train)
