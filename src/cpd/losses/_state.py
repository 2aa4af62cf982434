"""Losses that remember or learn: a module for each point, made once its channels are known."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Stateful", "gathered", "generator", "hidden", "rebuilt"]


class Stateful(nn.Module):
    """A loss with memory or parameters: ``loss(student, teacher, labels) -> terms by name``.

    Made with the channels of the teacher's map and the number of classes; the student comes in the
    teacher's coordinates, with zeros where its channels were removed. Buffers and parameters are
    part of a checkpoint, parameters are trained with the student.
    """

    def __init__(self, channels: int, classes: int) -> None:
        """``channels``: of the teacher's map. ``classes``: of the logits."""
        super().__init__()
        self.channels, self.classes = channels, classes


def generator(channels: int) -> nn.Sequential:
    """Two convolutions of 3 × 3 with a ReLU between, from a map to a map of the same size."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def hidden(maps: torch.Tensor, mask: float) -> torch.Tensor:
    """Set each position of maps (N, C, H, W) to zero over all channels with the chance ``mask``."""
    return maps * (torch.rand_like(maps[:, :1]) >= mask)


def rebuilt(made: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return 1/N Σ (made − teacher)², summed over channels and positions; the teacher is fixed."""
    return (made - teacher.detach()).square().sum() / len(made)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of every process along axis 0, without gradient; on one process, the tensor."""
    tensor = tensor.detach().contiguous()
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor)
    return torch.cat(parts)
