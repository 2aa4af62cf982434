"""One of two processes: `python two.py RANK FOLDER`; each scores its half of a batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from cpd.importance import resolve
from importance.networks import NETWORKS, combed, images, network
from importance.specs import VARIANTS


def scores(spec: Any, kind: str, x: torch.Tensor, world: int) -> dict[str, torch.Tensor]:
    """Scores of the mean loss over a share of a batch, gradients averaged over processes."""
    model, importance = network(kind), resolve(spec)
    importance.start(model, combed(kind))
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
    found = importance.scores()
    importance.close()
    return found


def main(rank: int, folder: Path) -> None:
    """Let the first process write what both found."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    found = {}
    for number, spec in enumerate(VARIANTS):
        for kind in NETWORKS:
            for name, vector in scores(spec, kind, images(6)[rank::2], 2).items():
                found[f"{number} {kind} {name}"] = vector
    if rank == 0:
        save_file(found, folder / "scores")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
