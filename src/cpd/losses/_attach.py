"""Losses at work: hooks on both networks, the channels a plan keeps, and losses that learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cpd.errors import InputError, UnknownName
from cpd.losses._maps import wide
from cpd.losses._points import Kept
from cpd.losses._state import Stateful
from cpd.losses._term import Losses, Seen, Term, scalar, valued

__all__ = ["Attached", "attach"]

LOGITS = ""  # the point of a loss that sees the logits


@contextmanager
def watched(model: nn.Module, paths: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """What the named modules of a network put out while the context lasts, in a dict by path.

    Raises UnknownName for a path that is no module, InputError for an output that is no tensor and
    for a module that runs twice.
    """
    found: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    for path in paths:
        if path not in modules:
            raise UnknownName(f"module of {type(model).__name__}", path, [n for n in modules if n])
    hooks = [modules[p].register_forward_hook(_keeper(p, found)) for p in paths]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _keeper(path: str, found: dict[str, torch.Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
        if not isinstance(output, torch.Tensor):
            kind = type(output).__name__
            raise InputError(f"a loss looks at {path!r}, which gives {kind}, not a tensor.")
        if path in found:
            raise InputError(f"a loss looks at {path!r}, which runs more than once; name another.")
        found[path] = output

    return keep


class Attached:
    """The losses of one stage between one student and one teacher.

    ``modules`` holds what learns or remembers; train its parameters and save its state.
    """

    def __init__(self, losses: Losses, student: nn.Module, teacher: nn.Module) -> None:
        """Nothing is looked at yet; ``attach`` makes these ready to use."""
        self.losses, self.student, self.teacher = losses, student, teacher
        self.points = losses.points
        self.kept: Kept = {}
        self.modules = nn.ModuleDict()
        self.names: dict[tuple[int, str], str] = {}

    def keep(self, kept: Kept) -> None:
        """From now on these channels are the student's, see ``kept_at``."""
        self.kept = kept

    @contextmanager
    def watching(self) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        """What the named modules of student and teacher put out inside the context."""
        with watched(self.student, self.points) as own, watched(self.teacher, self.points) as other:
            yield own, other

    def __call__(
        self, student: torch.Tensor, teacher: torch.Tensor, seen: Seen
    ) -> dict[str, torch.Tensor]:
        """Return every weighted term: logits from the arguments, features from ``seen``.

        In float32 where networks give halves, and beside autocast: losses are sums of products.
        """
        student, teacher = _single(student), _single(teacher)
        own, other = (
            {k: _single(x) for k, x in each.items()} for each in (seen.student, seen.teacher)
        )
        with torch.autocast(student.device.type, enabled=False):
            return self._terms(student, teacher, replace(seen, student=own, teacher=other))

    def _terms(
        self, student: torch.Tensor, teacher: torch.Tensor, seen: Seen
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for number, term in enumerate(self.losses.terms):
            if term.at is None and not term.stateful:
                found |= valued(term, student, teacher, seen)
                continue
            for name, value in self._at_points(number, term, (student, teacher), seen).items():
                found[name] = value
        return found

    def _at_points(
        self, number: int, term: Term, logits: tuple[torch.Tensor, torch.Tensor], seen: Seen
    ) -> dict[str, torch.Tensor]:
        """The mean of a term over its points."""
        sums: dict[str, torch.Tensor] = {}
        points = term.at or (LOGITS,)
        for path in points:
            pair = logits if path == LOGITS else (_at(seen.student, path), _at(seen.teacher, path))
            own, other = self._aligned(term, path, *pair)
            for name, value in self._valued(number, path, own, other, seen).items():
                sums[name] = sums.get(name, 0.0) + value / len(points)
        return sums

    def _valued(
        self, number: int, path: str, own: torch.Tensor, other: torch.Tensor, seen: Seen
    ) -> dict[str, torch.Tensor]:
        term = self.losses.terms[number]
        if not term.stateful:
            return valued(term, own, other, seen)
        module = self.modules[self.names[number, path]]
        made = module(own.float(), other.float(), seen.labels)  # its parameters are float32
        factor = term.factor(seen.step, seen.total)
        single = len(made) == 1
        names = {inside: term.name if single else f"{term.name}.{inside}" for inside in made}
        return {names[n]: factor * scalar(names[n], value) for n, value in made.items()}

    def _aligned(
        self, term: Term, path: str, own: torch.Tensor, other: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both tensors with channels on axis 1, the teacher's beside those of the student."""
        own, other = wide(own), wide(other.detach())
        axis, mask = self.kept.get(path, (term.axis, None))
        if not -own.dim() <= term.axis < own.dim():
            raise InputError(
                f"axis {term.axis} of loss {term.name!r}: {path!r} has {own.dim()} axes."
            )
        own, other = own.movedim(term.axis, 1), other.movedim(term.axis, 1)
        if mask is not None and term.align != "none":
            if axis % own.dim() != term.axis % own.dim():
                raise InputError(
                    f"the channels of {path!r} are on axis {axis}; give loss {term.name!r} the "
                    f"option axis: {axis}."
                )
            own, other = _matched(own, other, mask.to(own.device), pad=term.align == "pad")
        if term.align != "none" and own.shape != other.shape:
            raise InputError(
                f"loss {term.name!r} at {path!r}: the student gives {tuple(own.shape)}, the "
                f"teacher {tuple(other.shape)}. Which channels match is known where the teacher "
                "is the unpruned network; for another teacher name a point of one width, or take "
                "a loss on relations: at, ifvd, skd."
            )
        return own, other

    def prepare(self, inputs: Any, logits: Callable[[Any], torch.Tensor], *, seed: int) -> None:
        """Run both networks once on example inputs, check every point, make what learns.

        Raises UnknownName and InputError for what would fail in the first step.
        """
        networks = (self.student, self.teacher)
        flags = {m: m.training for network in networks for m in network.modules()}
        with torch.no_grad(), torch.random.fork_rng():
            try:
                with self.watching() as (own, other):
                    outputs = [_run(network.eval(), inputs) for network in networks]
            finally:
                for module, flag in flags.items():
                    module.training = flag
            torch.manual_seed(seed)
            both = logits(outputs[0]), logits(outputs[1])
            for number, term in enumerate(self.losses.terms):
                self._check(number, term, both, Seen(student=own, teacher=other))

    def _check(
        self, number: int, term: Term, logits: tuple[torch.Tensor, torch.Tensor], seen: Seen
    ) -> None:
        """Meet what does not fit, and make the modules of a term."""
        for path in term.at or (LOGITS,) * term.stateful:
            pair = logits if path == LOGITS else (_at(seen.student, path), _at(seen.teacher, path))
            _, taught = self._aligned(term, path, *pair)
            if term.stateful:
                self._make(number, term, path, (taught.shape[1], logits[1].shape[1]))

    def _make(self, number: int, term: Term, path: str, sizes: tuple[int, int]) -> None:
        name = f"{number} {term.name} {path}".strip().replace(".", "/")
        made = term.function(*sizes, **term.options)
        assert isinstance(made, Stateful)
        self.names[number, path] = name
        self.modules[name] = made


def _at(found: Mapping[str, torch.Tensor], path: str) -> torch.Tensor:
    if path not in found:
        raise InputError(f"a loss looks at {path!r}, which did not run in this forward pass.")
    return found[path]


def _matched(
    own: torch.Tensor, other: torch.Tensor, mask: torch.Tensor, *, pad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept channels of both, or the student in the teacher's coordinates."""
    kept = torch.nonzero(mask)[:, 0]
    masked = own.shape[1] == len(mask)  # not cut yet: as wide as its teacher
    if not masked and own.shape[1] != len(kept):
        return own, other  # the caller says what does not fit
    if not pad:
        return (own[:, kept] if masked else own), other[:, kept]
    if masked:
        return own * mask.to(own.dtype).reshape(-1, *[1] * (own.dim() - 2)), other
    shape = list(own.shape)
    shape[1] = len(mask)
    return own.new_zeros(shape).index_copy(1, kept, own), other


def _run(network: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple | list) else network(inputs)


def attach(
    losses: Losses,
    student: nn.Module,
    teacher: nn.Module,
    *,
    inputs: Callable[[], Any],
    logits: Callable[[Any], torch.Tensor],
    kept: Kept | None = None,
    seed: int = 0,
) -> Attached:
    """Return the losses bound to two networks, checked on example inputs.

    inputs: gives example inputs on the networks' device; called only where a loss needs it.
    logits: the task's. kept: which channels the student still has, where its teacher is the network
        it is cut from. seed: of the initial weights of losses that learn.

    Raises UnknownName for a module that is not there, InputError for shapes that do not fit.
    """
    made = Attached(losses, student, teacher)
    made.keep(kept or {})
    if made.points or any(term.stateful for term in losses.terms):
        made.prepare(inputs(), logits, seed=seed)
    return made


def _single(x: torch.Tensor) -> torch.Tensor:
    """Halves as float32; everything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
