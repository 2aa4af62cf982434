"""Training and testing, the same for every network and tool; and the time one pass takes."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cpd.data import digits
from cpd.losses.kd import kd

from .cells import SETTINGS, of
from .networks import SIDE

RECOVERY = 1000  # number of its first epoch: other shifts than those of the base's training


class Samples:
    """The digits of one seed as tensors; the epochs of training are made once each."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.data = digits(SIDE, seed, shift=2)
        self.labels = torch.tensor(self.data.train.labels)
        parts = (self.data.val, self.data.test)
        self.tested = torch.stack([part[k][0] for part in parts for k in range(len(part))])
        self.truth = torch.tensor([part[k][1] for part in parts for k in range(len(part))])
        plain = digits(SIDE, seed).train
        self.plain = torch.stack([plain[k][0] for k in range(len(plain))])
        self._epochs: dict[int, torch.Tensor] = {}

    def epoch(self, number: int) -> torch.Tensor:
        """Images (N, 1, SIDE, SIDE) of an epoch, shifted."""
        if number not in self._epochs:
            train = self.data.train
            train.set_epoch(number)
            self._epochs[number] = torch.stack([train[k][0] for k in range(len(train))])
        return self._epochs[number]

    def batches(self, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first batches of plain training images, with their labels."""
        size = SETTINGS["batch"]
        places = [slice(k * size, (k + 1) * size) for k in range(count)]
        return [(self.plain[place], self.labels[place]) for place in places]


def trained(model: nn.Module, samples: Samples, network: str, epochs: int) -> nn.Module:
    """Train as bases are trained."""
    return _train(model, samples, range(epochs), of(network)["rate"], None)


def recovered(
    model: nn.Module, samples: Samples, network: str, teacher: list[torch.Tensor] | None
) -> nn.Module:
    """Train for the few epochs that every pruned network gets; `teacher`: logits of each epoch."""
    epochs = range(RECOVERY, RECOVERY + SETTINGS["recovery_epochs"])
    return _train(model, samples, epochs, of(network)["recovery_rate"], teacher)


def taught(model: nn.Module, samples: Samples) -> list[torch.Tensor]:
    """Logits of a teacher for the epochs of recovery."""
    epochs = range(RECOVERY, RECOVERY + SETTINGS["recovery_epochs"])
    model.eval()
    with torch.no_grad():
        return [_in_parts(model, samples.epoch(number)) for number in epochs]


def tested(model: nn.Module, samples: Samples) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy on what was not trained on."""
    model.eval()
    with torch.no_grad():
        logits = _in_parts(model, samples.tested)
    loss = F.cross_entropy(logits, samples.truth)
    right = (logits.argmax(1) == samples.truth).double().mean()
    return round(float(right), 5), round(float(loss.nan_to_num(99.0, 99.0)), 4)


def share_of_time(model: nn.Module, base: nn.Module, rounds: int = 21) -> float:
    """Time of a pass over that of the unpruned network: eager, batch 64, one thread; the median of
    pairs of passes one after the other, which a machine that slows down for a while slows alike.
    """
    inputs = torch.randn(64, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    pair = [model.eval(), base.eval()]
    shares = []
    with torch.inference_mode():
        for _ in range(rounds):
            taken = []
            for network in pair:
                start = perf_counter()
                network(inputs)
                taken.append(perf_counter() - start)
            shares.append(taken[0] / taken[1])
    return round(median(shares[1:]), 4)


def _in_parts(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part) for part in images.split(200)])


def _train(
    model: nn.Module,
    samples: Samples,
    epochs: range,
    rate: float,
    teacher: list[torch.Tensor] | None,
) -> nn.Module:
    size, count = SETTINGS["batch"], len(samples.labels) // SETTINGS["batch"]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05, fused=True)
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=len(epochs) * count, pct_start=0.2
    )
    order = torch.Generator().manual_seed(samples.seed)
    model.to(memory_format=torch.channels_last)
    for place, number in enumerate(epochs):
        images = samples.epoch(number)
        mixed = torch.randperm(len(images), generator=order)
        model.train()
        for part in mixed[: count * size].split(size):
            logits = model(images[part].contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, samples.labels[part])
            if teacher is not None:
                loss = loss + kd(logits, teacher[place][part], temperature=2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.to(memory_format=torch.contiguous_format)
