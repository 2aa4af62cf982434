"""From live classes to a plan and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .branches import KIND, Branch, dead_branches
from .drop import dropped
from .forward import Forward
from .groups import Groups
from .kept import parts_of
from .labels import Mask, axis_size, new_shape
from .plan import Plan, Width
from .sizes import attribute_values
from .surgery import rebuild
from .trace import location, named_tensors


def plan_of(
    groups: Groups,
    alive: Mask,
    options: dict[str, Any],
    *,
    costs: Sequence[str] = (),
    measured: Mapping[str, tuple[float, float]] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Return the plan that keeps the classes in `alive`.

    `costs`: those to predict besides MACs and parameters; `measured`: others, before and after;
    `notes`: what is to be said about it.
    """
    dead = dead_branches(groups, alive)
    branches = {branch.name: branch.tensors for branch in dead}
    gone = {name for names in branches.values() for name in names}
    of_ids = _outside(groups, alive)[groups.units.label]
    kept = {}
    for name, labels in groups.labels.items():
        if name in gone:
            continue
        layers = []
        for layer in labels.layers:
            mask = of_ids[layer.ids]
            if not mask.all():
                layers.append((layer.axes, mask))
        parts = parts_of(layers)
        if parts:
            kept[name] = parts
    everything = groups.everything()
    return Plan(
        model=type(groups.model).__name__,
        shapes=dict(groups.trace.shapes),
        aliases=dict(groups.trace.aliases),
        kept=kept,
        attributes=_left(_attributes(groups, of_ids), groups, dead),
        rescale={k: v for k, v in _rescale(groups, of_ids).items() if k not in gone},
        forwards=_left(_forwards(groups, of_ids, dead), groups, dead),
        widths=_widths(groups, alive),
        branches=branches,
        costs={
            name: (groups.cost(name, everything), groups.cost(name, alive))
            for name in dict.fromkeys((*groups.costs, *costs))
        }
        | dict(measured or {}),
        notes=tuple(notes),
        options=options,
        inputs=describe(groups.trace.args, groups.trace.kwargs),
        groups=groups,
    )


def _outside(groups: Groups, alive: Mask) -> Mask:
    """Return the live classes, with all that went with a branch only: nothing computes with it, and
    nothing has to follow it.
    """
    found = alive.copy()
    for branch in groups.branches:
        if not alive[branch.number]:
            found[branch.inside] = True
    return found


def _forwards(groups: Groups, of_ids: Mask, dead: Sequence[Branch]) -> dict[str, Forward]:
    """Return the forwards that modules run as data; those that add a dead branch no longer do."""
    found = groups.replaced.at(of_ids)
    by_path: dict[str, list[Branch]] = {}
    for branch in dead:
        by_path.setdefault(branch.place.path, []).append(branch)
    for path, mine in by_path.items():
        whole = mine[0].template
        forward = found.get(path) or whole.at(of_ids) or whole.forward
        found[path] = dropped(forward, [branch.addition for branch in mine])
    return found


def _left(found: dict[str, Any], groups: Groups, dead: Sequence[Branch]) -> dict[str, Any]:
    """Leave out what belongs to modules that lose all of their tensors, and do not add."""
    gone = {name for branch in dead for name in branch.tensors}
    adding = {branch.place.path for branch in dead}

    def stays(path: str) -> bool:
        mine = {x for x in groups.trace.aliases if not path or x.startswith(f"{path}.")}
        return path in adding or not mine or not mine <= gone

    return {path: value for path, value in found.items() if not gone or stays(path)}


def _attributes(groups: Groups, of_ids: Mask) -> dict[str, dict[str, Any]]:
    """Return what changes, as JSON has it (`cut` gives tuples back).

    Norms without tensors are told their width here: nothing they hold would tell it later.
    """
    found = {
        path: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for path, values in attribute_values(groups.model, groups.sites, of_ids).items()
    }
    for step in groups.steps:
        path = location(step.node)[0]
        module = groups.model.get_submodule(path)
        if isinstance(module, nn.modules.batchnorm._NormBase) and not module.state_dict():
            width = axis_size(step.out, 1, of_ids)
            if width != module.num_features:
                found.setdefault(path, {})["num_features"] = width
    return found


def _rescale(groups: Groups, of_ids: Mask) -> dict[str, tuple[tuple[int, ...], float]]:
    result = {}
    for pin in groups.pins:
        if pin.path in groups.replaced.active:
            continue  # the forward that replaces the module's own has the scale
        new = axis_size(pin.labels, pin.axis, of_ids)
        old = pin.labels.shape[pin.axis]
        if new != old:
            for name, rows in pin.rows.items():
                result[name] = (tuple(rows.tolist()), (new / old) ** 0.5)
    return result


def shaped(groups: Groups, alive: Mask) -> nn.Module:
    """Return a network of the shapes that are left, with the first of all weights: it can be timed,
    and computes nothing of use.
    """
    dead = dead_branches(groups, alive)
    gone = {name for branch in dead for name in branch.tensors}
    of_ids = _outside(groups, alive)[groups.units.label]
    tensors = {}
    for name, tensor in named_tensors(groups.model):
        labels = groups.labels[groups.trace.aliases[name]]
        shape = new_shape(labels, of_ids) if labels.layers else tuple(tensor.shape)
        if shape != tuple(tensor.shape):
            tensors[name] = tensor.detach()[tuple(slice(0, size) for size in shape)].clone()
    values = _left(attribute_values(groups.model, groups.sites, of_ids), groups, dead)
    forwards = _left(_forwards(groups, of_ids, dead), groups, dead)
    return rebuild(groups.model, tensors, values, forwards, gone).eval()


def _widths(groups: Groups, alive: Mask) -> tuple[Width, ...]:
    widths = []
    for group in groups:
        for family in group.families:
            left = [c for c in family.clusters if alive[c].any()] or list(family.clusters)
            gone = max(int((~alive[c]).sum()) for c in left)
            widths.append(Width(group.name, family.kind, family.width, family.width - gone))
    widths += [Width(x.name, KIND, 1, int(alive[x.number])) for x in groups.branches]
    return tuple(widths)


def alive_of(groups: Groups, plan: Plan) -> Mask:
    """Return the classes that a plan for the same network keeps."""
    plan.check(groups.model)
    alive = np.ones(groups.units.count, bool)
    for branch in (x for x in groups.branches if set(x.tensors) <= plan.gone):
        alive[groups.units.closure([branch.number])] = False
    for name, part in ((name, part) for name, parts in plan.kept.items() for part in parts):
        for layer in (x for x in groups.labels[name].layers if set(x.axes) <= set(part.axes)):
            gone = tuple(k for k, axis in enumerate(part.axes) if axis not in layer.axes)
            classes = groups.units.label[layer.ids]
            alive[np.setdiff1d(classes, classes[part.mask.any(axis=gone)])] = False
    _count_unseen(groups, alive)
    whole = {branch.number for branch in groups.branches}
    for _ in range(4):
        for block, items in groups.units.below.items():
            if block not in whole and len(items) and not alive[items].any():
                alive[block] = False
    return alive


def _count_unseen(groups: Groups, alive: Mask) -> None:
    """Remove of rows that no tensor has (of what a forward makes, only the size counts) as many as
    of the live rows in step with them, no matter which.
    """
    units = groups.units
    seen = np.zeros(units.count, bool)
    for layer in (x for labels in groups.labels.values() for x in labels.layers):
        seen[units.label[layer.ids]] = True
    seen[list(units.below)] = True  # blocks go with what is in them
    for clusters in (family.clusters for family in units.families):
        gone = [int((~alive[cluster]).sum()) for cluster in clusters if seen[cluster].any()]
        for cluster in (x for x in clusters if gone and not seen[x].any()):
            alive[cluster[: min(gone)]] = False


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return example inputs as JSON values: tensors by shape and type, numbers as they are."""
    return {
        "args": [_described(value) for value in args],
        "kwargs": {key: _described(value) for key, value in kwargs.items()},
    }


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    return {"type": type(value).__name__}
