"""Refitting one layer: which weights give from the inputs that are left what all inputs gave."""

from __future__ import annotations

import torch

from .readers import Reader


class Fit:
    """The sums that a layer is mended from: of what it reads, and of what it has lost.

    `weight` and `alive` have the weight's shape. `centred`: means are taken by a bias or a norm.
    """

    def __init__(
        self, reader: Reader, weight: torch.Tensor, alive: torch.Tensor, *, centred: bool
    ) -> None:
        self.reader, self.like, self.centred = reader, weight, centred
        self.alive = reader.matrix(alive)
        self.generator = torch.Generator().manual_seed(0)
        self.lost: torch.Tensor | None = None
        self.read: torch.Tensor | None = None
        self.pilot: torch.Tensor | None = None
        self.count = self.drawn = 0
        self.sums: list[torch.Tensor] = []

    @property
    def regular(self) -> bool:
        """Whether every output that is left reads the same inputs of its group."""
        grid = self.alive.any(2, keepdim=True) & self.alive.any(1, keepdim=True)
        return bool((grid == self.alive).all())

    def add(self, source: torch.Tensor, lost: torch.Tensor, rows: float) -> None:
        """Add a batch: what the layer reads now, and what it puts out less than it did. `rows`: how
        many entries the weights are fitted from, at most.
        """
        missing = self.reader.outputs(lost)
        share = rows / max(len(missing), 1)
        missing = missing.to(torch.promote_types(missing.dtype, torch.float32))
        total = missing.sum(0, dtype=torch.float64)
        self.lost = total if self.lost is None else self.lost + total
        self.count += len(missing)
        if not self.regular:
            return
        read = self.reader.inputs(source).to(missing.dtype)
        read = read * self.alive.any(1).to(read.dtype)
        missing = missing * self.alive.any(2).to(missing.dtype)
        mean = read.sum(0, dtype=torch.float64)
        self.read = mean if self.read is None else self.read + mean
        if share < 1:
            drawn = torch.rand(len(read), generator=self.generator) < share
            drawn = drawn.to(read.device)
            if not bool(drawn.any()):
                return
            read, missing = read[drawn], missing[drawn]
        self._multiply(read, missing)

    def _multiply(self, read: torch.Tensor, missing: torch.Tensor) -> None:
        if self.pilot is None:  # near the mean, so that little is lost to cancellation
            self.pilot = read.mean(0) if self.centred else torch.zeros_like(read[0])
        read = (read - self.pilot).transpose(0, 1)
        missing = missing.transpose(0, 1)
        found = [
            read.transpose(1, 2) @ read,
            missing.transpose(1, 2) @ read,
            read.sum(1),
            missing.sum(1),
        ]
        self.drawn += read.shape[1]
        known = self.sums or [torch.zeros(()).to(found[0])] * len(found)
        self.sums = [a + b.double() for a, b in zip(known, found, strict=True)]

    def solved(self, damping: float) -> torch.Tensor | None:
        """Return what to add to the weight, in its shape; None where it cannot be fitted."""
        if not self.sums or not self.drawn:
            return None
        gram, cross, read, missing = (value / self.drawn for value in self.sums)
        if self.centred:
            gram = gram - read[:, :, None] * read[:, None, :]
            cross = cross - missing[:, :, None] * read[:, None, :]
        live = self.alive.any(1)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        mean = diagonal.sum(1) / live.sum(1).clamp_min(1)
        ridge = torch.where(mean > 0, damping * mean, 1.0)[:, None].expand_as(diagonal)
        gram = gram + torch.diag_embed(torch.where(live, ridge, 1.0))
        change = torch.linalg.solve(gram, cross.transpose(1, 2)).transpose(1, 2)
        return self.reader.weight_of(change * self.alive, self.like)

    def shift(self, change: torch.Tensor | None) -> torch.Tensor:
        """Return what to add to the bias: the mean that is missing, but for what `change` gives."""
        assert self.lost is not None
        mean = self.lost / self.count
        if change is not None and self.read is not None:
            matrix = self.reader.matrix(change).double()
            mean = mean - (matrix @ (self.read / self.count)[:, :, None])[:, :, 0]
        return mean.reshape(-1)
