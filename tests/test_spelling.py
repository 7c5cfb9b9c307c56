"""Every spelling means one canonical operator.

Each row is a small computation written as module, function, method or operator. It is captured in three dialects
(``symbolic_trace``, ``torch.export``, core ATen); each node that gets a canonical operator is executed by a reference
that knows the canonical operators only, and must give the value that the node itself gives.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fxconv.spelling import OPERATORS, Barrier, Op, Param, canonical
from fxconv.spelling_common import attribute

torch.manual_seed(0)


# ----------------------------------------------------------------- the reference


def execute(op: Op, x: list[Any], like: torch.Tensor) -> torch.Tensor:
    """The value of a canonical operator on real tensors; ``like`` is the node's value, for sizes left open."""
    a = op.attrs
    match op.name:
        case "conv":
            n = len(a["stride"])
            if a["transposed"]:
                f = getattr(F, f"conv_transpose{n}d")
                pads = [p[0] for p in a["padding"]]
                return f(x[0], x[1], x[2], a["stride"], pads, a["output_padding"], a["groups"], a["dilation"])
            flat = [e for pair in reversed(a["padding"]) for e in pair]
            f = getattr(F, f"conv{n}d")
            return f(F.pad(x[0], flat), x[1], x[2], a["stride"], 0, a["dilation"], a["groups"])
        case "linear":
            return F.linear(*x)
        case "matmul":
            return torch.matmul(*x)
        case "addmm":
            return a["beta"] * x[0] + a["alpha"] * torch.matmul(x[1], x[2])
        case "addcmul":
            return x[0] + a["value"] * x[1] * x[2]
        case "addcdiv":
            return x[0] + a["value"] * x[1] / x[2]
        case "lerp":
            return x[0] + x[2] * (x[1] - x[0])
        case "where":
            return torch.as_tensor(torch.where(x[0], *x[1:]), dtype=like.dtype)
        case "einsum":
            return torch.einsum(a["equation"], *x)
        case "batch_norm":
            shape = [1, -1] + [1] * (x[0].dim() - 2)
            scale = 1 / torch.sqrt(x[4] + a["eps"])
            out = (x[0] - x[3].view(shape)) * scale.view(shape)
            out = out if x[1] is None else out * x[1].view(shape)
            return out if x[2] is None else out + x[2].view(shape)
        case "norm_affine":
            if a["kind"] == "layer_norm":
                return F.layer_norm(x[0], a["normalized_shape"], x[1], x[2], a["eps"])
            if a["kind"] == "rms_norm":
                return F.rms_norm(x[0], a["normalized_shape"], x[1], a["eps"])
            if a["kind"] == "group_norm":
                return F.group_norm(x[0], a["groups"], x[1], x[2], a["eps"])
            return F.instance_norm(x[0], None, None, x[1], x[2], eps=a["eps"])
        case "add":
            return torch.as_tensor(x[0] + a["alpha"] * x[1])
        case "sub":
            return torch.as_tensor(x[0] - a["alpha"] * x[1])
        case "mul":
            return x[0] * x[1]
        case "div":
            return x[0] / x[1]
        case "neg":
            return -x[0]
        case "avg_pool":
            n = len(a["kernel"])
            args = [a["kernel"], a["stride"], a["padding"], a["ceil_mode"], a["count_include_pad"]]
            return getattr(F, f"avg_pool{n}d")(x[0], *args, *([a["divisor"]] if n > 1 else []))
        case "adaptive_avg_pool":
            return getattr(F, f"adaptive_avg_pool{len(a['output_size'])}d")(x[0], a["output_size"])
        case "max_pool":
            f = getattr(F, f"max_pool{len(a['kernel'])}d")
            return f(x[0], a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"])
        case "mean" | "sum":
            return getattr(torch, op.name)(x[0], a["dims"], a["keepdim"])
        case "interpolate":
            corners = {} if a["mode"] in ("nearest", "nearest-exact", "area") else {"align_corners": a["align_corners"]}
            if any(s is None for s in a["scales"]):
                return F.interpolate(x[0], size=like.shape[2:], mode=a["mode"], **corners)
            return F.interpolate(x[0], scale_factor=a["scales"], mode=a["mode"], **corners)
        case "pad":
            flat = [e for pair in reversed(a["pads"]) for e in pair]
            if a["mode"] == "constant":
                return F.pad(x[0], flat, value=a["value"])
            return F.pad(x[0], flat[: 2 * (x[0].dim() - 2)], a["mode"])
        case "cat" | "stack":
            return getattr(torch, op.name)(x, a["dim"])
        case "slice":
            key = [slice(None)] * x[0].dim()
            key[a["dim"]] = slice(a["start"], a["end"], a["step"])
            return x[0][tuple(key)]
        case "index":
            keys = {"slice": lambda k: slice(*k[1:]), "select": lambda k: k[1], "new": lambda k: None}
            return x[0][tuple(keys[k[0]](k) for k in a["items"])]
        case "select":
            return x[0].select(a["dim"], a["index"])
        case "write":
            if a["select"]:
                return torch.select_scatter(x[0], x[1], a["dim"], a["start"])
            end = a["start"] + x[1].shape[a["dim"]] * a["step"]
            return torch.slice_scatter(x[0], x[1], a["dim"], a["start"], end, a["step"])
        case "reshape":
            return x[0].reshape(like.shape)
        case "permute":
            return x[0].permute(a["dims"])
        case "expand":
            return x[0].expand(a["shape"])
        case "roll":
            return x[0].roll(a["shifts"], a["dims"])
        case "flip":
            return x[0].flip(a["dims"])
        case "repeat":
            return x[0].repeat(a["counts"])
        case "repeat_interleave":
            return x[0].repeat_interleave(a["count"], a["dim"])
        case "rot90":
            return x[0].rot90(a["k"], a["dims"])
        case "cumsum":
            return x[0].cumsum(a["dim"])
        case "pixel_shuffle" | "pixel_unshuffle":
            return getattr(F, op.name)(x[0], a["factor"])
        case "channel_shuffle":
            return torch.channel_shuffle(x[0], a["groups"])
        case "im2col":
            return F.unfold(x[0], a["kernel"], a["dilation"], a["padding"], a["stride"])
        case "col2im":
            return F.fold(x[0], like.shape[2:], a["kernel"], a["dilation"], a["padding"], a["stride"])
        case "tensor_unfold":
            return x[0].unfold(a["dim"], a["size"], a["step"])
        case "identity":
            return x[0]
        case "relu":
            return F.relu(x[0])
        case "leaky_relu":
            return F.leaky_relu(x[0], a["slope"])
        case "prelu":
            return F.prelu(x[0], x[1])
    raise AssertionError(op.name)


class Judge(fx.Interpreter):
    """Runs a graph, and next to each node its canonical operator."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: list[Op | Barrier] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        meaning = canonical(n, self.module)
        if n.op not in ("placeholder", "get_attr", "output"):
            self.found.append(meaning)
        if isinstance(meaning, Op):
            assert meaning.name in OPERATORS
            operands = [self.operand(i) for i in meaning.inputs]
            again = execute(meaning, operands, value)
            assert again.shape == value.shape, (n.format_node(), meaning)
            torch.testing.assert_close(again, value, rtol=1e-12, atol=1e-12)
        return value

    def operand(self, i: Any) -> Any:
        if isinstance(i, fx.Node):
            return self.env[i]
        return attribute(self.module, i.name) if isinstance(i, Param) else i

    def run(self, *args: Any) -> Any:
        # Values of nodes are freed after their last use, but an operator may name them once more here.
        self.garbage_collect_values = False
        return super().run(*args)


def graphs(module: nn.Module, args: tuple[torch.Tensor, ...], dialect: str) -> tuple[fx.GraphModule, list[Any]]:
    if dialect == "module":
        gm = fx.symbolic_trace(module)
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*args)
        return gm, list(args)
    program = torch.export.export(module, args, strict=False)
    if dialect == "core":
        program = program.run_decompositions()
    state = {**program.state_dict, **program.constants}
    values = [
        state[spec.target] if spec.target is not None else args[i - len(program.graph_signature.input_specs)]
        for i, spec in enumerate(program.graph_signature.input_specs)
    ]
    return program.graph_module, values


class Fn(nn.Module):
    def __init__(self, f: Callable[..., Any], **tensors: torch.Tensor) -> None:
        super().__init__()
        self.f = f
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, *x: torch.Tensor) -> Any:
        return self.f(self, *x)


class Fn1(Fn):
    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return self.f(self, x)


class Fn2(Fn):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
        return self.f(self, x, y)


def randomised(module: nn.Module) -> nn.Module:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.1 if "var" in name else torch.randn_like(tensor)
    return module


def t(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


IMAGE = (2, 6, 8, 10)
W33 = t(4, 6, 3, 3)

# name, module (float64, eval), input shapes, operators that must appear in the module and export dialects
ROWS: list[tuple[str, Callable[[], nn.Module], list[tuple[int, ...]], set[str]]] = [
    ("conv2d", lambda: nn.Conv2d(6, 4, 3, 2, 1), [IMAGE], {"conv"}),
    ("conv2d same even", lambda: nn.Conv2d(6, 4, (4, 3), padding="same", bias=False), [IMAGE], {"conv"}),
    ("conv2d grouped", lambda: nn.Conv2d(6, 4, (3, 1), dilation=2, groups=2), [IMAGE], {"conv"}),
    ("conv1d", lambda: nn.Conv1d(6, 4, 3, padding="valid"), [(2, 6, 9)], {"conv"}),
    ("conv3d", lambda: nn.Conv3d(2, 4, 2), [(2, 2, 3, 4, 5)], {"conv"}),
    ("conv transpose", lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, 2), [IMAGE], {"conv"}),
    ("F.conv2d", lambda: Fn1(lambda m, x: F.conv2d(x, m.w, stride=2, padding=(1, 0)), w=W33), [IMAGE], {"conv"}),
    ("torch.conv2d", lambda: Fn1(lambda m, x: torch.conv2d(x, m.w, None, 1, "same"), w=W33), [IMAGE], {"conv"}),
    ("F.conv_transpose2d", lambda: Fn1(lambda m, x: F.conv_transpose2d(x, m.w, stride=3, dilation=2), w=t(6, 4, 3, 2)),
     [IMAGE], {"conv"}),
    ("linear", lambda: nn.Linear(10, 3), [IMAGE], {"linear"}),
    ("F.linear", lambda: Fn1(lambda m, x: F.linear(x, m.w), w=t(3, 10)), [IMAGE], {"linear"}),
    ("matmul", lambda: Fn1(lambda m, x: (x @ m.w).matmul(m.v), w=t(10, 3), v=t(3, 2)), [IMAGE], {"matmul"}),
    ("mm bmm", lambda: Fn1(lambda m, x: torch.bmm(x, x.transpose(1, 2)), w=t(1)), [(2, 3, 4)], {"matmul", "permute"}),
    ("addmm", lambda: Fn1(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=3), w=t(6, 4), b=t(4)), [(2, 6)],
     {"addmm"}),
    ("addcmul", lambda: Fn1(lambda m, x: torch.addcmul(m.b, m.w, x, value=2), w=t(10), b=t(10)), [IMAGE], {"addcmul"}),
    ("einsum", lambda: Fn1(lambda m, x: torch.einsum("nchw,oc->nohw", x, m.w), w=t(3, 6)), [IMAGE], {"einsum"}),
    ("einsum list", lambda: Fn1(lambda m, x: torch.einsum("n c, o c -> n o", [x, m.w]), w=t(3, 6)), [(2, 6)],
     {"einsum"}),
    ("batch_norm", lambda: nn.BatchNorm2d(6), [IMAGE], {"batch_norm"}),
    ("batch_norm no affine", lambda: nn.BatchNorm1d(6, affine=False, eps=1e-2), [(2, 6, 3)], {"batch_norm"}),
    ("F.batch_norm", lambda: Fn1(lambda m, x: F.batch_norm(x, m.m, m.var, m.w, None, eps=0.1), m=t(6), var=t(6),
                                 w=t(6)), [IMAGE], {"batch_norm"}),
    ("layer_norm", lambda: nn.LayerNorm([8, 10]), [IMAGE], {"norm_affine"}),
    ("group_norm", lambda: nn.GroupNorm(3, 6), [IMAGE], {"norm_affine"}),
    ("instance_norm", lambda: nn.InstanceNorm2d(6, affine=True), [IMAGE], {"norm_affine"}),
    ("instance_norm running", lambda: nn.InstanceNorm2d(6, track_running_stats=True), [IMAGE], {"batch_norm"}),
    ("rms_norm", lambda: nn.RMSNorm(10), [IMAGE], {"norm_affine"}),
    ("arithmetic", lambda: Fn2(lambda m, x, y: (2 - x) / 3 * y - (-x) + 1), [IMAGE, IMAGE],
     {"sub", "div", "mul", "neg", "add"}),
    ("alpha", lambda: Fn2(lambda m, x, y: torch.add(x, y, alpha=2).sub(y, alpha=3)), [IMAGE, IMAGE], {"add", "sub"}),
    ("rsub", lambda: Fn2(lambda m, x, y: torch.rsub(x, y, alpha=3)), [IMAGE, IMAGE], {"sub"}),
    ("methods", lambda: Fn2(lambda m, x, y: x.add(y).mul(2).div(y).neg()), [IMAGE, IMAGE],
     {"add", "mul", "div", "neg"}),
    ("avg_pool", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), [IMAGE], {"avg_pool"}),
    ("avg_pool divisor", lambda: nn.AvgPool2d((2, 3), divisor_override=5), [IMAGE], {"avg_pool"}),
    ("F.avg_pool1d", lambda: Fn1(lambda m, x: F.avg_pool1d(x, 2)), [(2, 3, 7)], {"avg_pool"}),
    ("adaptive", lambda: nn.AdaptiveAvgPool2d((4, None)), [IMAGE], {"adaptive_avg_pool"}),
    ("F.adaptive", lambda: Fn1(lambda m, x: F.adaptive_avg_pool2d(x, 1)), [IMAGE], {"adaptive_avg_pool"}),
    ("max_pool", lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), [IMAGE], {"max_pool"}),
    ("F.max_pool1d", lambda: Fn1(lambda m, x: F.max_pool1d(x, 3, dilation=2)), [(2, 3, 9)], {"max_pool"}),
    ("mean", lambda: Fn1(lambda m, x: x.mean((2, 3)) + torch.mean(x, dim=[-1, -2])), [IMAGE], {"mean"}),
    ("mean keepdim", lambda: Fn1(lambda m, x: x.mean(dim=1, keepdim=True)), [IMAGE], {"mean"}),
    ("sum", lambda: Fn1(lambda m, x: torch.sum(x, -1) + x.sum()), [IMAGE], {"sum"}),
    ("nearest", lambda: nn.Upsample(scale_factor=2), [IMAGE], {"interpolate"}),
    ("bilinear", lambda: nn.UpsamplingBilinear2d(size=(5, 21)), [IMAGE], {"interpolate"}),
    ("bilinear scale", lambda: Fn1(lambda m, x: F.interpolate(x, scale_factor=1.7, mode="bilinear")), [IMAGE],
     {"interpolate"}),
    ("bicubic", lambda: Fn1(lambda m, x: F.interpolate(x, (9, 7), mode="bicubic", align_corners=False)), [IMAGE],
     {"interpolate"}),
    ("nearest-exact", lambda: Fn1(lambda m, x: F.interpolate(x, (9, 7), mode="nearest-exact")), [IMAGE],
     {"interpolate"}),
    ("linear 1d", lambda: Fn1(lambda m, x: F.interpolate(x, scale_factor=2, mode="linear")), [(2, 3, 5)],
     {"interpolate"}),
    ("recomputed scale", lambda: Fn1(lambda m, x: F.interpolate(x, scale_factor=1.7, recompute_scale_factor=True)),
     [IMAGE], {"interpolate"}),
    ("pad", lambda: Fn1(lambda m, x: F.pad(x, (1, 2, -3, 0), value=2)), [IMAGE], {"pad"}),
    ("pad modules", lambda: nn.Sequential(nn.ZeroPad2d((1, 2, 3, 0)), nn.ReflectionPad2d(2), nn.ConstantPad2d(1, 4.0),
                                          nn.ReplicationPad2d((0, 1, 2, 3))), [IMAGE], {"pad"}),
    ("cat", lambda: Fn2(lambda m, x, y: torch.cat([x, y, x], -1)), [IMAGE, IMAGE], {"cat"}),
    ("stack", lambda: Fn2(lambda m, x, y: torch.stack((x, y), dim=-2)), [IMAGE, IMAGE], {"stack"}),
    ("slices", lambda: Fn1(lambda m, x: x[:, 1:5:2, ..., -3:]), [IMAGE], set()),
    ("select", lambda: Fn1(lambda m, x: x[:, -1] + x.select(1, 0)), [IMAGE], {"select"}),
    ("index", lambda: Fn1(lambda m, x: x[0, None, ..., 3]), [IMAGE], set()),
    ("narrow", lambda: Fn1(lambda m, x: x.narrow(-1, 2, 4)), [IMAGE], {"slice"}),
    ("split", lambda: Fn1(lambda m, x: x.split([1, 2, 3], dim=1)[2].sum(1) - x.split(4, 1)[1].sum(1)), [IMAGE],
     {"slice"}),
    ("chunk", lambda: Fn1(lambda m, x: operator.sub(torch.chunk(x, 2, dim=-1)[0], x.chunk(2, 3)[1])), [IMAGE],
     {"slice"}),
    ("tensor_split", lambda: Fn1(lambda m, x: x.tensor_split(3, dim=1)[1]), [(2, 8, 3)], {"slice"}),
    ("unbind", lambda: Fn1(lambda m, x: x.unbind(1)[2]), [IMAGE], {"select"}),
    ("slice_scatter", lambda: Fn1(lambda m, x: x.slice_scatter(x[:, 1:3] * 2, 1, 1, 3)), [IMAGE], {"write"}),
    ("slice_scatter step", lambda: Fn1(lambda m, x: torch.slice_scatter(x, x[:, :1], 1, 0, 2, 2)), [IMAGE], {"write"}),
    ("slice_scatter end", lambda: Fn1(lambda m, x: x.slice_scatter(x[:, :1], 1, -1)), [IMAGE], {"write"}),
    ("select_scatter", lambda: Fn1(lambda m, x: x.select_scatter(x[:, 0], 1, -2)), [IMAGE], {"write"}),
    ("reshape", lambda: Fn1(lambda m, x: x.view(2, -1, 5).reshape(x.size(0), 3, -1).flatten(1).unflatten(1, (4, -1))),
     [IMAGE], {"reshape"}),
    ("flatten module", lambda: nn.Sequential(nn.Flatten(2), nn.Unflatten(1, (2, 3))), [IMAGE], {"reshape"}),
    ("squeeze", lambda: Fn1(lambda m, x: x.unsqueeze(1).squeeze(1)[None].squeeze()), [(2, 3)], {"reshape"}),
    ("permutes", lambda: Fn1(lambda m, x: x.permute(0, 2, 3, 1).transpose(-1, 1).movedim(1, -1).mT), [IMAGE],
     {"permute"}),
    ("t", lambda: Fn1(lambda m, x: x.t() + x.T + torch.swapaxes(x, 0, 1)), [(3, 3)], {"permute"}),
    ("expand", lambda: Fn1(lambda m, x: x.mean(1, True).expand(-1, 4, -1, -1)), [IMAGE], {"expand"}),
    ("roll flip", lambda: Fn1(lambda m, x: torch.roll(x, (1, -2), (2, 3)).flip(1)), [IMAGE], {"roll", "flip"}),
    ("copies", lambda: Fn1(lambda m, x: x.repeat(2, 1, 3).tile(2).repeat_interleave(2, -1)), [(2, 3, 5)],
     {"repeat", "repeat_interleave"}),
    ("rot90 cumsum", lambda: Fn1(lambda m, x: x.rot90(1, (2, 3)).rot90(-1, (1, 3)).cumsum(-2)), [IMAGE],
     {"rot90", "cumsum"}),
    ("mixtures", lambda: Fn2(lambda m, x, y: torch.addcdiv(torch.lerp(x, y, 0.3), x, y).lerp(y, x.addcmul(x, y))),
     [IMAGE, IMAGE], {"lerp", "addcdiv", "addcmul"}),
    ("where", lambda: Fn1(lambda m, x: torch.where(m.w, x, 0.5).masked_fill(m.w, 2.0), w=torch.arange(10) % 3 == 1),
     [IMAGE], {"where"}),
    ("tensordot", lambda: Fn1(lambda m, x: torch.inner(torch.tensordot(x, m.w, ([1, 3], [0, 1])), m.w[0]),
                              w=torch.randn(6, 10, 10)), [IMAGE], {"einsum"}),
    ("pixel_shuffle", lambda: nn.PixelShuffle(2), [(2, 8, 3, 5)], {"pixel_shuffle"}),
    ("pixel_unshuffle", lambda: nn.PixelUnshuffle(2), [IMAGE], {"pixel_unshuffle"}),
    ("channel_shuffle", lambda: nn.ChannelShuffle(3), [IMAGE], {"channel_shuffle"}),
    ("unfold", lambda: nn.Unfold((2, 3), 1, 1, 2), [IMAGE], {"im2col"}),
    ("fold", lambda: nn.Fold((7, 9), (2, 3), 1, 1, 2), [(2, 30, 20)], {"col2im"}),
    ("Tensor.unfold", lambda: Fn1(lambda m, x: x.unfold(2, 3, 2)), [IMAGE], {"tensor_unfold"}),
    ("activations", lambda: nn.Sequential(nn.ReLU(inplace=False), nn.LeakyReLU(0.2), nn.PReLU(6)), [IMAGE],
     {"relu", "leaky_relu", "prelu"}),
    ("F activations", lambda: Fn1(lambda m, x: F.leaky_relu(F.relu(x) - torch.relu(-x), 0.3).relu()), [IMAGE],
     {"relu", "leaky_relu"}),
    ("identities", lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Dropout2d()), [IMAGE], set()),
    ("identity methods", lambda: Fn1(lambda m, x: F.dropout(x.contiguous(), training=False).clone().double()), [IMAGE],
     {"identity"}),
]  # fmt: skip


IN_CORE = {
    "conv2d grouped", "conv transpose", "linear", "matmul", "addmm", "batch_norm", "layer_norm", "group_norm",
    "avg_pool", "adaptive", "max_pool", "nearest", "bilinear scale", "pad", "split", "slices", "pixel_shuffle",
    "activations",
}  # fmt: skip
"""Rows that core ATen spells differently (a decomposition takes half a second each)."""


CASES = [(*row[1:], d) for row in ROWS for d in ("module", "aten", "core") if d != "core" or row[0] in IN_CORE]
NAMES = [f"{row[0]} {d}" for row in ROWS for d in ("module", "aten", "core") if d != "core" or row[0] in IN_CORE]


@pytest.mark.parametrize("build,inputs,expected,dialect", CASES, ids=[n.replace(" ", "_") for n in NAMES])
def test_canonical_operator_has_the_meaning_of_the_node(
    build: Callable[[], nn.Module], inputs: list[tuple[int, ...]], expected: set[str], dialect: str
) -> None:
    module = randomised(build().double().eval())
    module = module if isinstance(module, Fn) else nn.Sequential(module)
    gm, values = graphs(module, tuple(t(*shape) for shape in inputs), dialect)
    judge = Judge(gm)
    judge.run(*values)
    names = {op.name for op in judge.found if isinstance(op, Op)}
    reasons = [b.reason for b in judge.found if isinstance(b, Barrier) and b.reason]
    if dialect != "core":
        assert expected <= names
        assert not reasons


# ----------------------------------------------------------------- refusals, with the reason


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Renamed(nn.Conv2d):
    """Only the constructor differs."""

    def __init__(self) -> None:
        super().__init__(6, 4, 1)


BARRIERS: list[tuple[str, nn.Module, str]] = [
    ("reflect", nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    ("own statistics", nn.BatchNorm2d(6, track_running_stats=False), "batch statistics"),
    ("sigmoid", nn.Sigmoid(), "Sigmoid is not affine"),
    ("gelu", Fn1(lambda m, x: F.gelu(x)), "GELU is not affine"),
    ("softmax", Fn1(lambda m, x: x.softmax(-1)), "Softmax is not affine"),
    ("floor", Fn1(lambda m, x: torch.div(x, 2, rounding_mode="floor")), "rounding_mode='floor'"),
    ("antialias", Fn1(lambda m, x: F.interpolate(x, (4, 4), mode="bilinear", antialias=True)), "antialias"),
    ("cast", Fn1(lambda m, x: x.float()), "cast from float64 to float32"),
    ("mixed", Fn1(lambda m, x: x + m.w, w=torch.randn(10)), "mixed dtypes: float32 and float64"),
    ("bool", Fn1(lambda m, x: x > 0), "dtype bool"),
    ("complex", Fn1(lambda m, x: torch.fft.fft(x)), "dtype complex128"),
    ("repeat", Fn1(lambda m, x: x.repeat_interleave(2)), "repeat_interleave of the flattened tensor"),
    ("dropout", Fn1(lambda m, x: F.dropout(x)), "training=True"),
    ("detach", Fn1(lambda m, x: x.detach()), "gradient"),
    ("adaptive_max", nn.AdaptiveMaxPool2d(2), "AdaptiveMaxPool2d"),
    ("subclass", Standardised(6, 4, 1), "Standardised has its own forward, unlike Conv2d"),
]


@pytest.mark.parametrize("name,module,reason", BARRIERS, ids=[b[0] for b in BARRIERS])
def test_refused_with_the_reason(name: str, module: nn.Module, reason: str) -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    module = module.double().eval() if name != "mixed" else module
    wrapped = module if isinstance(module, Fn) else nn.Sequential(module)
    tracer = fx.Tracer() if isinstance(module, Fn) else Leaves()
    gm = fx.GraphModule(wrapped, tracer.trace(wrapped))
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(t(*IMAGE))
    reasons = [b.reason for n in gm.graph.nodes if isinstance(b := canonical(n, gm), Barrier) and b.reason]
    assert len(reasons) == 1 and reason in reasons[0]


def test_a_subclass_without_its_own_forward_is_its_base() -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    wrapped = nn.Sequential(Renamed()).eval()
    gm = fx.GraphModule(wrapped, Leaves().trace(wrapped))
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(torch.randn(IMAGE))
    (op,) = [o for n in gm.graph.nodes if isinstance(o := canonical(n, gm), Op)]
    assert op.name == "conv" and op.inputs[1] == Param("0.weight")


def test_barriers_of_capture_and_missing_shapes() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3)))
    (node,) = [n for n in gm.graph.nodes if n.op == "call_module"]
    assert canonical(node, gm, {node.name: "it has a hook"}) == Barrier("it has a hook")
    assert canonical(node, gm) == Barrier("needs args: the shape is not known")


def test_sizes_stay_symbolic_without_new_guards() -> None:
    def f(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = x[:, :, 1:-1].flatten(2).transpose(1, 2)
        return y.view(x.shape[0], -1, 2, 3)[..., 0, :].squeeze()

    auto = torch.export.Dim.AUTO
    x = torch.randn(2, 6, 8, 10)
    program = torch.export.export(Fn1(f), (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},), strict=False)
    (placeholder,) = [n for n in program.graph.nodes if n.op == "placeholder"]
    environment = placeholder.meta["val"].fake_mode.shape_env
    guards = len(environment.guards)
    found = {n.name: canonical(n, program.graph_module) for n in program.graph.nodes}
    assert len(environment.guards) == guards
    squeezed = [op for op in found.values() if isinstance(op, Op) and "bare_squeeze" in op.attrs]
    assert [op.attrs["bare_squeeze"] for op in squeezed] == [True]
    ends = [op.attrs["end"] for op in found.values() if isinstance(op, Op) and op.name == "slice"]
    assert any(isinstance(end, torch.SymInt) for end in ends)
