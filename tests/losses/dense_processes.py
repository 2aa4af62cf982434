"""What the two-process test runs: ``[-m torch.distributed.run …] dense_processes.py OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset


class Data:
    """Four colours in float64, so that the order of a sum hardly shows."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(4, (32, 8, 8), generator=generator)
        colours = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        images = colours[labels].permute(0, 3, 1, 2)
        self.train = TensorDataset(images[:24], labels[:24])
        self.val = TensorDataset(images[24:], labels[24:])


def network() -> nn.Module:
    torch.manual_seed(5)
    layers = (nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    return nn.Sequential(*layers).double()


def run(losses: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of the student, the losses' modules and the metrics after six steps."""
    from cpd import losses as shelf
    from cpd import tasks
    from cpd.distill import Loop, Pieces, TrainOptions, snapshot

    data = Data()
    student, teacher = network(), network()
    pieces = Pieces(
        student, teacher, tasks.resolve("segmentation"), shelf.resolve(losses), data.train, data.val
    )
    optimizer = {"name": "SGD", "lr": 0.05, "momentum": 0.9}
    options = TrainOptions(batch_size=8, optimizer=optimizer, steps=6)
    loop = Loop(pieces, options, stage="distill", seed=1, keep="last")
    model = loop.run()
    assert loop.losses is not None
    metrics = torch.tensor(list(loop.state.history[-1]["metrics"].values()))
    learnt = {f"losses.{name}": t for name, t in snapshot(loop.losses.modules).items()}
    return {**snapshot(model), **learnt, "metrics": metrics}


def main(out: Path) -> None:
    """Run both, and let every process write what it has."""
    from safetensors.torch import save_file

    from cpd import _torchvision
    from cpd.distill.spread import leave

    _torchvision.ensure()
    torch.set_num_threads(1)
    learnt = run({"mgd": {"at": "0", "alpha": 0.001, "mask": 0.0}})
    remembered = run({"cirkd": {"at": "0", "pixels": 64, "regions": 16, "pool": 1}})
    parallel = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if parallel else 0
    for name, tensors in (("mgd", learnt), ("cirkd", remembered)):
        save_file({k: t.contiguous() for k, t in tensors.items()}, out / f"{name}-{rank}")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
