"""A plain PyTorch loop: one line where the optimizer was stepped.

python -m examples.plain
"""

from __future__ import annotations

from torch import nn

import cpd
from examples.common import EXAMPLE, PRUNING, accuracy, loader, network, optimizer_of


def main() -> tuple[nn.Module, cpd.Plan]:
    """Prune while training; return the small network and the plan."""
    model = network().train()
    optimizer = optimizer_of(model)
    pruner = cpd.Pruner(model, EXAMPLE, **PRUNING)
    for batch in loader():
        loss = model(**batch)["loss"]
        loss.backward()
        event = pruner.step(optimizer)
        if event is not None:
            print(event)
    small = pruner.finish()
    assert pruner.plan is not None
    return small, pruner.plan


if __name__ == "__main__":
    found, plan = main()
    print(plan)
    print(f"accuracy {accuracy(found):.1%}")
