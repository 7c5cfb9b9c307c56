"""The command line, in process (fast) and in a shell (once): sources, inputs, files written, verdicts, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxconv import sources, targets, timing
from fxconv.cli import MISUSE, OK, UNVERIFIED, main
from fxconv.errors import ArgsError, FxconvError, OptionError
from fxconv.fingerprint import weights_hash
from fxconv.report import Report, attach

CNN = ["factories:small_cnn", "--input", "2x3x9x7"]


def fxconv(*arguments: str | Path) -> int:
    return main([str(a) for a in arguments])


# --- sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, shapes",
    [
        ("torchvision:mobilenet_v3_small", [(1, 3, 224, 224)]),
        ("torchvision:inception_v3", [(1, 3, 299, 299)]),
        ("torchvision:efficientnet_b1", [(1, 3, 240, 240)]),
        ("torchvision:vit_b_32:image_size=64", [(1, 3, 64, 64)]),
        ("torchvision:lraspp_mobilenet_v3_large", [(1, 3, 520, 520)]),
        ("torchvision:ssdlite320_mobilenet_v3_large", [[(3, 320, 320)]]),
        ("torchvision:raft_small", [(1, 3, 128, 192), (1, 3, 128, 192)]),
        ("torchvision:r3d_18", [(1, 3, 16, 112, 112)]),
        ("timm:levit_128s", [(1, 3, 224, 224)]),
        ("timm:test_resnet.r160_in1k", [(1, 3, 160, 160)]),
        ("timm:vit_tiny_patch16_224:img_size=96", [(1, 3, 96, 96)]),
        ("hf:SegformerForSemanticSegmentation:depths=[1,1,1,1]", [(1, 3, 224, 224)]),
        ("hf:BertConfig:num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64", [(1, 16)]),
        ("factories:head", [(2, 4, 3, 2)]),
    ],
)
def test_sensible_inputs_for_named_models(source: str, shapes: list[Any]) -> None:
    found = sources.load(source)
    assert found.args is not None and isinstance(found.model, nn.Module) and not found.model.training
    assert [[tuple(t.shape) for t in a] if isinstance(a, list) else tuple(a.shape) for a in found.args] == shapes


@pytest.mark.parametrize("source", ["torchvision:mobilenet_v3_small", "torchvision:vit_b_32:image_size=64"])
def test_random_models_are_the_same_every_time_and_hide_nothing(source: str) -> None:
    first, second = sources.load(source), sources.load(source)
    assert isinstance(first.model, nn.Module) and first.args is not None
    assert weights_hash(first.model) == weights_hash(second.model)
    for name, p in first.model.named_parameters():
        assert p.numel() < 2 or p.std() > 1e-3, f"{name} has a single value"
    with torch.no_grad():
        assert first.model(*first.args).std() > 1e-2


@pytest.mark.parametrize(
    "source, said",
    [
        ("torchvision:resnet19", "torchvision has no model 'resnet19': did you mean 'resnet1"),
        ("timm:levit_128z", "did you mean 'levit_128"),
        ("hf:BertConfigg", "did you mean 'BertConfig'"),
        ("hf:pipeline", "transformers has no class 'pipeline'"),
        ("factories:smal_cnn", "did you mean 'small_cnn'"),
        ("factories:not_a_module", "gave a int"),
        ("no_such_module:make", "cannot import 'no_such_module'"),
        ("resnet18", "'resnet18' is no model source"),
        ("missing.pt2", "there is no file 'missing.pt2'"),
        ("missing.onnx", "there is no file 'missing.onnx'"),
        ("torchvision:resnet18:layers", "write key=value"),
        ("torchvision:alexnet:num_class=3", "alexnet cannot be built with 'num_class=3': TypeError"),
        ("timm:test_resnet:bogus=3", "test_resnet cannot be built with 'bogus=3': TypeError"),
        ("hf:BertConfig:num_hiden_layers=1", "BertConfig has no key 'num_hiden_layers': did you mean 'num_hidden_layers'"),
        ("factories:broken", "factories:broken() raised RuntimeError: no such checkpoint"),
        ("factories:needs_an_argument", "factories:needs_an_argument() raised TypeError"),
    ],
)
def test_bad_sources_say_what_to_do(source: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fxconv("explain", source) == MISUSE
    assert said in capsys.readouterr().err


def test_files_of_another_format_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (("bad.pt2", "is not a program that"), ("bad.onnx", "is not a model that ONNX Runtime can load")):
        (tmp_path / name).write_text("nothing of the kind")
        assert fxconv("verify", tmp_path / name, tmp_path / name) == MISUSE
        assert said in capsys.readouterr().err


def test_a_factory_of_a_program_needs_no_input(tmp_path: Path) -> None:
    assert fxconv("transform", "factories:program", "--out", tmp_path / "m.pt2", "--no-time", "--quiet") == OK
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.randn(2, 3, 9, 7)).shape == (2, 5)


def test_factories_in_classes_and_in_training_mode() -> None:
    for source in ("factories:Nested.make", "factories:training"):
        model = sources.load(source).model
        assert isinstance(model, nn.Module) and not model.training


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1x3x4x5", [((1, 3, 4, 5), torch.float32)]),
        ("2x3,4", [((2, 3), torch.float32), ((4,), torch.float32)]),
        ("1x16:int64, 1x16:bool", [((1, 16), torch.int64), ((1, 16), torch.bool)]),
        ("2:float64,scalar", [((2,), torch.float64), ((), torch.float32)]),
        ("[3x4x5,3x6x7],1", [[((3, 4, 5), torch.float32), ((3, 6, 7), torch.float32)], ((1,), torch.float32)]),
    ],
)
def test_inputs_are_spelled_by_their_sizes(text: str, expected: list[Any]) -> None:
    def describe(value: Any) -> Any:
        return [describe(v) for v in value] if isinstance(value, list) else (tuple(value.shape), value.dtype)

    assert [describe(v) for v in sources.parse_inputs(text)] == expected
    assert [describe(v) for v in sources.parse_inputs("2x3", torch.bfloat16)] == [((2, 3), torch.bfloat16)]


@pytest.mark.parametrize("text", ["1,3,axb", "1x3:int65", "", "[1x3", "1x-3"])
def test_bad_inputs_are_refused(text: str) -> None:
    with pytest.raises(ArgsError, match="cannot read the input"):
        sources.parse_inputs(text)


# --- timing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, low, high", [(6, 0, 5), (10, 1, 8), (20, 5, 14), (3, 0, 2)])
def test_interval_of_a_median(n: int, low: int, high: int) -> None:
    assert timing.median_interval(n) == (low, high)


def test_paired_timing_sees_a_factor_of_two() -> None:
    found = timing.paired(lambda: time.sleep(0.004), lambda: time.sleep(0.002), (), budget_s=0.2)
    assert 1.5 < found["low"] <= found["ratio"] <= found["high"] < 2.5
    assert found["pairs"] >= 7 and found["before_s"] > found["after_s"]


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic, batch, side", [("batch", 5, 9), ("all", 5, 12), ("none", 2, 9)])
def test_exported_sizes(dynamic: str, batch: int, side: int) -> None:
    model = sources.load("factories:small_cnn", inputs="2x3x9x9")
    assert isinstance(model.model, nn.Module) and model.args is not None
    program = targets.export(model.model, model.args, dynamic=dynamic)
    x = torch.randn(batch, 3, side, side)
    torch.testing.assert_close(program.module()(x), model.model(x))
    if dynamic == "none":
        with pytest.raises(Exception, match="(?i)guard|expected"):
            program.module()(torch.randn(3, 3, 9, 9))


def test_a_batch_of_one_is_exported_as_a_batch() -> None:
    model = sources.load("factories:small_cnn", inputs="1x3x9x9")
    assert isinstance(model.model, nn.Module) and model.args is not None
    assert targets.export(model.model, model.args).module()(torch.randn(3, 3, 9, 9)).shape == (3, 5)


def test_unknown_suffix_lists_the_known() -> None:
    with pytest.raises(OptionError, match="did you mean '.onnx'"):
        targets.writer_for("model.onxx")


def test_a_pt2_carries_its_report(tmp_path: Path) -> None:
    model, report = sources.load(CNN[0], inputs="2x3x9x7"), Report("m")
    assert isinstance(model.model, nn.Module) and model.args is not None
    targets.write(tmp_path / "m.pt2", model.model, model.args, {}, report)
    assert targets.embedded_report(tmp_path / "m.pt2") == report
    torch.export.save(targets.export(model.model, model.args), tmp_path / "bare.pt2")
    assert targets.embedded_report(tmp_path / "bare.pt2") is None


def test_what_cannot_be_exported_says_what_to_do() -> None:
    class Stubborn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if float(x.sum()) > 0 else x - 1

    with pytest.raises(FxconvError, match="torch.save"):
        targets.export(Stubborn(), (torch.ones(2),))


# --- commands ----------------------------------------------------------------------------------------------------


def test_transform_prints_a_table_and_exits_zero_when_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert fxconv("transform", *CNN) == OK
    out, err = capsys.readouterr()
    for said in ("rewrites: ", "multiply-adds", "launches", "measured time", "verified"):
        assert said in out, said
    assert "proved" in out or "confirmed" in out
    assert "loading factories:small_cnn" in err and "timing" in err


def test_transform_json_is_the_report_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    assert fxconv("transform", *CNN, "--json", "--no-time", "--report", file) == OK
    report = Report.from_json(capsys.readouterr().out)
    assert report == Report.from_json(file.read_text())
    assert report.model == "factories:small_cnn" and report.verified and not report.measured
    assert report.cost_after.launches < report.cost_before.launches and report.applied
    assert set(report.hashes) == {"before", "after"} and report.hashes["before"] != report.hashes["after"]


def test_transform_quiet_says_nothing_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert fxconv("transform", *CNN, "--quiet", "--no-time") == OK
    assert capsys.readouterr().err == ""


def test_transform_writes_html(tmp_path: Path) -> None:
    assert fxconv("transform", *CNN, "--no-time", "--report", tmp_path / "r.html") == OK
    assert "<h2>Rewrites" in (tmp_path / "r.html").read_text()


def test_transform_unverified_exits_nonzero(capsys: pytest.CaptureFixture[str]) -> None:
    assert fxconv("transform", *CNN, "--verify", "off", "--no-time") == UNVERIFIED
    assert "not run" in capsys.readouterr().out


def test_transform_without_inputs_is_not_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert fxconv("transform", "factories:small_cnn") == UNVERIFIED
    assert "not run" in capsys.readouterr().out


def test_transform_two_inputs() -> None:
    assert fxconv("transform", "factories:two_inputs", "--input", "2x5:int64,2x5x4", "--no-time") == OK


def test_transform_target(tmp_path: Path) -> None:
    out = tmp_path / "head.pt2"
    assert fxconv("transform", "factories:head", "--target", "conv", "--out", out, "--no-time") == OK
    program = torch.export.load(out)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert any("conv2d" in c for c in called) and not any("linear" in c or "mm" in c for c in called)
    model, (x,) = __import__("factories").head()
    torch.testing.assert_close(program.module()(x), model(x))
    assert program.module()(torch.randn(5, 4, 3, 2)).shape == (5, 6)


def test_transform_reads_a_config_and_arguments_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "pyproject.toml"
    config.write_text('[tool.fxconv]\nobjective = "macs"\nverify = "off"\n')
    assert fxconv("explain", *CNN, "--config", config, "--json") == OK
    assert Report.from_json(capsys.readouterr().out).objective == "macs"
    given = ["--config", config, "--objective", "params", "--verify", "rollback"]
    assert fxconv("transform", *CNN, *given, "--json") == OK
    assert Report.from_json(capsys.readouterr().out).objective == "params"
    config.write_text('[tool.fxconv]\nobjectve = "macs"\n')
    assert fxconv("explain", *CNN, "--config", config) == MISUSE
    assert "did you mean 'objective'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["transform", "factories:small_cnn", "--out", "x.onnx"], "give --input"),
        (["transform", *CNN, "--out", "x.oonx"], "unknown suffix '.oonx'"),
        (["transform", *CNN, "--out", "nowhere/x.pt2"], "there is no folder"),
        (["transform", *CNN, "--report", "nowhere/r.json"], "there is no folder"),
        (["recheck", "nowhere.json", "a.pt2", "b.pt2"], "cannot read 'nowhere.json'"),
    ],
)
def test_misuse_is_found_before_the_work(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fxconv(*arguments) == MISUSE
    err = capsys.readouterr().err
    assert said in err and "timing" not in err


def test_what_cannot_be_written_is_misuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever an exporter raises; and a path that is a folder, for the file and for the report."""
    (tmp_path / "taken.json").mkdir()
    for option in ("--out", "--report"):
        assert fxconv("transform", *CNN, option, tmp_path / "taken.json", "--no-time", "--quiet") == MISUSE
        assert "IsADirectoryError" in capsys.readouterr().err

    def fail(*_: Any) -> None:
        raise KeyError("no conversion of aten.conv2d\nand a page of advice")

    monkeypatch.setitem(targets._WRITERS, ".onnx", fail)
    assert fxconv("transform", *CNN, "--out", tmp_path / "m.onnx", "--no-time", "--quiet") == MISUSE
    assert "cannot write" in capsys.readouterr().err


def test_explain_changes_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert fxconv("explain", *CNN) == OK
    assert "rewrites: " in capsys.readouterr().out


def test_program_in_program_out_and_recheck(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, result, certificate = tmp_path / "in.pt2", tmp_path / "out.pt2", tmp_path / "r.json"
    model = sources.load(CNN[0], inputs="2x3x9x7")
    assert isinstance(model.model, nn.Module) and model.args is not None
    torch.export.save(targets.export(model.model, model.args), original)
    assert fxconv("transform", original, "--out", result, "--report", certificate, "--no-time") == OK
    assert targets.embedded_report(result) == Report.from_json(certificate.read_text())
    x = torch.randn(5, 3, 9, 7)
    torch.testing.assert_close(torch.export.load(result).module()(x), model.model(x))
    assert fxconv("verify", original, result) == OK

    capsys.readouterr()
    assert fxconv("recheck", certificate, original, result) == OK
    assert capsys.readouterr().out.count(": as certified") == 2

    tampered = torch.export.load(result)
    name = next(n for n, t in tampered.state_dict.items() if t.ndim > 1)
    with torch.no_grad():
        tampered.state_dict[name].view(-1)[0] += 1e-3
    torch.export.save(tampered, tmp_path / "tampered.pt2")
    assert fxconv("recheck", certificate, original, tmp_path / "tampered.pt2") == UNVERIFIED
    assert "NOT as certified" in capsys.readouterr().out


def test_a_module_can_be_rechecked_against_its_export(tmp_path: Path) -> None:
    """The hash of a module is that of its export, so a certificate for either holds for both."""
    original, result, certificate = tmp_path / "in.pt2", tmp_path / "out.pt2", tmp_path / "r.json"
    model = sources.load(CNN[0], inputs="2x3x9x7")
    assert isinstance(model.model, nn.Module) and model.args is not None
    torch.export.save(targets.export(model.model, model.args), original)
    assert fxconv("transform", *CNN, "--out", result, "--report", certificate, "--no-time") == OK
    assert fxconv("recheck", certificate, original, result) == OK


def test_a_certificate_of_an_unverified_result_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, certificate = tmp_path / "m.pt2", tmp_path / "r.json"
    model = sources.load(CNN[0], inputs="2x3x9x7")
    assert isinstance(model.model, nn.Module) and model.args is not None
    torch.export.save(targets.export(model.model, model.args), file)
    digest = weights_hash(model.model)
    certificate.write_text(Report("m", hashes={"before": digest, "after": digest}).to_json())
    assert fxconv("recheck", certificate, file, file) == UNVERIFIED
    assert "NOT of a verified result" in capsys.readouterr().out


def test_verify_compares_factories_programs_and_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = tmp_path / "m.onnx"
    assert fxconv("transform", *CNN, "--out", onnx, "--no-time") == OK
    assert fxconv("verify", "factories:small_cnn", onnx, "--input", "3x3x9x7") == OK
    assert fxconv("verify", "factories:small_cnn", "factories:other_cnn", "--input", "2x3x9x7") == UNVERIFIED
    capsys.readouterr()
    assert fxconv("verify", "factories:small_cnn", "factories:other_cnn", "--input", "2x3x9x7", "--json") == UNVERIFIED
    assert json.loads(capsys.readouterr().out)["status"] == "failed"
    assert fxconv("verify", "factories:small_cnn", "factories:other_cnn") == MISUSE
    assert "give --input" in capsys.readouterr().err


def test_onnx_agrees_at_other_batch_sizes(tmp_path: Path) -> None:
    onnx = tmp_path / "m.onnx"
    assert fxconv("transform", *CNN, "--out", onnx, "--no-time") == OK
    written, model = sources.load(str(onnx)).model, sources.load(CNN[0]).model
    assert isinstance(written, nn.Module) and isinstance(model, nn.Module)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 9, 7)
        torch.testing.assert_close(written(x), model(x), rtol=1e-4, atol=1e-5)


def test_openvino_and_executorch_files_run_and_agree(tmp_path: Path) -> None:
    import openvino
    from executorch.runtime import Runtime

    xml, pte = tmp_path / "m.xml", tmp_path / "m.pte"
    assert fxconv("transform", *CNN, "--out", xml, "--no-time") == OK
    assert fxconv("transform", *CNN, "--out", pte, "--no-time") == OK
    source = sources.load(CNN[0], inputs=CNN[2])
    assert isinstance(source.model, nn.Module) and source.args is not None
    with torch.no_grad():
        expected = source.model(*source.args)
    (x,) = source.args
    # Where the processor has bfloat16 units, OpenVINO computes in bfloat16 unless told not to.
    found = openvino.compile_model(xml, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x.numpy()])[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    method = Runtime.get().load_program(pte).load_method("forward")
    torch.testing.assert_close(method.execute([x])[0], expected, rtol=1e-4, atol=1e-5)


def test_in_a_shell(tmp_path: Path) -> None:
    """The installed script, with a pipe, from another folder: report on stdout, progress on stderr, exit code."""
    script, tests = Path(sys.executable).with_name("fxconv"), Path(__file__).parent
    (tmp_path / "mine.py").write_text((tests / "factories.py").read_text())
    done = subprocess.run(
        f"{script} transform mine:small_cnn --input 2x3x9x7 --out out.pt2 --report r.json | tail -n 3; "
        "echo code ${PIPESTATUS[0]}",
        shell=True,
        executable="/bin/bash",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "verified" in done.stdout and done.stdout.endswith("code 0\n"), done.stdout + done.stderr
    assert "loading mine:small_cnn" in done.stderr
    assert Report.from_json((tmp_path / "r.json").read_text()).verified
    assert isinstance(torch.export.load(tmp_path / "out.pt2"), torch.export.ExportedProgram)


def test_errors_in_a_shell_are_one_line_and_code_two(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("fxconv")
    done = subprocess.run([script, "transform", "torchvision:resnet19"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == MISUSE and done.stdout == ""
    assert "did you mean" in done.stderr and "Traceback" not in done.stderr


def test_attached_reports_are_what_the_result_carries() -> None:
    model = nn.Linear(1, 1)
    assert attach(model, Report("a")) is attach(model, Report("b")) and model.report.model == "b"
