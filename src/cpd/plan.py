"""Plan: what is kept of which tensor, and all that cutting needs. A value; JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .errors import ArtefactError, PlanMismatch
from .forward import Forward
from .kept import Kept, beyond, composed, placed
from .labels import Mask
from .reading import bounded
from .trace import named_tensors

if TYPE_CHECKING:
    from .groups import Groups

FORMAT = 3
_MOST = 1 << 27  # entries of all masks of a plan: a file may not ask for more memory
_NO_PLAN = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


@dataclass(frozen=True)
class Width:
    """Units of one family of one group, before and after."""

    group: str
    family: str
    before: int
    after: int


@dataclass(frozen=True)
class Plan:
    """What a network keeps.

    `kept`: tensor -> parts with disjoint axes. `attributes`: module path -> attribute -> new value.
    `rescale`: tensor -> (rows of the original, factor). `shapes`: all tensors of the model it was
    made for. `forwards`: module path -> what it computes, where its own code cannot follow.
    `branches`: residual branch that goes whole -> all names of its tensors; none of them is left.
    `costs`: name -> (before, after), exact where counted. `notes`: how far below its budgets it is,
    and why.
    """

    model: str
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    kept: dict[str, tuple[Kept, ...]]
    attributes: dict[str, dict[str, Any]]
    rescale: dict[str, tuple[tuple[int, ...], float]]
    widths: tuple[Width, ...]
    costs: dict[str, tuple[float, float]]
    options: dict[str, Any]
    inputs: dict[str, Any]
    forwards: dict[str, Forward] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    branches: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: Groups | None = field(default=None, compare=False, repr=False)

    @cached_property
    def gone(self) -> frozenset[str]:
        """Names of the tensors of which nothing is left, since their branch goes whole."""
        return frozenset(name for names in self.branches.values() for name in names)

    def masks(self) -> dict[str, torch.Tensor]:
        """Return name -> bool tensor of the original's shape, True = kept, for every tensor that
        changes.
        """
        result = {}
        for name, first in self.aliases.items():
            if first in self.kept:
                shape = self.shapes[first]
                mask = np.ones((1,) * len(shape), bool)
                for part in self.kept[first]:
                    mask = mask & placed(part, len(shape))
                result[name] = torch.from_numpy(np.broadcast_to(mask, shape).copy())
        return result | {
            name: torch.zeros(self.shapes[name], dtype=torch.bool) for name in self.gone
        }

    def new_shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape after cutting (all zero where its branch goes whole)."""
        shape = [0 if name in self.gone else size for size in self.shapes[name]]
        for part in self.kept.get(self.aliases[name], ()):
            for axis, size in zip(part.axes, part.sizes, strict=True):
                shape[axis] = size
        return tuple(shape)

    def check(self, model: nn.Module) -> None:
        """Raise `PlanMismatch` where the model is not the one this plan was made for."""
        name = type(model).__name__
        found = {key: tuple(tensor.shape) for key, tensor in named_tensors(model)}
        if name == self.model and found == self.shapes:
            return
        differ = [key for key in {**self.shapes, **found} if found.get(key) != self.shapes.get(key)]
        first = differ[0] if differ else ""
        detail = (
            f"{first} is {found.get(first)} here and {self.shapes.get(first)} in the plan"
            if differ
            else ""
        )
        raise PlanMismatch(
            f"this plan was made for a {self.model}, not for this {name}: {len(differ)} tensors "
            f"differ{'; ' + detail if detail else ''}. Build the model as it was before pruning."
        )

    def then(self, later: Plan) -> Plan:
        """Return the plan that cuts at once what this one and then `later` (made for its result)
        cut.
        """
        left = {name: self.new_shape(name) for name in self.shapes if name not in self.gone}
        if later.shapes != left:
            raise PlanMismatch("the later plan was not made for what this plan leaves")
        kept = {}
        for name in (x for x in {**self.kept, **later.kept} if x not in later.gone):
            kept[name] = composed(
                self.kept.get(name, ()), later.kept.get(name, ()), self.shapes[name]
            )
        attributes = {path: dict(values) for path, values in self.attributes.items()}
        for path, values in later.attributes.items():
            attributes.setdefault(path, {}).update(values)
        return Plan(
            self.model, self.shapes, self.aliases, kept, attributes, self._rescaled(later),
            _widths_then(self.widths, later.widths),
            {k: (self.costs[k][0], later.costs[k][1]) for k in self.costs if k in later.costs},
            later.options, self.inputs, {**self.forwards, **later.forwards}, later.notes,
            self.branches | {_new(name, self.branches): v for name, v in later.branches.items()},
        )  # fmt: skip

    def beyond(self, first: Plan) -> dict[str, tuple[Kept, ...]]:
        """Return what this plan keeps of each tensor that `first`, which keeps more, has left:
        parts in the numbering of what is left.
        """
        result = {}
        for name in self.kept:
            parts = beyond(first.kept.get(name, ()), self.kept[name], self.shapes[name])
            if parts:
                result[name] = parts
        return result

    def _rescaled(self, later: Plan) -> dict[str, tuple[tuple[int, ...], float]]:
        result = dict(self.rescale)
        for name, (rows, factor) in later.rescale.items():
            alive = [part for part in self.kept.get(name, ()) if 0 in part.axes]
            old = np.arange(self.shapes[name][0])
            if alive:
                old = np.flatnonzero(alive[0].mask.reshape(len(alive[0].mask), -1).any(1))
            known = result.get(name, ((), 1.0))
            every = tuple(sorted({*known[0], *old[list(rows)].tolist()}))
            result[name] = (every, known[1] * factor)
        return result

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(
            {
                "format": FORMAT if self.branches else 2,  # older versions read what they can
                "model": self.model,
                "costs": {key: list(value) for key, value in self.costs.items()},
                "options": self.options,
                "inputs": self.inputs,
                "notes": list(self.notes),
                "widths": [[w.group, w.family, w.before, w.after] for w in self.widths],
                "shapes": {name: list(shape) for name, shape in self.shapes.items()},
                "aliases": {name: first for name, first in self.aliases.items() if name != first},
                "kept": {
                    name: [
                        {"axes": list(p.axes), "shape": list(p.mask.shape), "kept": _runs(p.mask)}
                        for p in parts
                    ]
                    for name, parts in self.kept.items()
                },
                "attributes": self.attributes,
                **({"branches": self.branches} if self.branches else {}),
                "forwards": {path: forward.to_data() for path, forward in self.forwards.items()},
                "rescale": {
                    name: {"rows": _runs_of(rows), "factor": factor}
                    for name, (rows, factor) in self.rescale.items()
                },
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, *, limited: bool = True) -> Plan:
        """Return the plan of a JSON text.

        Args:
            text: what `to_json` returned.
            limited: refuse what is larger than plans of networks are (32 MiB, 2¹⁹ lists and
                mappings), as reading it could take all memory; for text that is not your own.

        Raises:
            ArtefactError: it is no plan, or too large.
        """
        try:
            return _from_dict(json.loads(bounded(text) if limited else text))
        except _NO_PLAN as error:
            raise ArtefactError(
                f"this is not a plan of format {FORMAT}: {type(error).__name__}: {error}. "
                "Give the text that Plan.to_json wrote, whole."
            ) from error

    def __str__(self) -> str:
        lines = [f"Plan for {self.model}"]
        for name, (before, after) in self.costs.items():
            lines.append(f"  {name}: {before:,} -> {after:,} ({after / max(before, 1):.1%})")
        lines += [f"  {note}" for note in self.notes]
        wide = max([len(w.group) for w in self.widths], default=0)
        lines += [
            f"  {w.group:<{wide}}  {w.before} -> {w.after} {w.family}"
            for w in self.widths
            if w.before != w.after
        ]
        return "\n".join(lines)


def _new(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken."""
    while name in taken:
        name += "'"
    return name


def _widths_then(first: Sequence[Width], later: Sequence[Width]) -> tuple[Width, ...]:
    after: dict[tuple[str, str], list[Width]] = {}
    for w in later:
        after.setdefault((w.group, w.family), []).append(w)
    result = []
    for w in first:
        found = after.get((w.group, w.family), [])
        result.append(Width(w.group, w.family, w.before, found.pop(0).after if found else w.after))
    return tuple(result)


def _runs(mask: Mask) -> str:
    return _runs_of(np.flatnonzero(mask.ravel()).tolist())


def _runs_of(numbers: Sequence[int]) -> str:
    """Write increasing numbers as "0-3,5"."""
    array = np.asarray(numbers, np.int64)
    if not len(array):
        return ""
    cuts = np.flatnonzero(np.diff(array) != 1)
    first, last = array[np.r_[0, cuts + 1]].tolist(), array[np.r_[cuts, len(array) - 1]].tolist()
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))


def _numbers(runs: str, limit: int) -> np.ndarray:
    mask = np.zeros(limit, bool)
    for run in runs.split(",") if runs else ():
        first, _, last = run.partition("-")
        start, stop = int(first), int(last or first) + 1
        if not 0 <= start < stop <= limit:
            raise ValueError(f"run {run!r} is outside 0-{limit - 1}")
        mask[start:stop] = True
    return np.flatnonzero(mask)


def _number(value: Any) -> float:
    if not isfinite(value):
        raise ValueError(f"a cost of {value}")
    return float(value) if isinstance(value, float) else int(value)


def _from_dict(data: Mapping[str, Any]) -> Plan:
    if data["format"] not in (1, 2, FORMAT):
        raise ValueError(f"format {data['format']}")
    shapes = {name: tuple(map(int, shape)) for name, shape in data["shapes"].items()}
    _check_sizes(data, shapes)
    kept = {name: _parts_from(parts, shapes[name]) for name, parts in data["kept"].items()}
    return Plan(
        model=str(data["model"]),
        shapes=shapes,
        aliases={name: data["aliases"].get(name, name) for name in shapes},
        kept=kept,
        attributes=data["attributes"],
        rescale={
            name: (tuple(_numbers(entry["rows"], shapes[name][0]).tolist()), float(entry["factor"]))
            for name, entry in data["rescale"].items()
        },
        widths=tuple(Width(str(g), str(f), int(b), int(a)) for g, f, b, a in data["widths"]),
        costs={key: (_number(a), _number(b)) for key, (a, b) in data["costs"].items()},
        options=data["options"],
        inputs=data["inputs"],
        forwards={
            path: Forward.from_data(forward) for path, forward in data.get("forwards", {}).items()
        },  # format 1 had none
        notes=tuple(map(str, data.get("notes", ()))),
        branches=_branches(data, shapes),
    )


def _branches(
    data: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, ...]]:
    """Return what goes whole; formats 1 and 2 have none. Nothing goes twice, or is kept too."""
    found = {str(k): tuple(map(str, names)) for k, names in data.get("branches", {}).items()}
    names = [name for names in found.values() for name in names]
    entries = sum(prod(shapes[name]) for name in names)
    inside = [f"{path}." if path else "" for path in data.get("forwards", {})]
    loose = [name for name in names if not name.startswith(tuple(inside))]
    if loose:
        raise ValueError(f"{loose[0]!r} goes whole, but no forward does without it")
    if len(set(names)) < len(names) or {*names} & {*data["kept"], *data["rescale"]}:
        raise ValueError("a tensor goes twice")
    if entries > _MOST:
        raise ValueError(f"masks of {entries} entries; {_MOST} are allowed")
    return found


def _check_sizes(data: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse what no plan has, before anything of its size is made."""
    entries = sum(shapes[name][0] for name in data["rescale"])
    for name, parts in data["kept"].items():
        axes = [axis for part in parts for axis in part["axes"]]
        if len(set(axes)) != len(axes) or not set(axes) <= set(range(len(shapes[name]))):
            raise ValueError(f"axes {axes} of {name}, which has {len(shapes[name])}")
        entries += sum(prod(shapes[name][axis] for axis in part["axes"]) for part in parts)
    if entries > _MOST or any(size < 0 for shape in shapes.values() for size in shape):
        raise ValueError(f"masks of {entries} entries; {_MOST} are allowed")
    aliases = data["aliases"]
    owners = {*aliases.values(), *data["kept"], *data["rescale"]}
    wrong = sorted(name for name in owners if name not in shapes or name in aliases)
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no tensor of its own")
    if not all(isfinite(entry["factor"]) for entry in data["rescale"].values()):
        raise ValueError("a factor is not finite")


def _parts_from(parts: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> tuple[Kept, ...]:
    result = []
    for part in parts:
        sizes = tuple(int(size) for size in part["shape"])
        axes = tuple(int(axis) for axis in part["axes"])
        if sizes != tuple(shape[axis] for axis in axes):
            raise ValueError(f"a part of shape {sizes} for axes {axes} of {shape}")
        mask = np.zeros(int(np.prod(sizes)), bool)
        mask[_numbers(part["kept"], len(mask))] = True
        result.append(Kept(axes, mask.reshape(sizes)))
    return tuple(result)
