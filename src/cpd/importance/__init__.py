"""Importance: how much each channel matters. One small file each; all behind one protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .._shelf import build, one
from ..groups import Groups
from ..trace import Inputs
from ._collect import Loss, collected, run_on
from ._normalise import normaliser
from .activation import activation
from .base import Accumulated, Importance, Scores, Sums, is_importance
from .bn_scale import bn_scale
from .fisher import fisher
from .fpgm import fpgm
from .hessian import hessian
from .hutchinson import hutchinson
from .kfac import kfac
from .lamp import lamp
from .magnitude import magnitude
from .obd import obd
from .random import random
from .taylor import taylor
from .variance import variance
from .wanda import wanda

__all__ = ["SHELF", "Importance", "Scores", "collect", "resolve", "score"]

SHELF: dict[str, Callable[..., Importance]] = {
    "activation": activation,
    "bn_scale": bn_scale,
    "fisher": fisher,
    "fpgm": fpgm,
    "hessian": hessian,
    "hutchinson": hutchinson,
    "kfac": kfac,
    "lamp": lamp,
    "magnitude": magnitude,
    "obd": obd,
    "random": random,
    "taylor": taylor,
    "variance": variance,
    "wanda": wanda,
}


def resolve(spec: Any) -> Importance:
    """Return the importance of a name, a {name: options}, an object of the protocol, or a callable.

    A callable takes (model, groups) and returns group name -> vector of length `group.size`. It is
    called at every `observe`, with gradients in place, and its results are added up. Every name
    also takes the option `normalise`: "none", or what each group's scores are divided by ("sum",
    "mean", "max", "norm", "minmax").

    Raises `UnknownName` for a name or an option that is not on the shelf.
    """
    if is_importance(spec):
        return spec
    if callable(spec):
        return Accumulated(spec, needs_gradient=False)
    name, options = one("importance", spec)
    found = normaliser(options.pop("normalise", None))
    made = build("importance", SHELF, name, options)
    assert isinstance(made, Sums)
    made.normalise = found
    return made


def score(spec: Any, model: nn.Module, groups: Groups, inputs: Inputs | None = None) -> Scores:
    """Return the scores of one observation: of the weights and gradients as they are now.

    `inputs`: a tensor, a tuple of arguments or a dict; an importance of activations is shown one
    forward pass on them, in evaluation mode.
    """
    importance = resolve(spec)
    importance.start(model, groups)
    try:
        if inputs is not None and getattr(importance, "needs_forward", False):
            run_on(model, inputs)
        importance.observe()
        return importance.scores()
    finally:
        importance.close()


def collect(
    spec: Any,
    model: nn.Module,
    groups: Groups,
    batches: Any,
    loss: Loss,
) -> Scores:
    """Return the scores of an importance over batches, with the model as it is before and after.

    Args:
        spec: a name of the shelf, a {name: options}, or anything else that `resolve` takes.
        model: in the mode (training or evaluation) that it is to be scored in. Parameters,
            gradients, buffers and the random state are given back as they were.
        groups: of this model, from `cpd.comb`.
        batches: any iterable; what it gives is handed to `loss`.
        loss: (model, batch) -> the loss, one number, with its graph: that of the task, that of a
            teacher, or both. It calls the model itself.

    Raises what the importance raises, and `InputError` where there is no batch.
    """
    return collected(resolve(spec), model, groups, batches, loss)
