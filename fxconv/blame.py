"""Which rewrite is to blame, and a script that shows it."""

from __future__ import annotations

import base64
import io
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn

from fxconv.probe import InputSpec, shapes_at
from fxconv.verify_cluster import Probe

__all__ = ["bisect", "reproduction"]

_PASTE = 4096
"""Entries of weights up to which a script holds them; 4096 in float64 are about 40 KB of text."""

_FILE = 2**27
"""Entries up to which larger ones go to a file: a gigabyte."""

_ROWS = {
    "zero": "{rows} = 0.0",
    "positive": "{rows} += 128.0",
    "negative": "{rows} -= 128.0",
    "mixed": "{rows} += 128.0 * (2.0 * (torch.arange({channels}) % 2) - 1).reshape({along})",
}
"""What a script does to rows of some kinds of probe; what shows on sparser ones shows on Gaussian ones too."""


def bisect(apply: Callable[[frozenset[int]], bool], n: int) -> frozenset[int]:
    """The rewrites, of ``n``, without which the model is right: a set to undo so that ``apply(the others)`` is True.

    ``apply(active)`` says whether the model with only these rewrites passes. One guilty rewrite is found in about
    2·log₂ n calls; g of them, acting alone or together, in about g times as many. Of a set that fails only together the
    last is blamed. Where the model fails without any rewrite none is guilty, and the set is empty.

    Source: Zeller and Hildebrandt, *Simplifying and Isolating Failure-Inducing Input*, 2002 (here the search for the
    element whose addition turns a passing prefix into a failing one, which is what bisection needs to be right for
    faults that need company).
    """
    known: dict[frozenset[int], bool] = {}

    def passes(active: frozenset[int]) -> bool:
        if active not in known:
            known[active] = apply(active)
        return known[active]

    guilty: set[int] = set()
    if n == 0 or not passes(frozenset()):
        return frozenset()
    while True:
        rest = [k for k in range(n) if k not in guilty]
        if passes(frozenset(rest)):
            return frozenset(guilty)
        good, bad = 0, len(rest)  # the first `good` rewrites pass, the first `bad` fail
        while bad - good > 1:
            middle = (good + bad) // 2
            if passes(frozenset(rest[:middle])):
                good = middle
            else:
                bad = middle
        guilty.add(rest[bad - 1])


def reproduction(
    original: fx.GraphModule,
    replacement: fx.GraphModule,
    inputs: Sequence[InputSpec],
    seed: int = 0,
    values: Mapping[sympy.Symbol, int] | None = None,
    probe: Probe | None = None,
) -> str:
    """A Python script that runs both, on inputs like those on which they were found to differ, and prints by how much.

    It needs torch alone. Small weights are in the script, bit for bit; larger ones, which do not fit into a mail, in a
    temporary file that it reads. Beyond `_FILE` entries the original has random weights, and the script transforms it
    anew, which shows the same fault where it does not depend on the weights. ``probe`` says at which sizes they differ
    and on which kinds of inputs; without it the inputs are Gaussian, at ``values`` for the symbols in their shapes.
    """
    size = sum(t.numel() for gm in (original, replacement) for t in _state(gm).values())
    lines = [
        '"""A rewrite that does not compute what it replaced, found by fxconv."""',
        "import base64, io, zlib",
        "import torch",
        "from torch import nn",
        "",
        "",
        "def load(text):",
        "    return torch.load(io.BytesIO(zlib.decompress(base64.b64decode(text))))",
        "",
    ]
    sources: list[str | None] = [None, None]
    if size <= _PASTE:
        sources = [f"load({_text(_state(gm))!r})" for gm in (original, replacement)]
    elif size <= _FILE:
        name = _file([_state(gm) for gm in (original, replacement)])
        lines += [f"WEIGHTS = {name!r}  # {size:,} entries, too many to paste", ""]
        sources = [f"torch.load(WEIGHTS)[{k}]" for k in (0, 1)]
    lines += _module("Original", original, seed, sources[0])
    if sources[1] is not None:
        lines += _module("Replacement", replacement, seed, sources[1])
    lines += ["", f"torch.manual_seed({seed})", "inputs = []"]
    shapes = probe.shapes if probe is not None else shapes_at(inputs, values or {})
    for spec, shape in zip(inputs, shapes, strict=True):
        lines += _input(spec, tuple(shape), probe.kinds if probe is not None else ())
    lines += ["original = Original().double().eval()"]
    if sources[1] is not None:
        lines += ["replacement = Replacement().double().eval()"]
    else:
        lines += [
            f"# The weights ({size:,} entries) are too many to keep: transform the original, with random ones, anew.",
            "# Pass the laws that you passed, if any, as laws=[...].",
            "import fxconv",
            "",
            'replacement = fxconv.transform(original, tuple(inputs), verify="off")',
        ]
    lines += [
        "with torch.no_grad():",
        "    expected, got = original(*inputs), replacement(*inputs)",
        "expected, got = [[y] if isinstance(y, torch.Tensor) else list(y) for y in (expected, got)]",
        "for k, (e, g) in enumerate(zip(expected, got)):",
        "    if e.shape != g.shape:",
        '        print(f"output {k}: shapes {tuple(e.shape)} against {tuple(g.shape)}")',
        "    else:",
        '        print(f"output {k}: relative error {float((e - g).abs().max() / e.abs().max()):.2e}")',
        "",
    ]
    return "\n".join(lines)


def _input(spec: InputSpec, shape: tuple[int, ...], kinds: Sequence[str]) -> list[str]:
    """Lines that make one input, with rows of these kinds as `fxconv.probe.draw` makes them."""
    if spec.kind == "symint":
        return [f"inputs.append({shape[0]})"]
    lines = [f"x = torch.randn({shape}, dtype=torch.float64)"]
    channel = spec.channel_dim
    if channel is None:
        channel = 1 if len(shape) > 2 else len(shape) - 1
    if shape:
        along = [1] * len(shape)
        along[channel] = shape[channel]
        owner = [row * len(kinds) // max(shape[0], 1) for row in range(shape[0])]
        for k, kind in enumerate(kinds):
            if kind in _ROWS and k in owner:
                rows = f"x[{owner.index(k)}:{owner.index(k) + owner.count(k)}]"
                lines.append(_ROWS[kind].format(rows=rows, channels=shape[channel], along=tuple(along)))
    return [*lines, "inputs.append(x)"]


def _file(states: Sequence[dict[str, torch.Tensor]]) -> str:
    """A temporary file with the weights of both sides."""
    with tempfile.NamedTemporaryFile(prefix="fxconv_", suffix=".pt", delete=False) as file:
        torch.save([{k: v.detach().cpu().clone() for k, v in state.items()} for state in states], file)
    return file.name


def _state(gm: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that the graph reads by name, plain tensor attributes included."""
    state = dict(gm.state_dict())
    if isinstance(gm, fx.GraphModule):
        for node in gm.graph.nodes:
            if node.op == "get_attr" and node.target not in state:
                value: Any = gm
                for part in str(node.target).split("."):
                    value = getattr(value, part)
                if isinstance(value, torch.Tensor):
                    state[str(node.target)] = value.detach()
    return state


def _module(name: str, gm: fx.GraphModule, seed: int, source: str | None) -> list[str]:
    """A class with the graph's code and its weights, which the expression ``source`` gives; None: random ones."""
    code = gm.graph.python_code("self")
    lines = [""]
    for alias, value in sorted(code.globals.items()):
        line = _import(alias, value)
        if line:
            lines.append(line)
    modules = {str(n.target): gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"}
    lines += ["", f"class {name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    for path, module in modules.items():
        lines.append(f"        add(self, {path!r}, nn.{module!r})")
    state = _state(gm)
    if source is not None:
        lines.append(f"        state = {source}")
    else:
        lines.append(f"        generator = torch.Generator().manual_seed({seed})")
        lines.append("        state = {}")
        for key, value in state.items():
            lines.append(f"        state[{key!r}] = {_random(value)}")
    lines += ["        for key, value in state.items():", "            add(self, key, value)", ""]
    # fx writes the method at column 0, with imports and wraps before it.
    body = code.src[code.src.index("def forward") :]
    lines += ["    " + line if line else "" for line in body.rstrip().splitlines()]
    helper = [
        "",
        "def add(root, path, value):",
        "    *parents, leaf = path.split('.')",
        "    for part in parents:",
        "        if not hasattr(root, part):",
        "            root.add_module(part, nn.Module())",
        "        root = getattr(root, part)",
        "    if isinstance(value, nn.Module):",
        "        root.add_module(leaf, value)",
        "    elif isinstance(getattr(root, leaf, None), nn.Parameter):",
        "        root._parameters[leaf] = nn.Parameter(value, requires_grad=False)",
        "    else:",
        "        root.register_buffer(leaf, value)",
        "",
    ]
    return [*helper, *lines] if name == "Original" else lines


def _import(alias: str, value: Any) -> str:
    if alias in ("torch", "nn", "base64", "io", "zlib"):
        return ""
    if value is None or isinstance(value, float):
        return f"{alias} = float({str(value)!r})" if isinstance(value, float) else f"{alias} = None"
    if value is type(None):
        return f"{alias} = type(None)"
    module = getattr(value, "__module__", None)
    qualname = getattr(value, "__qualname__", None)
    if isinstance(value, type(torch)):
        return f"import {value.__name__} as {alias}"
    if module and qualname and "." not in qualname:
        return f"from {module} import {qualname} as {alias}"
    return f"# {alias} = {value!r}"


def _text(state: dict[str, torch.Tensor]) -> str:
    buffer = io.BytesIO()
    torch.save({k: v.detach().cpu().clone() for k, v in state.items()}, buffer)
    return base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode()


def _random(value: torch.Tensor) -> str:
    """Code for something like ``value``: a kernel of unit gain, a positive variance, an integer as it is."""
    if not value.dtype.is_floating_point:
        return (
            f"torch.zeros({tuple(value.shape)}, dtype={value.dtype})"
            if value.numel() > 64
            else (f"torch.tensor({value.tolist()}, dtype={value.dtype})")
        )
    draw = f"torch.randn({tuple(value.shape)}, generator=generator, dtype=torch.float64)"
    if value.numel() and float(value.min()) > 0:  # a variance, perhaps
        return f"0.5 + {draw} ** 2"
    fan_in = max(value[0].numel() if value.dim() > 1 else 1, 1)
    return f"{draw} / {fan_in}**0.5" if fan_in > 1 else draw
