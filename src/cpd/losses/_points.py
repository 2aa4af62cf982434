"""Which channels of a module's output a plan keeps, from the labels that combing gave them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from cpd.errors import InputError
from cpd.groups import Groups
from cpd.labels import Labels
from cpd.plan import Plan
from cpd.planning import alive_of

__all__ = ["Kept", "kept_at"]

Kept = Mapping[str, tuple[int, torch.Tensor]]
"""Module path → (axis of the output, bool mask over its original channels, True = kept)."""


def kept_at(groups: Groups, plan: Plan, paths: Iterable[str]) -> Kept:
    """Return for each module whose output a plan narrows the axis and which channels stay.

    A module whose output keeps its width is left out. Raises InputError for a module that the
    traced network does not run, that gives several tensors, or whose channels lie on two axes at
    once (heads and their dimensions): name another module there.
    """
    alive = alive_of(groups, plan)[groups.units.label]
    found = {}
    for path in paths:
        labels = _output(groups, path)
        narrowed = _narrowed(labels, alive, path)
        if narrowed is not None:
            found[path] = narrowed
    return found


def _output(groups: Groups, path: str) -> Labels:
    """The labels of what a module gives to the rest of the network."""
    inside = {step.node: step for step in groups.steps if _within(step.node, path)}
    if not inside:
        raise InputError(f"combing saw no operation in the module {path!r}; name another one.")
    given = [
        step
        for node, step in inside.items()
        if any(user not in inside and not _getitem(user) for user in node.users)
    ]
    if len(given) != 1 or not isinstance(given[0].out, Labels):
        raise InputError(
            f"the module {path!r} gives {len(given)} tensors to the rest of the network, one is "
            "needed; name a module inside it."
        )
    shown = given[0].out
    for step in groups.steps:  # what is written into it in place is seen outside
        shown = step.written.get(given[0].node, shown)
    return shown


def _within(node: Any, path: str) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    names = (name.split("@")[0].removeprefix("L['self'].") for name, _ in stack.values())
    return path in names


def _getitem(node: Any) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _narrowed(labels: Labels, alive: np.ndarray, path: str) -> tuple[int, torch.Tensor] | None:
    lost = [layer for layer in labels.layers if not alive[layer.ids].all()]
    if not lost:
        return None
    axes = {axis for layer in lost for axis in layer.axes}
    if len(axes) > 1:
        raise InputError(
            f"the channels of {path!r} lie on the axes {sorted(axes)} of its output together; name "
            "a module whose output has them on one axis."
        )
    mask = np.ones(labels.shape[axes.pop()], bool)
    for layer in lost:
        mask &= alive[layer.ids].reshape(-1)
    return lost[0].axes[0], torch.from_numpy(mask)
