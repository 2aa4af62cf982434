"""SeaFormer: squeeze-enhanced axial attention beside a pyramid of inverted bottlenecks, light head.

Q. Wan, Z. Huang, J. Lu, G. Yu, L. Zhang, "SeaFormer: Squeeze-enhanced Axial Transformer for Mobile
Semantic Segmentation", ICLR 2023, arXiv 2301.13156.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cpd.models._layers import ConvNorm, DropPath, resize

__all__ = ["CONFIGS", "Config", "SeaFormer", "official_names", "seaformer"]

Blocks = Sequence[Sequence[int]]
_TABLE = 16  # positions of a learnt position table


@dataclass(frozen=True)
class Config:
    """One size of the network.

    Attributes:
        stem: channels of the first convolution. stride: its stride.
        stages: five lists of bottlenecks (kernel, expansion, channels, stride).
        depths: attention blocks after the last stages, one number for each.
        key_dims: of a head's queries and keys, for each of these; values have twice as many.
        heads: of every attention. ratios: widths of the hidden layers, for each.
        fused: channels of the head's fusions, one for each of ``depths``.
        drop_path: chance of the last block of each stage to be left out while training.
    """

    stem: int
    stages: Sequence[Blocks]
    depths: Sequence[int]
    key_dims: Sequence[int]
    heads: int
    ratios: Sequence[int]
    fused: Sequence[int]
    stride: int = 2
    drop_path: float = 0.1


def _stages(*widths: int, expand: Sequence[int]) -> list[Blocks]:
    """The usual five stages: widths and expansions of their eight or nine bottlenecks."""
    first, second, third, fourth, fifth, sixth = widths
    a, b, c, d, e, f, g = expand
    return [
        [(3, a, first, 1), (3, b, second, 2), (3, c, second, 1)],
        [(5, d, third, 2), (5, d, third, 1)],
        [(3, e, fourth, 2), (3, e, fourth, 1)],
        [(5, f, fifth, 2)],
        [(3, g, sixth, 2)],
    ]


CONFIGS = {
    "t": Config(
        stem=16,
        stages=_stages(16, 16, 32, 64, 128, 160, expand=(1, 4, 3, 3, 3, 3, 6)),
        depths=(2, 2),
        key_dims=(16, 24),
        heads=4,
        ratios=(2, 4),
        fused=(64, 96),
    ),
    "s": Config(
        stem=16,
        stages=_stages(16, 24, 48, 96, 160, 192, expand=(1, 4, 3, 3, 3, 4, 6)),
        depths=(3, 3),
        key_dims=(16, 24),
        heads=6,
        ratios=(2, 4),
        fused=(96, 128),
    ),
    "b": Config(
        stem=16,
        stages=_stages(16, 32, 64, 128, 192, 256, expand=(1, 4, 3, 3, 3, 4, 6)),
        depths=(4, 4),
        key_dims=(16, 24),
        heads=8,
        ratios=(2, 4),
        fused=(128, 160),
    ),
    "l": Config(
        stem=32,
        stages=_stages(32, 64, 128, 192, 256, 320, expand=(3, 4, 4, 4, 4, 4, 6)),
        depths=(3, 3, 3),
        key_dims=(16, 20, 24),
        heads=8,
        ratios=(2, 4, 6),
        fused=(128, 160, 192),
    ),
}


class Bottleneck(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; added to its input where it fits."""

    def __init__(self, inside: int, kernel: int, expand: int, outside: int, stride: int) -> None:
        super().__init__()
        wide = inside * expand
        act = nn.ReLU
        self.widen = ConvNorm(inside, wide, activation=act) if expand > 1 else nn.Identity()
        self.filter = ConvNorm(wide, wide, kernel, stride=stride, groups=wide, activation=act)
        self.narrow = ConvNorm(wide, outside)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.narrow(self.filter(self.widen(x)))
        return x + made if self.residual else made


class Position(nn.Module):
    """A learnt table of positions along one axis, added to (N, C, length)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, channels, _TABLE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = F.interpolate(self.table, size=x.shape[-1], mode="linear", align_corners=False)
        return x + table


class Attention(nn.Module):
    """Attention along the rows and along the columns of averages, weighing a local filter.

    out = h(proj(v + rows + columns)) · detail, where detail filters q, k and v together, and
    rows = attention of the means over the width, columns = of the means over the height.
    """

    def __init__(self, channels: int, key_dim: int, heads: int) -> None:
        super().__init__()
        keys, values = key_dim * heads, 2 * key_dim * heads
        self.num_heads = heads
        self.scale = key_dim**-0.5
        self.q, self.k = ConvNorm(channels, keys), ConvNorm(channels, keys)
        self.v = ConvNorm(channels, values)
        self.rows_q, self.rows_k = Position(keys), Position(keys)
        self.columns_q, self.columns_k = Position(keys), Position(keys)
        self.rows = nn.Sequential(nn.ReLU6(), ConvNorm(values, values))
        self.columns = nn.Sequential(nn.ReLU6(), ConvNorm(values, values))
        both = 2 * keys + values
        self.detail = ConvNorm(both, both, 3, groups=both, activation=nn.ReLU6)
        self.detail_out = ConvNorm(both, channels)
        self.proj = nn.Sequential(nn.ReLU6(), ConvNorm(values, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        detail = self.detail_out(self.detail(torch.cat([q, k, v], dim=1)))
        rows = self._along(self.rows_q(q.mean(3)), self.rows_k(k.mean(3)), v.mean(3))
        columns = self._along(self.columns_q(q.mean(2)), self.columns_k(k.mean(2)), v.mean(2))
        rows, columns = self.rows(rows[..., None]), self.columns(columns[:, :, None])
        whole = v + (rows + columns)
        return F.hardsigmoid(self.proj(whole)) * detail

    def _along(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention along one axis: (N, channels, length) → the same for the values."""
        q, k = self._heads(q).transpose(2, 3), self._heads(k)
        weights = (q @ k * self.scale).softmax(dim=-1)
        found = weights @ self._heads(v).transpose(2, 3)
        return found.transpose(2, 3).flatten(1, 2)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], self.num_heads, -1, x.shape[-1])


class Hidden(nn.Module):
    """Two pointwise convolutions with a 3 × 3 filter of each channel between."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.widen = ConvNorm(channels, wide)
        self.filter = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.act = nn.ReLU6()
        self.narrow = ConvNorm(wide, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.narrow(self.act(self.filter(self.widen(x))))
        return made


class Block(nn.Module):
    """Attention, then the hidden layer, each added to what came in."""

    def __init__(self, channels: int, key_dim: int, heads: int, ratio: int, drop: float) -> None:
        super().__init__()
        self.attn = Attention(channels, key_dim, heads)
        self.hidden = Hidden(channels, channels * ratio)
        self.drop = DropPath(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attn(x))
        return x + self.drop(self.hidden(x))


class Fusion(nn.Module):
    """Local features weighed by global ones: local(x) · h(global(y)), at the resolution of x."""

    def __init__(self, local: int, other: int, outside: int) -> None:
        super().__init__()
        self.local, self.world = ConvNorm(local, outside), ConvNorm(other, outside)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.local(x) * resize(F.hardsigmoid(self.world(y)), x)


class LightHead(nn.Module):
    """Detail fused with each global feature in turn, one filter, one classifier."""

    def __init__(self, detail: int, others: Sequence[int], fused: Sequence[int], classes: int):
        super().__init__()
        widths = pairwise((detail, *fused))
        self.fusions = nn.ModuleList(
            Fusion(inside, other, outside)
            for (inside, outside), other in zip(widths, others, strict=True)
        )
        last = fused[-1]
        self.filter = ConvNorm(last, last, groups=last, activation=nn.ReLU)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(last, classes, 1)

    def forward(self, detail: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
        for fusion, other in zip(self.fusions, others, strict=True):
            detail = fusion(detail, other)
        logits: torch.Tensor = self.classifier(self.dropout(self.filter(detail)))
        return logits


class SeaFormer(nn.Module):
    """Images (N, 3, H, W) → logits (N, classes, H / 8, W / 8) at the usual strides."""

    def __init__(self, config: Config, num_classes: int, in_chans: int = 3) -> None:
        """``config``: one of ``CONFIGS`` or your own."""
        super().__init__()
        self.stem = ConvNorm(in_chans, config.stem, 3, stride=config.stride, activation=nn.ReLU)
        self.stages, self.blocks = nn.ModuleList(), nn.ModuleList()
        without = len(config.stages) - len(config.depths)
        width, widths = config.stem, []
        for number, stage in enumerate(config.stages):
            layers = []
            for kernel, expand, outside, stride in stage:
                layers.append(Bottleneck(width, kernel, expand, outside, stride))
                width = outside
            widths.append(width)
            self.stages.append(nn.Sequential(*layers))
            if number >= without:
                self.blocks.append(_blocks(config, number - without, width))
        self.head = LightHead(widths[1], widths[without:], config.fused, num_classes)
        self.apply(_initialise)
        for block in self.modules():
            if isinstance(block, Attention):  # such a branch begins as nothing
                for last in (block.proj, block.rows, block.columns):
                    nn.init.zeros_(last.get_submodule("1.norm").weight)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits at the detail's resolution."""
        without = len(self.stages) - len(self.blocks)
        x, others = self.stem(x), []
        detail = x
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number == 1:
                detail = x
            if number >= without:
                x = self.blocks[number - without](x)
                others.append(x)
        logits: torch.Tensor = self.head(detail, others)
        return logits


def _blocks(config: Config, place: int, width: int) -> nn.Sequential:
    depth = config.depths[place]
    rates = [config.drop_path * k / max(1, depth - 1) for k in range(depth)]
    made = (
        Block(width, config.key_dims[place], config.heads, config.ratios[place], rate)
        for rate in rates
    )
    return nn.Sequential(*made)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def seaformer(
    size: str = "s", num_classes: int = 150, in_chans: int = 3, **changes: Any
) -> SeaFormer:
    """Return a SeaFormer with the light head.

    size: "t", "s", "b" or "l". changes: fields of ``Config`` that shall differ, such as
    ``stride=1`` for small images.
    """
    return SeaFormer(replace(CONFIGS[size], **changes), num_classes, in_chans)


# Name here → official name (checkpoints of the authors); patterns of re.sub, in order. A number in
# < > is one higher there.
_NAMES = (
    (r"^stem\.conv", "backbone.smb1.stem_block.0.c"),
    (r"^stem\.norm", "backbone.smb1.stem_block.0.bn"),
    (r"^stages\.(\d+)\.(\d+)\.", r"backbone.smb<\1>.layer<\2>."),
    (r"^blocks\.(\d+)\.", r"backbone.trans<\1>.transformer_blocks."),
    (r"^head\.fusions\.(\d+)\.local\.", r"decode_head.fuse<\1>.local_embedding."),
    (r"^head\.fusions\.(\d+)\.world\.", r"decode_head.fuse<\1>.global_act."),
    (r"^head\.filter\.", "decode_head.linear_fuse."),
    (r"^head\.classifier\.", "decode_head.conv_seg."),
    (r"(decode_head.*)\.norm\.", r"\1.bn."),
    (r"\.attn\.(q|k|v)\.", r".attn.to_\1."),
    (r"\.attn\.(row|column)s_(q|k)\.table$", r".attn.pos_emb_\1\2.pos_embed"),
    (r"\.attn\.(row|column)s\.", r".attn.proj_encode_\1."),
    (r"\.attn\.detail\.", ".attn.dwconv."),
    (r"\.attn\.detail_out\.", ".attn.pwconv."),
    (r"\.hidden\.widen\.", ".mlp.fc1."),
    (r"\.hidden\.filter\.", ".mlp.dwconv."),
    (r"\.hidden\.narrow\.", ".mlp.fc2."),
    (r"(backbone.*)\.conv\.", r"\1.c."),
    (r"(backbone.*)\.norm\.", r"\1.bn."),
)


def official_names(model: SeaFormer) -> dict[str, str]:
    """Name of each tensor here → its name in the authors' checkpoints for segmentation."""
    return {name: _official(model, name) for name in model.state_dict()}


def _official(model: SeaFormer, name: str) -> str:
    found = name
    for pattern, there in _NAMES:
        found = re.sub(pattern, there, found)
    part = re.match(r"(stages\.\d+\.\d+)\.(widen|filter|narrow)\.", name)
    if part is not None:  # there they are numbered in a row, activations counted
        block = model.get_submodule(part[1])
        first = 2 if isinstance(block.widen, nn.Identity) else 0
        place = {"widen": 0, "filter": 2, "narrow": 4}[part[2]] - first
        found = found.replace(f".{part[2]}.", f".conv.{place}.")
    return re.sub(r"<(\d+)>", lambda number: str(int(number[1]) + 1), found)
