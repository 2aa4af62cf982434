"""Opened: which code writes sizes that do not follow a cut, as a run of the cut network tells.

Beside one that is left open (-1) any other number fits, so nothing else shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .aliases import op_name
from .graph import Step, place_of
from .groups import Groups
from .handed import Watch
from .labels import Mask, axis_size
from .rules import Size
from .settle import classes_of, freeze, without
from .trace import location
from .units import Family

Call = tuple[str, tuple[int, ...]]  # its name, its numbers
WatchedCall = tuple[str, str, tuple[int, ...]]  # the module that makes it first
_LEAST = -8  # a number below is no axis, but counts channels from the end
_VIEWS = ("view", "reshape", "_unsafe_view", "unflatten")


def hold_open(groups: Groups, run: Callable[..., Any]) -> list[Family]:
    """Let a replaced forward hold a size that stays as it is beside one that is left open (-1):
    there any other number fits. Where it cannot be had, what changes the size stays.

    Most sizes that no attribute holds are computed, and follow: a run of the cut network tells.
    Returns the families that change sizes which a forward holds from now on.
    """
    alive = without(groups, groups.units.families)
    found = _open_sizes(groups, alive[groups.units.label])
    if not found:
        return []
    watch = Watch()
    run(alive, watch)
    why, held = "no attribute holds a size beside one that is left open", []
    for path, uses in found.items():
        made = [numbers for at, _, numbers in watch.calls if at == path]
        for step, size in (use for use in uses if _is_among(use[0].args[use[1].arg], made)):
            changing = _changing(groups, size)
            if path in groups.replaced.active or groups.replaced.enable([path], why):
                held += changing
            else:
                freeze(groups, changing, why, place_of(step.node))
    return held


def calls_of(alive: Mask, run: Callable[..., Any]) -> list[WatchedCall]:
    """Return the calls of a run with what is left, up to its end or where it fails."""
    watch = Watch()
    run(alive, watch)
    return watch.calls


def at_fault(
    groups: Groups,
    alive: Mask,
    paths: Iterable[str],
    uncut: list[WatchedCall],
    cut: list[WatchedCall],
) -> list[str]:
    """Return those modules whose code gives some call another number than it should after a cut,
    until it fails: an old one, or one that it computes of what it meets. All of them, where no
    calls are seen. `uncut`, `cut`: the calls of both networks; `alive`: what the cut has left.
    """
    of_ids = alive[groups.units.label]
    should: dict[str, dict[int, set[int]]] = {path: {} for path in paths}
    for step, size in ((x, size) for x in groups.steps for size in x.sizes):
        path = location(step.node)[0]
        if path in should:
            new = axis_size(size.labels, size.axis, of_ids)
            should[path].setdefault(size.old, set()).add(new)
    if not uncut or not cut:
        return list(should)
    first = {id(module): path for path, module in groups.model.named_modules()}
    found = []
    for path, becomes in should.items():
        name = first[id(groups.model.get_submodule(path))]
        before, after = ([call[1:] for call in made if call[0] == name] for made in (uncut, cut))
        if len(after) > len(before) or not all(map(partial(_follows, becomes), before, after)):
            found.append(path)
    return found


def _follows(becomes: Mapping[int, set[int]], before: Call, after: Call) -> bool:
    """Whether a call of the cut network has the numbers that it should."""
    (name, old), (other, new) = before, after
    return (name, len(old)) == (other, len(new)) and all(
        x >= _LEAST and y in becomes.get(x, (x,)) for x, y in zip(old, new, strict=True)
    )


def _open_sizes(groups: Groups, left: Mask) -> dict[str, list[tuple[Step, Size]]]:
    """Return by module the sizes beside open ones that change, but that neither an attribute nor
    a replaced forward holds.
    """
    held = {id(size) for site in groups.sites for size in site.sizes}
    found: dict[str, list[tuple[Step, Size]]] = {}
    for step in groups.steps:
        path = location(step.node)[0]
        if path in groups.replaced.active or op_name(step.node) not in _VIEWS:
            continue
        for size in (x for x in step.sizes if id(x) not in held and _beside_open(step, x)):
            if axis_size(size.labels, size.axis, left) != size.old:
                found.setdefault(path, []).append((step, size))
    return found


def _beside_open(step: Step, size: Size) -> bool:
    shape = step.args.get(size.arg)
    if size.index is None or not isinstance(shape, list | tuple) or -1 not in shape:
        return False
    return size.labels.carries(size.axis - size.index + list(shape).index(-1))


def _is_among(shape: Sequence[Any], calls: list[tuple[int, ...]]) -> bool:
    """Whether a shape is what some call is given, as its last numbers."""
    wanted = [x if isinstance(x, int) else None for x in shape]
    return any(
        len(given) >= len(wanted)
        and all(x in (None, y) for x, y in zip(wanted, given[-len(wanted) :], strict=True))
        for given in calls
    )


def _changing(groups: Groups, size: Size) -> list[Family]:
    """Return the families by which a size changes."""
    mine = np.zeros(groups.units.count, bool)
    for layer in (x for x in size.labels.layers if size.axis in x.axes):
        mine[groups.units.label[layer.ids].ravel()] = True
    found = []
    for family in groups.units.families:
        if not mine[groups.units.closure(classes_of(family))].any():
            continue
        for least in (False, True):
            left = without(groups, [family], least=least)[groups.units.label]
            if axis_size(size.labels, size.axis, left) != size.old:
                found.append(family)
                break
    return found
