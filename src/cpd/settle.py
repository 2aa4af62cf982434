"""Settle: what an attribute means whose value two sizes have by chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from .channels import Place, Reason
from .groups import Groups
from .labels import Mask, live_size
from .rules import Size
from .sizes import Site
from .trace import location
from .units import Family

Follows = Callable[[list[Family]], bool]
_CHOICES = 32  # what attributes may mean together, tried at most


@dataclass(frozen=True)
class Meaning:
    """What an attribute may mean: sizes that change together, and the families that change them."""

    sizes: tuple[Size, ...]
    families: list[Family]


def settle(groups: Groups, follows: Follows) -> None:
    """Where one attribute would hold two sizes that change apart, find out which it means.

    An attribute is found by its value, and two sizes may have one value by chance. One of a module
    around the call is left as it is. In the module that makes the call it is tried out; if that
    does not tell, the module's forward is replaced, and where that cannot be, none may change.
    """
    made = {id(size): location(step.node)[0] for step in groups.steps for size in step.sizes}
    unclear: dict[str, list[tuple[Site, list[Meaning]]]] = {}
    movers = _Movers(groups)
    for site in [site for site in groups.sites if len(site.sizes) > 1]:
        meanings = _meanings(movers, site)
        if len(meanings) < 2:
            continue
        own = all(made[id(size)] == site.path for size in site.sizes)
        if not own or site.path in groups.replaced.active:
            groups.sites.remove(site)
        else:
            unclear.setdefault(site.path, []).append((site, meanings))
    known: dict[object, tuple[int, ...]] = {}
    for path, sites in unclear.items():
        key = (type(groups.model.get_submodule(path)), *(s.attribute for s, _ in sites))
        if key not in known:
            known[key] = _tried_out(groups, sites, follows)
        if known[key]:
            _mean(groups, sites, known[key])
        else:
            _keep_unclear(groups, path, sites)


def _meanings(movers: _Movers, site: Site) -> list[Meaning]:
    found: dict[frozenset[int], Meaning] = {}
    for size in site.sizes:
        mine = movers.of(size)
        key = frozenset(id(family) for family in mine)
        sizes = (*(found[key].sizes if key in found else ()), size)
        found[key] = Meaning(sizes, mine)
    found.pop(frozenset(), None)
    return list(found.values())


def _tried_out(
    groups: Groups, sites: list[tuple[Site, list[Meaning]]], follows: Follows
) -> tuple[int, ...]:
    """Return which meaning of each attribute lets the code follow (-1: none, it stays as it is);
    nothing where several do, or no one does. The fewest changes come first.
    """
    families = {id(f): f for _, meanings in sites for m in meanings for f in m.families}
    choices = list(product(*(range(-1, len(meanings)) for _, meanings in sites)))
    choices.sort(key=lambda choice: sum(k >= 0 for k in choice))
    before = list(groups.sites)
    passed: list[tuple[int, ...]] = []
    for choice in choices[:_CHOICES]:
        if passed and sum(k >= 0 for k in choice) > sum(k >= 0 for k in passed[0]):
            break
        _mean(groups, sites, choice)
        if follows(list(families.values())):
            passed.append(choice)
        groups.sites[:] = before
    return passed[0] if len(passed) == 1 else ()


def _mean(groups: Groups, sites: list[tuple[Site, list[Meaning]]], choice: tuple[int, ...]) -> None:
    """Let each attribute mean what is chosen."""
    for (site, meanings), k in zip(sites, choice, strict=True):
        at = groups.sites.index(site)
        groups.sites[at : at + 1] = [replace(site, sizes=meanings[k].sizes)] if k >= 0 else []


def _keep_unclear(groups: Groups, path: str, sites: list[tuple[Site, list[Meaning]]]) -> None:
    for site, meanings in sites:
        why = f"{site.attribute} may mean two sizes"
        if path in groups.replaced.active or groups.replaced.enable([path], why):
            groups.sites.remove(site)
        else:
            apart = {id(family): family for m in meanings for family in m.families}
            why = f"{site.attribute} of {path or 'the network'} may mean two sizes"
            freeze(groups, list(apart.values()), why)


class _Movers:
    """Says which families change a size when they lose a unit."""

    def __init__(self, groups: Groups) -> None:
        self.label = groups.units.label
        self.families = [f for f in groups.units.families if f.width > 1]
        close = groups.units.closure
        self.closures = [close(int(c[0]) for c in f.clusters) for f in self.families]
        numbers = [np.full(len(part), k) for k, part in enumerate(self.closures)]
        empty = [np.empty(0, np.int64)]
        classes = np.concatenate(self.closures or empty)
        order = np.argsort(classes, kind="stable")
        self.classes, self.numbers = classes[order], np.concatenate(numbers or empty)[order]
        self.known: dict[tuple[int, int], list[Family]] = {}

    def of(self, size: Size) -> list[Family]:
        """Return the families whose next unit changes a size, in their order."""
        key = (id(size.labels), size.axis)
        if key not in self.known:
            self.known[key] = [self.families[k] for k in self._near(size) if self._moves(k, size)]
        return self.known[key]

    def _near(self, size: Size) -> list[int]:
        """Number the families of which a unit runs along the axis."""
        layers = [layer for layer in size.labels.layers if size.axis in layer.axes]
        mine = np.unique(self.label[np.concatenate([layer.ids.ravel() for layer in layers])])
        first = np.searchsorted(self.classes, mine, "left")
        last = np.searchsorted(self.classes, mine, "right")
        spans = [self.numbers[a:b] for a, b in zip(first, last, strict=True) if b > a]
        return np.unique(np.concatenate(spans)).tolist() if spans else []

    def _moves(self, number: int, size: Size) -> bool:
        layer = size.labels.governing(size.axis)
        if layer is None:
            return False
        left = ~np.isin(self.label[layer.ids], self.closures[number])
        return live_size(left, layer.axes.index(size.axis)) != size.old


def classes_of(family: Family) -> list[int]:
    """Return all classes of a family."""
    return np.concatenate(family.clusters).tolist()


def freeze(groups: Groups, families: list[Family], why: str, place: Place | None = None) -> None:
    """Take families out of choice, and remember why for the channels that only they remove."""
    units = groups.units
    units.reasons.append(Reason(why, place or Place()))
    for family in families:
        if family not in units.families:
            continue
        units.families = [f for f in units.families if f is not family]
        closure = units.closure(classes_of(family))
        units.frozen[closure[units.frozen[closure] < 0]] = len(units.reasons) - 1


def without(groups: Groups, families: Iterable[Family], *, least: bool = False) -> Mask:
    """Return the classes left when about half of the units of each family (or the last unit) are
    gone.
    """
    alive = groups.everything()
    for number, family in enumerate(families):
        most = min(family.size, family.width - 1)  # not the same of all: two must not fit by chance
        gone = 1 + (most // 2 + number) % most if most > 0 else 0
        times = family.multiple
        gone = min(-(-gone // times), most // times) * times
        which = slice(family.size - times, None) if least and gone else slice(gone)
        first = np.concatenate([cluster[: family.size][which] for cluster in family.clusters])
        alive[groups.units.closure(first.tolist())] = False
    return alive
