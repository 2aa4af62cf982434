"""Optimal Brain Damage by channels, with the diagonal of K-FAC as curvature."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InputError
from ..groups import CouplingGroup, Member
from ._aggregate import aggregated, check_aggregate
from ._members import (
    check_members,
    gradient_of,
    held_tensors,
    parameters_of,
    per_channel,
    require_gradients,
    sum_over,
)
from ._places import Place, Watching
from .base import Importance, Scores, inner_model, processes

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def kfac(*, aggregate: str = "sum", members: str = "all") -> Importance:
    """1/2 * sum of w_oi^2 * E[a_i²] * sum of g_o² over a channel's weights.

    a: what a layer reads; g: the gradient of what it puts out, squared and summed over samples and
    positions. It is the diagonal of the Kronecker-factored Fisher information (Martens and Grosse,
    ICML 2015; Grosse and Martens for convolutions, ICML 2016) in the place of the curvature; by
    structures: Wang et al., "EigenDamage" (ICML 2019), C-OBD. Parameters that are no linear layer's
    and no convolution's count with the squared gradient of each batch, as in `obd`. Gradients are
    those of the batch's mean loss, as in `fisher`.

    Raises `MissingGradient` where a group has no gradient.
    """
    check_aggregate(aggregate)
    check_members(members)
    return KFAC(aggregate, members)


class KFAC(Watching):
    """See `kfac`."""

    needs_gradient = True

    def __init__(self, aggregate: str, members: str) -> None:
        super().__init__()
        self.aggregate, self.members = aggregate, members
        self._pending: dict[str, torch.Tensor] = {}

    def places(self) -> set[Place]:
        """Return inputs and outputs of every layer that is a member."""
        model, groups = self.watched
        paths = {m.tensor.rpartition(".")[0] for group in groups for m in group.members}
        inner = inner_model(model)
        layers = [path for path in paths if isinstance(inner.get_submodule(path), _LAYERS)]
        return {Place(path, role, "weight") for path in layers for role in ("in", "out")}

    def take(self, place: Place, value: torch.Tensor, axis: int) -> None:
        """Keep sums of squares: of an input now, of an output's gradient when it comes."""
        if not torch.is_grad_enabled():
            return
        if place.role == "in":
            value = value.detach()
            self._note(f"{place.path}|read", _squares(value, axis))
            count = value.numel() / max(value.shape[axis], 1)
            self._note(f"{place.path}|count", torch.full((), count, device=value.device))
        elif value.requires_grad:
            value.register_hook(
                lambda gradient: self._note(f"{place.path}|made", _squares(gradient, axis))
            )

    def _note(self, name: str, value: torch.Tensor) -> None:
        known = self._pending.get(name)
        self._pending[name] = value if known is None else known + value

    def fresh(self) -> None:
        """Forget a pass that was not observed."""
        self._pending = {}

    def reset(self) -> None:
        """Forget the sums."""
        super().reset()
        self._pending = {}

    def observe(self) -> None:
        """Add up what the last pass left."""
        model, groups = self.watched
        tensors = held_tensors(model)
        require_gradients(tensors, groups)
        for name, value in self._pending.items():
            self.add(name, value / self.scale**2 if name.endswith("|made") else value)
        for group in groups if self.whole else ():  # until then gradients are of some parts
            for number, member in enumerate(parameters_of(group, tensors, self.members)):
                gradient = gradient_of(member.tensor, tensors)
                if gradient is None or f"{_path(member)}|made" in self._pending:
                    continue
                change = (tensors[member.tensor].detach() * gradient).square()
                value = per_channel(change, member, group.size) / 2
                self.add(f"{group.name}|{number}|gradient", value)
        self._pending = {}

    def shared(self, name: str) -> bool:
        """What comes of parameters' gradients is the same everywhere."""
        return name.endswith("|gradient")

    def finished(self, sums: Scores) -> Scores:
        """Multiply the factors."""
        model, groups = self.watched
        return {group.name: self._one(group, model, sums) for group in groups}

    def _one(self, group: CouplingGroup, model: nn.Module, sums: Scores) -> torch.Tensor:
        tensors, found = held_tensors(model), []
        for number, member in enumerate(parameters_of(group, tensors, self.members)):
            value = sums.get(f"{group.name}|{number}|gradient")
            made = sums.get(f"{_path(member)}|made")
            if made is not None:
                weight = tensors[member.tensor].detach().double().cpu()
                layer = inner_model(model).get_submodule(_path(member))
                curvature = _curvature(layer, member, made / processes() ** 2, sums)
                part = per_channel(weight.square() * curvature / 2, member, group.size)
                value = part if value is None else value + part
            if value is not None:
                found.append((member, value))
        if not found:
            raise InputError(f"no gradient reached any tensor of group {group.name!r}")
        return aggregated(found, group.size, self.aggregate)


def _squares(value: torch.Tensor, axis: int) -> torch.Tensor:
    """Sum squares over all axes but one: (channels,), float64."""
    return sum_over(value.square(), [k for k in range(value.ndim) if k != axis]).double()


def _path(member: Member) -> str:
    return member.tensor.rpartition(".")[0]


def _curvature(layer: nn.Module, member: Member, made: torch.Tensor, sums: Scores) -> torch.Tensor:
    """Return h for each entry of a weight (broadcastable), or of a bias."""
    if member.tensor.rpartition(".")[2] != "weight":
        return made
    path = _path(member)
    read = sums[f"{path}|read"] / sums[f"{path}|count"]
    if isinstance(layer, nn.Linear):
        return made[:, None] * read[None]
    assert isinstance(layer, nn.modules.conv._ConvNd)
    made, read = made.reshape(layer.groups, -1), read.reshape(layer.groups, -1)
    if layer.transposed:
        both = read[:, :, None] * made[:, None, :]
    else:
        both = made[:, :, None] * read[:, None, :]
    return both.flatten(0, 1).reshape(-1, both.shape[2], *[1] * len(layer.kernel_size))
