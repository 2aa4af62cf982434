"""Value: a study. Axes of levels, a level a change of one recipe; every combination is a cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from cpd.errors import InputError, UnknownName

__all__ = ["Cell", "Study", "laid", "names_in"]

Recipe = Mapping[str, Any]
_MERGED = ("base", "prune", "recover", "bench")  # stages: changed key by key; all else is replaced
_KINDS = ("curve", "classes")
_FIGURE = ("name", "kind", "series", "where", "count", "against")
_AGAINST = ("macs", "params")


@dataclass(frozen=True)
class Cell:
    """One run: ``place`` maps every axis to a level, ``values`` are the keywords of compress."""

    place: Mapping[str, str]
    values: Recipe

    @property
    def name(self) -> str:
        """Its levels, as a person says them."""
        return ", ".join(f"{axis} {level}" for axis, level in self.place.items())


@dataclass(frozen=True)
class Study:
    """A grid of compressions.

    Attributes:
        title: of the page. about: what it asks and what the paper says, for the page.
        recipe: what all cells share: keys of ``compress``, or the path of a file with them.
        bases: networks that are trained first, once for each seed: a name → changes of the recipe.
            "{name}" as a value anywhere in the recipe is the file with its weights.
        axes: axis → level → changes of the recipe, or the path of a file with them. Stages are
            changed key by key, other keys are replaced; later axes win.
        over: the axis that means and deviations run over, such as the seed.
        metric: what the networks are judged by.
        figures: mappings of ``name``, ``kind`` ("curve": metric against what was removed, with its
            knee; "classes": the best classes), ``series`` (the axis of its lines or bars),
            ``where`` (axis → level, for the other axes), ``count`` (of classes) and ``against``
            ("macs" or "params", of a curve).
        input_shape: of one sample, for measuring costs without data; some libraries know it.
        runs: folder of the cells, which several studies may share. kept: folder of their reports
            without pictures, small enough for a repository: a cell with one there is done, though
            its run has been deleted. output: folder of the page.
    """

    title: str
    axes: Mapping[str, Mapping[str, Any]]
    output: str
    recipe: Any = field(default_factory=dict)
    about: str = ""
    bases: Mapping[str, Recipe] = field(default_factory=dict)
    over: str | None = None
    metric: str = "miou"
    figures: tuple[Mapping[str, Any], ...] = ()
    input_shape: Any = None
    runs: str | None = None
    kept: str | None = None

    @classmethod
    def of(cls, values: Recipe, read: Callable[[str], Recipe]) -> Study:
        """A study from the mapping in its file; ``read`` gives the recipe at a path.

        Raises:
            UnknownName: a key that does not exist. InputError: a value that cannot work.
        """
        valid = [item.name for item in fields(cls)]
        for name in values:
            if name not in valid:
                raise UnknownName("key of a study", name, valid)
        for name in ("title", "axes", "output"):
            if not values.get(name):
                raise InputError(f"{name} is missing in the study")
        axes = {
            str(axis): {str(level): _recipe(change, read) for level, change in levels.items()}
            for axis, levels in _mapping("axes", values["axes"]).items()
            if _mapping(f"axis {axis}", levels)
        }
        bases = {k: _recipe(v, read) for k, v in _mapping("bases", values.get("bases", {})).items()}
        made = {
            **values,
            "axes": axes,
            "bases": bases,
            "recipe": _recipe(values.get("recipe", {}), read),
            "figures": tuple(values.get("figures", ())),
        }
        return cls(**made)

    def __post_init__(self) -> None:
        """Refuse axes and figures that do not exist, before anything is run."""
        if self.over is not None and self.over not in self.axes:
            raise UnknownName("axis to average over", self.over, self.axes)
        for figure in self.figures:
            _check_figure(figure, self.axes)
        for cell in self.cells():
            for name in names_in(cell.values):
                if name not in self.bases:
                    raise UnknownName("base", name, self.bases)

    @property
    def folder(self) -> Path:
        """Where the cells are."""
        return Path(self.runs if self.runs is not None else f"{self.output}/runs")

    def cells(self) -> list[Cell]:
        """Every combination of levels; the last axis changes fastest."""
        found = []
        for levels in product(*(each.items() for each in self.axes.values())):
            values = dict(self.recipe)
            for _, change in levels:
                values = laid(values, change)
            place = dict(zip(self.axes, (level for level, _ in levels), strict=True))
            found.append(Cell(place, values))
        return found

    def address(self, values: Recipe, *kept: str) -> str:
        """A short hash of all that decides a run, the bases it uses included."""
        chosen = {key: values[key] for key in kept or values if key in values}
        chosen.pop("output", None)
        bases = {name: self.bases[name] for name in names_in(chosen)}
        text = json.dumps([chosen, bases, self.recipe if bases else None], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_figure(figure: Mapping[str, Any], axes: Mapping[str, Any]) -> None:
    for key in figure:
        if key not in _FIGURE:
            raise UnknownName("key of a figure", key, _FIGURE)
    if not figure.get("name"):
        raise InputError(f"a figure needs a name, which its file gets: {dict(figure)}")
    if figure.get("kind") not in _KINDS:
        raise UnknownName("kind of figure", str(figure.get("kind")), _KINDS)
    if figure.get("against", "macs") not in _AGAINST:
        raise UnknownName("cost of a figure", str(figure["against"]), _AGAINST)
    series = [figure["series"]] if figure.get("series") else []
    for axis in (*figure.get("where", {}), *series):
        if axis not in axes:
            raise UnknownName("axis of a figure", axis, axes)


def laid(under: Recipe, over: Recipe) -> dict[str, Any]:
    """A recipe with changes laid over it."""
    found = dict(under)
    for key, value in over.items():
        both = key in _MERGED and isinstance(value, Mapping)
        found[key] = {**(found.get(key) or {}), **value} if both else value
    return found


def names_in(value: Any) -> Iterator[str]:
    """Every base that a recipe asks for: "{name}" anywhere in its values."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from names_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from names_in(item)
    elif isinstance(value, str) and value[:1] == "{" and value[-1:] == "}":
        yield value[1:-1]


def _recipe(value: Any, read: Callable[[str], Recipe]) -> dict[str, Any]:
    return dict(read(value)) if isinstance(value, str) else dict(_mapping("a recipe", value or {}))


def _mapping(what: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{what} must be a mapping, got {value!r}")
    return value
