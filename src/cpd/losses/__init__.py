"""The shelf of distillation losses: pure functions ``loss(student, teacher, *, …) -> scalar``.

``resolve`` turns what a person writes (a name, a mapping of names to options, a callable) into one
value that is called with both networks' logits and returns the weighted terms by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cpd import _shelf
from cpd.errors import InputError, UnknownName
from cpd.losses._logits import nonnegative
from cpd.losses.dist import dist
from cpd.losses.kd import kd

__all__ = ["SHELF", "Losses", "dist", "kd", "resolve"]

Loss = Callable[..., torch.Tensor]

SHELF: dict[str, Loss] = {
    "dist": dist,
    "kd": kd,
}


@dataclass(frozen=True)
class Term:
    """One weighted loss: weight · function(student, teacher, **options)."""

    name: str
    function: Callable[..., object]
    options: Mapping[str, Any]
    weight: float = 1.0

    def __call__(self, student: Any, teacher: Any) -> dict[str, torch.Tensor]:
        value = self.function(student, teacher, **self.options)
        named = value if isinstance(value, Mapping) else {self.name: value}
        return {name: self.weight * _scalar(name, term) for name, term in named.items()}

    def __str__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"{self.weight:g} * {self.name}(student, teacher{options})"


@dataclass(frozen=True)
class Losses:
    """A sum of weighted losses, kept apart by name: ``losses(student, teacher) -> {name: scalar}``.

    The terms are already weighted, so what is minimised is their sum. Prints itself as that sum.
    """

    terms: tuple[Term, ...]

    def __call__(self, student: Any, teacher: Any) -> dict[str, torch.Tensor]:
        """Return the weighted terms; InputError where a loss returns no scalar tensor."""
        found: dict[str, torch.Tensor] = {}
        for term in self.terms:
            found |= term(student, teacher)
        return found

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms)) or "no losses"


def resolve(spec: object) -> Losses:
    """Return the losses that a spec means.

    spec: a name of the shelf (``"kd"``); a mapping of names to options, where ``weight`` (≥ 0,
        default 1) multiplies the term and the rest are keywords of the loss
        (``{"kd": {"weight": 3.0, "temperature": 4.0}}``); a callable ``f(student, teacher)`` that
        returns a scalar tensor or a mapping of them; ``None`` or an empty mapping for no losses; or
        what an earlier call returned.

    Options are tried at once on tiny logits, so a bad value is met here and not in training.
    Raises UnknownName for a name or an option that is not there, InputError for any other fault.
    """
    if isinstance(spec, Losses):
        return spec
    if callable(spec):
        return Losses((Term(getattr(spec, "__name__", type(spec).__name__), spec, {}),))
    entries = {} if spec is None else _shelf.parse("loss", spec)
    return Losses(tuple(_term(name, options) for name, options in entries.items()))


def _term(name: str, options: dict[str, Any]) -> Term:
    if name not in SHELF:
        raise UnknownName("loss", name, SHELF)
    valid = _shelf.keywords(SHELF[name])[2:]
    _shelf.check_options("loss", name, options, ("weight", *valid))
    weight = options.pop("weight", 1.0)
    nonnegative(f"weight of loss {name!r}", weight)
    partial(SHELF[name], **options)(torch.zeros(2, 2), torch.zeros(2, 2))
    return Term(name, SHELF[name], options, float(weight))


def _scalar(name: str, value: object) -> torch.Tensor:
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        return value
    what = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    raise InputError(f"loss {name!r} must return a scalar tensor, got {what}.")
