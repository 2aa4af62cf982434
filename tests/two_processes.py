"""What the two-process tests run: ``python -m torch.distributed.run … MODE OUT``."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

SAMPLES = 96


class Split:
    """Data of Gaussian blobs; float64, so that the order of a sum hardly shows."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        centres = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        targets = torch.arange(SAMPLES + 62) % 4
        noise = torch.randn(len(targets), 3, 8, 8, generator=generator, dtype=torch.float64)
        inputs = centres[targets] + 2 * noise
        self.train = TensorDataset(inputs[:SAMPLES], targets[:SAMPLES])
        self.val = TensorDataset(inputs[SAMPLES:-31], targets[SAMPLES:-31])
        self.test = TensorDataset(inputs[-31:], targets[-31:])
        self.num_classes = 4
        self.input_shape = (3, 8, 8)


def network() -> nn.Module:
    """A network without batch statistics, so that a batch may be shared out."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )
        return nn.Sequential(*layers).double()


OPTIONS = {
    "batch_size": 16,
    "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
    "schedule": "CosineAnnealingLR",
    "warmup": 2,
    "accumulate": 2,
}


def distilled() -> dict[str, torch.Tensor]:
    """Weights and metrics after three epochs of distillation."""
    from cpd.distill import distill

    options = {**OPTIONS, "epochs": 3}
    result = distill(network(), teacher=network(), data=Split(), options=options, seed=1)
    metrics = torch.tensor([entry["metrics"]["top1"] for entry in result.history])
    return {**result.model.state_dict(), "metrics": metrics}


class Stop:
    """Breaks a run off, on every process."""

    def after_step(self, state):
        if state.step == 8:
            raise KeyboardInterrupt


def taught(folder: Path, parallel: str) -> dict[str, torch.Tensor]:
    """Weights of a cut network after distillation from the whole one, broken off and gone on with.

    Widths, batches and parts are uneven; a checkpoint lies behind the first epoch.
    """
    import cpd
    from cpd.distill import distill

    example = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    small, plan = cpd.prune(network(), example, importance="magnitude", target="macs=0.3")
    assert any(width.after % 2 for width in plan.widths)
    data = Split()
    inputs, targets = data.train.tensors
    data.train = TensorDataset(inputs[:90], targets[:90])
    options = {
        **OPTIONS,
        "accumulate": 3,
        "clip": 1.0,
        "optimizer": {"name": "AdamW", "lr": 0.01},
        "epochs": 3,
        "parallel": parallel,
    }
    given = {"data": data, "teacher": network(), "options": options, "seed": 1}
    broken: dict[str, Any] = {"checkpoint": folder / "checkpoint", "resume": True}
    with contextlib.suppress(KeyboardInterrupt):
        distill(small, **given, **broken, callbacks=(Stop(),))
    assert (folder / "checkpoint").exists()
    result = distill(small, **given, **broken)
    assert type(result.model) is type(small)
    assert result.history[-1]["step"] == 15
    metrics = torch.tensor([entry["metrics"]["top1"] for entry in result.history])
    return {**result.model.state_dict(), "metrics": metrics}


def compressed(folder: Path) -> dict[str, torch.Tensor]:
    """Weights after the whole way; the plan lies in the folder."""
    import cpd

    loop = {name: value for name, value in OPTIONS.items() if name != "warmup"}
    result = cpd.compress(
        network(),
        data=Split(),
        target="macs=0.5",
        importance="hessian",
        repair="auto",
        interval=4,
        events=4,
        prune={**loop, "schedule": None},
        recover={**OPTIONS, "epochs": 2},
        seed=1,
        output=folder,
        onnx=False,
    )
    return result.model.state_dict()


def pruned(folder: Path) -> dict[str, torch.Tensor]:
    """Weights after pruning in a loop of one's own, data parallel; the plan lies in the folder."""
    import cpd

    parallel, rank, world = torch.distributed.is_initialized(), 0, 1
    model: nn.Module = network()
    if parallel:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    example = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    pruner = cpd.Pruner(
        model, example, importance="fisher", target="macs=0.5", interval=3, events=3
    )
    inputs, targets = Split().train.tensors
    for step in range(10):
        rows = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:16]
        parts = rows[rank::world].chunk(2)
        for part in parts:
            loss = nn.functional.cross_entropy(model(inputs[part]), targets[part]) / len(parts)
            loss.backward()
            if part is not parts[-1]:
                pruner.observe(whole=False)
        pruner.step(optimizer)
    assert pruner.plan is not None
    if rank == 0:
        (folder / "run").mkdir(parents=True, exist_ok=True)
        (folder / "run" / "plan.json").write_text(pruner.plan.to_json())
    return pruner.finish().state_dict()


def of_gloo() -> list[str]:
    """Name the threads of gloo in this process; where the system does not tell, none."""
    names = [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def main(mode: str, out: Path) -> None:
    """Run, and let the main process write what came out."""
    from safetensors.torch import save_file

    from cpd import _torchvision
    from cpd.distill.spread import leave

    _torchvision.ensure()
    torch.set_num_threads(1)
    if mode == "pruner" and "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    modes = {
        "distill": distilled,
        "ddp": lambda: taught(out, "ddp"),
        "fsdp": lambda: taught(out, "fsdp"),
        "pruner": lambda: pruned(out),
    }
    weights = modes.get(mode, lambda: compressed(out / "run"))()
    parallel = torch.distributed.is_initialized()
    if not parallel or torch.distributed.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "weights")
    leave()
    if mode != "fsdp":  # PyTorch's caches of shards keep the group
        assert not of_gloo(), f"{of_gloo()}: may outlive the interpreter, and abort it"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
