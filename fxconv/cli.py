"""The `fxconv` command: transform, explain, approximate, verify, recheck, calibrate.

Reports go to stdout, progress and errors to stderr. Exit codes: 0 verified (transform, verify, recheck) or reported
(explain, approximate); 1 not verified, or the models differ; 2 misuse, or something that could not be read or written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import ArgsError, FxconvError
from .options import CAPTURE, OBJECTIVES, TARGETS, VERIFY, Options

log = logging.getLogger("fxconv")

OK, UNVERIFIED, MISUSE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    handler = _Progress(quiet=arguments.quiet)
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except FxconvError as error:
        sys.stderr.write(f"fxconv: {type(error).__name__}: {error}\n")
        return MISUSE
    except BrokenPipeError:  # `fxconv … | head`
        sys.stderr.close()
        return MISUSE
    except OSError as error:
        sys.stderr.write(f"fxconv: {type(error).__name__}: {error}\n")
        return MISUSE
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _Progress(logging.Handler):
    """Log records on stderr, with the seconds since the start: long steps shall not look like a hang."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(logging.WARNING if quiet else logging.INFO)
        self._start = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        sys.stderr.write(f"[{time.monotonic() - self._start:6.1f} s] {level}{record.getMessage()}\n")
        sys.stderr.flush()


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    from .version import __version__

    parser = argparse.ArgumentParser(
        prog="fxconv",
        description="Rewrite the affine work in a PyTorch model into its cheapest exact form, and verify the result.",
        epilog="A SOURCE is torchvision:NAME, timm:NAME, hf:CLASS, package.module:factory or FILE.pt2; after the name, "
        ":key=value,… goes to the builder (timm:vit_tiny_patch16_224:num_classes=10).",
    )
    parser.add_argument("--version", action="version", version=f"fxconv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    transform = commands.add_parser("transform", help="rewrite a model, verify it, report, and write the result")
    transform.add_argument("source", metavar="SOURCE")
    _add_source(transform)
    _add_options(transform)
    transform.add_argument("--verify", choices=VERIFY, help="what a rewrite that fails leads to (default: rollback)")
    transform.add_argument("--out", metavar="FILE", help="write the result: .pt2, .onnx, .pte, .xml, or .json (report)")
    transform.add_argument("--dynamic", choices=("batch", "all", "none"), help="which sizes stay variable in --out")
    transform.add_argument("--no-time", action="store_true", help="do not measure before and after")
    _add_report(transform)
    transform.set_defaults(command=_transform)

    explain = commands.add_parser("explain", help="the report alone: nothing is changed or written")
    explain.add_argument("source", metavar="SOURCE")
    _add_source(explain)
    _add_options(explain)
    _add_report(explain)
    explain.set_defaults(command=_explain)

    approximate = commands.add_parser("approximate", help="cheaper layers within an error budget; never exact")
    approximate.add_argument("source", metavar="SOURCE")
    _add_source(approximate)
    approximate.add_argument("--calibration", metavar="FILE", help="inputs: .npy, or .pt with a tensor (default: noise)")
    approximate.add_argument("--max-error", type=float, default=1e-2, metavar="E", help="of the outputs (default: 0.01)")
    approximate.add_argument("--objective", choices=("macs", "params"), default="macs", help="what is saved")
    approximate.add_argument("--out", metavar="FILE", help="write the result: .pt2, .onnx, .pte, .xml, or .json (report)")
    approximate.add_argument("--plot", metavar="FILE", help="error against multiply-adds, as a picture")
    _add_report(approximate)
    approximate.set_defaults(command=_approximate, dynamic=None)

    verify = commands.add_parser("verify", help="compare two models: factories, .pt2 or .onnx files")
    verify.add_argument("a", metavar="A", help="the original")
    verify.add_argument("b", metavar="B", help="what should compute the same")
    _add_source(verify)
    verify.add_argument("--json", action="store_true", help="the verdict as JSON")
    verify.set_defaults(command=_verify)

    recheck = commands.add_parser("recheck", help="check an archived certificate against the files it is about")
    recheck.add_argument("report", metavar="report.json")
    recheck.add_argument("original", metavar="original.pt2")
    recheck.add_argument("result", metavar="result.pt2")
    _add_source(recheck)
    recheck.set_defaults(command=_recheck)

    calibrate = commands.add_parser("calibrate", help="measure this machine for --profile local (under 30 seconds)")
    calibrate.add_argument("--threads", type=int, metavar="N", help="threads of the models' runs (default: torch's)")
    calibrate.add_argument("--json", action="store_true", help="the profile as JSON")
    calibrate.add_argument("--quiet", action="store_true", help="no progress on stderr")
    calibrate.set_defaults(command=_calibrate)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    shapes = "inputs: 1x3x224x224, or 1x16:int64,1x16:bool, or [3x320x320] for a list"
    parser.add_argument("--input", metavar="SHAPES", help=shapes)
    parser.add_argument("--weights", metavar="NAME", help="weights to download, for instance DEFAULT (default: random)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=TARGETS, help="what may be emitted (default: anything)")
    parser.add_argument("--objective", choices=OBJECTIVES, help="what is minimised (default: latency)")
    parser.add_argument("--capture", choices=CAPTURE, help="how the model becomes a graph (default: auto)")
    parser.add_argument("--profile", metavar="NAME", help="device profile: default, arm, cuda, or local (`fxconv calibrate`)")
    parser.add_argument("--config", metavar="FILE.toml", help="options from the table [tool.fxconv] of a TOML file")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", metavar="FILE", help="write the report: .json (the certificate) or .html")
    parser.add_argument("--json", action="store_true", help="the report as JSON in place of the table")
    parser.add_argument("--verbose", action="store_true", help="every rewrite and every remark on its own line")


def _transform(arguments: argparse.Namespace) -> int:
    import fxconv

    from . import targets
    from .report import attach, read

    for path in filter(None, (arguments.out, arguments.report)):
        _check_writable(path)
    if arguments.out:
        targets.writer_for(arguments.out)
    source = _load(arguments.source, arguments)
    if arguments.out and source.args is None and not arguments.out.endswith(".json"):
        raise ArgsError(f"writing {arguments.out} needs example inputs: give --input, for instance --input 1x3x224x224")
    log.info("transforming")
    result = fxconv.transform(source.model, source.args, source.kwargs or None, options=_options(arguments))
    report = dataclasses.replace(read(result), model=source.name)
    if not arguments.no_time and source.args is not None:
        report = dataclasses.replace(report, measured=_time(source, result))
    attach(result, report)
    if arguments.out:
        log.info("writing %s", arguments.out)
        _write_result(arguments, result, source, report)
    _show(report, arguments)
    return OK if report.verified else UNVERIFIED


def _write_result(arguments: argparse.Namespace, result: Any, source: Any, report: Any) -> None:
    from . import targets

    try:
        targets.write(arguments.out, result, source.args or (), source.kwargs, report, arguments.dynamic)
    except (FxconvError, OSError):
        raise
    except Exception as error:  # whatever an exporter raised
        log.debug("writing %s failed", arguments.out, exc_info=True)
        said = str(error).strip().partition("\n")[0]
        raise FxconvError(f"cannot write {arguments.out!r}: {type(error).__name__}: {said}") from error


def _explain(arguments: argparse.Namespace) -> int:
    import fxconv

    if arguments.report:
        _check_writable(arguments.report)
    source = _load(arguments.source, arguments)
    report = fxconv.explain(source.model, source.args, source.kwargs or None, options=_options(arguments))
    _show(dataclasses.replace(report, model=source.name), arguments)
    return OK


def _approximate(arguments: argparse.Namespace) -> int:
    from .approximate import approximate
    from .approximate_plot import plot
    from .report import read

    for path in filter(None, (arguments.out, arguments.report, arguments.plot)):
        _check_writable(path)
    source = _load(arguments.source, arguments)
    batches = _calibration(arguments, source)
    log.info("fitting")
    result = approximate(source.model, calibration=batches, max_error=arguments.max_error, objective=arguments.objective)
    report = dataclasses.replace(read(result), model=source.name)
    if arguments.out:
        _write_result(arguments, result, source, report)
    if arguments.plot and report.verification["pareto"]:
        plot(report, arguments.plot, objective=arguments.objective)
    elif arguments.plot:
        log.warning("no picture was written: no layer had a cheaper fit, the report says why")
    _show(report, arguments)
    return OK


def _calibration(arguments: argparse.Namespace, source: Any) -> list[Any]:
    """Batches of 32 from a file; without one Gaussian noise of the example's shape."""
    import torch

    if arguments.calibration is None:
        if not source.args:
            raise ArgsError("approximate needs --calibration FILE, or --input for noise in its place")
        log.warning("no --calibration: errors are those on noise, which real data may exceed")
        generator = torch.Generator().manual_seed(0)
        shape = (8, *source.args[0].shape[1:])
        return [torch.randn(shape, generator=generator).to(source.args[0]) for _ in range(8)]
    try:
        if arguments.calibration.endswith(".npy"):
            import numpy

            data = torch.from_numpy(numpy.load(arguments.calibration))
        else:
            data = torch.load(arguments.calibration, weights_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise FxconvError(f"cannot read {arguments.calibration!r}: {error}") from error
    if not isinstance(data, torch.Tensor) or data.dim() < 2:
        raise ArgsError(f"{arguments.calibration!r} holds no tensor of samples (N, …)")
    return list(data.split(32))


def _verify(arguments: argparse.Namespace) -> int:
    from .render import verification
    from .report import plain

    a, b = _load(arguments.a, arguments), _load(arguments.b, arguments)
    verdict = plain(_compare(a, b))
    _write(json.dumps(verdict, indent=2) if arguments.json else verification(verdict))
    return OK if verdict["status"] == "verified" else UNVERIFIED


def _recheck(arguments: argparse.Namespace) -> int:
    from .fingerprint import weights_hash
    from .render import verification
    from .report import Report, versions

    try:
        text = Path(arguments.report).read_text(encoding="utf-8")
    except OSError as error:
        raise FxconvError(f"cannot read {arguments.report!r}: {error.strerror}") from error
    report = Report.from_json(text)
    a, b = _load(arguments.original, arguments), _load(arguments.result, arguments)
    rows, good = [], True
    for side, source in (("before", a), ("after", b)):
        want, have = report.hashes.get(side), weights_hash(source.model)
        same = want == have
        good &= same
        said = f"SHA-256 {have[:16]}…" if same else f"SHA-256 {have[:16]}…, the certificate says {str(want)[:16]}…"
        rows.append(f"weights of {source.name}: {'as certified' if same else 'NOT as certified'} ({said})")
    if not report.verified:
        good = False
        rows.append(f"certificate: NOT of a verified result (status {report.verification['status']!r})")
    for name, version in versions().items():
        if report.versions.get(name) != version:
            rows.append(f"note: certified with {name} {report.versions.get(name)}, rechecked with {version}")
    verdict = _compare(a, b)
    good &= verdict["status"] == "verified"
    rows.append(verification(verdict))
    _write("\n".join(rows))
    return OK if good else UNVERIFIED


def _calibrate(arguments: argparse.Namespace) -> int:
    import torch

    from .calibrate import cache_file, calibrate, table, to_json

    before = torch.get_num_threads()
    if arguments.threads is not None and arguments.threads < 1:
        raise ArgsError(f"--threads {arguments.threads}: give 1 or more")
    try:
        torch.set_num_threads(arguments.threads or before)
        log.info("timing some 170 operators, with %d thread(s)", torch.get_num_threads())
        profile = calibrate()
        file = cache_file()
    finally:
        torch.set_num_threads(before)
    _write(to_json(profile).rstrip() if arguments.json else f"{table(profile)}\nwritten to {file}")
    return OK


def _load(text: str, arguments: argparse.Namespace) -> Any:
    from . import sources

    log.info("loading %s", text)
    return sources.load(text, inputs=arguments.input, weights=arguments.weights)


def _options(arguments: argparse.Namespace) -> Options:
    """The options of --config, with those given on the command line on top."""
    options = Options.from_toml(arguments.config) if arguments.config else Options()
    given = {key: getattr(arguments, key, None) for key in ("objective", "target", "capture", "verify", "profile")}
    return options.replace(**{key: value for key, value in given.items() if value is not None})


def _time(source: Any, result: Any) -> dict[str, Any]:
    from .timing import paired

    log.info("timing before and after, interleaved")
    return paired(_callable(source.model), _callable(result), source.args, source.kwargs)


def _callable(model: Any) -> Callable[..., Any]:
    from torch.export import ExportedProgram

    return model.module() if isinstance(model, ExportedProgram) else model


def _compare(a: Any, b: Any) -> dict[str, Any]:
    from .verify import verify

    args, kwargs = (a.args, a.kwargs) if a.args is not None else (b.args, b.kwargs)
    if args is None:
        raise ArgsError("neither model says what its inputs are: give --input, for instance --input 1x3x224x224")
    log.info("comparing %s with %s", a.name, b.name)
    return verify(a.model, b.model, args, kwargs or None).to_dict()


def _show(report: Any, arguments: argparse.Namespace) -> None:
    if arguments.report:
        html = arguments.report.endswith(".html")
        text = report.to_html() if html else report.to_json() + "\n"
        Path(arguments.report).write_text(text, encoding="utf-8")
    _write(report.to_json() if arguments.json else report.to_table(verbose=arguments.verbose))


def _check_writable(path: str) -> None:
    """Find out before minutes of work that the result cannot be stored."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise FxconvError(f"cannot write {path!r}: there is no folder {str(folder)!r}")


if __name__ == "__main__":
    raise SystemExit(main())
