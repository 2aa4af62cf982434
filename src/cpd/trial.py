"""Trial: which units the network's own Python code can follow.

A unit may be free in the graph and still not be removable, because the forward of some module
carries a size that no attribute holds. So the units whose sizes appear as literals are cut once on
the meta device, where nothing is computed: if the copy runs and puts out the same shapes, its code
follows; if not, they are kept, with the error as the reason. Kinds of units that occur many times
are tried once for all.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .groups import Groups
from .labels import Mask
from .opened import at_fault, calls_of, hold_open
from .runs import Failure, Runs
from .settle import classes_of, freeze, settle, without
from .sizes import NORM_AND_CONV
from .trace import location
from .units import Family

_ROUNDS = 3  # modules for which others of a kind are tried without what passes through them
_PARTS = ("start", "end", "length", "groups", "num_groups", "split_size")


def freeze_unfollowed(groups: Groups) -> None:
    """Keep the units of families that the network's code cannot follow.

    Where attributes hold all literals one trial of everything will do. A literal that none holds
    may fit by chance, so families that change one are tried kind by kind, and at two widths.
    """
    run = Runs(groups)
    hold_open(groups, run)
    _freeze_unfollowed(groups, run)
    held = hold_open(groups, run)  # of code that ran no further before
    error = run(without(groups, groups.units.families)) if held else None
    if error is not None:
        freeze(groups, held, f"the code cannot follow: {error.text}", error.place)


def _freeze_unfollowed(groups: Groups, run: Runs) -> None:
    settle(groups, lambda families: _tried(groups, families, run, halves=True) is None)
    suspects = _suspects(groups)
    if not suspects:
        return
    loose = _loose(groups)
    together = _followed(groups, [f for kind in suspects.values() for f in kind], run)
    if together is None and not loose.any():
        return
    for kind in suspects.values():
        open_ = any(loose[groups.units.closure(classes_of(f))].any() for f in kind)
        if together is None and not open_:
            continue
        _freeze_kind(groups, kind, run, halves=open_)
    kept = [f for kind in suspects.values() for f in kind if f in groups.units.families]
    error = run(without(groups, kept))
    if error is not None:
        error = _tried_replaced(groups, kept, run, error)
    if error is not None:
        why = f"the code cannot follow together with others: {error.text}"
        freeze(groups, kept, why, error.place)


def _freeze_kind(groups: Groups, kind: list[Family], run: Runs, *, halves: bool) -> None:
    """Keep those of a kind that pass through a module whose code fails, while the others follow.

    Where many modules fail, the rest of the kind is kept with the last one's reason.
    """
    for left in range(_ROUNDS, -1, -1):
        error = _tried(groups, kind, run, halves=halves)
        if error is not None:
            error = _tried_replaced(groups, kind, run, error)
        if error is None:
            return
        halves = True  # the same code may fit others by chance
        guilty = _through(groups, kind, error.paths[:1]) if left else kind
        freeze(groups, guilty or kind, f"the code cannot follow: {error.text}", error.place)
        kind = [f for f in kind if any(f is free for free in groups.units.families)]
        if not kind:
            return


def _through(groups: Groups, families: list[Family], paths: tuple[str, ...]) -> list[Family]:
    """Return the families that change what passes through modules."""
    mine = np.zeros(groups.units.count, bool)
    for path in paths:
        mine[groups.units.label[groups.replaced.passing(path)]] = True
    return [f for f in families if mine[groups.units.closure(classes_of(f))].any()]


def _followed(groups: Groups, families: list[Family], run: Runs) -> Failure | None:
    """Cut all at once; where the code of a class fails, replace its forwards and go on."""
    error = run(without(groups, families))
    while error is not None:
        paths = _of_one_class(groups, error.paths[:1])
        if not groups.replaced.enable(paths, error.text):
            return error
        error = run(without(groups, families))
    return None


def _tried(groups: Groups, kind: list[Family], run: Runs, *, halves: bool) -> Failure | None:
    error = run(without(groups, kind))
    for part in (kind[::2], kind[1::2]) if halves else ():
        if error is None and part:
            error = run(without(groups, part, least=True))
    return error


def _tried_replaced(
    groups: Groups, kind: list[Family], run: Runs, error: Failure
) -> Failure | None:
    """Try again with replaced forwards, where the code failed and wherever it is the same code.

    Around the module whose code failed only those can help that have a size to be changed, and
    whose code was seen to use a wrong number: the forward of others would be the calls that their
    code makes. Where the code runs but puts out other shapes, the modules that hold the sizes are
    taken.
    """
    enabled: list[str] = []
    again: Failure | None = error
    holders = _holders(groups, kind)
    while again is not None:
        faulty = _at_fault(groups, again, holders, run)
        around = tuple(path for path in again.paths[1:] if path in faulty)
        paths = _of_one_class(groups, (*again.paths[:1], *around)) or _touched(groups, faulty)
        added = groups.replaced.enable(paths, again.text)
        if not added:
            groups.replaced.disable(enabled)
            reasons = [groups.replaced.why_not.get(path) for path in again.paths]
            text = "; ".join([again.text, *[r for r in reasons if r][:1]])
            return replace(again, text=text)
        enabled += added
        again = _tried(groups, kind, run, halves=True)
    return None


def _at_fault(
    groups: Groups, failure: Failure, holders: dict[str, bool], run: Runs
) -> dict[str, bool]:
    """Return the holders that a run of what failed does not clear."""
    both_ways = any(t.others for t in groups.replaced.active.values())
    if failure.alive is None or both_ways or not holders:
        return holders
    cut = calls_of(failure.alive, run)
    found = at_fault(groups, failure.alive, holders, run.uncut, cut)
    return {path: holders[path] for path in found}


def _of_one_class(groups: Groups, paths: tuple[str, ...]) -> list[str]:
    """Return all modules of the class of the innermost of `paths` that can be replaced."""
    for path in paths:
        if path not in groups.replaced.active and groups.replaced.template(path) is not None:
            kind = type(groups.model.get_submodule(path))
            modules = groups.model.named_modules()
            return [
                name for name, m in modules if type(m) is kind and name in groups.replaced.steps
            ]
    return []


def _touched(groups: Groups, holders: dict[str, bool]) -> list[str]:
    """Return the modules whose literals change; those that no attribute holds first."""
    open_ = [path for path, held in holders.items() if not held]
    return open_ if set(open_) - set(groups.replaced.active) else list(holders)


def _holders(groups: Groups, kind: list[Family]) -> dict[str, bool]:
    """Return the modules whose literals the families change, and whether attributes hold them."""
    held = {id(size) for site in groups.sites for size in site.sizes}
    mine = np.zeros(groups.units.count, bool)
    for family in kind:
        mine[groups.units.closure(classes_of(family))] = True
    found: dict[str, bool] = {}
    for step, size in ((x, size) for x in groups.steps for size in x.sizes):
        path = location(step.node)[0]
        layers = [x for x in size.labels.layers if size.axis in x.axes]
        if any(mine[groups.units.label[layer.ids]].any() for layer in layers):
            found[path] = found.get(path, True) and id(size) in held
    return found


def _loose(groups: Groups) -> Mask:
    """Return the classes that change a number of parts which no attribute holds."""
    held = {id(size) for site in groups.sites for size in site.sizes}
    loose = np.zeros(groups.units.count, bool)
    for step, size in ((x, size) for x in groups.steps for size in x.sizes):
        if id(size) in held or location(step.node)[0] in groups.replaced.active:
            continue
        if size.arg not in _PARTS:
            continue  # a stale size of a shape raises, or is none
        for layer in (x for x in size.labels.layers if size.axis in x.axes):
            loose[groups.units.label[layer.ids]] = True
    return loose


def _suspects(groups: Groups) -> dict[object, list[Family]]:
    """Families that change a literal size or pass through a module that has one, by the classes of
    these modules: code may compute what stands in its place from any width that it sees.
    """
    touched: dict[tuple[str, str], Mask] = {}
    through: dict[str, str] = {}
    for step, size in ((x, size) for x in groups.steps for size in x.sizes):
        module = groups.model.get_submodule(location(step.node)[0])
        if isinstance(module, NORM_AND_CONV):
            continue  # its attributes are known
        through[location(step.node)[0]] = type(module).__name__
        place = (type(module).__name__, size.arg)
        mask = touched.setdefault(place, np.zeros(groups.units.count, bool))
        for layer in (x for x in size.labels.layers if size.axis in x.axes):
            mask[groups.units.label[layer.ids]] = True
    for path, kind in through.items():
        mask = touched.setdefault((kind, ""), np.zeros(groups.units.count, bool))
        mask[groups.units.label[groups.replaced.passing(path)]] = True
    found: dict[object, list[Family]] = {}
    for family in groups.units.families:
        closure = groups.units.closure(classes_of(family))
        key = frozenset(place for place, mask in touched.items() if mask[closure].any())
        if key:
            found.setdefault((family.kind, key), []).append(family)
    return found
