"""Options: one frozen record, from keywords, mappings or TOML; whatever is misspelt is an error that helps."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxconv
from fxconv.errors import OptionError
from fxconv.options import Options


@pytest.mark.parametrize(
    "keywords, said",
    [
        ({"objektive": "macs"}, "unknown option 'objektive': did you mean 'objective'"),
        ({"deny_law": ["x"]}, "did you mean 'deny_laws'"),
        ({"zzz": 1}, "unknown option 'zzz': Known: objective, target"),
        ({"objective": "latancy"}, "unknown objective 'latancy': did you mean 'latency'"),
        ({"target": "convv2d"}, "did you mean 'conv2d'"),
        ({"verify": "roll-back"}, "did you mean 'rollback'"),
        ({"verify": False}, "unknown verify False: "),
        ({"capture": "trace"}, "Known: auto, export, symbolic"),
        ({"strict": "yes"}, "expected true or false"),
        ({"seed": True}, "expected an integer"),
        ({"deny": 3}, "expected a list of names"),
        ({"deny": ["a", 3]}, "expected a list of names"),
        ({"dynamic_shapes": {"x": {"0": "any size"}}}, "'any size' names no dim"),
        ({"dynamic_shapes": {"x": {"0": {"min": 1}}}}, "lacks a name"),
        ({"dynamic_shapes": {"x": {"0": {"name": "n", "min": "a"}}}}, "min and max must be sizes"),
        ({"dynamic_shapes": {"x": {"0": {"name": "n", "min": 9, "max": 3}}}}, "the smaller one first"),
        ({"dynamic_shapes": "batch"}, "option 'dynamic_shapes' is 'batch', expected dims by input"),
        ({"laws": ["compose"]}, "expected fxconv.Law objects; allow_laws takes names"),
        ({"laws": "compose"}, "expected fxconv.Law objects"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_valid_key(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as error:
        Options(**keywords)
    assert said in str(error.value)
    with pytest.raises(OptionError) as error:
        Options.from_mapping(keywords)
    assert said in str(error.value)


def test_frozen_copied_pickled_and_compared() -> None:
    options = Options(objective="macs", deny=["head.*"], seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 4  # type: ignore[misc]
    assert copy.deepcopy(options) == options == pickle.loads(pickle.dumps(options))
    assert options.replace(seed=4) == Options(objective="macs", deny=("head.*",), seed=4)
    with pytest.raises(OptionError, match="did you mean 'seed'"):
        options.replace(sead=4)


TOML = """
[project]
name = "something"

[tool.fxconv]
objective = "macs"
target = "conv"
verify = "raise"
strict = true
deny = ["head.*"]
deny-laws = ["merge siblings"]
dynamic_shapes = { x = { 0 = "batch", 2 = "auto", 3 = { name = "width", min = 32, max = 512 } }, y = { 0 = "static" } }
"""


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(TOML)
    options = Options.from_toml(path)
    assert (options.objective, options.target, options.verify, options.strict) == ("macs", "conv", "raise", True)
    assert options.deny == ("head.*",) and options.deny_laws == ("merge siblings",)
    x, y = options.dynamic_shapes["x"], options.dynamic_shapes["y"]
    assert x[2] == Dim.AUTO and y[0] == Dim.STATIC and x[0].__name__ == "batch"
    assert (x[3].__name__, x[3].min, x[3].max) == ("width", 32, 512)


def test_toml_dims_are_what_export_takes(tmp_path: Path) -> None:
    path = tmp_path / "fxconv.toml"
    path.write_text('[tool.fxconv]\ndynamic_shapes = { input = { 0 = "batch", 1 = "static" } }\n')
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(4, 3),), dynamic_shapes=Options.from_toml(path).dynamic_shapes)
    assert program.module()(torch.ones(7, 3)).shape == (7, 2)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[tool.fxconv]\nobjectiv = 'macs'", "did you mean 'objective'"),
        ("[tool.other]\n", "no table [tool.fxconv]"),
        ("tool = 3\n", "no table [tool.fxconv]"),
        ("[tool]\nfxconv = ['macs']\n", "no table [tool.fxconv]"),
        ("[tool.fxconv]\nlaws = ['compose']\n", "allow_laws takes names"),
        ("objective = ", "is not TOML"),
    ],
)
def test_bad_toml(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(OptionError) as error:
        Options.from_toml(path)
    assert said in str(error.value)


def test_missing_toml() -> None:
    with pytest.raises(OptionError, match="cannot read 'nowhere.toml'"):
        Options.from_toml("nowhere.toml")


def test_arguments_win_over_options_unless_left_at_their_default() -> None:
    base = Options(objective="macs", verify="raise", deny=["head"])
    merged = Options.of(base, objective="params", verify="rollback", target=None)
    assert merged == base.replace(objective="params")
    assert Options.of(None) == Options() and Options.of({"seed": 2}).seed == 2
    assert Options.of(base) is base
    with pytest.raises(OptionError, match="give fxconv.Options"):
        Options.of(3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="did you mean 'objective'"):
        Options.of(base, objectve="macs")


@pytest.mark.parametrize(
    "keywords, path, allowed",
    [
        ({}, "features.0", True),
        ({"deny": ["head.*"]}, "head.fc", False),
        ({"deny": ["head.*"]}, "head", False),
        ({"deny": "head"}, "head.fc.0", False),
        ({"deny": ["head.*"]}, "header.fc", True),
        ({"deny": ["*.attn"]}, "blocks.3.attn.qkv", False),
        ({"allow": ["features"]}, "features.1.conv", True),
        ({"allow": ["features"]}, "head", False),
        ({"allow": ["features"], "deny": ["features.1"]}, "features.1.conv", False),
    ],
)
def test_modules_are_allowed_and_denied_by_name(keywords: dict[str, Any], path: str, allowed: bool) -> None:
    assert Options(**keywords).module_allowed(path) is allowed


class Neck(nn.Module):
    """Three convolutions with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.tail = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.tail(self.head(self.body(x)))
        return y


@pytest.mark.parametrize("capture", ["export", "symbolic"])
@pytest.mark.parametrize("denied", ["body", "head", "tail"])
def test_a_denied_module_is_not_folded_into_its_neighbours(denied: str, capture: str) -> None:
    model, x = Neck().eval(), torch.randn(2, 3, 5, 5)
    result = fxconv.transform(model, x, capture=capture, objective="macs", options={"deny": [f"{denied}.*"]})
    assert result.get_parameter(f"{denied}.weight") is model.get_parameter(f"{denied}.weight")
    weights = {name for name, _ in result.named_parameters() if name.endswith("weight")}
    # The two others are neighbours, and become one, unless the denied one stands between them.
    assert len(weights) == (3 if denied == "head" else 2)
    assert f"options leave '{denied}' alone" in fxconv.report(result).barriers
    torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_denied_module_is_left_alone_in_a_dynamo_graph() -> None:
    torch._dynamo.reset()
    model, x, seen = Neck().eval(), torch.randn(2, 3, 5, 5), []
    backend = fxconv.backend(lambda gm, inputs: (seen.append(gm), gm.forward)[1], objective="macs", deny=["head"])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert sum("conv2d" in str(n.target) for n in seen[0].graph.nodes) == 3


def test_laws_are_allowed_and_denied_by_name() -> None:
    options = Options(deny_laws=["Merge-Siblings"])
    assert not options.law_allowed("merge_siblings") and options.law_allowed("compose")
    only = Options(allow_laws=["compose"])
    assert only.law_allowed("compose") and not only.law_allowed("merge siblings")
    options.check_laws(["compose", "merge siblings"])
    with pytest.raises(OptionError, match="there is no law 'compos'; did you mean 'compose'"):
        Options(deny_laws=["compos"]).check_laws(["compose", "merge siblings"])


def test_equal_options_have_equal_fingerprints() -> None:
    assert Options(seed=1).fingerprint() == Options(seed=1).fingerprint() != Options(seed=2).fingerprint()

    def law(name: str = "mine", **keywords: Any) -> fxconv.Law:
        return fxconv.Law(name, lambda v, context: (), **keywords)

    different = [law(), law("yours"), law(late=True), law(margin=0.5), fxconv.Law("mine", lambda v, context: iter([v]))]
    prints = [Options().fingerprint(), *(Options(laws=[one]).fingerprint() for one in different)]
    assert Options(laws=[law()]).fingerprint() == prints[1] and len(set(prints)) == len(prints)
