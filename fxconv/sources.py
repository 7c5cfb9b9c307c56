"""Where the command line gets models from, and what to feed them.

    torchvision:NAME[:key=value,…]     any registered torchvision model, random weights unless asked otherwise
    timm:NAME[:key=value,…]            any timm model
    hf:CLASS[:key=value,…]             a transformers config or model class, built from its config (nothing is loaded)
    package.module:factory             a callable (or a module) that gives an nn.Module, or (module, args)
    model.pt2                          a saved torch.export program
    model.onnx                         for `fxconv verify` only: run by ONNX Runtime

Values of `key=value` are JSON where they parse as JSON ("num_classes=10", "depths=[1,1]") and text otherwise.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .errors import ArgsError, FxconvError, NotAModuleError
from .options import nearest

log = logging.getLogger(__name__)

SEED = 0
"""Seeds the random weights and inputs, so that two runs of a command do the same."""

_ONNX_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}

_TRIVIAL = 1e-4
"""Standard deviation up to which a parameter is called trivial: a default initialisation of 25,000 inputs has 4e-3."""

_VIDEO_FRAMES = 16
_SEGMENTATION_SIZE = 520
_DETECTION_SIZE = 320
_FLOW_SIZE = (128, 192)


@dataclass
class Source:
    """A model with example inputs. `args` is None where nobody knows any."""

    name: str
    model: nn.Module | ExportedProgram
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


def load(text: str, *, inputs: str | None = None, weights: str | None = None) -> Source:
    """The model that `text` names, in eval mode, with its inputs: those that `inputs` spells, or sensible ones.

    weights: "DEFAULT" or a name of torchvision's; for timm, anything means pretrained. They are downloaded.
    Raises FxconvError where the source, a package that it needs, or the weights cannot be had.
    """
    kind, _, rest = text.partition(":")
    if text.endswith(".pt2"):
        source = _program(text)
    elif text.endswith(".onnx"):
        source = _onnx(text)
    elif kind in ("torchvision", "timm", "hf") and rest:
        name, _, options = rest.partition(":")
        builder = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}[kind]
        keywords = _keywords(options)
        torch.manual_seed(SEED)
        try:
            source = builder(name, keywords, weights)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            if not keywords or isinstance(error, FxconvError):
                raise
            log.debug("building %s raised", text, exc_info=True)
            raise FxconvError(f"{name} cannot be built with {options!r}: {type(error).__name__}: {error}") from error
    elif rest:
        source = _factory(kind, rest)
    else:
        raise FxconvError(
            f"{text!r} is no model source: give torchvision:NAME, timm:NAME, hf:CLASS, package.module:factory or a "
            "file that ends in .pt2"
        )
    source.name = text
    if isinstance(source.model, nn.Module):
        source.model.eval()
    if inputs is not None:
        source.args, source.kwargs = parse_inputs(inputs, _float_dtype(source.model)), {}
    return source


def parse_inputs(text: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Random inputs from a description: "1x3x224x224", "1x16:int64,1x16:bool", "[3x320x320,3x300x200]" for a list.

    Floating inputs are N(0, 1) in `dtype` unless one is written; integers and booleans are 0 or 1, which every
    vocabulary and mask allows. Raises ArgsError where the description cannot be read.
    """
    generator = torch.Generator().manual_seed(SEED)

    def tensor(item: str) -> Tensor:
        match = re.fullmatch(r"\s*(\d+(?:x\d+)*|scalar)\s*(?::\s*(\w+)\s*)?", item)
        if match is None:
            raise ArgsError(f"cannot read the input {item!r}: write sizes such as 1x3x224x224, with :int64 for a dtype")
        shape = [] if match[1] == "scalar" else [int(n) for n in match[1].split("x")]
        kind = getattr(torch, match[2], None) if match[2] else dtype
        if not isinstance(kind, torch.dtype):
            raise ArgsError(f"cannot read the input {item!r}: torch has no dtype {match[2]!r}")
        if kind.is_floating_point or kind.is_complex:
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(kind)
        return torch.randint(0, 2, shape, generator=generator).to(kind)

    parts = re.findall(r"\[[^\]]*\]|[^,\[\]]+", text)
    if not parts or "".join(parts).replace(",", "") != text.replace(",", ""):
        raise ArgsError(f"cannot read the inputs {text!r}: write sizes such as 1x3x224x224, lists in brackets")
    return tuple([tensor(i) for i in p[1:-1].split(",")] if p.startswith("[") else tensor(p) for p in parts)


def randomise(model: nn.Module, seed: int = SEED) -> None:
    """Give every parameter and buffer that an initialisation left trivial an ordinary random value, in place.

    Freshly built models hide errors: BatchNorm statistics of 0 and 1 fold to nothing, a zero-initialised head makes
    every output 0, ConvNeXt's LayerScale of 1e-6 makes any mistake behind it invisible. BatchNorm gets mean ~ N(0, .3),
    var ~ U(.5, 2), weight ~ U(.5, 1.5), bias ~ N(0, .3); other parameters whose entries are nearly equal become
    U(.5, 1.5) (vectors called weight, scale or gamma), N(0, .1) (other vectors) or N(0, 1 / fan-in) (the rest).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> None:
        t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)

    def normal(t: Tensor, std: float) -> None:
        t.copy_(torch.randn(t.shape, generator=generator) * std)

    with torch.no_grad():
        for module in model.modules():
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            statistics = dict(module.named_buffers(recurse=False)) if norm else {}
            if "running_mean" in statistics:
                normal(statistics["running_mean"], 0.3)
                uniform(statistics["running_var"], 0.5, 2.0)
            for name, p in module.named_parameters(recurse=False):
                if not p.is_floating_point() or p.numel() < 2 or float(p.std()) > _TRIVIAL:
                    continue
                vector = max(p.shape) == p.numel()
                if vector and re.search(r"weight|scale|gamma", name):
                    uniform(p, 0.5, 1.5)
                elif vector:
                    normal(p, 0.3 if norm else 0.1)
                else:
                    normal(p, (p.numel() / p.shape[0]) ** -0.5)


class OnnxModel(nn.Module):
    """An ONNX file as a module: ONNX Runtime on the CPU, optimisations off, so that only the file is compared.

    It has no parameters and computes in the dtypes of the file, whatever `.double()` says; outputs are given back in
    the dtype of the inputs.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        ort = _need("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [(i.name, i.shape, i.type) for i in self._session.get_inputs()]

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModel:
        return self  # it has no state, and a session cannot be copied

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Tensors in the order of the file's inputs → its outputs (one tensor, or a tuple)."""
        names = [name for name, _, _ in self.inputs]
        if len(args) != len(names):
            raise ArgsError(f"the ONNX model takes {len(names)} inputs ({', '.join(names)}), was given {len(args)}")
        # Cast by NumPy: the verifier's float64 runs turn torch's casts to float32 into casts to float64.
        feed = {
            name: a.detach().cpu().numpy().astype(_ONNX_DTYPES.get(kind, "float32"))
            for (name, _, kind), a in zip(self.inputs, args, strict=True)
        }
        # The verifier also runs models in float64, and compares dtypes: give back what came in.
        given = next((a.dtype for a in args if a.is_floating_point()), None)
        out = tuple(torch.from_numpy(o) for o in self._session.run(None, feed))
        out = tuple(o.to(given) if given is not None and o.is_floating_point() else o for o in out)
        return out[0] if len(out) == 1 else out


def _need(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise FxconvError(f"this needs {package}: pip install 'fxconv[{extra}]' ({error})") from error


def _float_dtype(model: nn.Module | ExportedProgram) -> torch.dtype:
    tensors = model.state_dict.values() if isinstance(model, ExportedProgram) else model.state_dict().values()
    return next((t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), torch.float32)


def _keywords(text: str) -> dict[str, Any]:
    """ "a=1,b=[1,2],c=text" → {"a": 1, "b": [1, 2], "c": "text"}; commas inside brackets belong to the value."""
    result: dict[str, Any] = {}
    for item in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", text):
        key, equals, value = item.partition("=")
        if not equals:
            raise FxconvError(f"cannot read {item!r}: write key=value")
        try:
            result[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            result[key.strip()] = value
    return result


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def _torchvision(name: str, keywords: dict[str, Any], weights: str | None) -> Source:
    _need("torchvision", "vision")
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise FxconvError(f"torchvision has no model {name!r}: {nearest(name, known)}")
    enum = models.get_model_weights(name)
    chosen = None
    if weights is not None:
        names = ["DEFAULT", *(w.name for w in enum)]
        if weights not in names:
            raise FxconvError(f"{name} has no weights {weights!r}: {nearest(weights, names)}")
        chosen = enum[weights] if weights != "DEFAULT" else enum.DEFAULT
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    keywords = {"weights": chosen, **keywords}
    if "weights_backbone" in parameters:
        keywords.setdefault("weights_backbone", None)  # whose default is a download
    if chosen is None and name in ("googlenet", "inception_v3"):
        keywords.setdefault("init_weights", False)  # their own initialisation takes a minute
    try:
        model = models.get_model(name, **keywords)
    except OSError as error:
        raise FxconvError(f"cannot load the weights {weights} of {name}: {error}. Leave --weights away?") from error
    if chosen is None:
        randomise(model)
    return Source(name, model, _torchvision_inputs(model, chosen or next(iter(enum))))


def _torchvision_inputs(model: nn.Module, weights: Any) -> tuple[Any, ...]:
    """What the model's documented preprocessing gives: the sizes that its weights were evaluated at."""
    transforms = weights.transforms()
    match type(transforms).__name__:
        case "ObjectDetection":
            return ([_randn(3, _DETECTION_SIZE, _DETECTION_SIZE)],)
        case "OpticalFlow":
            return (_randn(1, 3, *_FLOW_SIZE), _randn(1, 3, *_FLOW_SIZE).flip(-1))
        case "SemanticSegmentation":
            return (_randn(1, 3, _SEGMENTATION_SIZE, _SEGMENTATION_SIZE),)
        case "VideoClassification":
            return (_randn(1, 3, _VIDEO_FRAMES, *transforms.crop_size),)
    # A vision transformer's size is fixed when it is built, whatever some weights were made for.
    size = getattr(model, "image_size", None) or transforms.crop_size[0]
    return (_randn(1, 3, size, size),)


def _timm(name: str, keywords: dict[str, Any], weights: str | None) -> Source:
    timm = _need("timm", "timm")
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise FxconvError(f"timm has no model {name!r}: {_close(name, known)}")
    try:
        model = timm.create_model(name, pretrained=weights is not None, **keywords)
    except OSError as error:
        raise FxconvError(f"cannot load the weights of {name}: {error}. Leave --weights away?") from error
    if weights is None:
        randomise(model)
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
    if "img_size" in keywords:
        side = keywords["img_size"]
        size = (size[0], *(side if isinstance(side, list) else (side, side)))
    return Source(name, model, (_randn(1, *size),))


def _hf(name: str, keywords: dict[str, Any], weights: str | None) -> Source:
    transformers = _need("transformers", "hf")
    if weights is not None:
        raise FxconvError("hf: builds a model from its config, without weights: leave --weights away")
    cls: Any = getattr(transformers, name, None)
    if not inspect.isclass(cls):
        raise FxconvError(f"transformers has no class {name!r}: {_close(name, dir(transformers))}")
    config_class = cls if issubclass(cls, transformers.PretrainedConfig) else getattr(cls, "config_class", None)
    if config_class is None:
        raise FxconvError(f"transformers.{name} is neither a config nor a model class")
    plain: Any = config_class()
    unknown = [key for key in keywords if not hasattr(plain, key)]
    if unknown:  # transformers would keep it, unused
        raise FxconvError(f"{config_class.__name__} has no key {unknown[0]!r}: {_close(unknown[0], list(plain.to_dict()))}")
    config = config_class(**keywords)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache in the output is state, not a result
    build: Any = transformers.AutoModel.from_config if cls is config_class else cls
    model: nn.Module = build(config)
    randomise(model)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return Source(name, model, (_randn(1, getattr(config, "num_channels", 3), height, width),))
    return Source(name, model, (parse_inputs("1x16:int64")[0],))


def _close(name: str, known: list[str]) -> str:
    """Like `nearest`, without listing the thousand names that there are."""
    return nearest(name, known).partition(" Known:")[0] if "did you mean" in nearest(name, known) else "check the name"


def _factory(module_name: str, path: str) -> Source:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current directory, as `python -m` has it; a console script has not
    try:
        value: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise FxconvError(f"cannot import {module_name!r}: {error}") from error
    except Exception as error:  # whatever the module's code raised
        log.debug("importing %s raised", module_name, exc_info=True)
        raise FxconvError(f"importing {module_name!r} raised {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(value, part):
            raise FxconvError(f"{module_name} has no {path!r}: {_close(part, dir(value))}")
        value = getattr(value, part)
    try:
        made = value if isinstance(value, nn.Module | ExportedProgram) or not callable(value) else value()
    except Exception as error:  # whatever the factory's code raised
        log.debug("%s:%s raised", module_name, path, exc_info=True)
        raise FxconvError(f"{module_name}:{path}() raised {type(error).__name__}: {error}") from error
    model, args = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module | ExportedProgram):
        raise NotAModuleError(f"{module_name}:{path} gave a {type(model).__name__}: it must give an nn.Module, or (module, args)")
    if args is not None and not isinstance(args, tuple):
        args = (args,)
    if args is None and isinstance(model, ExportedProgram):
        return _with_examples(path, model)
    return Source(path, model, args)


def _program(path: str) -> Source:
    if not Path(path).is_file():
        raise FxconvError(f"there is no file {path!r}")
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises whatever its deserialiser met
        raise FxconvError(f"{path!r} is not a program that torch.export.save wrote: {error}") from error
    return _with_examples(path, program)


def _with_examples(name: str, program: ExportedProgram) -> Source:
    if program.example_inputs is None:
        return Source(name, program, None)
    args, kwargs = program.example_inputs
    return Source(name, program, tuple(args), dict(kwargs))


def _onnx(path: str) -> Source:
    if not Path(path).is_file():
        raise FxconvError(f"there is no file {path!r}")
    try:
        model = OnnxModel(path)
    except FxconvError:
        raise
    except Exception as error:  # ONNX Runtime's own classes
        raise FxconvError(f"{path!r} is not a model that ONNX Runtime can load: {error}") from error
    shapes = [
        # A dim with a name is dynamic: 2 is the smallest size that is not special.
        "x".join(str(s if isinstance(s, int) else 2) for s in shape) + f":{_ONNX_DTYPES.get(kind, 'float32')}"
        for _, shape, kind in model.inputs
    ]
    return Source(path, model, parse_inputs(",".join(shapes)))
