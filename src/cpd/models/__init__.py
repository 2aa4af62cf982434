"""The shelf of networks: the paper's, where no well-kept library ships them.

Every entry makes a network of random weights: ``SHELF["seaformer_l"](num_classes=150)``. To the
shell they are ``cpd:NAME``. ``official`` turns the tensors of an official checkpoint into those of
a network made here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from cpd.errors import ArtefactError, InputError
from cpd.models._config import Config, sentence, smaller
from cpd.models.seaformer import SeaFormer, seaformer
from cpd.models.seaformer import official_names as _seaformer_names
from cpd.models.segformer import segformer
from cpd.models.upernet import UPerNet, upernet
from cpd.models.upernet import official_names as _upernet_names

__all__ = [
    "SHELF",
    "Config",
    "SeaFormer",
    "UPerNet",
    "names",
    "official",
    "seaformer",
    "segformer",
    "sentence",
    "smaller",
    "upernet",
]

SHELF: dict[str, Callable[..., nn.Module]] = {
    **{f"seaformer_{size}": partial(seaformer, size) for size in ("b", "l", "s", "t")},
    **{f"segformer_b{size}": partial(segformer, f"b{size}") for size in range(6)},
    **{
        f"upernet_{size}": partial(upernet, size)
        for size in ("deit_b", "deit_s", "deit_t", "vit_b")
    },
}


def names(model: nn.Module) -> dict[str, str]:
    """Name of each tensor of a network → its name in the official checkpoints.

    Raises InputError for a network without a map.
    """
    if isinstance(model, SeaFormer):
        return _seaformer_names(model)
    if isinstance(model, UPerNet):
        return _upernet_names(model)
    raise InputError(f"there is no map of names for {type(model).__name__}.")


def official(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of an official checkpoint under the names that they have in ``model``.

    tensors: the checkpoint's ``state_dict``. What else is in it, such as another head, is left.

    Raises ArtefactError where a tensor is missing or of another shape.
    """
    found = {}
    own = model.state_dict()
    for name, there in names(model).items():
        if there not in tensors:
            raise ArtefactError(f"the checkpoint has no {there!r}, wanted for {name!r}.")
        shape = tuple(tensors[there].shape)
        if shape != tuple(own[name].shape):
            raise ArtefactError(
                f"{there!r} of the checkpoint is {shape}; {name!r} is {tuple(own[name].shape)}."
            )
        found[name] = tensors[there]
    return found
