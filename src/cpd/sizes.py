"""Sizes: which Python attribute holds which literal size of a traced call.

A view in a forward carries numbers (`num_heads`, `head_dim`, ...) that must follow when channels
go. The trace tells which literal carries channels and which module's code made the call; the
attribute of that value is found on that module, or on the nearest module around it that hands one
on to it. A literal with no attribute is taken to be computed from the tensors' own shapes; the
trial in `comb` and the proof in `verify` tell when it is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from .handed import HandedOn, Holder
from .labels import Mask, axis_size
from .rules import Size

NORM_AND_CONV = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.conv._ConvNd)


class Use(NamedTuple):
    """A literal size where it is used: by which module's code, in a call of what, and whether it is
    the bound of a slice that halves an axis.
    """

    path: str
    op: str
    size: Size
    half: bool = False


@dataclass(frozen=True)
class Site:
    """An attribute (or one entry of a tuple or list) and the sizes that it holds."""

    path: str
    attribute: str
    index: int | None
    sizes: tuple[Size, ...]

    @property
    def holder(self) -> Holder:
        """Where the number is."""
        return self.path, self.attribute, self.index

    def value(self, alive: Mask) -> int | None:
        """Return the new value, or None where the sizes disagree.

        A literal that happens to equal another one and does not change (the 3 of q, k, v beside 3
        heads) has no say.
        """
        found = {axis_size(size.labels, size.axis, alive) for size in self.sizes}
        found -= {self.sizes[0].old} if len(found) > 1 else set()
        return found.pop() if len(found) == 1 else None


def find_sites(model: nn.Module, uses: Iterable[Use], handed_on: HandedOn) -> list[Site]:
    """Return the attributes behind literal sizes."""
    uses, unsure = list(uses), _Unsure()
    for use in uses:
        _places(model, use, unsure)
    handed_on.ask(unsure.holders)
    by_place: dict[Holder, list[Size]] = {}
    for use in uses:
        for place in _places(model, use, handed_on):
            by_place.setdefault(place, []).append(use.size)
    return [Site(*place, tuple(sizes)) for place, sizes in by_place.items()]


class _Unsure:
    """Answers as `HandedOn` does, that nothing is known, and notes what it is asked about."""

    def __init__(self) -> None:
        self.holders: set[Holder] = set()

    def __call__(self, holder: Holder, *_: Any) -> bool:
        self.holders.add(holder)
        return False

    def unknown(self, _: Holder) -> bool:
        return False


def _places(model: nn.Module, use: Use, reaches: HandedOn | _Unsure) -> list[Holder]:
    """Return the attributes that may hold a size: the module's own, of several those that reach
    the call where any does; or those around it that reach its calls, or may do so where none is
    known to.
    """
    path, size = use.path, use.size
    perhaps: list[Holder] = []
    while True:
        module = model.get_submodule(path)
        if isinstance(module, NORM_AND_CONV) and size.arg in vars(module):
            return [(path, size.arg, size.index if size.arg == "normalized_shape" else None)]
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return []  # its attributes are those of its weights
        found = _attributes(module, size.old)
        if size.arg == "split_sizes":  # a list of sizes is held in its own order
            listed = [place for place in found if place[1] == size.index]
            found = listed or [place for place in found if place[1] is None]
        if isinstance(module, nn.MultiheadAttention):
            if size.axis == len(size.labels.shape) - 1:
                return []  # its head dims, which it computes; there may be as many as heads
            found = [place for place in found if place[0] == "num_heads"]
            return [(path, *place) for place in found]
        places = [(path, *place) for place in found]
        if path != use.path:
            perhaps = perhaps or [place for place in places if reaches.unknown(place)]
            places = [place for place in places if reaches(place, use.path)]
        else:
            places = _likely(places, use, reaches)
        if places or not path:
            return places or perhaps
        path = path.rpartition(".")[0]


def _likely(places: list[Holder], use: Use, reaches: HandedOn | _Unsure) -> list[Holder]:
    """Return those attributes of the module that makes a call which may hold its number."""
    if use.half:  # mostly computed: an attribute may be as large by chance
        return [x for x in places if reaches(x, use.path, use.op) or reaches.unknown(x)]
    if len(places) < 2:
        return places
    there = [place for place in places if reaches(place, use.path, use.op, use.size.index)]
    return there or places


def _attributes(module: nn.Module, value: int) -> list[tuple[str, int | None]]:
    """Return the module's own integers (and entries of tuples and lists) of this value."""
    found: list[tuple[str, int | None]] = []
    for name, held in vars(module).items():
        if _is(held, value):
            found.append((name, None))
        elif isinstance(held, tuple | list):
            found += [(name, k) for k, entry in enumerate(held) if _is(entry, value)]
    return found


def _is(held: Any, value: int) -> bool:
    return isinstance(held, int) and not isinstance(held, bool) and held == value


def attribute_values(
    model: nn.Module, sites: Iterable[Site], alive: Mask
) -> dict[str, dict[str, Any]]:
    """Return module path -> attribute -> new value for all attributes that change."""
    changes: dict[str, dict[str, Any]] = {}
    for site in sites:
        new = site.value(alive)
        old = site.sizes[0].old
        if new is None or new == old:
            continue
        held = changes.get(site.path, {}).get(site.attribute)
        if held is None:
            held = getattr(model.get_submodule(site.path), site.attribute)
        if site.index is None:
            held = new
        else:
            entries = list(held)
            entries[site.index] = new
            held = type(held)(entries) if type(held) in (tuple, list) else tuple(entries)
        changes.setdefault(site.path, {})[site.attribute] = held
    return changes
