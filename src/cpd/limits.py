"""Limits: what the user says about single groups, modules and channels.

`limits` bound how much of a group may go, by name, pattern or a function; `keep` names channels
that stay, by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._numbers import is_number
from .branches import Branch
from .errors import InputError, UnknownName
from .groups import CouplingGroup, Groups

Limits = Mapping[str, float] | Callable[[CouplingGroup | Branch], "float | None"]
Keep = Mapping[str, "Sequence[int] | str"]


def limits_of(groups: Groups, limits: Limits | None) -> dict[str, float]:
    """Return group name -> largest share of its units that may go, of those that have a limit.

    A pattern stands for the groups that it names; where it names none, for those whose channels a
    module or tensor of that name makes. Where several match, the lowest holds. A function is asked
    for every group and, combed with `depth=True`, for every branch.

    Raises `InputError` for patterns that match nothing and for shares outside 0 to 1.
    """
    found: dict[str, float] = {}
    if callable(limits):
        everyone = [*groups, *groups.branches]
        given = [(each.name, limits(each), [each.name]) for each in everyone]
        pairs = [(name, share, names) for name, share, names in given if share is not None]
    elif not isinstance(limits or {}, Mapping):
        raise InputError(f"limits are a mapping of names to shares or a function, got {limits!r}")
    else:
        pairs = [(x, share, _matching(groups, x)) for x, share in (limits or {}).items()]
    for what, share, names in pairs:
        if not (is_number(share) and 0 <= share <= 1):
            raise InputError(f"limit {what}={share!r}; give the largest share that may go, 0 to 1")
        found.update({name: min(float(share), found.get(name, 1.0)) for name in names})
    return found


def _matching(groups: Groups, pattern: str) -> list[str]:
    everyone = [*groups, *groups.branches]
    names = [each.name for each in everyone if fnmatchcase(each.name, pattern)]
    if names:
        return names
    names = [group.name for group in groups if any(_makes(group, pattern))]
    if not names:
        known = ", ".join(group.name for group in groups)
        raise InputError(
            f"limit {pattern!r} matches no coupling group and no module that makes the channels of "
            f"one; groups there are: {known}"
        )
    return names


def _makes(group: CouplingGroup, pattern: str) -> list[bool]:
    tensors = [member.tensor for member in group.members if member.role == "out"]
    paths = [*tensors, *(tensor.rpartition(".")[0] for tensor in tensors)]
    return [fnmatchcase(x, pattern) or x.startswith(f"{pattern}.") for x in dict.fromkeys(paths)]


def kept_classes(groups: Groups, keep: Keep | None) -> NDArray[np.bool_]:
    """Return which classes may not go, since the user keeps them, and the blocks that hold any.

    `keep`: name of a module or tensor -> numbers of channels that it makes, or "all"; a group's
    name with "all" keeps the whole group.

    Raises `UnknownName` for names, `InputError` for numbers that do not exist.
    """
    held = np.zeros(groups.units.count, bool)
    if not isinstance(keep or {}, Mapping):
        raise InputError(f"keep is a mapping of modules to numbers of channels, got {keep!r}")
    for name, numbers in (keep or {}).items():
        group = next((group for group in groups if group.name == name), None)
        branch = next((branch for branch in groups.branches if branch.name == name), None)
        if branch is not None and isinstance(numbers, str) and numbers == "all":
            held[branch.number] = True
        elif group is not None and isinstance(numbers, str) and numbers == "all":
            held[group.classes] = True
        else:
            classes = _made_by(groups, name)
            held[classes[_numbers(name, numbers, len(classes))]] = True
    if held.any():
        for block in groups.units.below:
            held[block] |= bool(held[groups.units.closure([block])].any())
    return held


def _made_by(groups: Groups, name: str) -> NDArray[np.int64]:
    """The classes of the channels that a module's weight, or a tensor, makes, in their order."""
    for tensor in (name, f"{name}.weight", f"{name}.in_proj_weight"):
        first = groups.trace.aliases.get(tensor, "")
        layers = groups.labels[first].layers if first in groups.labels else ()
        made = [x for x in layers if (first, x.owner) not in groups.consumed and x.ids.ndim == 1]
        if made:
            return groups.units.label[made[0].ids]
    names = {tensor.rpartition(".")[0] for tensor in groups.labels} | {g.name for g in groups}
    raise UnknownName("module or tensor to keep channels of", name, names - {""})


def _numbers(name: str, numbers: Any, size: int) -> Any:
    if isinstance(numbers, str):
        if numbers != "all":
            raise InputError(f'keep {name}={numbers!r}: give numbers of channels, or "all"')
        return slice(None)
    if not isinstance(numbers, Iterable):
        raise InputError(f'keep {name}={numbers!r}: give a list of channels, or "all"')
    found = np.asarray(list(numbers))
    whole = found.size == 0 or (found.ndim == 1 and found.dtype.kind in "iu")
    if not whole or (found.size and (found.min() < 0 or found.max() >= size)):
        raise InputError(
            f"keep {name}={list(numbers)!r}: give whole numbers from 0 to {size - 1}, one for each "
            "channel that stays"
        )
    return found.astype(np.int64)
