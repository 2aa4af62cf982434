"""Small networks with a channel of every kind, and what their scores are compared by."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.groups import Groups

Inputs = torch.Tensor


class Residual(nn.Module):
    """Convolutions of all sorts: plain, residual with norms, depthwise, grouped, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.bn1 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.deep, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.two = nn.Conv2d(12, 8, 1)
        self.group, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(4, 8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.two(F.elu(self.bn2(self.deep(F.elu(self.bn1(self.one(x)))))))
        x = F.relu(self.up(F.gelu(self.norm(self.group(x)))))
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """Tokens: a table of positions, attention by one linear layer, layer norms, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.position = (
            nn.Conv2d(3, 12, 2, stride=2),
            nn.Parameter(torch.randn(1, 4, 12)),
        )
        self.n1, self.n2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.gate, self.down = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 12)
        self.scale = nn.Parameter(torch.rand(12) + 0.5)
        self.head = nn.Linear(12, 4)
        self.heads = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        n, length, _ = x.shape
        q, k, v = self.qkv(self.n1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, length, -1))
        h = self.n2(x)
        x = x + self.scale * self.down(F.silu(self.up(h)) * self.gate(h))
        return self.head(x.mean(1))


class Layer(nn.Module):
    """nn.MultiheadAttention, whose projections are no layers, between raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.raw, self.bias = nn.Parameter(torch.randn(6, 8) / 3), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x.flatten(1).view(-1, 4, 12))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.tanh(F.linear(x, self.raw, self.bias)).mean(1))


class Words(nn.Module):
    """A table of words, recurrent layers of both kinds; the words come of the image's pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.lstm, self.gru = nn.LSTM(8, 6, 2, batch_first=True), nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = (x[:, :, 0].flatten(1).abs() * 5).long().clamp(max=10)
        return self.head(self.gru(self.lstm(self.table(words))[0])[0].mean(1))


class Mixed(nn.Module):
    """What is left: transposed grouped convolutions, two channels for each that is read, attention
    over others' keys, both directions of a recurrent layer, a cell.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.wide, self.up = nn.Conv2d(12, 12, 1), nn.ConvTranspose2d(12, 8, 2, 2, groups=2)
        self.other = nn.Linear(6, 10)
        self.attention = nn.MultiheadAttention(8, 2, kdim=10, vdim=10, batch_first=True)
        self.lstm = nn.LSTM(8, 5, bidirectional=True, batch_first=True)
        self.cell, self.head = nn.GRUCell(10, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.elu(self.stem(x))
        keys = torch.tanh(self.other(x.flatten(2).transpose(1, 2)))
        x = F.elu(self.up(F.elu(self.wide(F.elu(self.twice(x))))))
        x = x.mean(2).transpose(1, 2)
        x = x + self.attention(x, keys, keys, need_weights=False)[0]
        x = self.lstm(x)[0]
        return self.head(self.cell(x[:, 0], self.cell(x[:, 1])))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "tokens": Tokens,
    "layer": Layer,
    "words": Words,
    "mixed": Mixed,
}


def network(name: str, seed: int = 0) -> nn.Module:
    """A network in float64 and evaluation mode, with all weights, norms' too, at random."""
    generator = torch.Generator().manual_seed(seed)
    model = NETWORKS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:  # few channels are never active
                parameter.copy_(0.3 * noise + 0.8)
        for buffer_name, buffer in model.named_buffers():
            if "running" in buffer_name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def images(count: int = 6, seed: int = 1) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)


def loss(model: nn.Module, x: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
    """A loss that is a sum over samples, of which only a part is run."""
    target = (torch.arange(len(x)) % 4)[part]
    out = model(x[part])
    return F.cross_entropy(out, target, reduction="sum") + out.square().sum() / 3


@cache
def combed(name: str) -> Groups:
    """The groups of all networks of a name: they hold for any weights."""
    return cpd.comb(network(name), images(2))


def collected(
    spec: Any, model: nn.Module, groups: Groups, parts: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    return cpd.importance.collect(spec, model, groups, parts, loss)
