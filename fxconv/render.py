"""A report as text for a terminal, and as a self-contained HTML page."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from .report import REWRITE_STATUS, Cost, Remark, Report, Rewrite

GROUPS = 12
"""How many groups of rewrites, and of remarks, the compact table shows."""

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float) -> str:
    """A count in three significant digits: 950, 12.3 k, 1.20 M, 2.83 G."""
    sign, value = ("-" if value < 0 else ""), abs(value)
    for size, prefix in _PREFIXES:
        if value >= 0.9995 * size:
            return f"{sign}{_three(value / size)} {prefix}"
    return f"{sign}{value:.0f}" if float(value).is_integer() else f"{sign}{_three(value)}"


def _three(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def seconds(value: float) -> str:
    """A duration in three significant digits: 41.2 ms, 3.04 s, 250 us."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(value) >= 0.9995 * size:
            return f"{_three(value / size)} {unit}"
    return "0 s" if value == 0 else f"{value * 1e9:.0f} ns"


def change(before: float, after: float) -> str:
    """The relative change in per cent: "-3.1 %", "0 %" when nothing changed."""
    if before == after:
        return "0 %"
    if before == 0:
        return "new"
    percent = 100.0 * (after - before) / before
    return f"{percent:+.1f} %" if abs(percent) >= 0.05 else f"{percent:+.1g} %"


def error(value: Any) -> str:
    """An error in two digits: 3.1e-07; "" when none was measured."""
    return "" if value is None else f"{float(value):.1e}" if value else "0"


def to_table(report: Report, verbose: bool = False) -> str:
    """The report for a terminal. `verbose` shows every rewrite and every remark on a line of its own."""
    parts = [_headline(report)]
    parts += [f"note: {note}" for note in report.capture.notes]
    parts.append(_section("rewrites", len(report.applied), _rewrites(report.applied, verbose)))
    parts += _rolled_back(report.rolled_back, verbose)
    # Barriers are counted by reason below; one by one they only tell where.
    missed = [r for r in report.missed if verbose or r.kind != "barrier"]
    parts.append(_section("not rewritten", len(missed), _remarks(missed, verbose)))
    if report.barriers:
        parts.append(_barriers(report, verbose))
    parts += [f"advice: {r.where}: {r.reason}" if r.where else f"advice: {r.reason}" for r in report.advice]
    parts.append(_pareto(report, verbose))
    parts.append(_costs(report))
    parts.append(verdict(report))
    if verbose and report.timings:
        parts.append("fxconv took " + ", ".join(f"{k} {seconds(v)}" for k, v in report.timings.items()))
    return "\n\n".join(p for p in parts if p)


_PARETO = ["layer", "fit", "multiply-adds", "parameters", "error", ""]


def _pareto_rows(report: Report) -> list[list[str]]:
    """What `approximate` fitted to each layer and nothing cheaper beats, cheapest first."""
    return [
        [
            str(r["layer"]),
            f"{r['family']}, {r['detail']}",
            f"{number(r['macs'])} of {number(r['macs_before'])}",
            f"{number(r['params'])} of {number(r['params_before'])}",
            error(r["error"]),
            "taken" if r["chosen"] else "",
        ]
        for r in report.verification.get("pareto", ())
    ]


def _pareto(report: Report, verbose: bool) -> str:
    rows = _pareto_rows(report)
    if not rows:
        return ""
    text = tabulate(rows[: None if verbose else GROUPS], headers=_PARETO, disable_numparse=True)
    more = len(rows) - GROUPS
    hidden = f"\n… and {more} more (--verbose shows every one)" if more > 0 and not verbose else ""
    return _section("fits that nothing cheaper beats (error of the layer's output)", len(rows), text + hidden)


def verdict(report: Report) -> str:
    """The whole-model verification, and how many rewrites were proved, confirmed, taken back."""
    counts = [(sum(r.status == status for r in report.rewrites), status) for status in REWRITE_STATUS]
    said = ", ".join(f"{n} {status}" for n, status in counts if n)
    return verification(report.verification) + (f"\nrewrites: {said}" if said else "")


def verification(v: Mapping[str, Any]) -> str:
    """`Report.verification` in words, the status first."""
    text = str(v["status"]) + (f": {v['reason']}" if v.get("reason") else "")
    if v.get("outputs"):
        text += (
            f"\nlargest relative error against the original in float64: {error(v['error'])} in {v['dtype']} "
            f"(the original's own: {error(v['original_error'])}; allowed: {float(v['factor']):g} times that)"
            f", {error(v['float64_error'])} in float64; at batch {' and '.join(map(str, v['batches']))}"
        )
    return "\n".join([text, *(f"note: {note}" for note in v.get("notes", ()))])


def _headline(report: Report) -> str:
    how = f", captured by {report.capture.how}" if report.capture.how else ""
    target = f", target {report.target}" if report.target else ""
    return f"{report.model}: objective {report.objective}{target}{how}"


def _section(title: str, count: int, body: str) -> str:
    return f"{title}: {count}" + (f"\n{body}" if body else "")


def _costs(report: Report) -> str:
    b, a = report.cost_before, report.cost_after
    rows = [
        [label, number(x), number(y), change(x, y)]
        for label, x, y in (
            ("multiply-adds", b.macs, a.macs),
            ("parameters", b.params, a.params),
            ("launches", b.launches, a.launches),
            ("bytes moved", b.bytes, a.bytes),
        )
        if x or y or label != "bytes moved"
    ]
    if b.seconds or a.seconds:  # `approximate` predicts none
        rows.append(["predicted time", seconds(b.seconds), seconds(a.seconds), change(b.seconds, a.seconds)])
    m = report.measured
    if m:
        rows.append(["measured time", seconds(m["before_s"]), seconds(m["after_s"]), _speed(m)])
    return tabulate(rows, headers=["", "before", "after", "change"], disable_numparse=True, colalign=_align(4))


def _speed(m: Mapping[str, Any]) -> str:
    """The measured ratio with its interval; no direction is claimed where the interval holds 1."""
    if m["low"] > 1:
        return f"{m['ratio']:.2f} times faster ({m['low']:.2f} to {m['high']:.2f})"
    if m["high"] < 1:
        return f"{1 / m['ratio']:.2f} times slower ({1 / m['high']:.2f} to {1 / m['low']:.2f})"
    return f"no difference seen ({m['low']:.2f} to {m['high']:.2f} times faster)"


def _align(columns: int) -> tuple[str, ...]:
    return ("left",) + ("right",) * (columns - 1)


def _rewrites(rewrites: Sequence[Rewrite], verbose: bool) -> str:
    groups: dict[Any, list[Rewrite]] = {}
    for i, r in enumerate(rewrites):
        key = i if verbose else (_digitless(r.where or r.name), r.laws, r.status, r.exactness, len(r.nodes))
        groups.setdefault(key, []).append(r)
    ordered = list(groups.values()) if verbose else sorted(groups.values(), key=lambda g: -_gain(g))
    rows = []
    for group in ordered[: None if verbose else GROUPS]:
        before, after = _total(r.before for r in group), _total(r.after for r in group)
        first = group[0]
        status = first.status if first.exactness == "exact" else f"{first.status}, {first.exactness}"
        worst = max((r.verdict["max_error"] for r in group if r.verdict.get("max_error") is not None), default=None)
        rows.append(
            [
                len(group),
                _names([r.where or r.name for r in group]),
                " > ".join(first.laws) + (" (" + " + ".join(first.nodes) + ")" if verbose else ""),
                f"{number(before.macs)} -> {number(after.macs)}",
                f"{before.launches} -> {after.launches}",
                status,
                error(worst),
            ]
        )
    headers = ["", "where", "laws", "multiply-adds", "launches", "verdict", "error"]
    return _grid(rows, headers, len(ordered) - len(rows))


def _gain(group: Sequence[Rewrite]) -> float:
    return sum(r.before.seconds - r.after.seconds for r in group) + 1e-12 * len(group)


def _total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def _remarks(remarks: Sequence[Remark], verbose: bool) -> str:
    groups: dict[Any, list[Remark]] = {}
    for i, r in enumerate(remarks):
        key = i if verbose else (r.kind, r.law, _digitless(r.reason))
        groups.setdefault(key, []).append(r)
    ordered = list(groups.values()) if verbose else sorted(groups.values(), key=lambda g: -len(g))
    rows = []
    for group in ordered[: None if verbose else GROUPS]:
        first = group[0]
        # The numbers in a group may differ: say so, and quote the first one's.
        same = all(r.reason == first.reason for r in group)
        reason = first.reason if same else f"for instance {first.where}: {first.reason}"
        row = [len(group), first.kind, first.law, reason, _names([r.where for r in group])]
        rows.append([*row, first.would_fire_if] if verbose else row)
    headers = ["", "kind", "law", "reason", "where"] + (["would fire if"] if verbose else [])
    return _grid(rows, headers, len(ordered) - len(rows))


def _rolled_back(rewrites: Sequence[Rewrite], verbose: bool) -> list[str]:
    """One paragraph each, never grouped: each is a rewrite that would have been wrong."""
    lines = [
        f"rolled back: {r.where or r.name} ({' > '.join(r.laws)}): {r.verdict.get('reason') or 'not confirmed'}" for r in rewrites
    ]
    if verbose or len(lines) <= GROUPS:
        return lines
    return [*lines[:GROUPS], f"… and {len(lines) - GROUPS} more rolled back (--verbose shows every one)"]


def _barriers(report: Report, verbose: bool) -> str:
    items = sorted(report.barriers.items(), key=lambda item: -item[1])
    shown = items if verbose else items[:GROUPS]
    more = f", and {len(items) - len(shown)} other reasons" if len(shown) < len(items) else ""
    return f"barriers: {sum(report.barriers.values())} ({', '.join(f'{n} {reason}' for reason, n in shown)}{more})"


def _grid(rows: Sequence[Sequence[object]], headers: Sequence[str], hidden: int) -> str:
    if not rows:
        return ""
    widths = [5, 46, 46, 22, 12, 24, 10] if len(headers) == 7 else [5, 10, 22, 70, 46, 40][: len(headers)]
    text = tabulate(
        [[str(c) for c in row] for row in rows],
        headers=headers,
        disable_numparse=True,
        maxcolwidths=widths,
        colalign=("right",) + ("left",) * (len(headers) - 1),
    )
    return text + (f"\n… and {hidden} more kinds (--verbose shows every one)" if hidden > 0 else "")


def _digitless(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "*", text)


def _names(names: Sequence[str], shown: int = 2) -> str:
    """Up to two names as they are; more as patterns: "features.denseblock*.denselayer*.conv*"."""
    distinct = list(dict.fromkeys(n for n in names if n))
    if len(distinct) > shown:
        distinct = list(dict.fromkeys(re.sub(r"\d+", "*", n) for n in distinct))
    return ", ".join(distinct[:shown]) + (", …" if len(distinct) > shown else "")


_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } th, td { padding: .2rem .7rem; text-align: left;
vertical-align: top; border-bottom: 1px solid #ddd; } th { background: #f4f4f4; } code { font-size: 90%; }
.verified { color: #0a6b2d; } .failed { color: #a40000; } h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; }
"""


def to_html(report: Report) -> str:
    """The whole report as one self-contained page: every rewrite, every remark, the verification and the versions."""
    status = str(report.verification["status"])
    body = [
        f"<h1>{html.escape(_headline(report))}</h1>",
        f'<p class="{"verified" if report.verified else "failed"}"><strong>{html.escape(status)}</strong></p>',
        f"<pre>{html.escape(verdict(report))}</pre>",
        f"<pre>{html.escape(_costs(report))}</pre>",
    ]
    if report.capture.notes:
        items = "".join(f"<li>{html.escape(n)}</li>" for n in report.capture.notes)
        body.append(f"<h2>Notes</h2><ul>{items}</ul>")
    body.append(
        _html_table(
            "Rewrites",
            ["name", "module", "replaced", "laws", "MACs", "launches", "verdict", "error", "allowed", "reason"],
            [
                [
                    r.name,
                    r.where,
                    ", ".join(r.nodes),
                    " > ".join(r.laws),
                    f"{number(r.before.macs)} -> {number(r.after.macs)}",
                    f"{r.before.launches} -> {r.after.launches}",
                    f"{r.status} ({r.exactness})",
                    error(r.verdict.get("max_error")),
                    error(r.verdict.get("tolerance")),
                    r.verdict.get("reason", ""),
                ]
                for r in report.rewrites
            ],
        )
    )
    body.append(_html_table("Fits that nothing cheaper beats", _PARETO, _pareto_rows(report)))
    headers = ["kind", "where", "law", "reason", "would fire if"]
    body.append(_html_table("Not rewritten", headers, [list(dataclasses.astuple(r)) for r in report.missed]))
    body.append(_html_table("Advice", headers, [list(dataclasses.astuple(r)) for r in report.advice]))
    body.append(_html_table("Barriers", ["nodes", "reason"], [[n, reason] for reason, n in report.barriers.items()]))
    facts = [[k, v] for d in (report.versions, report.hashes) for k, v in d.items()]
    facts += [[f"{k} took", seconds(v)] for k, v in report.timings.items()]
    body.append(_html_table("Versions, hashes and times", ["", ""], facts))
    title = html.escape(report.model)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>fxconv: {title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(b for b in body if b) + "\n</body></html>\n"
    )


def _html_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    cells = [[str(c) for c in row] for row in rows]
    table = tabulate(cells, headers=headers, tablefmt="html", disable_numparse=True)
    return f"<h2>{html.escape(title)} ({len(rows)})</h2>\n{table}"
