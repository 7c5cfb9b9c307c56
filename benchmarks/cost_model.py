"""``python -m benchmarks.cost_model``: does the cost model know which of two exact forms is faster?

Each pair is one function written in two ways that fxconv can turn into each other, or must not. Both are priced as
graphs, with the default profile, and timed paired and interleaved on one thread by processor time. A pair counts where
the times differ by more than 10 %; it is right where the cheaper form is the faster one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from fxconv.axes import shape_of
from fxconv.capture import capture
from fxconv.cost import CostModel, Price
from fxconv.lift import Lifter
from fxconv.measure import example_sizes
from fxconv.original import FREE, original_steps
from fxconv.profiles import load_profile
from fxconv.steps import Step
from fxconv.timing import paired
from fxconv.transform import symbol_ranges

Form = Callable[[Tensor], Tensor]


class Fn(nn.Module):
    """A function with modules of its own."""

    def __init__(self, f: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the function gives."""
        return self.f(self, x)


def seconds(model: nn.Module, x: Tensor, profile: str) -> float:
    """The predicted seconds of a module as it is written."""
    captured = capture(model, (x,))
    lifter = Lifter(captured.gm, captured.barriers)
    lifter.run()
    hints = {s: hint for s, (_, _, hint) in symbol_ranges(captured.gm).items()}
    costs = CostModel(load_profile(profile), example_sizes(captured, hints))
    total = Price()
    for node, op in lifter.lifted.ops.items():
        for step in original_steps(lifter, node, op):
            total = total + costs.price(step)
        source = op.inputs[0] if op.inputs else None
        if op.name in FREE and isinstance(source, fx.Node) and _copied(source.meta["val"], node.meta["val"]):
            total = total + costs.price(Step("permute", shape_of(source.meta["val"]), shape_of(node.meta["val"])))
    return total.seconds


def _copied(before: Tensor, after: Tensor) -> bool:
    """Whether a layout operator had to copy: its operand was permuted, and its result is not."""
    return after.is_contiguous() and not before.is_contiguous()


def _c(i: int, o: int, k: int, stride: int = 1, groups: int = 1, padding: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, stride, k // 2 if padding is None else padding, groups=groups)


def pairs() -> Iterator[tuple[str, nn.Module, nn.Module, Tensor]]:
    """What the pair is about, the two forms, and an input."""
    for c, size in ((16, 32), (64, 28), (256, 7)):
        x = torch.randn(1, c, size, size)
        yield f"3x3 then 1x1, or one 3x3; {c} channels, {size}", nn.Sequential(_c(c, c, 3), _c(c, c, 1)), _c(c, c, 3), x
        two = Fn(lambda s, x: s.a(x) + s.b(x), a=_c(c, c, 3), b=_c(c, c, 1))
        yield f"3x3 + 1x1 branches, or one 3x3; {c}, {size}", two, _c(c, c, 3), x
        norm = nn.Sequential(_c(c, c, 3), nn.BatchNorm2d(c))
        yield f"3x3 and BatchNorm, or 3x3; {c}, {size}", norm, _c(c, c, 3), x
    for c, size in ((48, 56), (128, 14)):
        x = torch.randn(1, c, size, size)
        three = Fn(lambda s, x: s.a(x) + s.b(x) + s.n(x), a=_c(c, c, 3, 1, c), b=_c(c, c, 1, 1, c), n=nn.BatchNorm2d(c))
        yield f"depthwise 3x3 + 1x1 + norm, or one depthwise; {c}, {size}", three, _c(c, c, 3, 1, c), x
        apart = nn.Sequential(_c(c, c, 3, 1, c), _c(c, c, 1))
        yield f"depthwise, pointwise, or dense 3x3; {c}, {size}", apart, _c(c, c, 3), x
        chain = nn.Sequential(_c(c, c, 3, 1, c, 0), _c(c, c, 3, 1, c, 0))
        yield f"two depthwise 3x3, or one 5x5; {c}, {size}", chain, _c(c, c, 5, 1, c, 0), x
    for c, wide, size in ((16, 256, 48), (16, 64, 96), (64, 16, 28)):
        x = torch.randn(1, c, size, size)
        block = nn.Sequential(_c(c, wide, 3), _c(wide, c, 1))
        yield f"{c}-{wide}-{c} block, or one 3x3; {size}", block, _c(c, c, 3), x
    for c, size in ((24, 28), (64, 14)):
        x = torch.randn(1, c, size, size)
        yield (
            f"two 3x3, or one 5x5; {c}, {size}",
            nn.Sequential(_c(c, c, 3, padding=0), _c(c, c, 3, padding=0)),
            _c(c, c, 5, padding=0),
            x,
        )
    for c, r, rows in ((512, 8, 1), (512, 8, 64), (256, 256, 1), (384, 1536, 196)):
        x = torch.randn(rows, c)
        low = nn.Sequential(nn.Linear(c, r), nn.Linear(r, c))
        yield f"Linear {c}-{r}-{c}, or {c}-{c}; {rows} rows", low, nn.Linear(c, c), x
    for i, size, o in ((512, 7, 1024), (64, 7, 256), (16, 4, 10)):
        x = torch.randn(1, i, size, size)
        head = nn.Sequential(nn.Flatten(), nn.Linear(i * size * size, o))
        yield f"flatten and Linear, or a full convolution; {i}, {size}, {o}", head, _c(i, o, size, padding=0), x
    for c, size in ((64, 56), (32, 112), (192, 14)):
        x = torch.randn(1, c, size, size)
        tokens = Fn(lambda s, x: s.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous(), fc=nn.Linear(c, c))
        yield f"permute, Linear, permute, or 1x1; {c}, {size}", tokens, _c(c, c, 1), x
    for c, size in ((64, 128), (128, 64), (64, 28), (16, 8)):
        x = torch.randn(1, c, size, size)
        up = nn.Sequential(nn.Upsample(scale_factor=2.0), _c(c, c, 3))
        yield f"nearest and 3x3, or transposed 4x4; {c}, {size}", up, nn.ConvTranspose2d(c, c, 4, 2, 1), x
        late = nn.Sequential(nn.Upsample(scale_factor=2.0), _c(c, c, 1))
        yield (
            f"nearest and 1x1, or 1x1 and nearest; {c}, {size}",
            late,
            nn.Sequential(_c(c, c, 1), nn.Upsample(scale_factor=2.0)),
            x,
        )
    for c, size in ((64, 28), (256, 14)):
        x = torch.randn(1, c, size, size)
        early = nn.Sequential(_c(c, c, 1), nn.AvgPool2d(2))
        yield f"1x1 and pool, or pool and 1x1; {c}, {size}", early, nn.Sequential(nn.AvgPool2d(2), _c(c, c, 1)), x
        mean = Fn(lambda s, x: s.fc(x).mean((2, 3)), fc=_c(c, c, 1))
        yield (
            f"1x1 and mean, or mean and Linear; {c}, {size}",
            mean,
            Fn(lambda s, x: s.fc(x.mean((2, 3))), fc=nn.Linear(c, c)),
            x,
        )
        blur = nn.Sequential(nn.AvgPool2d(2), _c(c, c, 3))
        yield f"pool and 3x3, or 6x6 of stride 2; {c}, {size}", blur, _c(c, c, 6, 2, padding=2), x
    for parts, c, size in ((4, 64, 56), (2, 32, 28)):
        x = torch.randn(1, c, size, size)
        split = Fn(
            lambda s, x, n=parts: torch.cat([getattr(s, f"p{k}")(x) for k in range(n)], 1),
            **{f"p{k}": _c(c, 16, 1) for k in range(parts)},
        )
        yield f"{parts} siblings of 1x1 and cat, or one; {c}, {size}", split, _c(c, 16 * parts, 1), x
        parted = Fn(
            lambda s, x, n=parts: sum(s.get_submodule(f"p{k}")(y) for k, y in enumerate(x.chunk(n, 1))),
            **{f"p{k}": _c(c // parts, c, 1) for k in range(parts)},
        )
        yield f"{parts} slices through 1x1, added, or one 1x1; {c}, {size}", parted, _c(c, c, 1), x
    for rows, c in ((196, 192), (1, 384)):
        x = torch.randn(rows, c)
        three = Fn(
            lambda s, x: torch.cat([s.q(x), s.k(x), s.v(x)], -1),
            q=nn.Linear(c, c),
            k=nn.Linear(c, c),
            v=nn.Linear(c, c),
        )
        yield f"q, k, v apart, or one Linear; {rows}, {c}", three, nn.Linear(c, 3 * c), x
    for c, size in ((64, 56), (512, 7)):
        x = torch.randn(1, c, size, size)
        twice = nn.Sequential(nn.BatchNorm2d(c), nn.BatchNorm2d(c))
        yield f"two norms, or one; {c}, {size}", twice, nn.BatchNorm2d(c), x
        padded = nn.Sequential(nn.ZeroPad2d(1), _c(c, c, 3, 1, c, 0))
        yield f"pad and depthwise, or padded depthwise; {c}, {size}", padded, _c(c, c, 3, 1, c), x
    x = torch.randn(1, 3, 64, 64)
    whole = Fn(lambda s, x: s.c(x).flatten(2).mT, c=_c(3, 256, 8, 8, padding=0))
    yield (
        "patches by reshape and Linear, or a strided convolution",
        Fn(
            lambda s, x: s.fc(x.reshape(1, 3, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(1, 64, 192)),
            fc=nn.Linear(192, 256),
        ),
        whole,
        x,
    )


def main() -> None:
    """Print the table and the share that is right; two to three minutes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_model", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each pair (default: 1)")
    parser.add_argument("--profile", default="default")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, right, counted = [], 0, 0
    for name, a, b, x in pairs():
        a, b = a.eval(), b.eval()
        predicted = seconds(a, x, arguments.profile) / seconds(b, x, arguments.profile)
        t = paired(a, b, (x,), budget_s=arguments.seconds, min_pairs=15, max_pairs=2000, clock=time.process_time)
        differs = not 1 / 1.1 <= t["ratio"] <= 1.1
        good = (predicted > 1) == (t["ratio"] > 1)
        counted += differs
        right += differs and good
        verdict = "" if not differs else "right" if good else "WRONG"
        rows.append([name, f"{predicted:.2f}", f"{t['ratio']:.2f} ({t['low']:.2f} to {t['high']:.2f})", verdict])
    print(tabulate(rows, headers=["pair: first ÷ second", "predicted", "measured", ""], disable_numparse=True))
    share = f"{right} in the right order ({100 * right / counted:.0f} %)"
    print(f"\n{len(rows)} pairs, of which {counted} differ by more than 10 %: {share}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
