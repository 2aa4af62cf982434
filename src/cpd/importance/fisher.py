"""Group Fisher: per-sample gradients of a channel's mask, summed over coupled consumers, then
squared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import MissingGradient
from ..groups import Groups, Member
from .base import Scores, reduced

Place = tuple[str, str]  # a module's path, and whether it reads ("in") or makes ("out") channels


class Fisher:
    r"""Score of "Group Fisher Pruning for Practical Network Compression" (Liu et al., ICML 2021).

    The mask m_c of a channel multiplies the inputs of all layers that read it. Its gradient for
    sample n is

        g[n, c] = sum over consumers, sum over places:  a[n, c, place] * dL_n/da[n, c, place]

    and the score, an estimate of the loss's second derivative in m_c, is sum_n g[n, c]^2, added up
    over backward passes and processes. Consumers are the linear and convolution layers (modules)
    that read the channel; a group with none is scored by the layers that make it, on their outputs.
    `dL_n` is taken from the batch's mean loss as it is: multiply by the squared batch size for
    per-sample losses.
    """

    needs_gradient = True

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._sums: Scores = {}
        self._found: dict[Place, torch.Tensor] = {}
        self._readers: dict[str, list[tuple[str, Member]]] = {}
        self._groups: Groups | None = None

    def start(self, model: nn.Module, groups: Groups) -> None:
        """Hook the layers that read (or, failing that, make) the channels."""
        self.close()
        self._groups = groups
        inner = getattr(model, "module", model) if hasattr(model, "module") else model
        self._readers = {group.name: _readers(inner, group.members) for group in groups}
        places = {(path, m.role) for readers in self._readers.values() for path, m in readers}
        for path, role in sorted(places):
            self._hook(inner.get_submodule(path), (path, role))
        self.reset()

    def _hook(self, module: nn.Module, place: Place) -> None:
        def watch(value: Any, kept: torch.Tensor) -> None:
            value.register_hook(lambda gradient: self._take(module, place, kept, gradient))

        def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args or not _differentiable(args[0]):
                return None
            mine = args[0].view_as(args[0])  # its gradient is that of this reader alone
            watch(mine, mine.detach())
            return (mine, *args[1:])

        def after(_: nn.Module, __: tuple[Any, ...], result: Any) -> None:
            if _differentiable(result):
                watch(result, result.detach().clone())  # it may be changed in place

        if place[1] == "in":
            self._handles.append(module.register_forward_pre_hook(before))
        else:
            self._handles.append(module.register_forward_hook(after))

    def _take(
        self, module: nn.Module, place: Place, value: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """Keep a * dL/da per sample and channel: (batch, channels)."""
        with torch.no_grad():
            product = (value * gradient).double()
            axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else product.ndim - 1
            rest = [k for k in range(1, product.ndim) if k != axis]
            per_sample = product.sum(rest) if rest else product
            known = self._found.get(place)
            self._found[place] = per_sample if known is None else known + per_sample

    def observe(self) -> None:
        """Square what the last backward pass left, and add it up."""
        assert self._groups is not None, "start() comes first"
        for group in self._groups:
            total: torch.Tensor | None = None
            for path, member in self._readers[group.name]:
                found = self._found.get((path, member.role))
                if found is None:
                    continue
                channel = _along(member)
                part = torch.zeros(len(found), group.size, dtype=torch.float64, device=found.device)
                index = torch.from_numpy(channel).to(found.device)
                mine = index >= 0
                part.index_add_(1, index[mine], found[:, : len(index)][:, mine])
                total = part if total is None else total + part
            if total is None:
                raise MissingGradient(
                    f"no gradient reached the layers of group {group.name!r}. Call observe() after "
                    "loss.backward() "
                    "of a forward pass in which gradients were enabled."
                )
            known = self._sums.get(group.name, 0)
            self._sums[group.name] = known + total.square().sum(0).cpu()
        self._found = {}

    def scores(self) -> Scores:
        """Return the sums over all processes."""
        return {name: reduced(vector, mean=False) for name, vector in self._sums.items()}

    def state(self) -> Scores:
        """Return the sums for a checkpoint."""
        return {name: vector.clone() for name, vector in self._sums.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from the sums of a checkpoint."""
        self._sums = {name: vector.double().clone() for name, vector in state.items()}

    def reset(self) -> None:
        """Forget the sums."""
        self._sums, self._found = {}, {}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _differentiable(value: Any) -> bool:
    tensor = isinstance(value, torch.Tensor)
    return tensor and value.requires_grad and torch.is_grad_enabled()


_READS = (nn.Linear, nn.modules.conv._ConvNd)


def _readers(model: nn.Module, members: tuple[Member, ...]) -> list[tuple[str, Member]]:
    for role in ("in", "out"):
        found = []
        for member in members:
            path, _, leaf = member.tensor.rpartition(".")
            if (
                member.role == role
                and leaf == "weight"
                and isinstance(model.get_submodule(path), _READS)
            ):
                found.append((path, member))
        if found:
            return found
    return [(m.tensor.rpartition(".")[0], m) for m in members[:1]]


def _along(member: Member) -> Any:
    """Return the group's channel of each input (or output) channel of a layer, -1 for other
    groups'.
    """
    channel = member.channel
    if (
        channel.ndim > 1 and channel.shape[0] > 1 and channel.shape[1] > 1
    ):  # a grouped convolution's inputs
        flat = channel.reshape(channel.shape[0], channel.shape[1])
        _, first = _unique_rows(flat)
        return flat[first].reshape(-1)
    return channel.reshape(-1)


def _unique_rows(rows: Any) -> tuple[Any, Any]:
    """Rows change from group to group of a grouped convolution; return where each group begins."""
    import numpy as np

    starts = np.flatnonzero(np.r_[True, (rows[1:] != rows[:-1]).any(1)])
    return rows[starts], starts
