"""The five networks: classes of timm, small enough that a CPU trains them in seconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

SIDE, CLASSES = 32, 10
INPUTS = torch.zeros(2, 1, SIDE, SIDE)


def resnet() -> nn.Module:
    """Basic blocks at 8, 4, 2 and 1 pixels a side; the digits have 8."""
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(
        BasicBlock, (2, 1, 1, 1), channels=(16, 24, 32, 48), in_chans=1, num_classes=CLASSES
    )


def resnext() -> nn.Module:
    """Bottlenecks of eight groups at 8, 4, 2 and 1 pixels a side."""
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(
        Bottleneck,
        (1, 1, 1, 1),
        channels=(8, 12, 16, 24),
        cardinality=8,
        base_width=32,
        in_chans=1,
        num_classes=CLASSES,
    )


def mobilenetv2() -> nn.Module:
    """Inverted residuals, expansion 4, at 8 and 4 pixels a side."""
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    blocks = [["ds_r1_k3_s2_c8"], ["ir_r2_k3_s1_e4_c12"], ["ir_r2_k3_s2_e4_c16"]]
    blocks += [["ir_r2_k3_s1_e4_c24"]]
    return EfficientNet(
        decode_arch_def(blocks),
        num_features=96,
        stem_size=12,
        in_chans=1,
        num_classes=CLASSES,
        act_layer=nn.ReLU6,
        round_chs_fn=lambda channels: channels,
    )


def densenet() -> nn.Module:
    """Three dense blocks of three layers, growth 8."""
    from timm.models.densenet import DenseNet

    return DenseNet(
        growth_rate=8, block_config=(3, 3, 3), bn_size=2, in_chans=1, num_classes=CLASSES
    )


def vit() -> nn.Module:
    """Four blocks of three heads on 16 patches of 8x8."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIDE,
        patch_size=8,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=48,
        depth=4,
        num_heads=3,
        mlp_ratio=3,
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": resnet,
    "MobileNetV2": mobilenetv2,
    "ViT": vit,
    "ResNeXt": resnext,
    "DenseNet": densenet,
}
