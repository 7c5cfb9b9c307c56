"""Bugs to plant into emitted rewrites, one at a time: each changes the nodes or weights of one cluster in a graph.

A mutant is a function of a `Site`, the part of a graph that one rewrite wrote. It changes the graph in place and says
whether there was anything to change. The same mutant works on a cluster cut out in float64 and on the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten
Change = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Site:
    """The nodes of one rewrite in ``gm``; ``result`` is the last of them."""

    gm: fx.GraphModule
    names: frozenset[str]
    result: str

    @property
    def nodes(self) -> list[fx.Node]:
        return [n for n in self.gm.graph.nodes if n.name in self.names and n.op != "get_attr"]

    @property
    def last(self) -> fx.Node:
        return next(n for n in self.gm.graph.nodes if n.name == self.result)

    def of(self, *kinds: str) -> Iterator[fx.Node]:
        """The nodes of these kinds, by the name of their operator."""
        for node in self.nodes:
            if node.op == "call_function" and str(node.target).split(".")[1 if "aten" in str(node.target) else -1] in kinds:
                yield node

    def tensor(self, node: Any) -> Tensor | None:
        """What a ``get_attr`` node of this rewrite reads."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value: Any = self.gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def change(self, node: Any, how: Change) -> bool:
        """Replace a stored tensor by ``how`` of it in float64, in the dtype it has; False where that is no change."""
        stored = self.tensor(node)
        if stored is None or stored.numel() == 0:
            return False
        new = how(stored.detach().double())
        if new is None or new.shape != stored.shape or torch.equal(new, stored.detach().double()):
            return False
        with torch.no_grad():
            stored.data = new.to(stored.dtype).contiguous()
        return True

    def weight(self, how: Change, *kinds: str) -> bool:
        """Change the first weight that `how` accepts."""
        found = self.of(*(kinds or ("conv1d", "conv2d", "linear", "conv_transpose2d")))
        return any(self.change(n.args[1], how) for n in found if len(n.args) > 1)

    def bias(self, how: Change) -> bool:
        found = self.of("conv1d", "conv2d", "linear", "conv_transpose2d")
        return any(self.change(n.args[2], how) for n in found if len(n.args) > 2)

    def wrap(self, how: Callable[..., Tensor], *more: fx.Node, node: fx.Node | None = None) -> bool:
        """Put ``how`` behind a node, the last one unless given."""
        node = self.last if node is None else node
        with self.gm.graph.inserting_after(node):
            new = self.gm.graph.call_function(how, (node, *more))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.gm.recompile()
        return True

    def before(self, node: fx.Node, how: Callable[[Tensor], Tensor]) -> bool:
        """Put ``how`` before a node's first input."""
        with self.gm.graph.inserting_before(node):
            node.update_arg(0, self.gm.graph.call_function(how, (node.args[0],)))
        self.gm.recompile()
        return True

    def arg(self, node: fx.Node, index: int, value: Any) -> bool:
        """Set a positional argument; the ones before it that are left out get the operator's defaults."""
        arguments = node.target._schema.arguments  # type: ignore[union-attr]
        args = list(node.args)
        while len(args) <= index:
            args.append(arguments[len(args)].default_value)
        if args[index] == value:
            return False
        args[index] = value
        node.args = tuple(args)
        self.gm.recompile()
        return True


def ints(node: fx.Node, index: int) -> list[int]:
    """The numbers in a positional argument, [] where it is left out."""
    value: Any = node.args[index] if len(node.args) > index else []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _with(how: Callable[..., Tensor], more: Any) -> Callable[[Tensor], Tensor]:
    def both(x: Tensor) -> Tensor:  # fx can call a function, and no functools.partial
        return how(x, more)

    return both


def padded(site: Site, how: Callable[..., Tensor]) -> bool:
    """Let ``how`` pad the input of a convolution, by what the convolution then pads no more."""
    for node in site.of("conv2d"):
        padding = ints(node, 4)
        if padding and max(padding) > 0:
            pads = [padding[-1], padding[-1], padding[0], padding[0]]
            return site.arg(node, 4, [0, 0]) and site.before(node, _with(how, pads))
    return False


MUTANTS: dict[str, Callable[[Site], bool]] = {}


def mutant(name: str) -> Callable[[Callable[[Site], bool]], Callable[[Site], bool]]:
    def register(how: Callable[[Site], bool]) -> Callable[[Site], bool]:
        assert name not in MUTANTS
        MUTANTS[name] = how
        return how

    return register


def weights(name: str, how: Change, *kinds: str) -> None:
    mutant(name)(lambda site: site.weight(how, *kinds))


def biases(name: str, how: Change) -> None:
    mutant(name)(lambda site: site.bias(how))


def outputs(name: str, how: Callable[[Tensor], Tensor]) -> None:
    mutant(name)(lambda site: site.wrap(how))


def entry(t: Tensor, at: tuple[Any, ...], factor: float) -> Tensor:
    t = t.clone()
    t[at] = t[at] * factor
    return t


def kernel(how: Change) -> Change:
    """Only for what has taps in two dims."""
    return lambda w: how(w) if w.dim() == 4 and w.shape[2:].numel() > 1 else None


def matrix(how: Change) -> Change:
    """Only for as many rows as columns, more than one."""
    return lambda w: how(w) if w.dim() > 1 and w.shape[0] == w.shape[1] > 1 else None


def rows(how: Change) -> Change:
    return lambda w: how(w) if w.shape[0] > 1 else None


def columns(how: Change) -> Change:
    return lambda w: how(w) if w.dim() > 1 and w.shape[1] > 1 else None


def ramp(t: Tensor, dim: int) -> Tensor:
    """1, 1.1, 1.2, … along one dim."""
    return 1 + 0.1 * torch.arange(t.shape[dim], dtype=t.dtype).reshape([-1 if d == dim else 1 for d in range(t.dim())])


def eye_in_the_middle(w: Tensor, times: float) -> Tensor | None:
    if w.dim() < 2 or w.shape[0] != w.shape[1]:
        return None
    w = w.clone()
    at = (torch.arange(w.shape[0]),) * 2 + tuple(k // 2 for k in w.shape[2:])
    w[at] += times
    return w


def low_rank(w: Tensor) -> Tensor | None:
    flat = w.flatten(1)
    if min(flat.shape) < 2:
        return None
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    s[-1] = 0
    return (u @ torch.diag(s) @ v).reshape(w.shape)


# --- biases: not scaled, lost, twice, on the wrong side ---------------------------------------------------------------

biases("bias not scaled", lambda b: b * 1.1)
biases("bias lost", lambda b: b * 0)
biases("bias negated", lambda b: -b)
biases("bias twice", lambda b: b * 2)
biases("beta lost", lambda b: b - 0.3)
biases("beta lost in the last channel", lambda b: torch.cat([b[:-1], b[-1:] - 0.3]))
biases("biases permuted", rows(lambda b: b.roll(1, 0)))
biases("mean subtracted twice", rows(lambda b: b - 0.1 * ramp(b, 0)))
biases("bias in float32", lambda b: b.float().double())
biases("bias off in the ninth digit", lambda b: entry(b, (-1,), 1 + 1e-9))


# --- weights: scales, order, composition ------------------------------------------------------------------------------

weights("eps lost", lambda w: w * (1 + 5e-6))
weights("eps lost in the last channel", rows(lambda w: entry(w, (-1,), 1 + 5e-6)))
weights("variance for standard deviation", rows(lambda w: w * ramp(w, 0)))
weights("scale on the input channels", columns(lambda w: w * ramp(w, 1)))
weights("alpha lost", lambda w: w * 2)
weights("negated", lambda w: -w)
weights("one late channel", rows(lambda w: entry(w, (-1,), 1.001)))
weights("one late channel, a little", rows(lambda w: entry(w, (-1,), 1 + 1e-8)))
weights("one input channel", columns(lambda w: entry(w, (slice(None), -1), 1.001)))
weights("one weight", lambda w: entry(w, (-1,) * w.dim(), 1 + 1e-6))
weights("output channels permuted", rows(lambda w: w.roll(1, 0)))
weights("last two channels swapped", rows(lambda w: torch.cat([w[:-2], w[-1:], w[-2:-1]])))
weights("input channels permuted", columns(lambda w: w.roll(1, 1)))
weights("transposed, C_in = C_out", matrix(lambda w: w.transpose(0, 1)))
weights("composed in float32", lambda w: w.float().double())
weights("composed in bfloat16", lambda w: w.bfloat16().double())
weights("composed in float16", lambda w: w.half().double())
weights("rank cut by one", low_rank)
weights("small weights cut", lambda w: w * (w.abs() > w.abs().flatten().kthvalue(1 + w.numel() // 50).values))
weights("identity branch lost", lambda w: eye_in_the_middle(w, -1.0))
weights("identity branch twice", lambda w: eye_in_the_middle(w, 1.0))
weights("kernel flipped", kernel(lambda w: w.flip(2, 3)))
weights("kernel flipped along W", kernel(lambda w: w.flip(3) if w.shape[3] > 1 else None))
weights("kernel's H and W swapped", kernel(lambda w: w.transpose(2, 3) if w.shape[2] == w.shape[3] else None))
weights("kernel off by one tap", kernel(lambda w: w.roll(1, 3) if w.shape[3] > 1 else None))
weights("middle tap lost", kernel(lambda w: entry(w, (..., w.shape[2] // 2, w.shape[3] // 2), 0.0)))
weights("corner tap", kernel(lambda w: entry(w, (..., 0, 0), 1 + 1e-6)))
weights("1-d kernel flipped", lambda w: w.flip(2) if w.shape[2] > 1 else None, "conv1d")
weights("columns of a flatten in another order", lambda w: _other_order(w), "linear")
weights("weight of another layer", lambda w: torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).to(w))


def _other_order(w: Tensor) -> Tensor | None:
    """As if the image that was flattened had been 6 high, not wide."""
    return w.unflatten(1, (-1, 6)).transpose(1, 2).flatten(1) if w.shape[1] % 6 == 0 and w.shape[1] > 6 else None


def _rolled(w: Tensor, groups: int) -> Tensor:
    return w.roll(w.shape[0] // groups, 0)


@mutant("groups permuted")
def _(site: Site) -> bool:
    for node in site.of("conv2d"):
        groups = (ints(node, 6) or [1])[0]
        if groups > 1:
            return site.change(node.args[1], _with(_rolled, groups))
    return False


# --- arguments of operators -------------------------------------------------------------------------------------------


@mutant("padding off by one")
def _(site: Site) -> bool:
    return any(site.arg(n, 4, [p[0] + 1, p[-1]]) for n in site.of("conv2d") if (p := ints(n, 4)))


@mutant("padding on the other side")
def _(site: Site) -> bool:
    """One pixel more above, one less below."""
    return any(site.before(n, lambda x: F.pad(x, (0, 0, 1, -1))) for n in site.of("conv2d") if ints(n, 4)[:1] not in ([], [0]))


@mutant("stride on one axis")
def _(site: Site) -> bool:
    return any(site.arg(n, 3, [s[0], s[-1] + 1]) for n in site.of("conv2d") if (s := ints(n, 3)))


@mutant("dilation")
def _(site: Site) -> bool:
    """Padded by as much more, so that the size is right."""
    for node in site.of("conv2d"):
        weight = site.tensor(node.args[1])
        if weight is not None and weight.shape[2] == weight.shape[3] == 3 and ints(node, 4):
            return site.arg(node, 4, [p + 1 for p in ints(node, 4)]) and site.arg(node, 5, [2, 2])
    return False


@mutant("output_padding")
def _(site: Site) -> bool:
    return any(site.arg(n, 5, [1, 0]) for n in site.of("conv_transpose2d") if max(ints(n, 3)) > 1)


@mutant("stride of a transposed convolution")
def _(site: Site) -> bool:
    return any(site.arg(n, 3, [s + 1 for s in ints(n, 3)]) for n in site.of("conv_transpose2d"))


@mutant("border replicated for zero")
def _(site: Site) -> bool:
    return padded(site, lambda x, pads: F.pad(x, pads, mode="replicate"))


@mutant("bias before padding")
def _(site: Site) -> bool:
    """A bias that a padded convolution folded in as if the border had it too."""
    return padded(site, lambda x, pads: F.pad(x, pads, value=0.3))


@mutant("pooling counts the padding")
def _(site: Site) -> bool:
    for node in site.of("avg_pool2d"):
        if max(ints(node, 3) or [0]) > 0:
            return site.arg(node, 5, not (node.args[5] if len(node.args) > 5 else True))
    return False


@mutant("pooling for every other pixel")
def _(site: Site) -> bool:
    for node in site.of("avg_pool2d"):
        return site.before(node, lambda x: x.roll(1, -1))
    return False


@mutant("upsampled by repetition for interpolation")
def _(site: Site) -> bool:
    for node in site.of("upsample_bilinear2d"):
        return site.wrap(lambda y, x: F.interpolate(x, size=y.shape[2:]), node.all_input_nodes[0], node=node)
    return False


@mutant("align_corners")
def _(site: Site) -> bool:
    for node in site.of("upsample_bilinear2d"):
        return site.arg(node, 2, not node.args[2])
    return False


@mutant("slice off by one")
def _(site: Site) -> bool:
    """Of merged siblings: the neighbour's channel."""
    for node in site.of("slice"):
        start, end = ints(node, 2)[0], ints(node, 3)[0]
        if start > 0:
            return site.arg(node, 2, start - 1) and (abs(end) > 2**31 or site.arg(node, 3, end - 1))
    return False


@mutant("branch dropped")
def _(site: Site) -> bool:
    for node in site.of("add"):
        if isinstance(node.args[1], fx.Node):
            return site.wrap(lambda y, x: y - x, node.args[1], node=node)
    return False


@mutant("branch twice")
def _(site: Site) -> bool:
    for node in site.of("add"):
        if isinstance(node.args[1], fx.Node):
            return site.wrap(lambda y, x: y + x, node.args[1], node=node)
    return False


@mutant("subtracted for added")
def _(site: Site) -> bool:
    for node in site.of("add"):
        if isinstance(node.args[1], fx.Node):
            return site.wrap(lambda y, x: y - 2 * x, node.args[1], node=node)
    return False


@mutant("input transposed")
def _(site: Site) -> bool:
    for node in site.of("conv2d", "avg_pool2d"):
        return site.before(node, lambda x: x.flip(2, 3))
    return False


@mutant("input mirrored")
def _(site: Site) -> bool:
    for node in site.of("conv1d", "conv2d", "avg_pool2d", "conv_transpose2d"):
        return site.before(node, lambda x: x.flip(-1))
    return False


@mutant("row and column order of a flatten")
def _(site: Site) -> bool:
    for node in site.of("reshape"):
        if len(node.args[1]) == 2:  # type: ignore[arg-type]
            return site.before(node, lambda x: x.transpose(-1, -2).contiguous().view(x.shape))
    return False


# --- what comes out ---------------------------------------------------------------------------------------------------


def _image(how: Callable[[Tensor], Tensor]) -> Callable[[Site], bool]:
    def only_images(site: Site) -> bool:
        val = site.last.meta.get("val")
        return val is not None and val.dim() == 4 and min(int(s) for s in val.shape[2:]) > 2 and site.wrap(how)

    return only_images


outputs("last channel's sign", lambda y: y * torch.cat([torch.ones(y.shape[1] - 1), -torch.ones(1)]).to(y)[_at(y)])
outputs("samples swapped", lambda y: y.flip(0) if y.shape[0] > 1 else y + 1)
outputs("samples averaged a little", lambda y: y + 1e-6 * y.mean(0, keepdim=True) * (y.shape[0] > 1) + 1e-6 * y)
outputs("rounded to float32", lambda y: y.float().to(y.dtype) if y.dtype == torch.float64 else y)
outputs("rounded to bfloat16", lambda y: y.bfloat16().to(y.dtype))
outputs("rectified", F.relu)
outputs("zero", lambda y: y * 0)
outputs("constant added", lambda y: y + 1e-3)
outputs("transposed in memory", lambda y: y.transpose(-1, -2).reshape(y.shape))
mutant("one border row")(_image(lambda y: entry(y, (slice(None), slice(None), -1), 1 + 1e-6)))
mutant("one border column")(_image(lambda y: entry(y, (..., 0), 1 + 1e-4)))
mutant("one corner")(_image(lambda y: entry(y, (..., 0, 0), 1 + 1e-7)))
mutant("one corner of one channel, at full size")(_image(lambda y: entry(y, (slice(None), -1, -1, -1), 1 + 1e-5)))
mutant("constant along W for one along C")(_image(lambda y: y + 0.01 * torch.arange(y.shape[3]).to(y)))
mutant("shifted by a pixel")(_image(lambda y: y.roll(1, 2)))
mutant("H and W swapped")(_image(lambda y: y.transpose(2, 3)))


def _at(y: Tensor) -> tuple[Any, ...]:
    return (None, slice(None), *(None for _ in range(y.dim() - 2)))
