"""Steps as fx nodes, in the dialect of the graph they go into: ATen operators, or modules and functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.interp import handlers

from fxconv.axes import Size, as_size, is_static, quotient, same, same_shape, shape_of
from fxconv.kernel import Kernel
from fxconv.rounding import unfit
from fxconv.steps import Step

aten = torch.ops.aten

_CONV = {1: (F.conv1d, nn.Conv1d), 2: (F.conv2d, nn.Conv2d), 3: (F.conv3d, nn.Conv3d)}
_CONV_ATEN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {
    1: (aten.conv_transpose1d.default, nn.ConvTranspose1d),
    2: (aten.conv_transpose2d.input, nn.ConvTranspose2d),
    3: (aten.conv_transpose3d.input, nn.ConvTranspose3d),
}
_TRANSPOSED_F = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_AVG_ATEN = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}
_AVG = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_ATEN = {
    1: aten.adaptive_avg_pool1d.default,
    2: aten.adaptive_avg_pool2d.default,
    3: aten.adaptive_avg_pool3d.default,
}
_ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_NEAREST_ATEN = {1: aten.upsample_nearest1d.vec, 2: aten.upsample_nearest2d.vec, 3: aten.upsample_nearest3d.vec}
_EXACT_ATEN = {
    1: aten._upsample_nearest_exact1d.vec,
    2: aten._upsample_nearest_exact2d.vec,
    3: aten._upsample_nearest_exact3d.vec,
}
_LINEAR_ATEN = {1: aten.upsample_linear1d.vec, 2: aten.upsample_bilinear2d.vec, 3: aten.upsample_trilinear3d.vec}
_CUBIC_ATEN = {2: aten.upsample_bicubic2d.vec}
_ARITHMETIC = {
    "add": operator.add,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "python_mod": operator.mod,
    "maximum": torch.sym_max,
    "minimum": torch.sym_min,
}
"""The functions that sizes are computed by, under the names that torch's handlers of expressions have."""
_LINEAR_MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}


@contextmanager
def _uncached(mode: Any) -> Iterator[None]:
    """A fake tensor mode without its cache, which with dynamic sizes costs more than it saves."""
    enabled, mode.cache_enabled = mode.cache_enabled, False
    try:
        with mode:
            yield
    finally:
        mode.cache_enabled = enabled


def _linear_value(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The fake result of a Linear: [..., in] → [..., out], contiguous. ATen's own folds the leading dims into one and
    unfolds them again, and of dynamic sizes that takes sympy a second each."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _looks(x: Any) -> Any:
    """What a fake result depends on in an argument."""
    if isinstance(x, torch.Tensor):
        return shape_of(x), tuple(as_size(s) for s in x.stride()), x.dtype, x.device
    if isinstance(x, slice):  # has no hash before Python 3.12
        return slice, *map(_looks, (x.start, x.stop, x.step))
    return (type(x), as_size(x) if isinstance(x, torch.SymInt) else x)


class Writer:
    """Writes steps into a graph at its current insertion point.

    Args:
        gm: the graph module that receives nodes, parameters and modules.
        dialect: "aten" or "module".
        fresh_name: gives an attribute name that nothing in ``gm`` has yet, from a suggestion.
        requires_grad: whether new parameters do.
    """

    def __init__(self, gm: fx.GraphModule, dialect: str, fresh_name: Callable[[str], str], requires_grad: bool) -> None:
        self.gm, self.dialect, self.fresh_name, self.requires_grad = gm, dialect, fresh_name, requires_grad
        self.graph = gm.graph
        self.base = "fused"
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.meta: dict[str, Any] = {}
        self.parameters: dict[str, Kernel] = {}
        self.unfit: dict[Kernel, str] = {}
        """Why the dtype cannot hold a kernel: it overflows, or loses accuracy below the least normal number."""
        self.written: list[fx.Node] = []
        self._by_kernel: dict[tuple[int, torch.dtype], str] = {}
        self._held: list[Kernel] = []
        self._sizes: list[tuple[Size, fx.Node, int]] | None = None
        self._values: dict[Any, Any] = {}

    # -- parameters ---------------------------------------------------------------------------------------------------

    def rounded(self, k: Kernel, name: str) -> torch.Tensor:
        """The kernel's values rounded once to the model's dtype, contiguous; the float64 ones are forgotten."""
        value = k.tensor()
        out = torch.empty(value.shape, dtype=self.dtype, device=self.device)
        out.copy_(value)
        reason, _ = unfit(name, value, out) if self.dtype.is_floating_point else ("", 0.0)
        if reason:
            self.unfit[k] = reason
        k.release()
        return out

    def parameter(self, k: Kernel, suffix: str) -> fx.Node:
        """A ``get_attr`` of a new parameter with the kernel's values; the same kernel is stored once."""
        key = (id(k), self.dtype)
        name = self._by_kernel.get(key)
        if name is None:
            name = self.fresh_name(f"{self.base}_{suffix}")
            self.gm.register_parameter(name, nn.Parameter(self.rounded(k, name), requires_grad=self.requires_grad))
            self._by_kernel[key] = name
            self._held.append(k)
            self.parameters[name] = k
        node = self.graph.get_attr(name)
        self._finish(node, self._fake(getattr(self.gm, name)))
        return node

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _fake(self, t: torch.Tensor) -> Any:
        mode = self.meta.get("fake_mode")
        if mode is None:
            return t
        # As `from_tensor` makes it, in a tenth of the time: in what was made here are no views and subclasses to look for.
        strided = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta", requires_grad=t.requires_grad)
        fake = FakeTensor(mode, strided, t.device)
        fake._is_param = isinstance(t, nn.Parameter)
        return fake

    def _finish(self, node: fx.Node, val: Any) -> None:
        node.meta.update({k: v for k, v in self.meta.items() if k != "fake_mode"})
        node.meta["val"] = val
        node.meta["fxconv_new"] = True
        if isinstance(val, torch.Tensor):
            from torch.fx.passes.shape_prop import _extract_tensor_metadata

            # Whether a tensor of dynamic sizes is contiguous takes sympy longer to tell than all the rest.
            node.meta["tensor_meta"] = _extract_tensor_metadata(val, include_contiguity=False)
        self.written.append(node)

    def call(self, target: Any, *args: Any, module_target: Any = None, **kwargs: Any) -> fx.Node:
        """A call of an ATen operator, or in the module dialect of ``module_target`` with the same arguments."""
        val = self._value(target, args, kwargs)
        used = target if self.dialect == "aten" or module_target is None else module_target
        node = self.graph.call_function(used, args, kwargs)
        self._finish(node, val)
        return node

    def _value(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fake result of a call; calls that look alike have the same."""
        fake_args = fx.map_arg(args, lambda n: n.meta["val"])
        fake_kwargs = fx.map_arg(kwargs, lambda n: n.meta["val"])
        mode = self.meta.get("fake_mode")
        with torch.no_grad():
            if mode is None:
                return target(*fake_args, **fake_kwargs)
            leaves, structure = pytree.tree_flatten((fake_args, fake_kwargs))
            key = (target, str(structure), *(_looks(x) for x in leaves))
            if key not in self._values:
                # Composite operators take symbolic sizes only under the Python dispatcher.
                with _uncached(mode), enable_python_dispatcher():
                    compute = _linear_value if target is aten.linear.default else target
                    self._values[key] = compute(*fake_args, **fake_kwargs)
            return self._values[key]

    def again(self, node: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node:
        """A copy of a node that reads ``new`` where it read ``old``."""
        swap = lambda n: new if n is old else n  # noqa: E731
        args, kwargs = fx.map_arg(node.args, swap), fx.map_arg(node.kwargs, swap)
        out = self.graph.create_node(node.op, node.target, args, kwargs)
        val = node.meta["val"]
        if isinstance(val, torch.Tensor) and tuple(new.meta["val"].shape) != tuple(old.meta["val"].shape):
            # An activation in another layout.
            val = new.meta["val"]
        self._finish(out, val)
        out.meta["fxconv_apply"] = True
        return out

    # -- sizes --------------------------------------------------------------------------------------------------------

    def size(self, expr: Size, near: fx.Node) -> Any:
        """A size as an int, or as a node that computes it."""
        if is_static(expr):
            return int(expr)
        for d, s in enumerate(shape_of(near.meta["val"])):
            if same(s, expr):
                return self._sym_size(near, d)
        for s, node, d in self._known_sizes():
            if same(s, expr):
                return self._sym_size(node, d)
        return self._arithmetic(expr, near)

    def _known_sizes(self) -> list[tuple[Size, fx.Node, int]]:
        if self._sizes is None:
            self._sizes = []
            for node in self.graph.nodes:
                if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
                    for d, s in enumerate(shape_of(node.meta["val"])):
                        if not is_static(s):
                            self._sizes.append((s, node, d))
                            # k·(h // k) is h that k divides (`divisible`); elsewhere h stands by itself, in h // 32.
                            self._sizes += [(f.args[0], node, d) for f in sympy.sympify(s).atoms(FloorDiv) if s == f * f.args[1]]
        return self._sizes

    def _sym_size(self, node: fx.Node, d: int) -> fx.Node:
        val = node.meta["val"].shape[d]
        if self.dialect == "aten":
            out = self.graph.call_function(aten.sym_size.int, (node, d))
        else:
            out = self.graph.call_method("size", (node, d))
        self._finish(out, val)
        return out

    def _arithmetic(self, expr: sympy.Expr, near: fx.Node) -> Any:
        """A size as arithmetic on sizes of the inputs."""
        if expr.is_Integer:
            return int(expr)
        for s, node, d in self._known_sizes():
            if isinstance(times := quotient(s, expr), int):
                return self._on_sizes(operator.floordiv, self._sym_size(node, d), times)
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            return reduce(partial(self._on_sizes, operator.mul), [self.size(as_size(expr.base), near)] * int(expr.exp))
        if (f := _ARITHMETIC.get(handlers().get(expr.func, ""))) is None:
            raise ValueError(f"no input has the size {expr}")
        return reduce(partial(self._on_sizes, f), [self.size(as_size(a), near) for a in expr.args])

    def _on_sizes(self, f: Any, a: Any, b: Any) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return f(a, b)
        node = self.graph.call_function(f, (a, b))
        values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b)]
        self._finish(node, f(*values))
        return node

    def shape_arg(self, shape: Sequence[Size], x: fx.Node) -> list[Any]:
        """A shape for a reshape of x: dynamic sizes as nodes, the one that is hardest to name as −1."""
        dynamic = [i for i, s in enumerate(shape) if not is_static(s)]
        if not dynamic:
            return [int(s) for s in shape]
        own = shape_of(x.meta["val"])
        known = [i for i in dynamic if any(same(shape[i], s) for s in own)]
        unknown = [i for i in dynamic if i not in known]
        free = (unknown or known)[0]
        return [-1 if i == free else self.size(s, x) for i, s in enumerate(shape)]

    # -- steps --------------------------------------------------------------------------------------------------------

    def write(self, step: Step, x: fx.Node) -> fx.Node:
        """Write one unary step."""
        return getattr(self, f"_{step.kind}")(step, x)

    def _reshape(self, step: Step, x: fx.Node) -> fx.Node:
        source = x
        while source.target in (aten.reshape.default, torch.reshape) and "fxconv_new" in source.meta:
            assert isinstance(source.args[0], fx.Node)
            source = source.args[0]
        if same_shape(shape_of(source.meta["val"]), step.shape):
            return source
        return self.call(aten.reshape.default, x, self.shape_arg(step.shape, x), module_target=torch.reshape)

    def _permute(self, step: Step, x: fx.Node) -> fx.Node:
        dims = list(step.attrs["dims"])
        while x.target in (aten.permute.default, torch.permute) and "fxconv_new" in x.meta:
            source, inner = x.args
            assert isinstance(source, fx.Node) and isinstance(inner, (list, tuple))
            x, dims = source, [inner[d] for d in dims]
        if dims == sorted(dims):
            return x
        return self.call(aten.permute.default, x, dims, module_target=torch.permute)

    def _contiguous(self, step: Step, x: fx.Node) -> fx.Node:
        return self.call(aten.contiguous.default, x, module_target=torch.Tensor.contiguous)

    def _expand(self, step: Step, x: fx.Node) -> fx.Node:
        sizes = [-1 if same(a, b) else self.size(b, x) for a, b in zip(shape_of(x.meta["val"]), step.shape, strict=True)]
        return self.call(aten.expand.default, x, sizes, module_target=torch.Tensor.expand)

    def _linear(self, step: Step, x: fx.Node) -> fx.Node:
        return self._weighted(aten.linear.default, F.linear, step, x, ())

    def _conv(self, step: Step, x: fx.Node) -> fx.Node:
        a = step.attrs
        nd = len(a["stride"])
        args = (list(a["stride"]), list(a["padding"]), list(a["dilation"]), a["groups"])
        return self._weighted(_CONV_ATEN[nd], _CONV[nd][0], step, x, args)

    def _conv_transpose(self, step: Step, x: fx.Node) -> fx.Node:
        a = step.attrs
        nd = len(a["stride"])
        args = (list(a["stride"]), list(a["padding"]), list(a["output_padding"]), a["groups"], list(a["dilation"]))
        return self._weighted(_TRANSPOSED[nd][0], _TRANSPOSED_F[nd], step, x, args)

    def _weighted(self, target: Any, function: Any, step: Step, x: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        weight = self.parameter(step.weights[0], "weight")
        bias = self.parameter(step.weights[1], "bias") if len(step.weights) > 1 else None
        if self.dialect == "aten":
            return self.call(target, x, weight, bias, *args)
        node = self.call(target, x, weight, bias, *args, module_target=function)
        return self._as_module(step, node, weight, bias)

    def _as_module(self, step: Step, node: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        """Replace a functional call by a module that owns the parameters."""
        w = getattr(self.gm, str(weight.target))
        a = step.attrs
        with torch.device("meta"):
            if step.kind == "linear":
                module: nn.Module = nn.Linear(w.shape[1], w.shape[0], bias is not None)
            else:
                nd = len(a["stride"])
                options: dict[str, Any] = {
                    "stride": tuple(a["stride"]),
                    "padding": tuple(a["padding"]),
                    "dilation": tuple(a["dilation"]),
                    "groups": a["groups"],
                    "bias": bias is not None,
                }
                if step.kind == "conv":
                    kind: Any = _CONV[nd][1]
                    module = kind(w.shape[1] * a["groups"], w.shape[0], tuple(w.shape[2:]), **options)
                else:
                    options["output_padding"] = tuple(a["output_padding"])
                    kind = _TRANSPOSED[nd][1]
                    module = kind(w.shape[0], w.shape[1] * a["groups"], tuple(w.shape[2:]), **options)
        module.eval()
        name = self.fresh_name(self.base)
        for role, source in (("weight", weight), ("bias", bias)):
            if source is not None:
                old = str(source.target)
                setattr(module, role, getattr(self.gm, old))
                self.parameters[f"{name}.{role}"] = self.parameters[old]
        self.gm.add_submodule(name, module)
        x = node.args[0]
        out = self.graph.call_module(name, (x,))
        self._finish(out, node.meta["val"])
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)
        self.written.remove(node)
        for source in (weight, bias):
            if source is not None and not source.users:
                self._forget(source)
        return out

    def _forget(self, source: fx.Node) -> None:
        name = str(source.target)
        self.graph.erase_node(source)
        self.written.remove(source)
        if name in self.gm._parameters and not any(n.op == "get_attr" and n.target == name for n in self.graph.nodes):
            delattr(self.gm, name)
            del self.parameters[name]
            self._by_kernel = {k: v for k, v in self._by_kernel.items() if v != name}

    def _scale(self, step: Step, x: fx.Node) -> fx.Node:
        k = step.weights[0]
        if k.shape == () and not step.attrs.get("bias"):
            return self.call(aten.mul.Tensor, x, float(k.tensor()), module_target=torch.mul)
        scale = self.parameter(k, "scale")
        if step.attrs.get("bias"):
            shift = self.parameter(step.weights[1], "shift")
            return self.call(aten.addcmul.default, shift, x, scale, module_target=torch.addcmul)
        return self.call(aten.mul.Tensor, x, scale, module_target=torch.mul)

    def _add_const(self, step: Step, x: fx.Node) -> fx.Node:
        k = step.weights[0]
        if k.shape == ():
            return self.call(aten.add.Tensor, x, float(k.tensor()), module_target=torch.add)
        return self.call(aten.add.Tensor, x, self.parameter(k, "shift"), module_target=torch.add)

    def add(self, x: fx.Node, y: fx.Node, factor: float = 1.0) -> fx.Node:
        """``x + factor · y``."""
        if factor == -1.0:
            return self.call(aten.sub.Tensor, x, y, module_target=torch.sub)
        options = {} if factor == 1.0 else {"alpha": factor}
        return self.call(aten.add.Tensor, x, y, module_target=torch.add, **options)

    def cat(self, xs: Sequence[fx.Node], dim: int) -> fx.Node:
        return self.call(aten.cat.default, list(xs), dim, module_target=torch.cat)

    def _slice(self, step: Step, x: fx.Node) -> fx.Node:
        a = step.attrs
        if self.dialect == "aten":
            end = a["end"] if a["end"] is not None else 2**63 - 1
            return self.call(aten.slice.Tensor, x, a["dim"], a["start"], end, a["step"])
        index = (slice(None),) * a["dim"] + (slice(a["start"], a["end"], a["step"]),)
        return self.call(operator.getitem, x, index)

    def _pad(self, step: Step, x: fx.Node) -> fx.Node:
        pads = list(step.attrs["pads"])
        mode = step.attrs.get("mode")
        if mode is not None:  # which wants all dims but the first two named
            flat = [p for pair in reversed(pads[2:]) for p in pair]
            return self.call(aten.pad.default, x, flat, mode, module_target=F.pad)
        while pads and pads[0] == (0, 0):
            pads.pop(0)
        flat = [p for pair in reversed(pads) for p in pair]
        return self.call(aten.constant_pad_nd.default, x, flat, module_target=F.pad)

    def _avg_pool(self, step: Step, x: fx.Node) -> fx.Node:
        a = step.attrs
        nd = len(a["kernel"])
        args = (list(a["kernel"]), list(a["stride"]), list(a["padding"]), a["ceil_mode"], not a["inside"])
        return self._flat_lead(step, x, nd, lambda y: self.call(_AVG_ATEN[nd], y, *args, module_target=_AVG[nd]))

    def _flat_lead(self, step: Step, x: fx.Node, nd: int, f: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Pooling and resampling want exactly two dims in front of the spatial ones."""
        lead = step.in_shape[:-nd]
        if len(lead) == 2:
            return f(x)
        raise AssertionError(f"{step.kind} of shape {step.in_shape}")

    def _nearest(self, step: Step, x: fx.Node) -> fx.Node:
        scales = [float(s) for s in step.attrs["scales"]]
        target = _NEAREST_ATEN[len(scales)]
        if self.dialect == "aten":
            return self.call(target, x, None, scales)
        node = self.call(target, x, None, scales)
        return self._functional(node, F.interpolate, (x,), {"scale_factor": tuple(scales), "mode": "nearest"})

    def _functional(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        out = self.graph.call_function(target, args, kwargs)
        self._finish(out, node.meta["val"])
        self.graph.erase_node(node)
        self.written.remove(node)
        return out

    def _interpolate(self, step: Step, x: fx.Node) -> fx.Node:
        a = step.attrs
        nd = len(a["size"])
        mode, scales = a["mode"], a["scales"]
        given = None if any(s is None for s in scales) else [float(s) for s in scales]
        size = None if given is not None else [self.size(s, x) for s in a["size"]]
        name = {"linear": _LINEAR_MODE[nd], "cubic": "bicubic"}.get(mode, mode)
        table = {"linear": _LINEAR_ATEN, "cubic": _CUBIC_ATEN, "nearest": _NEAREST_ATEN}.get(mode, _EXACT_ATEN)
        align = (a["align_corners"],) if mode in ("linear", "cubic") else ()
        node = self.call(table[nd], x, size, *align, given)
        if self.dialect == "aten":
            return node
        kwargs: dict[str, Any] = {"size": size, "scale_factor": given, "mode": name}
        if mode in ("linear", "cubic"):
            kwargs["align_corners"] = a["align_corners"]
        return self._functional(node, F.interpolate, (x,), {k: v for k, v in kwargs.items() if v is not None})

    def _adaptive_avg(self, step: Step, x: fx.Node) -> fx.Node:
        size = [self.size(s, x) for s in step.attrs["size"]]
        nd = len(size)
        return self.call(_ADAPTIVE_ATEN[nd], x, size, module_target=_ADAPTIVE[nd])

    def _gather(self, step: Step, x: fx.Node) -> fx.Node:
        name = self.fresh_name(f"{self.base}_index")
        index = torch.tensor(step.attrs["index"], device=self.device)
        self.gm.register_buffer(name, index)
        node = self.graph.get_attr(name)
        self._finish(node, self._fake(index))
        return self.call(aten.index_select.default, x, step.attrs["dim"], node, module_target=torch.index_select)

    def _mean(self, step: Step, x: fx.Node) -> fx.Node:
        return self.call(aten.mean.dim, x, list(step.attrs["dims"]), module_target=torch.mean)
