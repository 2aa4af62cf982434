"""The Trainer of transformers: a callback; and with a teacher, a Trainer that distills.

python -m examples.with_transformers
"""

from __future__ import annotations

import copy
import tempfile
from typing import TYPE_CHECKING, Any

from torch import nn

import cpd
from cpd.adapters.transformers import DistillTrainer, PruneCallback
from examples.common import (
    BATCH,
    EXAMPLE,
    PRUNING,
    Ordered,
    accuracy,
    loader,
    network,
    optimizer_of,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments


def arguments(folder: str, **changes: Any) -> TrainingArguments:
    """The settings of the other examples."""
    from transformers import TrainingArguments

    given = {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return TrainingArguments(**{**given, **changes})


def main() -> tuple[nn.Module, cpd.Plan]:
    """Prune while training; return the small network and the plan."""
    from transformers import Trainer

    model = network()
    pruner = cpd.Pruner(model, EXAMPLE, **PRUNING)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            args=arguments(folder),
            train_dataset=Ordered(),
            optimizers=(optimizer_of(model), None),
            callbacks=[PruneCallback(pruner)],
        ).train()
    small = pruner.finish()
    assert pruner.plan is not None
    return small, pruner.plan


def distilled() -> tuple[nn.Module, nn.Module]:
    """Train a teacher, prune a copy of it under it, cutting as it trains; return both."""
    teacher = network().train()
    optimizer = optimizer_of(teacher)
    for batch in loader():
        teacher(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    model = copy.deepcopy(teacher)
    pruner = cpd.Pruner(model, EXAMPLE, **PRUNING, cut_every=4)
    with tempfile.TemporaryDirectory() as folder:
        DistillTrainer(
            model=model,
            teacher=teacher,
            losses={"kd": {"temperature": 4.0}},
            args=arguments(folder, learning_rate=3e-3),
            train_dataset=Ordered(),
            callbacks=[PruneCallback(pruner)],
        ).train()
    return teacher, pruner.finish()


if __name__ == "__main__":
    found, plan = main()
    print(plan)
    print(f"accuracy {accuracy(found):.1%}")
    large, small = distilled()
    print(f"teacher {accuracy(large):.1%}, small network taught by it {accuracy(small):.1%}")
