"""Is a Linear layer with more than one output hard, or dear, to turn into a convolution? The numbers in README.

    python -m benchmarks.linear_as_conv

Linear(I, O) on the last axis and Conv1d(1, O, I) on the same axis have the same weights, reshaped, and the same number
of multiply-adds. What differs is the kernel that the library picks; this measures it, paired and interleaved.
"""

from __future__ import annotations

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fxconv.timing import paired


def _pair(linear: nn.Linear, conv: nn.Module) -> nn.Module:
    with torch.no_grad():
        conv.get_parameter("weight").copy_(linear.weight.reshape(conv.get_parameter("weight").shape))
        conv.get_parameter("bias").copy_(linear.bias)
    return conv


def _row(name: str, linear: nn.Linear, conv: nn.Module, x: Tensor, shaped: Tensor) -> list[str]:
    _pair(linear, conv)
    with torch.no_grad():
        difference = (linear.double()(x.double()) - conv.double()(shaped.double()).flatten(1)).abs().max().item()
    linear.float(), conv.float()
    t = paired(lambda a, _: linear(a), lambda _, b: conv(b), (x, shaped), budget_s=1.0, max_pairs=2000)
    return [
        name,
        str(len(x)),
        f"{difference:.0e}",
        f"{t['before_s'] * 1e6:.0f}",
        f"{t['after_s'] * 1e6:.0f}",
        f"{1 / t['ratio']:.2f} ({1 / t['high']:.2f} to {1 / t['low']:.2f})",
    ]


def main() -> None:
    """Print the table; about 15 seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for batch in (1, 64):
        for outputs in (1, 10, 100):
            x = torch.randn(batch, 100)
            name = f"Linear(100, {outputs}) as Conv1d(1, {outputs}, 100)"
            rows.append(_row(name, nn.Linear(100, outputs), nn.Conv1d(1, outputs, 100), x, x[:, None]))
        x = torch.randn(batch, 784)
        conv = nn.Conv1d(1, 10, 784)
        rows.append(_row("Linear(784, 10) as Conv1d(1, 10, 784)", nn.Linear(784, 10), conv, x, x[:, None]))
        image = x.view(batch, 1, 28, 28)
        rows.append(_row("Linear(784, 10) as Conv2d(1, 10, 28)", nn.Linear(784, 10), nn.Conv2d(1, 10, 28), x, image))
    headers = ["", "batch", "difference (float64)", "Linear, us", "conv, us", "conv ÷ Linear (95 %)"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
