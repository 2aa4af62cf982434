"""Importance: how much each channel matters. One small file each; all behind one protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .._shelf import build, one
from ..groups import Groups
from .base import Accumulated, Importance, Scores, is_importance
from .fisher import Fisher
from .hessian import hessian
from .magnitude import magnitude
from .random import random
from .taylor import taylor

__all__ = ["SHELF", "Importance", "Scores", "resolve", "score"]

SHELF: dict[str, Callable[..., Importance]] = {
    "fisher": Fisher,
    "hessian": hessian,
    "magnitude": magnitude,
    "random": random,
    "taylor": taylor,
}


def resolve(spec: Any) -> Importance:
    """Return the importance of a name, a {name: options}, an object of the protocol, or a callable.

    A callable takes (model, groups) and returns group name -> vector of length `group.size`. It is
    called at every `observe`, with gradients in place, and its results are added up.

    Raises `UnknownName` for a name that is not on the shelf.
    """
    if is_importance(spec):
        return spec
    if callable(spec):
        return Accumulated(spec, needs_gradient=False)
    name, options = one("importance", spec)
    return build("importance", SHELF, name, options)


def score(spec: Any, model: nn.Module, groups: Groups) -> Scores:
    """Return the scores of one observation: of the weights and gradients as they are now."""
    importance = resolve(spec)
    importance.start(model, groups)
    try:
        importance.observe()
        return importance.scores()
    finally:
        importance.close()
