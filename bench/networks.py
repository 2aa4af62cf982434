"""The networks that are measured, and what is common to both tools."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NETWORKS = (
    "timm:resnet50",
    "timm:resnext50_32x4d",
    "timm:mobilenetv2_100",
    "timm:densenet121",
    "timm:efficientnet_b0",
    "timm:convnext_tiny",
    "timm:deit_small_patch16_224",
    "timm:swin_tiny_patch4_window7_224",
    "timm:vit_tiny_patch16_224",
    "torchvision:vit_b_16",
)


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network in evaluation mode and one example input; the same for the same name.

    Norms and what starts at zero get random weights: behind the last norm of timm's residual
    branches or the zero head of torchvision's transformer no comparison sees anything.
    """
    from cpd import _torchvision

    _torchvision.ensure()
    torch.manual_seed(0)
    library, _, kind = name.rpartition(":")
    if library == "torchvision":
        import torchvision

        model, shape = torchvision.models.get_model(kind), (3, 224, 224)
    else:
        import timm

        model = timm.create_model(kind)
        shape = model.default_cfg["input_size"]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model.eval(), torch.randn(1, *shape)


def macs(model: nn.Module, inputs: torch.Tensor) -> int:
    """Return what PyTorch's own counter sees, with attention as two matrix products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
            model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return seen.get_total_flops() // 2


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value wanted."""
    return float((got - wanted).abs().max() / wanted.abs().max())
