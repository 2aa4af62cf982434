"""Af-DCD: dense contrast between patches and channel groups, without augmentation."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd._numbers import nonnegative, positive, share, whole
from cpd.errors import InputError
from cpd.losses._maps import planes
from cpd.losses._state import Stateful, generator, hidden, rebuilt

__all__ = ["AfDCD", "contrast"]


def contrast(
    made: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 0.07,
    groups: int = 16,
    patch: int = 4,
) -> torch.Tensor:
    """Return 1/(N · H · W) Σ −log(e⁺ / (e⁺ + Σ e⁻)) over every vector of ``made``.

    The map is cut into patches of ``patch`` × ``patch`` positions and its channels into ``groups``
    runs, so a patch holds patch² · groups vectors of C / groups values. For a vector u:
    e⁺ = exp(−‖u − v‖₁ / τ) with v the teacher's vector of the same position and group;
    e⁻ the same for the teacher's vectors of every other group in the patch, at all its positions.

    made, teacher: maps (N, C, H, W) of one shape, with C a multiple of ``groups``; rows and columns
        beyond the last whole patch do not count. temperature: τ > 0.

    Returns a scalar in nats, ≥ 0. Raises InputError for shapes that differ, C that is no multiple
    of ``groups``, and maps smaller than a patch.

    Source: X. Fan, C. Li, et al., "Augmentation-Free Dense Contrastive Knowledge Distillation for
    Efficient Semantic Segmentation", NeurIPS 2023, equation 9 (omni-contrasting), with the L1
    distance of the authors' code.
    """
    positive("temperature", temperature)
    made, teacher = planes(made, teacher)
    count, channels, high, wide = made.shape
    if channels % groups or min(high, wide) < patch:
        raise InputError(
            f"af_dcd needs channels in {groups} equal groups and at least {patch} x {patch} "
            f"positions after pooling, got a map {tuple(made.shape)}; set groups, patch or pool."
        )
    high, wide = high - high % patch, wide - wide % patch
    own, taught = (_vectors(x[..., :high, :wide], groups, patch) for x in (made, teacher))
    near = -torch.cdist(own, taught, p=1.0) / temperature  # (patches, vectors, vectors)
    group = torch.arange(groups, device=near.device).repeat(patch * patch)
    same = group[:, None] == group[None, :]
    right = near.diagonal(dim1=1, dim2=2)
    wrong = near.masked_fill(same, -torch.inf)
    total = torch.logsumexp(torch.cat([right[..., None], wrong], dim=2), dim=2)
    return (total - right).sum() / (count * high * wide)


def _vectors(maps: torch.Tensor, groups: int, patch: int) -> torch.Tensor:
    """(N, C, H, W) → (N · patches, patch² · groups, C / groups), groups fastest."""
    count, channels, high, wide = maps.shape
    cut = maps.reshape(
        count, groups, channels // groups, high // patch, patch, wide // patch, patch
    ).permute(0, 3, 5, 4, 6, 1, 2)
    return cut.reshape(-1, patch * patch * groups, channels // groups)


class AfDCD(Stateful):
    """feature / N Σ (G(s · M) − t)² + contrast · C(G(s · M), t), see ``contrast`` and ``MGD``.

    The contrast is taken after max pooling of ``pool`` × ``pool`` (0 or 1: none).

    feature: weight of the reconstruction, 1·10⁻⁶ to 2·10⁻⁶. contrastive: 0.04 for ADE20K, 0.005
        for Cityscapes. mask: chance of a position to be hidden. The authors add kd with 0.5 to 1.

    Returns {"feature": …, "contrast": …}.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        feature: float = 2e-6,
        contrastive: float = 0.04,
        temperature: float = 0.07,
        mask: float = 0.75,
        groups: int = 16,
        patch: int = 4,
        pool: int = 4,
    ) -> None:
        """``channels`` of the teacher's map; see the class for the options."""
        nonnegative("feature", feature)
        nonnegative("contrastive", contrastive)
        positive("temperature", temperature)
        share("mask", mask)
        whole("groups", groups, 2)
        whole("patch", patch, 1)
        whole("pool", pool, 0)
        super().__init__(channels, classes)
        self.weights = {"feature": feature, "contrast": contrastive}
        self.mask, self.pool = mask, pool
        self.options = {"temperature": temperature, "groups": groups, "patch": patch}
        self.generator = generator(channels)

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor,  # noqa: ARG002  (every stateful loss is called with labels)
    ) -> dict[str, torch.Tensor]:
        """Return both terms."""
        student, teacher = planes(student, teacher)
        made = self.generator(hidden(student, self.mask))
        whole = rebuilt(made, teacher)
        if self.pool > 1:
            made, teacher = F.max_pool2d(made, self.pool), F.max_pool2d(teacher, self.pool)
        apart = contrast(made, teacher, **self.options)  # type: ignore[arg-type]
        return {
            "feature": self.weights["feature"] * whole,
            "contrast": self.weights["contrast"] * apart,
        }
