"""What importances read of a group: entries of tensors by channel, gradients, and who reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from ..errors import MissingGradient, UnknownName
from ..groups import CouplingGroup, Groups, Member
from .base import inner_model

Tensors = Mapping[str, torch.Tensor]
NORMS = ("batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm", "native_")


def held_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's parameters and buffers by every name, also where a wrapper holds it."""
    inner = inner_model(model)
    return {
        **dict(inner.named_buffers(remove_duplicate=False)),
        **dict(inner.named_parameters(remove_duplicate=False)),
    }


def per_channel(values: torch.Tensor, member: Member, size: int) -> torch.Tensor:
    """Sum a tensor's entries over each channel of a group: shape (size,), float64.

    `values` has the shape of the member's tensor.
    """
    channel = torch.from_numpy(member.channel).to(values.device)
    gone = [axis for axis, length in enumerate(channel.shape) if length == 1]
    summed = sum_over(values, [axis for axis in gone if values.shape[axis] > 1])
    flat, index = summed.reshape(-1).double(), channel.reshape(-1)
    if (index < 0).any():
        flat, index = flat[index >= 0], index[index >= 0]
    return torch.zeros(size, dtype=torch.float64, device=values.device).index_add_(0, index, flat)


def sum_over(values: torch.Tensor, axes: list[int]) -> torch.Tensor:
    """Sum over axes, the last ones first: these lie together in memory. At least in float32."""
    kind = torch.promote_types(values.dtype, torch.float32)
    last = values.ndim
    while last - 1 in axes:
        last -= 1
    late, early = list(range(last, values.ndim)), [axis for axis in axes if axis < last]
    if late:
        values = values.sum(late, dtype=kind)
    return values.sum(early, dtype=kind) if early else values.to(kind)


def covered(member: Member, size: int) -> torch.Tensor:
    """Return which channels of a group run through a member: bool (size,)."""
    held = torch.zeros(size, dtype=torch.bool)
    index = torch.from_numpy(member.channel).reshape(-1)
    held[index[index >= 0]] = True
    return held


def entries(member: Member, tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Return how many entries of a tensor each channel of a group has: (size,), float64."""
    return per_channel(torch.ones(tensor.shape, dtype=torch.float32), member, size)


def gradient_of(name: str, tensors: Tensors) -> torch.Tensor | None:
    """Return a parameter's gradient, or None for what has none by its nature (buffers, frozen
    parameters).
    """
    tensor = tensors[name]
    return tensor.grad if isinstance(tensor, nn.Parameter) else None


def require_gradients(tensors: Tensors, groups: Groups) -> None:
    """Raise `MissingGradient` where a group has no gradient at all."""
    for group in groups:
        if not any(gradient_of(m.tensor, tensors) is not None for m in group.members):
            raise MissingGradient(
                f"no gradient on any tensor of group {group.name!r} ({group.members[0].tensor}, "
                "...). Call this after loss.backward() and before zero_grad(), and let these "
                "parameters require gradients."
            )


def made_by(group: CouplingGroup) -> list[Member]:
    """Return the members that make or scale the channels; all members where none does."""
    out = [member for member in group.members if member.role == "out"]
    return out or list(group.members)


MEMBERS = ("out", "in", "all")


def check_members(which: str) -> str:
    """Return "out", "in" or "all". Raises `UnknownName` for anything else."""
    if which not in MEMBERS:
        raise UnknownName("members of a group", which, MEMBERS)
    return which


def parameters_of(group: CouplingGroup, tensors: Tensors, which: str) -> list[Member]:
    """Return a group's parameters: those that make ("out"), read ("in"), or do either ("all")."""
    mine = [m for m in group.members if isinstance(tensors[m.tensor], nn.Parameter)]
    if which == "all":
        return mine
    return [m for m in mine if m.role == which] or mine


# --- at which of its tensors a channel's mask is read --------------------------------------------


def tiers(groups: Groups, group: CouplingGroup) -> list[list[Member]]:
    """Return the members at which a mask on the channels can be read, best first.

    A mask of a channel can be put where others read it, behind the norm that scales it, or where it
    is made. To read it at more than one of them would count it several times.
    """
    scales = scales_of(groups)
    scaled = {name.rpartition(".")[0] for name in scales} - {""}
    readers = [m for m in group.members if m.role == "in"]
    out = [m for m in group.members if m.role == "out"]
    scaling = [m for m in out if m.tensor in scales or m.tensor.rpartition(".")[0] in scaled]
    return [readers, scaling, [m for m in out if m not in scaling]]


def scales_of(groups: Groups) -> set[str]:
    """Return the names of all parameters that scale channels: a norm's weight, or any other
    parameter of one axis that is multiplied with an activation.
    """
    if groups not in _SCALES:
        _SCALES[groups] = set(_find_scales(groups))
    return _SCALES[groups]


_SCALES: WeakKeyDictionary[Groups, set[str]] = WeakKeyDictionary()


def _find_scales(groups: Groups) -> Iterator[str]:
    named = groups.trace.tensors
    parameters = {name for name, _ in groups.model.named_parameters()}
    for node in groups.trace.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        op = "" if schema is None else schema.name.rpartition("::")[2].rstrip("_")
        inputs = [named.get(x.name) if isinstance(x, fx.Node) else None for x in node.args]
        held = [name for name in inputs if name is not None and name in parameters]
        if op.startswith(NORMS):
            yield from held[:1]  # the weight comes before the bias
        elif op == "mul" and any(isinstance(x, fx.Node) and x.name not in named for x in node.args):
            yield from (name for name in held if _axes(groups.trace.shapes[name]) == 1)


def _axes(shape: tuple[int, ...]) -> int:
    return sum(length > 1 for length in shape)


def mask_gradient(members: Sequence[Member], tensors: Tensors, size: int) -> torch.Tensor:
    """Return sum w * dL/dw over these members, for each channel: (size,), float64.

    At the members of one tier this is dL/dm of a mask m on the channel (at m = 1), of the loss that
    the gradients are of. Members without a gradient count as zero.
    """
    total: torch.Tensor | None = None
    for member in members:
        gradient = gradient_of(member.tensor, tensors)
        if gradient is None:
            continue
        part = per_channel(tensors[member.tensor].detach() * gradient, member, size)
        total = part if total is None else total + part.to(total.device)
    return torch.zeros(size, dtype=torch.float64) if total is None else total


def first_tier(found: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return for each channel the value of the first tier that covers it, 0 where none does.

    `found`: (values (..., size), covered (size,)) of each tier.
    """
    result, open_ = torch.zeros_like(found[0][0]), torch.ones_like(found[0][1])
    for values, held in found:
        result = torch.where(open_ & held, values.to(result.device), result)
        open_ = open_ & ~held
    return result


def covered_by(members: Sequence[Member], size: int) -> torch.Tensor:
    """Return which channels run through any of these members: bool (size,)."""
    held = torch.zeros(size, dtype=torch.bool)
    for member in members:
        held |= covered(member, size)
    return held
