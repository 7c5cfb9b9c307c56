"""`Options`: everything that `fxconv.transform` can be told, in one frozen record, for pipelines and config files.

```toml
[tool.fxconv]
objective = "macs"
deny = ["head.*"]                                  # leave these modules alone
deny_laws = ["merge_siblings"]
dynamic_shapes = { x = { 0 = "batch", 2 = "auto", 3 = "auto" } }
```

`Options(**keywords)`, `Options.from_mapping(…)` and `Options.from_toml(path)` check alike: an unknown key or value is
an `OptionError` that names the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import OptionError

OBJECTIVES = ("latency", "macs", "params", "launches")
TARGETS = ("conv", "conv2d", "linear")
VERIFY = ("rollback", "raise", "off")
CAPTURE = ("auto", "export", "symbolic")
CHECK = ("version", "hash")

_DIMS = {"auto": "AUTO", "dynamic": "DYNAMIC", "static": "STATIC"}


def nearest(value: object, known: Iterable[str]) -> str:
    """A sentence that lists the known names, the nearest first where one is near: "did you mean 'macs'? Known: …"."""
    names = list(known)
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(value).lower(), by_lower, n=1, cutoff=0.5)
    hint = f"did you mean {by_lower[close[0]]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"


@dataclass(frozen=True)
class Options:
    """What `fxconv.transform` may and shall do. Immutable; `options.replace(verify="raise")` gives a changed copy.

    Raises OptionError for a key that does not exist, a value of the wrong type and a value that is not known.
    """

    objective: str = "latency"
    """What is minimised: "latency" (predicted seconds), "macs", "params" or "launches"."""
    target: str | None = None
    """What may be emitted: None (anything), "conv" (no Linear), "conv2d" (nor Conv1d) or "linear"."""
    verify: str = "rollback"
    """What happens to a rewrite that verification does not confirm: "rollback", "raise", or "off" (nothing is run)."""
    capture: str = "auto"
    """How a module becomes a graph: "export", "symbolic", or "auto" (export where there are inputs)."""
    strict: bool = False
    """Raise instead of settling for less: CaptureError where only parts could be captured, VerificationError where the
    result is not verified."""
    measure: bool = False
    """Time candidates on this machine and keep a rewrite only if it wins."""
    profile: str = "default"
    """Device profile of the cost model: "default", "local" (measured by `fxconv calibrate`) or a shipped one's name."""
    trainable: bool = False
    """Only rewrites through which a checkpoint of the original can be loaded and trained on (Linear ⇄ Conv)."""
    seed: int = 0
    """Seeds every random probe: the same options on the same model give the same certificate."""
    check: str = "version"
    """How `fxconv.backend` notices changed weights: "version" (identity and version counter) or "hash" (also writes
    through `.data`, at the price of hashing all weights)."""
    allow: tuple[str, ...] = ()
    """Module name patterns ("features.*"); only nodes inside are rewritten. Empty: all."""
    deny: tuple[str, ...] = ()
    """Module name patterns that are left alone; wins over `allow`."""
    allow_laws: tuple[str, ...] = ()
    """Names of the laws that may be used. Empty: all."""
    deny_laws: tuple[str, ...] = ()
    """Names of laws that may not be used; wins over `allow_laws`."""
    laws: tuple[Any, ...] | None = None
    """Law objects to use in place of the built-in ones, as `transform(laws=)`."""
    dynamic_shapes: Any = None
    """As torch.export.export takes it. In a mapping or TOML, a dim is "auto", "dynamic", "static", a size, a name, or
    {name, min, max}."""

    if not TYPE_CHECKING:  # type checkers shall see the generated __init__

        def __new__(cls, *args, **kwargs):
            # Before the generated __init__, whose TypeError would not name the nearest valid key.
            for key in kwargs:
                _known_key(key)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        _choice("objective", self.objective, OBJECTIVES)
        _choice("target", self.target, (None, *TARGETS))
        _choice("verify", self.verify, VERIFY)
        _choice("capture", self.capture, CAPTURE)
        _choice("check", self.check, CHECK)
        for name in ("strict", "measure", "trainable"):
            _typed(name, getattr(self, name), bool, "true or false")
        _typed("seed", self.seed, int, "an integer")
        _typed("profile", self.profile, str, "the name of a device profile")
        for name in ("allow", "deny", "allow_laws", "deny_laws"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        if self.laws is not None:
            object.__setattr__(self, "laws", _law_objects(self.laws))
        if isinstance(self.dynamic_shapes, str | int | float):
            expected = 'expected dims by input, such as { x = { 0 = "batch" } }'
            raise OptionError(f"option 'dynamic_shapes' is {self.dynamic_shapes!r}, {expected}")
        object.__setattr__(self, "dynamic_shapes", _dynamic_shapes(self.dynamic_shapes))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Options:
        """Options from a dictionary, for instance a parsed config file. Keys may be written with hyphens."""
        return cls(**{str(key).replace("-", "_"): value for key, value in mapping.items()})

    @classmethod
    def from_toml(cls, path: str | Path) -> Options:
        """Options from the table `[tool.fxconv]` of a TOML file such as pyproject.toml."""
        try:
            data = _toml_loads()(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"cannot read {str(path)!r}: {error.strerror}") from error
        except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
            raise OptionError(f"{str(path)!r} is not TOML: {error}") from error
        tool = data.get("tool")
        table = tool.get("fxconv") if isinstance(tool, dict) else None
        if not isinstance(table, dict):
            raise OptionError(f"{str(path)!r} has no table [tool.fxconv]: add one, with keys of fxconv.Options")
        return cls.from_mapping(table)

    @classmethod
    def of(cls, options: Options | Mapping[str, Any] | str | Path | None = None, **overrides: Any) -> Options:
        """`options` in any of its forms, with `overrides` on top: those that differ from the default win.

        `transform(model, x, objective="macs", options=opts)` means `opts` with objective "macs"; an argument left at
        its default does not reset what `opts` says.
        """
        match options:
            case None:
                base = cls()
            case Options():
                base = options
            case Mapping():
                base = cls.from_mapping(options)
            case str() | Path():
                base = cls.from_toml(options)
            case _:
                raise OptionError(
                    f"options is a {type(options).__name__}: give fxconv.Options, a dictionary or the path of a TOML file"
                )
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        changed = {}
        for key, value in overrides.items():
            _known_key(key)
            if value is not defaults[key] and (type(value) is not type(defaults[key]) or value != defaults[key]):
                changed[key] = value
        return base.replace(**changed) if changed else base

    def replace(self, **changes: Any) -> Options:
        """A copy with `changes`, checked like any other Options."""
        return dataclasses.replace(self, **changes)

    def module_allowed(self, path: str) -> bool:
        """Whether nodes of the module with this qualified name ("" is the model itself) may be rewritten.

        A pattern matches a module and everything in it: "head", "head.*" and "h*" all match "head" and "head.fc".
        """
        if any(_matches(path, p) for p in self.deny):
            return False
        return not self.allow or any(_matches(path, p) for p in self.allow)

    def law_allowed(self, name: str) -> bool:
        """Whether the law of this name may be used; case, hyphens, underscores and spaces do not matter."""
        key = _law_key(name)
        if key in map(_law_key, self.deny_laws):
            return False
        return not self.allow_laws or key in map(_law_key, self.allow_laws)

    def check_laws(self, known: Iterable[str]) -> None:
        """Raise OptionError if `allow_laws` or `deny_laws` names a law that is not in `known`: it would do nothing."""
        names = list(known)
        keys = set(map(_law_key, names))
        for field in ("allow_laws", "deny_laws"):
            for name in getattr(self, field):
                if _law_key(name) not in keys:
                    raise OptionError(f"{field}: there is no law {name!r}; {nearest(name, names)}")

    def fingerprint(self) -> str:
        """SHA-256 over every option: equal options have equal fingerprints, in every process (for compile caches)."""
        parts = {f.name: repr(getattr(self, f.name)) for f in dataclasses.fields(self)}
        parts["laws"] = repr(None if self.laws is None else [_law_identity(law) for law in self.laws])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _law_identity(law: Any) -> list[str]:
    """What tells laws apart in every process: their fields, with the code of a function in place of its address."""
    apply = law.apply
    code = getattr(apply, "__code__", None)
    place = f"{getattr(apply, '__module__', '')}.{getattr(apply, '__qualname__', type(apply).__qualname__)}"
    return [law.name, place, code.co_code.hex() if code else "", str(law.late), str(law.margin)]


def _matches(path: str, pattern: str) -> bool:
    stem = pattern.removesuffix(".*")
    return fnmatchcase(path, stem) or fnmatchcase(path, stem + ".*")


def _law_key(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def _known_key(key: str) -> None:
    known = [f.name for f in dataclasses.fields(Options)]
    if key not in known:
        raise OptionError(f"unknown option {key!r}: {nearest(key, known)}")


def _choice(key: str, value: object, known: Sequence[str | None]) -> None:
    if value not in known or isinstance(value, bool):
        raise OptionError(f"unknown {key} {value!r}: {nearest(value, [str(k) for k in known])}")


def _typed(key: str, value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise OptionError(f"option {key!r} is {value!r}, expected {what}")


def _names(key: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):  # a single name is what was meant, not its letters
        return (value,)
    names = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(v, str) for v in names):
        raise OptionError(f'option {key!r} is {value!r}, expected a list of names such as ["head.*"]')
    return names


def _law_objects(value: object) -> tuple[Any, ...]:
    from .law import Law

    laws = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if not all(isinstance(law, Law) for law in laws):
        raise OptionError(f"option 'laws' is {value!r}, expected fxconv.Law objects; allow_laws takes names of built-in ones")
    return laws


def _dynamic_shapes(spec: Any) -> Any:
    """A dynamic_shapes tree with the strings, sizes and tables that TOML can hold turned into torch.export dims.

    Whatever is not one of those (Dim objects, None, whole trees that torch.export understands) stays as it is.
    """
    if isinstance(spec, Mapping):
        return {_dim_key(k): _dim(v) for k, v in spec.items()}
    if isinstance(spec, list | tuple):
        return type(spec)(_dim(v) for v in spec)
    return spec


def _dim_key(key: Any) -> Any:
    # TOML keys are strings; the key of a dim is its number.
    return int(key) if isinstance(key, str) and key.isdigit() else key


def _dim(value: Any) -> Any:
    if isinstance(value, str):
        if value in _DIMS:
            return getattr(torch.export.Dim, _DIMS[value])
        if not value.isidentifier():
            raise OptionError(f"dynamic_shapes: {value!r} names no dim; {nearest(value, _DIMS)}, or an identifier")
        return torch.export.Dim(value)
    if isinstance(value, Mapping) and value and set(value) <= {"name", "min", "max"}:
        if "name" not in value:
            raise OptionError(f'dynamic_shapes: {dict(value)!r} lacks a name: {{ name = "batch", min = 1, max = 64 }}')
        sizes = [value[key] for key in ("min", "max") if key in value]
        if not all(isinstance(size, int) and size >= 0 for size in sizes) or sizes != sorted(sizes):
            raise OptionError(f"dynamic_shapes: {dict(value)!r}: min and max must be sizes, the smaller one first")
        return torch.export.Dim(value["name"], min=value.get("min"), max=value.get("max"))
    return _dynamic_shapes(value)


def _toml_loads() -> Callable[[str], dict[str, Any]]:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads
    try:
        import tomli
    except ModuleNotFoundError as error:
        raise OptionError("reading TOML needs Python 3.11, or on 3.10 `pip install tomli`") from error
    return tomli.loads
