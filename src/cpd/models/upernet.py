"""UPerNet on a plain vision transformer of timm: neck, PSP and FPN head, auxiliary head.

T. Xiao, Y. Liu, B. Zhou, Y. Jiang, J. Sun, "Unified Perceptual Parsing for Scene Understanding",
ECCV 2018, arXiv 1807.10221, with the backbones and the neck of MMSegmentation's configurations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cpd import _torchvision
from cpd.models._layers import ConvNorm, resize

__all__ = ["CONFIGS", "Config", "UPerNet", "official_names", "upernet"]


@dataclass(frozen=True)
class Config:
    """One size of the network.

    Attributes:
        backbone: name in timm of a plain vision transformer.
        image_size: side of the images that the table of positions is made for.
        taken: numbers of the blocks whose outputs are taken.
        scales: of the levels that the neck makes of them; nothing: no neck, all levels as they are.
        channels: width of the head. auxiliary: width of the auxiliary head.
        pools: sides of the pooled maps of the PSP module.
        final_norm: whether the last block's output is normalised.
        drop_path: chance of the last block to be left out while training.
        options: further options of the backbone in timm, such as ``embed_dim``.
    """

    backbone: str
    image_size: int = 512
    taken: Sequence[int] = (2, 5, 8, 11)
    scales: Sequence[float] | None = (4, 2, 1, 0.5)
    channels: int = 512
    auxiliary: int = 256
    pools: Sequence[int] = (1, 2, 3, 6)
    final_norm: bool = False
    drop_path: float = 0.1
    options: Any = None


CONFIGS = {
    "deit_t": Config("deit_tiny_patch16_224"),
    "deit_s": Config("deit_small_patch16_224"),
    "deit_b": Config("deit_base_patch16_224"),
    "vit_b": Config("vit_base_patch16_224"),
}


class Backbone(nn.Module):
    """Images (N, 3, H, W) → the maps (N, C, H / patch, W / patch) after some of the blocks.

    Where patches do not fill the image, mean colour is added below and on the right.
    """

    body: Any

    def __init__(self, config: Config, in_chans: int) -> None:
        super().__init__()
        _torchvision.ensure()
        import timm

        self.body = timm.create_model(
            config.backbone,
            img_size=config.image_size,
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_path_rate=config.drop_path,
            **(config.options or {}),
        )
        if not config.final_norm:
            self.body.norm = nn.Identity()
        self.taken = tuple(config.taken)
        self.width = int(self.body.embed_dim)
        self.patch: tuple[int, int] = self.body.patch_embed.patch_size

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        body = self.body
        high, wide = body.patch_embed.dynamic_feat_size(x.shape[-2:])
        x = body.norm_pre(body.patch_drop(body._pos_embed(body.patch_embed(x))))
        found = []
        for number, block in enumerate(body.blocks):
            x = block(x)
            if number == len(body.blocks) - 1:
                x = body.norm(x)
            if number in self.taken:
                tokens = x[:, body.num_prefix_tokens :]
                maps = tokens.transpose(1, 2).unflatten(2, (high, wide))
                found.append(maps)
        return found


class Neck(nn.Module):
    """Each map through 1 × 1, resized to its level, then 3 × 3."""

    def __init__(self, channels: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in scales)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in scales)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = []
        for x, scale, lateral, conv in zip(
            maps, self.scales, self.lateral, self.convs, strict=True
        ):
            x = lateral(x)
            if scale != 1:
                # By the scale, as the published weights were trained; by the size where it is none.
                fits = min(x.shape[-2:]) * scale >= 1
                to: dict[str, Any] = {"scale_factor": scale} if fits else {"size": _least(x, scale)}
                x = F.interpolate(x, **to, mode="bilinear", align_corners=False)
            found.append(conv(x))
        return found


def _least(x: torch.Tensor, scale: float) -> list[int]:
    """The scaled size of maps that are so small that a side would vanish."""
    return [max(1, int(side * scale)) for side in x.shape[-2:]]


class Pyramid(nn.Module):
    """PSP module: the map beside its averages over ever finer grids, joined by 3 × 3."""

    def __init__(self, inside: int, channels: int, pools: Sequence[int]) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(side), ConvNorm(inside, channels, activation=nn.ReLU)
            )
            for side in pools
        )
        joined = inside + len(pools) * channels
        self.join = ConvNorm(joined, channels, 3, activation=nn.ReLU)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = [resize(pool(x), x) for pool in self.pools]
        joined: torch.Tensor = self.join(torch.cat([x, *pooled], dim=1))
        return joined


class Head(nn.Module):
    """Levels summed from coarse to fine, each filtered, all joined at the finest resolution."""

    def __init__(self, inside: int, config: Config, classes: int) -> None:
        super().__init__()
        channels, levels = config.channels, len(config.taken)
        self.pyramid = Pyramid(inside, channels, config.pools)
        self.lateral = nn.ModuleList(
            ConvNorm(inside, channels, activation=nn.ReLU) for _ in range(levels - 1)
        )
        self.filters = nn.ModuleList(
            ConvNorm(channels, channels, 3, activation=nn.ReLU) for _ in range(levels - 1)
        )
        self.join = ConvNorm(levels * channels, channels, 3, activation=nn.ReLU)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        x = self.pyramid(levels[-1])
        found = [x]
        for level, lateral, conv in zip(
            levels[-2::-1], self.lateral[::-1], self.filters[::-1], strict=True
        ):
            side = lateral(level)
            x = side + resize(x, side)
            found.insert(0, conv(x))
        same = [found[0], *(resize(each, found[0]) for each in found[1:])]
        logits: torch.Tensor = self.classifier(self.dropout(self.join(torch.cat(same, dim=1))))
        return logits


class AuxiliaryHead(nn.Sequential):
    """One 3 × 3 convolution and a classifier on the coarsest level."""

    def __init__(self, inside: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = ConvNorm(inside, channels, 3, activation=nn.ReLU)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(channels, classes, 1)


class UPerNet(nn.Module):
    """Images (N, 3, H, W) → logits (N, classes, H / 4, W / 4) for patches of 16, of H / 16 without
    a neck.

    Images that patches do not fill are padded, and their logits come as (N, classes, H, W): at any
    coarser resolution they would not lie on the image exactly.

    With an auxiliary head the output is the mapping {"out": logits, "aux": its logits}, in training
    and in evaluation: what is combed is what is trained.
    """

    def __init__(
        self, config: Config, num_classes: int, in_chans: int = 3, *, auxiliary: bool = True
    ) -> None:
        """``config``: one of ``CONFIGS`` or your own."""
        super().__init__()
        self.backbone = Backbone(config, in_chans)
        width = self.backbone.width
        self.neck = None if config.scales is None else Neck(width, config.scales)
        self.head = Head(width, config, num_classes)
        made = AuxiliaryHead(width, config.auxiliary, num_classes) if auxiliary else None
        self.auxiliary = made
        for part in (self.neck, self.head, made):
            _initialise(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the logits, or both in a mapping."""
        levels = self.backbone(x)
        if self.neck is not None:
            levels = self.neck(levels)
        logits = self._within(self.head(levels), x)
        if self.auxiliary is None:
            return logits
        return {"out": logits, "aux": self._within(self.auxiliary(levels[-1]), x)}

    def _within(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Logits without those of the padding, where there is any."""
        sides, patch = x.shape[-2:], self.backbone.patch
        filled = [-(-side // each) * each for side, each in zip(sides, patch, strict=True)]
        if filled == list(sides):
            return logits
        fine = F.interpolate(logits, size=filled, mode="bilinear", align_corners=False)
        return fine[..., : sides[0], : sides[1]]


def _initialise(part: nn.Module | None) -> None:
    for module in part.modules() if part is not None else ():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def upernet(
    size: str = "deit_s",
    num_classes: int = 150,
    in_chans: int = 3,
    *,
    auxiliary: bool = True,
    **changes: Any,
) -> UPerNet:
    """Return a UPerNet. Needs timm.

    size: "deit_t", "deit_s", "deit_b" or "vit_b". auxiliary: with the auxiliary head, whose logits
    come beside the others in evaluation, too, and in what is exported; without it a network has the
    same other tensors. changes: fields of ``Config`` that shall differ.
    """
    return UPerNet(replace(CONFIGS[size], **changes), num_classes, in_chans, auxiliary=auxiliary)


# Name here → name in MMSegmentation's checkpoints; patterns of re.sub, in order.
_NAMES = (
    (r"^backbone\.body\.patch_embed\.proj\.", "backbone.patch_embed.projection."),
    (r"^backbone\.body\.blocks\.(\d+)\.", r"backbone.layers.\1."),
    (r"^backbone\.body\.norm\.", "backbone.ln1."),
    (r"^backbone\.body\.", "backbone."),
    (r"(layers.*)\.norm(\d)\.", r"\1.ln\2."),
    (r"(layers.*)\.attn\.qkv\.(weight|bias)$", r"\1.attn.attn.in_proj_\2"),
    (r"(layers.*)\.attn\.proj\.", r"\1.attn.attn.out_proj."),
    (r"(layers.*)\.mlp\.fc1\.", r"\1.ffn.layers.0.0."),
    (r"(layers.*)\.mlp\.fc2\.", r"\1.ffn.layers.1."),
    (r"^neck\.lateral\.(\d)\.", r"neck.lateral_convs.\1.conv."),
    (r"^neck\.convs\.(\d)\.", r"neck.convs.\1.conv."),
    (r"^head\.pyramid\.pools\.", "decode_head.psp_modules."),
    (r"^head\.pyramid\.join\.", "decode_head.bottleneck."),
    (r"^head\.lateral\.", "decode_head.lateral_convs."),
    (r"^head\.filters\.", "decode_head.fpn_convs."),
    (r"^head\.join\.", "decode_head.fpn_bottleneck."),
    (r"^head\.classifier\.", "decode_head.conv_seg."),
    (r"^auxiliary\.conv\.", "auxiliary_head.convs.0."),
    (r"^auxiliary\.classifier\.", "auxiliary_head.conv_seg."),
    (r"((?:decode|auxiliary)_head.*)\.norm\.", r"\1.bn."),
)


def official_names(model: UPerNet) -> dict[str, str]:
    """Name of each tensor here → its name in MMSegmentation's checkpoints."""
    found = {}
    for name in model.state_dict():
        there = name
        for pattern, changed in _NAMES:
            there = re.sub(pattern, changed, there)
        found[name] = there
    return found
