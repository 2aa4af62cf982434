"""The paper's importance."""

from __future__ import annotations

import torch
from torch import fx, nn

from ..groups import Groups, Member
from ._members import (
    Tensors,
    covered,
    covered_by,
    first_tier,
    gradient_of,
    held_tensors,
    made_by,
    mask_gradient,
    per_channel,
    require_gradients,
    sum_over,
    tiers,
)
from .base import Accumulated, Importance, Scores


def hessian(*, mended: bool = False) -> Importance:
    r"""Score of "Comb, Prune, Distill" (arXiv 2408.03046): an estimate of the Hessian's diagonal.

    For a parameter p whose rows r make the channels c of a group, after every backward pass:

        S_p[c] += sum_{r that make c} (sum_{w in p[r, ...]} w * dL/dw)^2 / A_p

    with A_p the sizes of all axes of the activation that the layer puts out but its axis 1, per
    sample, times the channels still there. The group's score is the mean over its members, divided
    by the number of members and followers (the tensors that read the channels). Gradients are those
    of the whole mini-batch. A channel has several rows where one tensor makes more of it: thirds
    for queries, keys and values, gates of recurrent layers. Each row is squared by itself and then
    summed, as the released code does with the thirds. Shapes: one vector (size,) per group.

    `mended`: without two weaknesses of the above. Axis 1 holds the channels of images, but the
    positions of tokens (batch, tokens, channels), so tokens were divided by their channels instead
    of their number; and the changes of the loss by rows and members were squared one by one,
    although they go together. Instead, with P the elements per sample of one channel where it is
    made,

        S[c] += (sum over all that read c, sum_{w that reads c} w * dL/dw)^2 / (P * channels)

    The inner sum is the gradient of one mask on channel c, as in "Group Fisher Pruning" (Liu et
    al., ICML 2021), read from parameters' gradients. Channels that no parameter reads are taken
    behind the norm that scales them, or else where they are made.

    Raises `MissingGradient` where a group has no gradient.
    """
    return Hessian(mended=mended)


class Hessian(Accumulated):
    """See `hessian`. How many channels are left is counted once for each interval."""

    def __init__(self, *, mended: bool) -> None:
        super().__init__(self._mended if mended else self._paper, needs_gradient=True)
        self._kept: dict[str, int] = {}
        self._elements: dict[str, float] = {}
        self._covers: dict[tuple[str, int], torch.Tensor] = {}

    def start(self, model: nn.Module, groups: Groups) -> None:
        """Begin to watch a model."""
        super().start(model, groups)
        self._elements = _elements(groups)
        self._covers = {}

    def reset(self) -> None:
        """Forget the sums, and what was left."""
        super().reset()
        self._kept = {}

    def _paper(self, model: nn.Module, groups: Groups) -> Scores:
        tensors = held_tensors(model)
        require_gradients(tensors, groups)
        result = {}
        for group in groups:
            size, made = group.size, made_by(group)
            kept = self._left(group.name, made, tensors, size)
            total, held = _zeros(size, made, tensors), _zeros(size, made, tensors)
            count = len(group.members) - len(made)  # followers
            for member in made:
                gradient = gradient_of(member.tensor, tensors)
                if gradient is None:
                    continue
                change = tensors[member.tensor].detach() * gradient
                elements = self._elements.get(member.tensor, member.activation)
                total += _squared_rows(change, member, size) / (elements * kept)
                held += self._covered(group.name, member, size).to(held)
                count += 1
            result[group.name] = total / held.clamp_min(1) / max(count, 1)
        return result

    def _mended(self, model: nn.Module, groups: Groups) -> Scores:
        tensors = held_tensors(model)
        require_gradients(tensors, groups)
        result = {}
        for group in groups:
            size, made = group.size, made_by(group)
            zeros = _zeros(size, made, tensors)
            found = []
            for tier in tiers(groups, group):
                mine = [m for m in tier if gradient_of(m.tensor, tensors) is not None]
                held = covered_by(mine, size).to(zeros.device)
                found.append((mask_gradient(mine, tensors, size).to(zeros), held))
            places = sum(m.activation for m in made) / len(made)
            kept = self._left(group.name, made, tensors, size)
            result[group.name] = first_tier(found).square() / (places * kept)
        return result

    def _covered(self, name: str, member: Member, size: int) -> torch.Tensor:
        """Return which channels a member holds; worked out once, for all backward passes."""
        key = (name, id(member))
        if key not in self._covers:
            self._covers[key] = covered(member, size)
        return self._covers[key]

    def _left(self, name: str, members: list[Member], tensors: Tensors, size: int) -> int:
        """How many channels are still there: not all that makes them is zero."""
        if name not in self._kept:
            alive = _zeros(size, members, tensors)
            for member in members:
                values = tensors[member.tensor].detach()
                alive += per_channel(values != 0, member, size).to(alive)
            self._kept[name] = max(int((alive != 0).sum()), 1)
        return self._kept[name]


def _squared_rows(values: torch.Tensor, member: Member, size: int) -> torch.Tensor:
    """Return for each channel the sum over the rows that make it of the square of a row's sum."""
    varies = [axis for axis, length in enumerate(member.channel.shape) if length > 1]
    if len(varies) > 1:  # in groups of a convolution: all that makes one channel is one row
        return per_channel(values, member, size).square()
    rows = sum_over(values, [axis for axis in range(values.ndim) if axis not in varies])
    return per_channel(rows.double().square().reshape(member.channel.shape), member, size)


def _zeros(size: int, members: list[Member], tensors: Tensors) -> torch.Tensor:
    device = tensors[members[0].tensor].device
    return torch.zeros(size, dtype=torch.float64, device=device)


def _elements(groups: Groups) -> dict[str, float]:
    """Return for each tensor the elements per sample, over all axes but 0 and 1, of what the first
    call that reads it puts out.
    """
    found: dict[str, float] = {}
    for node in groups.trace.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or node.op == "placeholder" or value.ndim < 2:
            continue
        elements = float(value.shape[0]) / max(groups.trace.batch, 1)
        for length in value.shape[2:]:
            elements *= float(length)
        for arg in node.args:
            name = groups.trace.tensors.get(arg.name) if isinstance(arg, fx.Node) else None
            if name is not None:
                found.setdefault(name, elements)
    return found
