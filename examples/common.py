"""What the examples share: a small network, digits in a fixed order, and how it is pruned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cpd.data import digits

BATCH, STEPS = 64, 90
PRUNING: dict[str, Any] = {
    "importance": "fisher",
    "target": "macs=0.5",
    "interval": 15,
    "events": 3,
}
EXAMPLE = {"pixel_values": torch.zeros(2, 1, 16, 16)}


class Net(nn.Module):
    """Two stages with a shortcut; gives logits, and with labels the loss as well."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.inside = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
        )
        self.head = nn.Linear(16, 10)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Logits (N, 10) of images (N, 1, H, W)."""
        found = self.stem(pixel_values).relu()
        found = (found + self.inside(found)).relu()
        logits: torch.Tensor = self.head(found.mean((2, 3)))
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Ordered(Dataset[dict[str, torch.Tensor]]):
    """The training digits of several epochs in one fixed order, as mappings."""

    def __init__(self) -> None:
        """The same order in every run."""
        self.data = digits(size=16).train
        generator = torch.Generator().manual_seed(0)
        count = len(self.data)
        epochs = range(-(-BATCH * STEPS // count))
        order = torch.cat([torch.randperm(count, generator=generator) for _ in epochs])
        self.order = order[: BATCH * STEPS].tolist()

    def __len__(self) -> int:
        """Samples of all steps."""
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One image and its label."""
        image, label = self.data[self.order[index]]
        return {"pixel_values": image, "labels": torch.tensor(label)}


def network() -> Net:
    """The network, the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Momentum, at a constant rate."""
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def loader() -> DataLoader[dict[str, torch.Tensor]]:
    """The batches in their order."""
    return DataLoader(Ordered(), BATCH)


def accuracy(model: nn.Module) -> float:
    """Share of the held-out digits that a network gets right."""
    data = digits(size=16).test
    images = torch.stack([data[k][0] for k in range(len(data))])
    labels = torch.tensor([data[k][1] for k in range(len(data))])
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())
