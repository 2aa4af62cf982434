"""Group Fisher: per-sample gradients of a channel's mask, summed over coupled consumers, then
squared.
"""

from __future__ import annotations

import torch

from ..errors import MissingGradient
from ..groups import CouplingGroup
from ._members import Tensors, first_tier, gradient_of, held_tensors, mask_gradient, sum_over
from ._places import Place, Reading, Watching
from .base import Importance, Scores, processes


def fisher() -> Importance:
    r"""Score of "Group Fisher Pruning for Practical Network Compression" (Liu et al., ICML 2021).

    The mask m_c of a channel multiplies the inputs of all layers that read it. Its gradient for
    sample n is

        g[n, c] = sum over consumers, sum over places:  a[n, c, place] * dL_n/da[n, c, place]

    and the score, an estimate of the loss's second derivative in m_c, is sum_n g[n, c]^2, added up
    over backward passes and processes. Consumers are the layers that read the channel; channels
    that none reads are scored behind the norm that scales them, or else by the layers that make
    them, on their outputs. `dL_n` is taken from the batch's mean loss as it is: multiply by the
    squared batch size for per-sample losses.

    A weight that is used outside any layer shows no activations. The sum over its samples is then
    taken from its gradient, sum_w w * dL/dw, and squared as one: near a minimum, where samples'
    gradients do not pull one way, its expectation is the same.

    Raises `MissingGradient` where a group has no gradient.
    """
    return Fisher()


Part = tuple[torch.Tensor, torch.Tensor]  # values (rows, size), and the channels they cover (size,)


class Fisher(Watching):
    """See `fisher`. Under data parallel each process's loss is the mean over its own samples."""

    needs_gradient = True

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[Place, torch.Tensor] = {}

    def places(self) -> set[Place]:
        """Return the inputs of readers, and what stands in for channels that none reads."""
        _, groups = self.watched
        found: set[Place] = set()
        for group in groups:
            left = torch.ones(group.size, dtype=torch.bool)
            for tier in self.readings[group.name]:
                shown = [r for r in tier if r.main and r.place is not None and left.any()]
                found |= {r.place for r in shown if r.place is not None}
                for reading in shown:
                    left &= ~reading.covers(group.size)
        return found

    def take(self, place: Place, value: torch.Tensor, axis: int) -> torch.Tensor | None:
        """Watch the gradient that comes back; that of an input is this reader's alone."""
        if not value.requires_grad or not torch.is_grad_enabled():
            return None
        shown = value.view_as(value) if place.role == "in" else value
        # an output may be changed in place afterwards
        kept = shown.detach() if place.role == "in" else value.detach().clone()
        rows = self.rows
        shown.register_hook(lambda gradient: self._note(place, kept, gradient, axis, rows))
        return shown if place.role == "in" else None

    def _note(
        self, place: Place, value: torch.Tensor, gradient: torch.Tensor, axis: int, rows: int
    ) -> None:
        """Keep a * dL/da per sample and channel: (batch, channels)."""
        with torch.no_grad():
            product = value * gradient
            if axis == 0 or product.shape[0] % rows:
                found = sum_over(product, [k for k in range(product.ndim) if k != axis])[None]
            else:  # windows of one sample follow each other along axis 0
                rest = [k for k in range(1, product.ndim) if k != axis]
                found = sum_over(product, rest)
                found = found.reshape(rows, -1, found.shape[-1]).sum(1)
            found = found.double()
            known = self._found.get(place)
            self._found[place] = found if known is None else _together(known, found)

    def fresh(self) -> None:
        """Forget what a backward pass left that was not observed."""
        self._found = {}

    def reset(self) -> None:
        """Forget the sums."""
        super().reset()
        self._found = {}

    def observe(self) -> None:
        """Square what the last backward pass left, and add it up."""
        model, groups = self.watched
        tensors = held_tensors(model)
        if self.scale != 1:
            self._found = {place: found / self.scale for place, found in self._found.items()}
        for group in groups:
            self._require(group, tensors)
            samples, batch = _ordered(self._tiers(group, tensors))
            self.add(group.name, first_tier(samples).square().sum(0))
            if self.whole:  # until then gradients are those of the parts so far
                self.add(f"{group.name}|parameters", first_tier(batch)[0].square())
        self._found = {}

    def _require(self, group: CouplingGroup, tensors: Tensors) -> None:
        readings = [reading for tier in self.readings[group.name] for reading in tier]
        if not any(
            reading.place in self._found or gradient_of(reading.member.tensor, tensors) is not None
            for reading in readings
        ):
            raise MissingGradient(
                f"no gradient reached the layers of group {group.name!r}. Call observe() after "
                "loss.backward() of a forward pass in which gradients were enabled."
            )

    def _tiers(self, group: CouplingGroup, tensors: Tensors) -> list[tuple[Part, Part]]:
        """Return what each tier tells, as far as channels are left that readers do not tell of and
        no tier before it showed by sample.
        """
        parts: list[tuple[Part, Part]] = []
        left = torch.ones(group.size, dtype=torch.bool)
        for tier in self.readings[group.name]:
            seen, told = self._parts(group, tier, tensors)
            left &= ~(seen[1] | told[1]) if not parts else ~seen[1]
            parts.append((seen, told))
            if not left.any():
                break
        return parts

    def _parts(
        self, group: CouplingGroup, tier: list[Reading], tensors: Tensors
    ) -> tuple[Part, Part]:
        """Return what layers showed of each sample, (batch, size), and what parameters' gradients
        tell of the batch, (1, size), each with the channels it covers.
        """
        size = group.size
        total = torch.zeros(1, size, dtype=torch.float64)
        covered, others = torch.zeros(size, dtype=torch.bool), []
        for reading in tier:
            found = self._found.get(reading.place) if reading.place is not None else None
            if found is None:
                others.append(reading)
            elif reading.main:
                total = _together(total.to(found.device), reading.onto(found, size))
                covered |= reading.covers(size)
        left = [r for r in others if gradient_of(r.member.tensor, tensors) is not None]
        rest = mask_gradient([r.member for r in left], tensors, size)
        held = torch.zeros(size, dtype=torch.bool)
        for reading in left:
            held |= reading.covers(size)
        return (total, covered), (rest[None], held)

    def shared(self, name: str) -> bool:
        """What comes of parameters' gradients is the same everywhere."""
        return name.endswith("|parameters")

    def finished(self, sums: Scores) -> Scores:
        """Add both parts; a process's share of the batch weighs by the share."""
        _, groups = self.watched
        scale = processes() ** 2
        return {g.name: sums[g.name] / scale + sums[f"{g.name}|parameters"] for g in groups}


def _ordered(parts: list[tuple[Part, Part]]) -> tuple[list[Part], list[Part]]:
    """Return what is known of samples, and of the batch, in the order in which it is believed.

    All readers of a channel belong together, however they are known. Elsewhere what was seen of
    single samples comes first.
    """
    (seen, told), *others = parts
    rows = max(len(values) for (values, _), _ in parts)
    device = next((p[0].device for pair in parts for p in pair if p[1].any()), seen[0].device)
    none = torch.zeros(1, seen[0].shape[1], dtype=torch.float64)
    read = seen[1] | told[1]
    samples = [(seen[0], read), *(part for part, _ in others), *((none, p[1]) for _, p in others)]
    batch = [(told[0], read), *((none, p[1]) for p, _ in others), *(part for _, part in others)]
    wide = [(_rows(values.to(device), rows), held.to(device)) for values, held in samples]
    return wide, [(values.to(device), held.to(device)) for values, held in batch]


def _rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    """A sum over samples stands in the first row."""
    if len(values) == rows:
        return values
    return torch.cat([values, values.new_zeros(rows - len(values), values.shape[1])])


def _together(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Add what is known by sample and what is known of the batch only."""
    rows = max(len(a), len(b))
    return _rows(a, rows) + _rows(b, rows)
