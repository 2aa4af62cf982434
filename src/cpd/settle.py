"""Settle: what an attribute means whose value two sizes have by chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from .channels import Place, Reason
from .groups import Groups
from .labels import axis_size
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
    for site in [site for site in groups.sites if len(site.sizes) > 1]:
        meanings = _meanings(groups, site)
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


def _meanings(groups: Groups, site: Site) -> list[Meaning]:
    found: dict[frozenset[int], Meaning] = {}
    for size in site.sizes:
        movers = [f for f in groups.units.families if f.width > 1 and _changes(groups, f, size)]
        key = frozenset(id(family) for family in movers)
        sizes = (*(found[key].sizes if key in found else ()), size)
        found[key] = Meaning(sizes, movers)
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


def _changes(groups: Groups, family: Family, size: Size) -> bool:
    """Say whether a unit less of a family changes a size."""
    closure = groups.units.closure([int(cluster[0]) for cluster in family.clusters])
    layers = [layer for layer in size.labels.layers if size.axis in layer.axes]
    mine = groups.units.label[np.concatenate([layer.ids.ravel() for layer in layers])]
    if not np.isin(mine, closure).any():
        return False
    alive = groups.everything()
    alive[closure] = False
    return axis_size(size.labels, size.axis, alive[groups.units.label]) != size.old


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
