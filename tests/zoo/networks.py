"""Whole networks from torchvision and timm, built without weights, with every parameter and buffer randomised."""

from __future__ import annotations

from typing import Any

import torch
from helpers import draw, randomise, settle
from torch import nn

# Input sizes: as small as the network allows, so that the suite stays quick.
TORCHVISION = {
    "alexnet": 64,
    "vgg11": 64,
    "vgg11_bn": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 80,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x1_0": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "vit_b_16": 64,
    "swin_t": 64,
    "lraspp_mobilenet_v3_large": 64,
}
TIMM = {
    "repvgg_a0": 64,
    "repvgg_b1g4": 64,
    "mobileone_s0": 64,
    "fastvit_t8": 64,
    "repvit_m0_9": 64,
    "repghostnet_050": 64,
    "ghostnetv3_050": 64,
    "lcnetv2_small": 64,
    "efficientvit_m0": 224,
    "levit_128s": 224,
    # the other families that have a fuse() or a reparameterize()
    "levit_conv_128s": 224,
    "fastvit_sa12": 64,
    "fastvit_mci0": 64,
    "iformer_t": 64,
    "efficientvim_m1": 64,
    "shvit_s1": 64,
    "tiny_vit_5m_224": 64,
    "nextvit_small": 64,
}


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """A torchvision network in eval mode, random throughout."""
    from torchvision.models import get_model

    if name == "vit_b_16":
        options["image_size"] = TORCHVISION[name]
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # seconds of truncated normals that randomise() overwrites
    if name.startswith("lraspp"):
        options["weights_backbone"] = None
    model = randomise(get_model(name, weights=None, **options))
    return settle(model, draw((2, 3, TORCHVISION[name], TORCHVISION[name]), dtype=torch.float32))


def timm_model(name: str, **options: Any) -> nn.Module:
    """A timm network in eval mode, random throughout."""
    import timm

    model = randomise(timm.create_model(name, pretrained=False, **options))
    return settle(model, draw((2, 3, TIMM[name], TIMM[name]), dtype=torch.float32))
