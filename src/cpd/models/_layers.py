"""Layers that several networks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["ConvNorm", "DropPath", "resize"]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and an activation where one is given."""

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Padding keeps the resolution at stride 1."""
        super().__init__()
        self.conv = nn.Conv2d(
            inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outside)
        self.activation = nn.Identity() if activation is None else activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inside, H, W) → (N, outside, H / stride, W / stride)."""
        activated: torch.Tensor = self.activation(self.norm(self.conv(x)))
        return activated


class DropPath(nn.Module):
    """While training, zero whole samples with chance ``rate`` and scale the others up.

    Source: G. Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
    """

    def __init__(self, rate: float) -> None:
        """``rate`` in [0, 1)."""
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        if not self.training or not self.rate:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


def resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bilinearly to the resolution of ``like``, corners not aligned."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
