"""What a transform did, did not do and proved: plain records that pickle, compare and round-trip through JSON.

The records hold names, numbers and text only, no tensor and no fx node: a report outlives the model that it describes,
and `to_json()` is the certificate that a pipeline archives and `fxconv recheck` reads.

Units throughout: multiply-adds (MACs) and parameters are counts, bytes are bytes moved at the example sizes, launches
are device kernels (one per emitted op that is not a view), seconds are seconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .errors import ArgsError, FxconvError
from .version import __version__

META_KEY = "fxconv"
"""Where a transformed GraphModule keeps its report: `gm.meta[META_KEY]`, the plain dictionary of `Report.to_dict()`."""

_PICKLED = "_fxconv_report"

SCHEMA = 1
"""Version of the JSON form. A report of another schema is refused when read, never half understood."""

REWRITE_STATUS = ("proved", "confirmed", "unverified", "not run", "rolled back")
MODEL_STATUS = ("verified", "failed", "not verifiable", "not run")
REMARK_KINDS = ("missed", "refused", "barrier", "advice")
EXACTNESS = ("exact", "exact to rounding", "approximate")

T = TypeVar("T")


def versions() -> dict[str, str]:
    """The versions that a certificate names: fxconv, torch and Python."""
    return {"fxconv": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def plain(value: Any) -> Any:
    """`value` with tuples as lists, records as dictionaries and tensor scalars as numbers, so that JSON gives back an equal
    object.

    Raises FxconvError where something is neither: a tensor or a node in a report would keep a model alive.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [plain(v) for v in items]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if getattr(value, "is_Integer", False) or getattr(value, "is_Float", False):  # sympy, from symbolic sizes
        return int(value) if value.is_Integer else float(value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return str(value)
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "ndim", None) == 0:
        return plain(item())
    raise FxconvError(
        f"a report holds names, numbers and text, and was given a {type(value).__name__}: convert it with str(), "
        "float() or .tolist() before it goes into a verdict or a remark"
    )


@dataclass(frozen=True)
class Cost:
    """What running something once costs, at the example sizes."""

    macs: int = 0
    """Multiply-adds."""
    params: int = 0
    """Elements of the distinct parameters and constants read."""
    launches: int = 0
    """Device kernels started; views are free."""
    bytes: int = 0
    """Bytes read and written, weights included."""
    seconds: float = 0.0
    """Predicted by the cost model's device profile, not measured."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass(frozen=True)
class Capture:
    """How the model became a graph."""

    how: str = ""
    """"export", "symbolic", "given" (a GraphModule or ExportedProgram went in) or "parts" (child by child)."""
    notes: tuple[str, ...] = ()
    """Warnings that the user should read: a bare squeeze(), what stayed opaque and why, why export failed."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Rewrite:
    """One cluster of nodes that was replaced (or was, until verification took it back).

    verdict: a mapping with
        status     "proved" | "confirmed" | "unverified" (nothing could be compared) | "not run" | "rolled back"
        probes     list of {"kind", "count", "seed", ...} or a count
        seeds      list of ints
        max_error  relative error found, float64 weights against float64 original
        tolerance  what accumulated rounding allows
        reason     why it was rolled back or not run; "" otherwise
    Other keys are kept as they are.
    """

    name: str
    """Name of the (last) node that now produces the value."""
    nodes: tuple[str, ...]
    """Names of the nodes replaced, in graph order."""
    new_nodes: tuple[str, ...]
    """Names of the nodes put in their place."""
    laws: tuple[str, ...]
    """The chain of laws, in the order in which they were used."""
    before: Cost = Cost()
    after: Cost = Cost()
    verdict: Mapping[str, Any] = field(default_factory=lambda: {"status": "not run"})
    where: str = ""
    """Qualified name of the innermost module that holds every replaced node, "" when unknown."""
    exactness: str = "exact"
    """"exact", "exact to rounding" (a structure within half an ulp per weight) or "approximate"."""

    def __post_init__(self) -> None:
        _one_of("a rewrite's status", self.verdict.get("status"), REWRITE_STATUS)
        _one_of("a rewrite's exactness", self.exactness, EXACTNESS)
        for name in ("nodes", "new_nodes", "laws"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "verdict", plain(self.verdict))

    @property
    def status(self) -> str:
        """The verdict, one of `REWRITE_STATUS`."""
        return str(self.verdict["status"])

    @property
    def applied(self) -> bool:
        """True unless verification took the rewrite back."""
        return self.status != "rolled back"


@dataclass(frozen=True)
class Remark:
    """Something that was not done, or that the user should know, with the reason and the offending value in it."""

    kind: str
    """"missed" (legal, and does not pay), "refused" (not legal), "barrier" (not affine, opaque) or "advice"."""
    where: str
    """Name of the node that it is about."""
    law: str = ""
    """Name of the law that would have fired; "" for barriers and advice."""
    reason: str = ""
    would_fire_if: str = ""
    """What would have to be different, "" where nothing sensible would."""

    def __post_init__(self) -> None:
        _one_of("a remark's kind", self.kind, REMARK_KINDS)


@dataclass(frozen=True)
class Report:
    """The whole story of one transform; see the module's docstring for the units.

    verification: `ModelVerdict.to_dict()`, or {"status": "not run", "reason": ...}; read here are
        status          "verified" | "failed" | "not verifiable" | "not run"
        error           largest error of the result in its own dtype, relative to the original in float64
        original_error  the same of the original in its own dtype
        float64_error   the same of the result in float64
        factor          how many times `original_error` is allowed
        dtype           the model's dtype, for instance "float32"
        outputs         one entry per output that was compared; without any, the errors mean nothing
        batches, seeds  lists
        notes           what the user may want to know
        reason          why it failed, cannot be verified (the op that is random) or was not run
    measured: {} or a mapping with before_s, after_s (medians), ratio (before ÷ after), low, high (95 % interval of
    the ratio), pairs, threads.
    hashes: {"before": ..., "after": ...}, SHA-256 over names, dtypes, shapes and bytes of all weights.
    """

    model: str
    objective: str = "latency"
    target: str | None = None
    capture: Capture = Capture()
    rewrites: tuple[Rewrite, ...] = ()
    missed: tuple[Remark, ...] = ()
    """Remarks of kind "missed" and "refused"."""
    advice: tuple[Remark, ...] = ()
    barriers: Mapping[str, int] = field(default_factory=dict)
    """Reason → how many nodes it made opaque."""
    cost_before: Cost = Cost()
    cost_after: Cost = Cost()
    verification: Mapping[str, Any] = field(default_factory=lambda: {"status": "not run"})
    timings: Mapping[str, float] = field(default_factory=dict)
    """Stage → seconds that fxconv itself took."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)
    hashes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("the model's status", self.verification.get("status"), MODEL_STATUS)
        for name in ("rewrites", "missed", "advice"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("barriers", "verification", "timings", "measured", "versions", "hashes"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    @property
    def applied(self) -> tuple[Rewrite, ...]:
        """The rewrites that are in the result."""
        return tuple(r for r in self.rewrites if r.applied)

    @property
    def rolled_back(self) -> tuple[Rewrite, ...]:
        """The rewrites that verification took back."""
        return tuple(r for r in self.rewrites if not r.applied)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What capture found that the user should read."""
        return self.capture.notes

    @property
    def verified(self) -> bool:
        """True when the whole model was compared with the original and every rewrite in it was proved or confirmed."""
        return self.verification["status"] == "verified" and all(r.status in ("proved", "confirmed") for r in self.applied)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary (str, numbers, lists, dicts) that `from_dict` turns back into an equal report."""
        return {"schema": SCHEMA, **plain(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote. Raises FxconvError for anything else, naming what is wrong."""
        schema = data.get("schema")
        if schema != SCHEMA:
            raise FxconvError(
                f"this is not a report that fxconv {__version__} can read: schema {schema!r}, expected {SCHEMA}. "
                "Write it again with `fxconv transform … --report FILE.json`."
            )
        d = {k: v for k, v in data.items() if k != "schema"}
        d["capture"] = _build(Capture, d.get("capture", {}), notes=tuple)
        d["rewrites"] = tuple(
            _build(Rewrite, r, before=_cost, after=_cost, nodes=tuple, new_nodes=tuple, laws=tuple) for r in d.get("rewrites", ())
        )
        for name in ("missed", "advice"):
            d[name] = tuple(_build(Remark, r) for r in d.get(name, ()))
        for name in ("cost_before", "cost_after"):
            d[name] = _cost(d.get(name, {}))
        return _build(cls, d)

    def to_json(self, indent: int | None = 2) -> str:
        """The certificate, as strict JSON: infinities and NaN are written as {"float": "inf"}."""
        return json.dumps(_encode(self.to_dict()), indent=indent, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote. Raises FxconvError where the text is not one."""
        try:
            data = json.loads(text, object_hook=_decode)
        except json.JSONDecodeError as error:
            raise FxconvError(f"not JSON: {error}. Expected what `fxconv transform … --report FILE` wrote.") from error
        if not isinstance(data, dict):
            raise FxconvError(f"not a report: the JSON holds a {type(data).__name__}, expected an object")
        return cls.from_dict(data)

    def to_table(self, verbose: bool = False) -> str:
        """The report for a terminal: like rewrites and like remarks are counted together unless `verbose`."""
        from .render import to_table  # rendering needs these records, so it cannot be imported above

        return to_table(self, verbose=verbose)

    def to_html(self) -> str:
        """The whole report as one self-contained page."""
        from .render import to_html

        return to_html(self)

    def __str__(self) -> str:
        return self.to_table()


def attach(result: T, report: Report) -> T:
    """Store `report` in `result` so that it survives deepcopy and pickling, and return `result`.

    In `meta["fxconv"]` of a GraphModule, of a Module (which gets a `meta`), or of an ExportedProgram's graph module.
    Where the name is free, `result.report` is set as well. torch.export.save drops both: put `to_json()` into its
    `extra_files`, as the command line does.
    """
    holder = _holder(result)
    meta = getattr(holder, "meta", None)
    if not isinstance(meta, dict):
        meta = {}
        holder.meta = meta
    meta[META_KEY] = report.to_dict()
    if isinstance(holder, torch.nn.Module):
        # GraphModule.__reduce__ forgets the meta and keeps plain attributes; its __deepcopy__ does the opposite.
        holder.__dict__[_PICKLED] = meta[META_KEY]
    if isinstance(getattr(result, "report", report), Report):
        result.report = report  # type: ignore[attr-defined]
        if isinstance(result, torch.fx.GraphModule):
            meta.setdefault("_user_preserved_attributes", {})["report"] = report  # __deepcopy__ sets these
    return result


def read(result: Any) -> Report:
    """The report that a transformed model, program or (already) report carries.

    Raises ArgsError when there is none, saying where reports come from.
    """
    if isinstance(result, Report):
        return result
    holder = _holder(result)
    meta = getattr(holder, "meta", None)
    data = meta.get(META_KEY) if isinstance(meta, dict) else None
    if data is None:
        data = getattr(holder, "__dict__", {}).get(_PICKLED)
    if data is None:
        raise ArgsError(
            f"this {type(result).__name__} carries no fxconv report: give what fxconv.transform returned, or "
            "call fxconv.explain(model, args) on the original"
        )
    return Report.from_dict(data)


def _holder(result: Any) -> Any:
    return result.graph_module if isinstance(result, torch.export.ExportedProgram) else result


def _one_of(what: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise FxconvError(f"{what} is {value!r}, expected one of: {', '.join(known)}")


def _cost(data: Mapping[str, Any]) -> Cost:
    return _build(Cost, data)


def _build(cls: type[T], data: Mapping[str, Any], **convert: Any) -> T:
    """`cls(**data)` with some fields converted; unknown keys are an error, since they would be lost silently."""
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        raise FxconvError(f"not a report of this version: {cls.__name__} has no {', '.join(unknown)}")
    try:
        return cls(**{k: convert[k](v) if k in convert else v for k, v in data.items()})
    except TypeError as error:
        raise FxconvError(f"not a report of this version: {error}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {k: _encode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    return value


def _decode(data: dict[str, Any]) -> Any:
    return float(data["float"]) if set(data) == {"float"} else data
