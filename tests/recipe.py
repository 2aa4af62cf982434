"""What tests of recipes share: do the options of the data exist, can the teacher be made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cpd import _shelf, data
from cpd.cli.models import named


def options_exist(spec: Any) -> None:
    """UnknownName for a data set or an option of it that does not exist; nothing is opened."""
    if isinstance(spec, str) and ":" in spec:
        return  # a callable of one's own
    name, options = _shelf.one("data set", spec)
    assert name in data.SHELF
    _shelf.check_options("data set", name, options, _shelf.keywords(data.SHELF[name]))


def teacher_of(spec: Any) -> Any:
    """The teacher as ``compress`` gets it; another network is on no device and without weights."""
    if not isinstance(spec, Mapping):
        return spec
    ((name, options),) = spec.items()
    assert "weights" in options, "a teacher that has learnt nothing"
    with torch.device("meta"):
        made = named("teacher", {name: {k: v for k, v in options.items() if k != "weights"}})
    assert isinstance(made, nn.Module)
    return made
