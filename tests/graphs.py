"""Questions to a transformed graph, asked across dialects (ATen, modules, functions, methods).

The library has its own reader of spellings; the tests must not trust it, so this is a second, independent and much
smaller one.
It names the *kind* of each node (`conv`, `linear`, `batch_norm`, `mul`, ...), counts kinds and launches, and finds
per-channel
affine operations that a neighbouring linear operation should have absorbed.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

# Every name that a node's target can have, by kind. Modules are named by their class, ATen overloads by their packet.
_NAMES: dict[str, str] = {
    "conv": "conv1d conv2d conv3d convolution Conv1d Conv2d Conv3d",
    "conv_transpose": "conv_transpose1d conv_transpose2d conv_transpose3d ConvTranspose1d ConvTranspose2d ConvTranspose3d",
    "linear": "linear Linear",
    "matmul": "matmul mm bmm addmm addbmm baddbmm einsum mv dot tensordot",
    "batch_norm": "batch_norm native_batch_norm native_batch_norm_legit native_batch_norm_legit_no_training "
    "cudnn_batch_norm BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm",
    "add": "add iadd",
    "sub": "sub isub rsub subtract",
    "mul": "mul imul multiply",
    "div": "div truediv itruediv divide true_divide",
    "neg": "neg negative",
    "addcmul": "addcmul addcdiv lerp",
    "avg_pool": "avg_pool1d avg_pool2d avg_pool3d AvgPool1d AvgPool2d AvgPool3d",
    "mean": "mean adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d AdaptiveAvgPool1d AdaptiveAvgPool2d "
    "AdaptiveAvgPool3d",
    "max_pool": "max_pool1d max_pool2d max_pool3d MaxPool1d MaxPool2d MaxPool3d max_pool2d_with_indices",
    "interpolate": "interpolate upsample upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d upsample_nearest_exact1d "
    "upsample_nearest_exact2d Upsample UpsamplingNearest2d UpsamplingBilinear2d",
    "pad": "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad2d circular_pad ZeroPad1d ZeroPad2d "
    "ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad2d ReplicationPad2d CircularPad2d",
    "cat": "cat concat concatenate stack hstack vstack",
    "split": "split chunk split_with_sizes tensor_split unbind unsafe_split unsafe_chunk",
    "slice": "slice narrow select getitem index_select take slice_scatter select_scatter index",
    "permute": "permute transpose t movedim moveaxis swapaxes swapdims adjoint",
    "reshape": "view reshape flatten unflatten squeeze unsqueeze unsafe_view expand expand_as view_as reshape_as "
    "Flatten Unflatten broadcast_to",
    "copy": "contiguous clone copy",
    "identity": "dropout Dropout Dropout1d Dropout2d Dropout3d Identity feature_dropout alpha_dropout StochasticDepth "
    "DropPath native_dropout dropout1d dropout2d dropout3d detach alias lift_fresh_copy",
    "pixel_shuffle": "pixel_shuffle pixel_unshuffle PixelShuffle PixelUnshuffle",
    "channel_shuffle": "channel_shuffle native_channel_shuffle ChannelShuffle",
    "relu": "relu ReLU",
}
_KIND = {name: kind for kind, names in _NAMES.items() for name in names.split()}
LINEAR_OPS = frozenset({"conv", "conv_transpose", "linear"})
VIEWS = frozenset({"permute", "reshape", "split", "slice", "identity", "copy"})
FREE = frozenset({"permute", "reshape", "split", "slice", "identity"})  # no launch of their own (a copy is one)


def graph_of(result: Any) -> fx.GraphModule:
    """The GraphModule of a result: itself, or an ExportedProgram's plain module."""
    if isinstance(result, torch.export.ExportedProgram):
        return result.module(check_guards=False)
    assert isinstance(result, fx.GraphModule), f"expected a GraphModule, not {type(result)}"
    return result


def name_of(node: fx.Node, gm: fx.GraphModule) -> str:
    """The bare name of what a node calls: `Conv2d`, `conv2d`, `view`, without namespace, overload and in-place
    underscore.
    """
    if node.op == "output":
        return "output"
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        for cls in type(module).__mro__:  # timm's BatchNormAct2d is a BatchNorm2d: a BatchNorm that is left is a BatchNorm left
            if cls.__name__ in _KIND:
                return cls.__name__
        return type(module).__name__
    if node.op == "call_method":
        return str(node.target).strip("_")
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return name.strip("_")


_CONSTANTS: WeakKeyDictionary[fx.Graph, frozenset[fx.Node]] = WeakKeyDictionary()


def _constants(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes that depend on parameters and buffers only; found in one pass, since networks are deeper than Python's
    stack.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        computed = node.op in ("call_function", "call_method") and bool(inputs) and all(i in found for i in inputs)
        if node.op == "get_attr" or computed:
            found.add(node)
    return frozenset(found)


def is_constant(node: Any) -> bool:
    """Whether a node's value depends on parameters and buffers only."""
    if not isinstance(node, fx.Node):
        return True
    if node.graph not in _CONSTANTS:
        _CONSTANTS[node.graph] = _constants(node.graph)
    return node in _CONSTANTS[node.graph]


def is_tensor(node: fx.Node) -> bool:
    """Whether a node computes tensors (size arithmetic does not count as an operation)."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if value is not None:
        leaves = value if isinstance(value, (tuple, list)) else (value,)
        return any(isinstance(leaf, torch.Tensor) for leaf in leaves)
    if node.op in ("placeholder", "get_attr", "call_module"):
        return True
    if node.op == "call_method":
        return node.target not in ("size", "dim", "numel", "item", "stride")
    if node.target in (getattr, torch.ops.aten.sym_size.int):
        return False
    if getattr(node.target, "__module__", "") in ("_operator", "operator", "math", "builtins"):
        return any(is_tensor(i) for i in node.all_input_nodes)
    return True


def kind_of(node: fx.Node, gm: fx.GraphModule) -> str:
    """The kind of a node; the bare name for what has no kind (`sigmoid`, `layer_norm`), "" for what computes no
    tensor.
    """
    if node.op in ("placeholder", "output", "get_attr") or not is_tensor(node):
        return ""
    name = name_of(node, gm)
    if name.startswith("assert"):
        return ""  # a guard on sizes
    kind = _KIND.get(name, name)
    if is_constant(node):
        return "" if kind in FREE else "constant"  # a transposed weight is free, a computed one is work at every call
    if name == "convolution" and len(node.args) > 6 and node.args[6]:
        return "conv_transpose"
    if kind == "matmul" and any(is_constant(i) for i in node.all_input_nodes):
        return "linear"  # a product with stored weights is a Linear, however it is spelled
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        producer = node.args[0]
        value = producer.meta.get("val")
        if isinstance(value, (tuple, list)) or kind_of(producer, gm) in ("split", "batch_norm"):
            return ""  # takes one output of several
    return kind


def kinds(result: Any) -> Counter[str]:
    """How many nodes of each kind a result has."""
    gm = graph_of(result)
    return Counter(kind for node in gm.graph.nodes if (kind := kind_of(node, gm)))


def launches(result: Any) -> int:
    """Operations that launch work on a device: everything but views and constants."""
    return sum(n for kind, n in kinds(result).items() if kind not in FREE)


def order(result: Any) -> list[str]:
    """Kinds in execution order, without views."""
    gm = graph_of(result)
    return [kind for node in gm.graph.nodes if (kind := kind_of(node, gm)) and kind not in VIEWS and kind != "constant"]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps shapes of tensors and the values of everything that is no tensor."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.plain: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n] = tuple(value.shape)
            if is_constant(n):
                self.plain[n] = value
        elif not isinstance(value, (tuple, list)):
            self.plain[n] = value
        return value


class _Reader:
    """Follows a tagged tensor along views, to see which axis a per-channel operand varies along."""

    def __init__(self, gm: fx.GraphModule, args: tuple[Any, ...]) -> None:
        self.gm = gm
        self.run = _Recorder(gm)
        with torch.no_grad():
            self.run.run(*args)

    def kind(self, node: fx.Node) -> str:
        return kind_of(node, self.gm)

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Users of the value itself; users of its shape do not count."""
        return [u for u in node.users if self._reads(u, node)]

    def _reads(self, user: fx.Node, node: fx.Node) -> bool:
        if name_of(user, self.gm) in ("reshape_as", "view_as", "expand_as", "type_as") and user.args[0] is not node:
            return False
        return user.op == "output" or (is_tensor(user) and user in self.run.shapes) or self.kind(user) in VIEWS

    def constant(self, operand: Any) -> torch.Tensor | None:
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            return torch.tensor(float(operand))
        value = self.run.plain.get(operand) if isinstance(operand, fx.Node) else None
        return value if isinstance(value, torch.Tensor) else None

    def through(self, node: fx.Node, source: fx.Node, value: torch.Tensor) -> torch.Tensor | None:
        """What a view makes of `value` put in the place of `source`; None where that cannot be told."""

        def operand(n: fx.Node) -> Any:
            return value if n is source else self.run.plain.get(n)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
        try:
            if node.op == "call_module":
                out = self.gm.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                out = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                out = node.target(*args, **kwargs)
        except (RuntimeError, TypeError, AttributeError):
            return None
        return out if isinstance(out, torch.Tensor) else None

    def per_channel(self, node: fx.Node) -> tuple[fx.Node, torch.Tensor] | None:
        """(input, what is added or multiplied, broadcast to the input's shape) of a per-channel affine node, else
        None.
        """
        kind = self.kind(node)
        if kind == "batch_norm" and isinstance(node.args[0], fx.Node) and node.args[0] in self.run.shapes:
            shape = self.run.shapes[node.args[0]]
            return node.args[0], torch.arange(shape[1]).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
        if kind == "conv" and _pointwise_depthwise(node, self.gm) and node.args[0] in self.run.shapes:
            shape = self.run.shapes[node.args[0]]
            return node.args[0], torch.arange(shape[1]).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
        if kind == "addcmul" and len(node.args) == 3 and self.constant(node.args[0]) is not None:
            for x, other in ((node.args[1], node.args[2]), (node.args[2], node.args[1])):
                value = self.constant(other)
                if value is not None and x in self.run.shapes and sum(size != 1 for size in value.shape) <= 1:
                    return x, value.expand(self.run.shapes[x])
        if kind not in ("add", "sub", "mul", "div") or len(node.args) < 2:
            return None
        for x, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            value = self.constant(other)
            if not isinstance(x, fx.Node) or is_constant(x) or value is None or x not in self.run.shapes:
                continue
            if kind == "div" and other is node.args[0]:
                return None  # c / x is not affine
            if sum(size != 1 for size in value.shape) > 1 or self.run.shapes[node] != self.run.shapes[x]:
                return None  # a map, or something that expands
            return x, value.expand(self.run.shapes[x])
        return None

    def absorbed_by_producer(self, node: fx.Node, x: fx.Node, value: torch.Tensor) -> bool:
        """Whether `x` is the output of a single-consumer linear operation, seen through single-consumer views."""
        chain = []
        while self.kind(x) in VIEWS and self.kind(x) != "split" and len(self.users(x)) == 1:
            chain.append(x)
            if not isinstance(x.args[0], fx.Node):
                return False
            x = x.args[0]
        if self.kind(x) not in LINEAR_OPS or len(self.users(x)) != 1:
            return False
        shape = self.run.shapes[x]
        axis = len(shape) - 1 if self.kind(x) == "linear" else 1
        tags: torch.Tensor | None = (
            torch.arange(shape[axis]).view([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape)
        )
        for view in reversed(chain):
            assert tags is not None
            tags = self.through(view, view.args[0], tags)
            if tags is None:
                return False
        pairs = torch.stack([tags.flatten().double(), value.flatten().double()])
        return len(torch.unique(pairs, dim=1)[0]) == len(torch.unique(tags))  # one value per output channel

    def absorbed_by_consumers(self, node: fx.Node, value: torch.Tensor) -> bool:
        """Whether every consumer is an unpadded convolution, or a Linear along the axis that `value` varies on."""
        users = self.users(node)
        if not users:
            return False
        for user in users:
            kind = self.kind(user)
            if user.op == "output":
                return False
            if kind in VIEWS and kind != "split":
                moved = self.through(user, node, value)
                if moved is None or not self.absorbed_by_consumers(user, moved):
                    return False
            elif kind not in ("conv", "linear") or user.args[0] is not node or not self._contracts(user, kind, value):
                return False
        return True

    def _contracts(self, user: fx.Node, kind: str, value: torch.Tensor) -> bool:
        axis = value.ndim - 1 if kind == "linear" else 1
        first = value.movedim(axis, 0).flatten(1)
        constant_elsewhere = bool((first == first[:, :1]).all())
        return constant_elsewhere and (kind == "linear" or not _padded(user, self.gm))


def _pointwise_depthwise(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether a convolution is a BatchNorm in disguise: depthwise, 1x1, stride 1, unpadded."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        weight, stride, groups = module.weight, module.stride, module.groups
    else:
        weight = fx.node.map_arg(node.args[1], lambda n: _get_attr(gm, n))
        stride = node.args[3] if len(node.args) > 3 else node.kwargs.get("stride", 1)
        place = 8 if "onvolution" in name_of(node, gm) else 6
        groups = node.args[place] if len(node.args) > place else node.kwargs.get("groups", 1)
    if not isinstance(weight, torch.Tensor) or weight.shape[1:].numel() != 1 or groups != weight.shape[0]:
        return False
    strides = stride if isinstance(stride, (tuple, list)) else (stride,)
    return weight.shape[0] > 1 and all(s == 1 for s in strides) and not _padded(node, gm)


def _get_attr(gm: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(gm) if node.op == "get_attr" else node


def _padded(node: fx.Node, gm: fx.GraphModule) -> bool:
    if node.op == "call_module":
        padding = gm.get_submodule(str(node.target)).padding
    else:
        padding = node.kwargs.get("padding", node.args[4] if len(node.args) > 4 else 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def absorbable_affines(result: Any, args: tuple[Any, ...]) -> list[str]:
    """Per-channel affine nodes, in any spelling, that a neighbour should have absorbed.

    A node counts when its producer is a single-consumer Linear or convolution (seen through views), or when all its
    consumers are Linears or unpadded convolutions. Returned as "name (kind): which neighbour".
    """
    gm = graph_of(result)
    reader = _Reader(gm, args)
    found = []
    for node in gm.graph.nodes:
        affine = reader.per_channel(node)
        if affine is None:
            continue
        x, value = affine
        if reader.absorbed_by_producer(node, x, value):
            found.append(f"{node.name} ({reader.kind(node)}): its producer is a single-consumer linear op")
        elif reader.absorbed_by_consumers(node, value):
            found.append(f"{node.name} ({reader.kind(node)}): all its consumers are linear and unpadded")
    return found


def channel_affines(result: Any, args: tuple[Any, ...]) -> list[str]:
    """Every BatchNorm, and every mul, add, sub or div with a stored vector: absorbable or not."""
    gm = graph_of(result)
    reader = _Reader(gm, args)
    found = []
    for node in gm.graph.nodes:
        affine = reader.per_channel(node)
        if affine is None:
            continue
        operands = [reader.constant(a) for a in node.args[:3]]
        if reader.kind(node) == "batch_norm" or any(o is not None and o.numel() > 1 for o in operands):
            found.append(f"{node.name} ({reader.kind(node)})")
    return found


def new_weights(result: Any, original: nn.Module) -> Iterator[tuple[str, nn.Parameter | torch.Tensor]]:
    """Weights (2 dims or more) of a result that are not the original's own tensors: what rewrites made."""
    gm = graph_of(result)
    own = {t.data_ptr() for t in [*original.parameters(), *original.buffers()]}
    for name, tensor in [*gm.named_parameters(), *gm.named_buffers()]:
        if tensor.ndim >= 2 and tensor.is_floating_point() and tensor.data_ptr() not in own:
            yield name, tensor
