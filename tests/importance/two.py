"""One of two processes: `python two.py RANK FOLDER`; each scores its half of a batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from cpd.importance import resolve
from importance.networks import NETWORKS, combed, images, network
from importance.specs import VARIANTS

# What a run that goes on from a checkpoint has to find again, and where.
RESUMED: list[Any] = [
    "activation",
    "fisher",
    {"hessian": {"mended": True}},
    {"hutchinson": {"kind": "diagonal", "seed": 3}},
    "kfac",
    "magnitude",
    "obd",
    "taylor",
    "variance",
    "wanda",
]
KINDS = ("residual", "layer")


def scores(
    spec: Any, kind: str, batches: list[torch.Tensor], world: int, *, broken: bool = False
) -> dict[str, torch.Tensor]:
    """Scores of mean losses over shares of batches, gradients averaged over processes.

    ``broken``: after each batch another run goes on, from what the first process would have saved.
    """
    model, importance = network(kind), resolve(spec)
    importance.start(model, combed(kind))
    for x in batches:
        model.zero_grad()
        value = model(x).square().sum() / len(x)
        if hasattr(importance, "before_backward"):
            importance.before_backward(value)
        value.backward()
        if world > 1:
            gradients = [parameter.grad for parameter in model.parameters()]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            torch.distributed.all_reduce(flat)  # at once: each exchange waits for the other process
            torch.nn.utils.vector_to_parameters(flat / world, gradients)
        importance.observe()
        if broken:
            state = [importance.state()]
            torch.distributed.broadcast_object_list(state)
            importance.close()
            importance = resolve(spec)
            importance.start(model, combed(kind))
            importance.load_state(state[0])
    found = importance.scores()
    importance.close()
    return found


def shares(rank: int = 0, world: int = 1) -> list[torch.Tensor]:
    """What one of the processes gets of two batches."""
    return [batch[rank::world] for batch in images(12).split(6)]


def cases(rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """All scores by "importance, network, group"; "resumed" are those over two batches, where
    several processes begin anew after each.
    """
    found = {}
    for spec in VARIANTS:
        for kind in NETWORKS:
            for name, vector in scores(spec, kind, shares(rank, world)[:1], world).items():
                found[f"{spec} {kind} {name}"] = vector
    for spec in RESUMED:
        for kind in KINDS:
            given = shares(rank, world)
            for name, vector in scores(spec, kind, given, world, broken=world > 1).items():
                found[f"{spec} {kind} {name} resumed"] = vector
    return found


def main(rank: int, folder: Path) -> None:
    """Let the first process write what both found."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    found = cases(rank, 2)
    if rank == 0:
        save_file(found, folder / "scores")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
