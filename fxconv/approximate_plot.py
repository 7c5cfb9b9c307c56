"""The Pareto table of `fxconv.approximate` as a picture: error against multiply-adds, one colour per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxconv.errors import FxconvError
from fxconv.report import read

_MARKS = {"low rank": "o", "blocks": "s", "toeplitz": "^", "filters": "D", "small kernel": "v"}


def plot(result: Any, path: str | Path, *, objective: str = "macs") -> None:
    """Write the picture (the suffix says which format).

    Args:
        result: what `fxconv.approximate` returned, or its report.
        path: the file.
        objective: "macs" or "params", the axis to the right.

    Raises:
        FxconvError: matplotlib is not installed, there is no table, or the file cannot be written.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise FxconvError("a plot needs matplotlib: pip install 'fxconv[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    report = read(result)
    rows = report.verification.get("pareto") or []
    if not rows:
        raise FxconvError("there is nothing to plot: no layer had a cheaper fit, see the report's remarks")
    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for i, layer in enumerate(dict.fromkeys(r["layer"] for r in rows)):
        mine = [r for r in rows if r["layer"] == layer]
        colour = f"C{i % 10}"
        share = [r[objective] / r[f"{objective}_before"] for r in mine]
        axes.plot(share, [max(r["error"], 1e-16) for r in mine], color=colour, alpha=0.4, lw=1)
        for r, s in zip(mine, share, strict=True):
            edge = {"edgecolors": "k", "linewidths": 1.5, "s": 90} if r["chosen"] else {"s": 25}
            axes.scatter(s, max(r["error"], 1e-16), color=colour, marker=_MARKS.get(r["family"], "x"), zorder=3, **edge)
        axes.plot([], [], color=colour, label=layer)
    for family in dict.fromkeys(r["family"] for r in rows):
        axes.scatter([], [], color="grey", marker=_MARKS.get(family, "x"), label=family)
    what = {"macs": "multiply-adds", "params": "parameters"}[objective]
    axes.set(yscale="log", xlabel=f"{what}, of the layer's", ylabel="error of the layer's output (held-out data)")
    axes.set_title(f"{report.model}: {report.verification['reason']}", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise FxconvError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        pyplot.close(figure)
