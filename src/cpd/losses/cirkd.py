"""CIRKD: similarities of pixels across images, in the batch and to what was seen before."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd._numbers import nonnegative, positive, whole
from cpd.losses._maps import labels_at, planes
from cpd.losses._state import Stateful, gathered

__all__ = ["CIRKD", "across", "recalled"]


def across(
    student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 0.1, pool: int = 2
) -> torch.Tensor:
    """Return 1/N² Σ_a Σ_b mean over pixels i of a of KL(P_t[i] ‖ P_s[i]), the mini-batch term.

    P[i] = softmax over the pixels j of image b of ⟨x_i, y_j⟩ / τ, on unit vectors x of image a and
    y of image b, after average pooling of ``pool`` × ``pool``.

    student, teacher: maps (N, C, H, W) of one resolution; the widths may differ.
    temperature: τ > 0. pool: ≥ 1.

    Returns a scalar in nats, ≥ 0. Raises InputError for resolutions that differ.

    Source: C. Yang, H. Zhou, Z. An, X. Jiang, Y. Xu, Q. Zhang, "Cross-Image Relational Knowledge
    Distillation for Semantic Segmentation", CVPR 2022, arXiv 2204.06986, equations 4 and 5.
    """
    positive("temperature", temperature)
    student, teacher = planes(student, teacher, same_width=False)
    own, taught = (_pairs(_unit(x, pool)) / temperature for x in (student, teacher))
    log_own, log_taught = F.log_softmax(own, dim=-1), F.log_softmax(taught, dim=-1)
    pixels = own.shape[-1]
    divergence = F.kl_div(log_own, log_taught, reduction="sum", log_target=True)
    return divergence / (len(student) ** 2 * pixels)


def _unit(maps: torch.Tensor, pool: int = 1) -> torch.Tensor:
    """Unit vectors of every pixel: (N, pixels, C)."""
    small = F.avg_pool2d(maps, pool, ceil_mode=True) if pool > 1 else maps
    return F.normalize(small.flatten(2), dim=1).transpose(1, 2)


def _pairs(unit: torch.Tensor) -> torch.Tensor:
    """Similarities of every pixel to those of every image: (N, N, pixels, pixels)."""
    return torch.einsum("apc,bqc->abpq", unit, unit)


def recalled(
    student: torch.Tensor,
    teacher: torch.Tensor,
    bank: torch.Tensor,
    *,
    temperature: float = 0.1,
    soften: float = 1.0,
) -> torch.Tensor:
    """Return T² · mean over pixels i of KL(R_t[i] ‖ R_s[i]), the term of a memory.

    R[i] = softmax over the bank's entries k of ⟨x_i, b_k⟩ / (τ T).

    student, teacher: unit vectors (pixels, C). bank: unit vectors (entries, C) of the teacher.
    temperature: τ > 0, of the similarities. soften: T > 0, of the distillation.

    Returns a scalar in nats, ≥ 0. Source: as ``across``, equations 8 to 11.
    """
    positive("temperature", temperature)
    positive("soften", soften)
    own, taught = (
        F.log_softmax(x @ bank.T / (temperature * soften), 1) for x in (student, teacher)
    )
    return F.kl_div(own, taught, reduction="batchmean", log_target=True) * soften**2


class Queue(torch.nn.Module):
    """The newest ``size`` unit vectors of each class; the oldest make room."""

    entries: torch.Tensor
    count: torch.Tensor

    def __init__(self, classes: int, size: int, channels: int) -> None:
        """An empty queue; memory: classes · size · channels numbers."""
        super().__init__()
        self.register_buffer("entries", torch.zeros(classes, size, channels))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))

    def push(self, label: int, vectors: torch.Tensor) -> None:
        """Add vectors (n, channels) of one class."""
        size = self.entries.shape[1]
        vectors = vectors[-size:]
        places = (int(self.count[label]) + torch.arange(len(vectors))) % size
        self.entries[label, places.to(self.entries.device)] = vectors.to(self.entries.dtype)
        self.count[label] += len(vectors)

    def sample(self, each: int) -> torch.Tensor:
        """Up to ``each`` entries of every class that has any: (entries, channels)."""
        size = self.entries.shape[1]
        most = min(int(self.count.max()), size)
        places = torch.randperm(most, device=self.entries.device)[:each]
        filled = places[None] < self.count[:, None]
        return self.entries[:, places][filled]


class CIRKD(Stateful):
    """batch · across + pixel · recalled(pixel queue) + region · recalled(region queue).

    Before comparing each image gives the queues, for each class in it, up to 16 of its pixels and
    the mean of them all, as the teacher sees them. With several processes every one stores what all
    saw. Only what was stored is compared to: there are no entries of noise at the beginning.

    batch, pixel, region: weights ≥ 0 of the terms. temperature: of similarities; soften: of the
        distillation. pixels, regions: entries kept for each class (2000 pixels for wide features).
        sampled_pixels, sampled_regions: entries compared to in a step, over all classes.

    Takes maps (N, C, H, W) of one resolution, and labels. Returns {"batch": …, "pixel": …,
    "region": …}. Raises InputError for what does not fit.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        batch: float = 1.0,
        pixel: float = 0.1,
        region: float = 0.1,
        temperature: float = 0.1,
        soften: float = 1.0,
        pool: int = 2,
        pixels: int = 20000,
        regions: int = 2000,
        sampled_pixels: int = 4096,
        sampled_regions: int = 1024,
        update: int = 16,
    ) -> None:
        """``channels`` of the teacher's map, ``classes`` of the task."""
        super().__init__(channels, classes)
        self.weights = {"batch": batch, "pixel": pixel, "region": region}
        for name, value in self.weights.items():
            nonnegative(name, value)
        positive("temperature", temperature)
        positive("soften", soften)
        sizes = {"pool": pool, "pixels": pixels, "regions": regions, "update": update}
        sizes |= {"sampled_pixels": sampled_pixels, "sampled_regions": sampled_regions}
        for name, size in sizes.items():
            whole(name, size, 1)
        self.temperature, self.soften, self.pool, self.update = temperature, soften, pool, update
        self.pixels = Queue(classes, pixels, channels)
        self.regions = Queue(classes, regions, channels)
        self.each = {
            "pixel": sampled_pixels // classes + 1,
            "region": sampled_regions // classes + 1,
        }

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the three terms, and remember the teacher's view of this batch."""
        student, teacher = planes(student, teacher)
        where = labels_at(labels, student.shape).flatten(1)
        own, taught = _unit(student), _unit(teacher)
        self._remember(gathered(taught), gathered(where))
        known = (where >= 0) & (where < self.classes)
        own, taught = own[known], taught[known]
        terms = {"batch": across(student, teacher, temperature=self.temperature, pool=self.pool)}
        for name, queue in (("pixel", self.pixels), ("region", self.regions)):
            bank = queue.sample(self.each[name]) if len(own) else taught
            terms[name] = own.sum() * 0
            if len(bank):
                terms[name] = recalled(
                    own, taught, bank, temperature=self.temperature, soften=self.soften
                )
        return {name: self.weights[name] * term for name, term in terms.items()}

    @torch.no_grad()
    def _remember(self, unit: torch.Tensor, where: torch.Tensor) -> None:
        """Fill both queues from unit vectors (N, pixels, C) and labels (N, pixels)."""
        # The same on every process, whatever their own generators are at.
        seed = int(self.pixels.count.sum()) + int(self.regions.count.sum())
        generator = torch.Generator().manual_seed(seed)
        for vectors, labels in zip(unit, where, strict=True):
            for label in labels.unique().tolist():
                if not 0 <= label < self.classes:
                    continue
                mine = vectors[labels == label]
                self.regions.push(label, F.normalize(mine.mean(dim=0, keepdim=True), dim=1))
                drawn = torch.randperm(len(mine), generator=generator)[: self.update]
                self.pixels.push(label, mine[drawn.to(mine.device)])
