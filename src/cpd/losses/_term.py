"""Values: one weighted loss of a recipe, a sum of them, and what a step shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cpd.errors import InputError

__all__ = ["Losses", "Seen", "Term"]


@dataclass(frozen=True)
class Seen:
    """What a step has for the losses, beside both networks' logits.

    Attributes:
        labels: the task's targets, negative where it ignores them.
        student, teacher: named intermediate tensors, by module path.
        step: of the stage, from 0. total: steps of the stage; 0 where nobody says.
    """

    labels: Any = None
    student: Mapping[str, torch.Tensor] = field(default_factory=dict)
    teacher: Mapping[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    total: int = 0


@dataclass(frozen=True)
class Term:
    """One weighted loss: weight · function(student, teacher, **options).

    Attributes:
        name: what to call it in the log.
        function: of the shelf, or a person's own.
        options: keywords of the function.
        weight: ≥ 0. warmup: steps over which the weight rises linearly from 0. decay: share of the
            weight that is left at the end of the stage, reached by half a cosine after the warm-up.
        at: module paths; the loss is the mean over them. None: it sees the logits.
        axis: axis of the channels there.
        labelled: whether the function takes ``labels``.
        stateful: whether ``function`` makes a module for each point, see ``Stateful``.
        align: how a narrower student meets its teacher: "select" (the kept channels of both), "pad"
            (the teacher's coordinates, zeros where channels went), "none" (widths may differ).
        shown: how it prints.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    weight: float = 1.0
    warmup: int = 0
    decay: float = 1.0
    at: tuple[str, ...] | None = None
    axis: int = 1
    labelled: bool = False
    stateful: bool = False
    align: str = "select"
    shown: str = ""

    def factor(self, step: int, total: int) -> float:
        """The weight at a step."""
        if step < self.warmup:
            return self.weight * (step + 1) / (self.warmup + 1)
        if self.decay == 1 or total <= self.warmup:
            return self.weight
        done = min(1.0, (step - self.warmup) / max(1, total - 1 - self.warmup))
        left = self.decay + (1 - self.decay) * (1 + math.cos(math.pi * done)) / 2
        return self.weight * left

    def __str__(self) -> str:
        name = self.shown or self.name
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        where = f" at {', '.join(self.at)}" if self.at else ""
        return f"{self.weight:g} * {name}(student, teacher{options}){where}"


@dataclass(frozen=True)
class Losses:
    """A sum of weighted losses, kept apart by name: ``losses(student, teacher) -> {name: scalar}``.

    The terms are already weighted, so what is minimised is their sum. Prints itself as that sum.
    """

    terms: tuple[Term, ...]

    @property
    def points(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs are needed, each once."""
        return tuple(dict.fromkeys(path for term in self.terms for path in term.at or ()))

    def __call__(
        self, student: Any, teacher: Any, seen: Seen | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the weighted terms on logits; those at named modules need ``attach``.

        Raises InputError where a loss returns no scalar tensor, and for a loss that sees features.
        """
        seen = seen or Seen()
        found: dict[str, torch.Tensor] = {}
        for term in self.terms:
            if term.at is not None or term.stateful:
                raise InputError(
                    f"loss {term.name!r} looks at modules of the networks: call it through attach."
                )
            found |= valued(term, student, teacher, seen)
        return found

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms)) or "no losses"


def valued(term: Term, student: Any, teacher: Any, seen: Seen) -> dict[str, torch.Tensor]:
    """The weighted scalars of a term, by name."""
    more = {"labels": seen.labels} if term.labelled else {}
    value = term.function(student, teacher, **term.options, **more)
    named = value if isinstance(value, Mapping) else {term.name: value}
    factor = term.factor(seen.step, seen.total)
    return {name: factor * scalar(name, one) for name, one in named.items()}


def scalar(name: str, value: object) -> torch.Tensor:
    """The value, if it is a scalar tensor; InputError otherwise."""
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        return value
    what = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    raise InputError(f"loss {name!r} must return a scalar tensor, got {what}.")
