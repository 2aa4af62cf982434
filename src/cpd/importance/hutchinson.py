"""Curvature by Hessian-vector products."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from .._numbers import whole
from ..errors import MissingGradient, UnknownName
from ..groups import CouplingGroup, Groups
from ._aggregate import aggregated, check_aggregate
from ._members import check_members, entries, held_tensors, parameters_of, per_channel
from .base import Importance, Scores, Sums, inner_model

KINDS = ("trace", "diagonal")
_DRAWS = "(draws)"  # in a state, beside the groups' names


def hutchinson(
    *,
    kind: str = "trace",
    probes: int = 1,
    members: str = "out",
    aggregate: str = "sum",
    seed: int = 0,
) -> Importance:
    """Tr(H_SS) / |S| * ‖w_S‖² of a channel's weights S ("trace"), or 1/2 sum of w² diag(H).

    H is the Hessian of the loss, its blocks estimated by z * Hz for vectors z of random signs: the
    expectation of z_i (Hz)_i is H_ii (Hutchinson, 1990). "trace" is the score of Yu et al.,
    "Hessian-Aware Pruning and Optimal Neural Implant" (WACV 2022), with |S| the number of weights.
    It may be negative where the loss curves down.

    `probes`: vectors for each batch; more batches serve as well, since the estimates add up.
    `aggregate` joins members for "diagonal"; "trace" is over all of them together. Every batch
    costs one product for each probe, about two more backward passes each. It needs the loss itself,
    before its backward pass: `collect` and `compress` show it, `score` cannot.

    Raises `MissingGradient` where no loss was shown, or where one cannot be differentiated twice.
    """
    if kind not in KINDS:
        raise UnknownName("kind of hutchinson", kind, KINDS)
    whole("probes", probes, 1)
    check_members(members)
    check_aggregate(aggregate)
    return Hutchinson(kind, probes, members, aggregate, seed)


class _Twice:
    """Operators that can be differentiated twice, while anybody needs them.

    PyTorch keeps the choice for the whole process, and several may watch one network: the first to
    come changes it, the last to go puts it back, in whatever order they go.
    """

    def __init__(self) -> None:
        self._users, self._within = 0, ExitStack()

    def enter(self) -> None:
        self._users += 1
        if self._users == 1:
            self._within.enter_context(sdpa_kernel(SDPBackend.MATH))
            cudnn: Any = torch.backends.cudnn.flags(enabled=False)
            self._within.enter_context(cudnn)

    def leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._within.close()


_TWICE = _Twice()


class Hutchinson(Sums):
    """See `hutchinson`."""

    needs_gradient = True

    def __init__(self, kind: str, probes: int, members: str, aggregate: str, seed: int) -> None:
        super().__init__()
        self.kind, self.probes, self.seed = kind, probes, seed
        self.members, self.aggregate = members, aggregate
        self._pending: Scores = {}
        self._taken = 0
        self._handles: list[RemovableHandle] = []
        self._inside = False

    def start(self, model: nn.Module, groups: Groups) -> None:
        """Begin to watch; while it does, operators run that can be differentiated twice."""
        super().start(model, groups)
        inner = inner_model(model)
        self._handles = [
            inner.register_forward_pre_hook(self._before),
            inner.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, *_: Any) -> None:
        if not self._inside:
            self._inside = True
            _TWICE.enter()

    def _after(self, *_: Any) -> None:
        if self._inside:
            self._inside = False
            _TWICE.leave()

    def before_backward(self, loss: torch.Tensor) -> None:
        """Estimate the curvature of a loss whose graph is still there; its backward pass may
        follow.
        """
        model, groups = self.watched
        tensors = held_tensors(model)
        names = {
            m.tensor for g in groups for m in parameters_of(g, tensors, self.members)
        }  # a tensor that is tied has one name
        mine = {n: tensors[n] for n in sorted(names) if tensors[n].requires_grad}
        self._require(bool(mine) and loss.requires_grad)
        generator = torch.Generator().manual_seed(self.seed + self._taken)
        self._taken += 1
        for _ in range(self.probes):
            diagonal = self._product(loss, mine, generator)
            for group in groups:
                self._note(group, tensors, diagonal)

    def _product(
        self, loss: torch.Tensor, tensors: Scores, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Return z * Hz / probes for one vector z of random signs."""
        values = list(tensors.values())
        first = torch.autograd.grad(
            loss, values, create_graph=True, allow_unused=True, materialize_grads=True
        )
        curved = [gradient for gradient in first if gradient.requires_grad]
        self._require(bool(curved))
        probe = self.signs(tensors, generator)
        second = torch.autograd.grad(
            curved,
            values,
            grad_outputs=[z for z, g in zip(probe, first, strict=True) if g.requires_grad],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        found = zip(tensors, probe, second, strict=True)
        return {name: z * product / self.probes for name, z, product in found}

    @staticmethod
    def signs(tensors: Scores, generator: torch.Generator) -> list[torch.Tensor]:
        """Return a tensor of random signs, +1 or -1, for each of these."""
        values = tensors.values()
        drawn = [torch.randint(0, 2, x.shape, generator=generator) * 2 - 1 for x in values]
        return [z.to(x) for z, x in zip(drawn, values, strict=True)]

    def _note(self, group: CouplingGroup, tensors: Scores, diagonal: Scores) -> None:
        size, found = group.size, []
        norm, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for member in parameters_of(group, tensors, self.members):
            if member.tensor not in diagonal:
                continue
            weight, h = tensors[member.tensor].detach(), diagonal[member.tensor].detach()
            if self.kind == "diagonal":
                value = per_channel(weight.square() * h, member, size) / 2
            else:
                value = per_channel(h, member, size)
                norm += per_channel(weight.square(), member, size).cpu()
                count += entries(member, weight, size)
            found.append((member, value.cpu()))
        if self.kind == "diagonal":
            score = aggregated(found, size, self.aggregate)
        else:
            score = aggregated(found, size, "sum") / count.clamp_min(1) * norm
        self._pending[group.name] = self._pending.get(group.name, 0) + score

    def _require(self, given: bool) -> None:
        if not given:
            raise MissingGradient(
                "hutchinson needs the loss before its backward pass, with a graph that can be "
                "differentiated twice. Use cpd.importance.collect or cpd.compress, or call "
                "before_backward(loss) between the forward and the backward pass."
            )

    def observe(self) -> None:
        """Count the losses shown since the last time."""
        self._require(bool(self._pending))
        for name, value in self._pending.items():
            self.add(name, value)
        self._pending = {}

    def shared(self, name: str) -> bool:  # noqa: ARG002
        """Each process's loss is the mean over its own samples."""
        return True

    def state(self) -> Scores:
        """Return the sums, and how many draws there have been."""
        return {**super().state(), _DRAWS: torch.tensor([self._taken], dtype=torch.int64)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from the sums of a checkpoint, with the draws that come next."""
        super().load_state({name: v for name, v in state.items() if name != _DRAWS})
        self._taken = int(state[_DRAWS]) if _DRAWS in state else 0

    def reset(self) -> None:
        """Forget the sums, and draw from the beginning: a run that goes on after it does so too."""
        super().reset()
        self._pending = {}
        self._taken = 0

    def close(self) -> None:
        """Remove the hooks."""
        super().close()
        self._after()
        for handle in self._handles:
            handle.remove()
        self._handles = []
