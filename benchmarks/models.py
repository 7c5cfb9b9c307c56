"""The models of the headline table, with random weights: what a perfect rewrite by hand is worth on each is known.

The goals are original ÷ rewritten times on one thread at batch 1, by hand, on 2 cores of an AMD EPYC: eager, on top of
ONNX Runtime, on top of OpenVINO.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@dataclass(frozen=True)
class Entry:
    """A model of the table: how to make it, its input, and the goals by peer; and, where somebody wrote it down, the
    perfect rewrite by hand, made from the model without fxconv, to be timed in the same run."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    goals: dict[str, float]
    by_hand: Callable[[nn.Module], nn.Module] | None = None


class Logits(nn.Module):
    """A transformers model whose output is its logits, which every engine can return."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] → logits."""
        logits: Tensor = self.model(x).logits
        return logits


class Collapsible(nn.Module):
    """SESR's linear block (Bhardwaj et al., 2021): 3×3 to many channels, 1×1 back, and a residual."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, wide, 3, padding=1, bias=False)
        self.squeeze = nn.Conv2d(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → the same."""
        return torch.relu(self.squeeze(self.expand(x)) + x)


def collapsed(blocks: nn.Module) -> nn.Module:
    """Each `Collapsible` as the one 3×3 convolution that it is, its weights computed in float64."""
    twin = nn.Sequential()
    for block in blocks.children():
        assert isinstance(block, Collapsible)
        expand, squeeze = block.expand.weight.detach().double(), block.squeeze.weight.detach().double()
        weight = torch.einsum("om,mchw->ochw", squeeze[:, :, 0, 0], expand)
        weight[:, :, 1, 1] += torch.eye(weight.shape[0], dtype=torch.float64)
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        assert block.squeeze.bias is not None and conv.bias is not None
        with torch.no_grad():
            conv.weight.copy_(weight)
            conv.bias.copy_(block.squeeze.bias)
        twin.extend([conv, nn.ReLU()])
    return twin.eval()


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name)
        return model

    return make


def _segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return Logits(SegformerForSemanticSegmentation(SegformerConfig()))


class FusedHead(nn.Module):
    """A SegFormer decode head with each stage's projection, its part of the fusing convolution and the BatchNorm in one
    1×1 convolution, computed before the upsampling: interpolation weights sum to one, so biases pass it unchanged."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        with torch.no_grad():
            wide = copy.deepcopy(head).double()
            fused = fuse_conv_bn_eval(wide.linear_fuse, wide.batch_norm)
            # The head concatenates its stages last to first.
            parts = fused.weight[:, :, 0, 0].chunk(len(wide.linear_projections), dim=1)[::-1]
            bias = fused.bias
            self.stages = nn.ModuleList()
            for part, projection in zip(parts, wide.linear_projections, strict=True):
                stage = nn.Conv2d(projection.proj.in_features, fused.out_channels, 1, bias=not self.stages)
                stage.weight.copy_((part @ projection.proj.weight)[:, :, None, None])
                bias = bias + part @ projection.proj.bias
                self.stages.append(stage)
            self.stages[0].bias.copy_(bias)
        self.classifier = head.classifier

    def forward(self, encoder_hidden_states: tuple[Tensor, ...], **_: Any) -> Tensor:
        """The encoder's stages, [N, C, H, W] each, largest first → logits at the first one's size."""
        first, *others = (stage(x) for stage, x in zip(self.stages, encoder_hidden_states, strict=True))
        total: Tensor = first
        for y in others:
            total = total + nn.functional.interpolate(y, size=first.shape[2:], mode="bilinear", align_corners=False)
        logits: Tensor = self.classifier(torch.relu(total))
        return logits


def _fused_segformer(model: nn.Module) -> nn.Module:
    twin: Any = copy.deepcopy(model)
    twin.model.decode_head = FusedHead(twin.model.decode_head)
    fused: nn.Module = twin.eval()
    return fused


def _vgg() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.vgg11()
    return model


def _goals(eager: float, onnxruntime: float = 0, openvino: float = 0) -> dict[str, float]:
    goals = {"eager": eager, "onnxruntime": onnxruntime, "openvino": openvino}
    return {peer: goal for peer, goal in goals.items() if goal}


IMAGE = (1, 3, 224, 224)

MODELS: dict[str, Entry] = {
    "mobileone_s0": Entry(_timm("mobileone_s0"), IMAGE, _goals(5.5, 3.6, 3.4)),
    "segformer_b0": Entry(_segformer, (1, 3, 512, 512), _goals(2.3, 1.87, 1.84), _fused_segformer),
    "repvit_m0_9": Entry(_timm("repvit_m0_9"), IMAGE, _goals(1.8, 1.06, 1.03)),
    "fastvit_t8": Entry(_timm("fastvit_t8"), (1, 3, 256, 256), _goals(1.5, 1.16, 1.05)),
    "repvgg_a0": Entry(_timm("repvgg_a0"), IMAGE, _goals(1.3, 1.12, 1.14)),
    "repghostnet_050": Entry(_timm("repghostnet_050"), IMAGE, _goals(1.16, 1.09, 1.10)),
    "levit_128s": Entry(_timm("levit_128s"), IMAGE, _goals(1.15, 1.01, 1.02)),
    "sesr_blocks": Entry(lambda: nn.Sequential(*(Collapsible(16, 256) for _ in range(5))), (1, 16, 96, 96), _goals(17), collapsed),
    "nearest_conv": Entry(
        lambda: nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(128, 128, 3, padding=1)),
        (1, 128, 64, 64),
        _goals(1.6, 1.6, 2.05),
    ),
    "vgg11": Entry(_vgg, IMAGE, _goals(1.0)),
}
"""``vgg11`` is the negative control: its head as a 7×7 convolution would be 2.4 times slower on CPU."""


def make(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model in eval mode and its inputs.

    The weights are random, and none of them zero: several models start their residual branches at BatchNorm weights of
    zero, and a branch times zero is work that a rewrite may drop, which trained weights would not allow.
    """
    torch.manual_seed(0)
    entry = MODELS[name]
    model = entry.make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.1)
    return model, (torch.randn(entry.shape),)
