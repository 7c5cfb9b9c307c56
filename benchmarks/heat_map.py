"""A heat map by dense prediction: `fxconv.densify` turns a digit classifier into a detector.

    python benchmarks/heat_map.py [--out heat_map.png]
    python benchmarks/heat_map.py --torchvision vgg11      # how far padding moves interior windows

A small unpadded CNN learns scikit-learn's 8×8 digits (seconds), is densified, and scores a large canvas of scattered
digits in one pass. The picture shows the canvas and the score of one digit over it; the times compare the pass with
running the original on every window.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

import fxconv
from fxconv.densify import window_scores


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def train(epochs: int = 40) -> nn.Module:
    torch.manual_seed(0)
    x, y = digits()
    # The eleventh class is background: empty windows and digits cut by the window's edge.
    shifted = torch.stack(
        [torch.roll(a, (int(s), int(t)), (1, 2)) for a, s, t in zip(x, *torch.randint(3, 6, (2, len(x))), strict=True)]
    )
    x, y = torch.cat([x, shifted, torch.zeros(200, 1, 8, 8)]), torch.cat([y, torch.full((len(x) + 200,), 10)])
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 16, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 11), nn.Softmax(1),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(256):
            loss = F.nll_loss(model(x[batch]).clamp_min(1e-9).log(), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def canvas(size: int = 96, count: int = 24) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Digits scattered over an empty image, and where: (row, column, label)."""
    torch.manual_seed(1)
    x, y = digits()
    image, placed = torch.zeros(1, 1, size, size), []
    cells = torch.randperm((size // 16) ** 2)[:count].tolist()
    for cell in cells:
        row, column = (
            16 * (cell // (size // 16)) + int(torch.randint(9, ())),
            16 * (cell % (size // 16)) + int(torch.randint(9, ())),
        )
        pick = int(torch.randint(len(x), ()))
        image[0, 0, row : row + 8, column : column + 8] = x[pick, 0]
        placed.append((row, column, int(y[pick])))
    return image, placed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="heat_map.png")
    parser.add_argument("--torchvision", metavar="NAME", help="measure what padding does to a torchvision classifier")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.torchvision:
        import torchvision

        model = getattr(torchvision.models, arguments.torchvision)(weights=None).eval()
        print(fxconv.report(fxconv.densify(model, torch.randn(1, 3, 224, 224))).to_table())
        return
    model = train()
    dense = fxconv.densify(model, torch.zeros(1, 1, 8, 8))
    image, placed = canvas()
    with torch.no_grad():
        dense(image)
        clock = time.perf_counter()
        scores = dense(image)
        one_pass = time.perf_counter() - clock
        clock = time.perf_counter()
        expected = window_scores(model, image, dense.window, dense.window_stride)
        by_window = time.perf_counter() - clock
    found = sum(int(scores[0, :10, r, c].argmax()) == label for r, c, label in placed)
    print(f"largest difference to running every window: {float((scores - expected).abs().max()):.1e}")
    print(
        f"{scores[0, 0].numel()} windows: {by_window * 1e3:.0f} ms one by one, {one_pass * 1e3:.1f} ms in one pass "
        f"({by_window / one_pass:.0f}×)"
    )
    print(f"{found} of {len(placed)} digits recognised where they lie")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    label = placed[0][2]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.4), constrained_layout=True)
    axes[0].imshow(image[0, 0], cmap="gray_r")
    axes[0].set_title("image")
    heat = axes[1].imshow(1 - scores[0, 10], cmap="magma", vmin=0, vmax=1)
    axes[1].set_title("score of any digit")
    axes[2].imshow(scores[0, label], cmap="magma", vmin=0, vmax=1)
    axes[2].set_title(f"score of “{label}”; circles: where one lies")
    for row, column, kind in placed:
        if kind == label:
            axes[2].add_patch(pyplot.Circle((column, row), 4, fill=False, color="c"))
    figure.colorbar(heat, ax=axes)
    figure.savefig(arguments.out, dpi=110)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
