"""Trial: which units the network's own Python code can follow.

A unit may be free in the graph and still not be removable, because the forward of some module
carries a size that no attribute holds. So the units whose sizes appear as literals are cut once on
the meta device, where nothing is computed: if the copy runs and puts out the same shapes, its code
follows; if not, they are kept, with the error as the reason. Kinds of units that occur many times
are tried once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from .channels import Reason
from .groups import Groups
from .labels import Mask, axis_size, new_shape
from .replace import Disagreement
from .rules import Size
from .sizes import NORM_AND_CONV, attribute_values
from .surgery import rebuild
from .trace import location, quiet_state
from .units import Family

Run = Callable[[Mask], str | None]
_PARTS = ("start", "end", "length", "groups", "num_groups", "split_size")


def freeze_unfollowed(groups: Groups) -> None:
    """Keep the units of families that the network's code cannot follow.

    Where attributes hold all literals one trial of everything will do. A literal that none holds
    may fit by chance, so families that change one are tried kind by kind, and at two widths.
    """
    _settle(groups)
    suspects = _suspects(groups)
    if not suspects:
        return
    run = _runner(groups)
    loose = _loose(groups)
    together = run(_without(groups, [f for kind in suspects.values() for f in kind]))
    if together is None and not loose.any():
        return
    for kind in suspects.values():
        open_ = any(loose[groups.units.closure(_classes(f))].any() for f in kind)
        if together is None and not open_:
            continue
        error = _tried(groups, kind, run, halves=open_)
        if error is not None:
            error = _tried_replaced(groups, kind, run, error)
        if error is not None:
            _freeze(groups, kind, f"the code cannot follow: {error}")
    kept = [f for kind in suspects.values() for f in kind if f in groups.units.families]
    error = run(_without(groups, kept))
    if error is not None:
        error = _tried_replaced(groups, kept, run, error)
    if error is not None:
        _freeze(groups, kept, f"the code cannot follow together with others: {error}")


def _tried(groups: Groups, kind: list[Family], run: Run, *, halves: bool) -> str | None:
    error = run(_without(groups, kind))
    for part in (kind[::2], kind[1::2]) if halves else ():
        error = error or run(_without(groups, part, least=True))
    return error


def _tried_replaced(groups: Groups, kind: list[Family], run: Run, error: str) -> str | None:
    """Try again with replaced forwards: where no attribute holds a size, then where one does."""
    places = _touched(groups, kind)
    for paths in ([p for p, held in places.items() if not held], list(places)):
        added = groups.replaced.enable(paths, error)
        if added:
            again = _tried(groups, kind, run, halves=True)
            if again is None:
                return None
            groups.replaced.disable(added)
            error = again
    reasons = {
        f"{p or 'the network'}: {groups.replaced.why_not[p]}"
        for p in places
        if p in groups.replaced.why_not
    }
    return "; ".join([error, *sorted(reasons)[:2]])


def _touched(groups: Groups, kind: list[Family]) -> dict[str, bool]:
    """Return the modules whose literals the families change, and whether attributes hold all."""
    held = {id(size) for site in groups.sites for size in site.sizes}
    mine = np.zeros(groups.units.count, bool)
    for family in kind:
        mine[groups.units.closure(_classes(family))] = True
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


def _settle(groups: Groups) -> None:
    """Where one attribute would hold two sizes that change apart, it holds neither.

    An attribute is found by its value, and two sizes may have one value by chance. In the module
    that makes both, none may change; an attribute of a module around it is left as it is.
    """
    made = {id(size): location(step.node)[0] for step in groups.steps for size in step.sizes}
    for site in [site for site in groups.sites if len(site.sizes) > 1]:
        movers: dict[frozenset[int], list[Family]] = {}
        for size in site.sizes:
            found = [f for f in groups.units.families if f.width > 1 and _changes(groups, f, size)]
            movers[frozenset(id(family) for family in found)] = found
        movers.pop(frozenset(), None)
        if len(movers) < 2:
            continue
        why = f"{site.attribute} may mean two sizes"
        own = all(made[id(size)] == site.path for size in site.sizes)
        if (
            not own
            or site.path in groups.replaced.active
            or groups.replaced.enable([site.path], why)
        ):
            groups.sites.remove(site)
        else:
            apart = {id(family): family for found in movers.values() for family in found}
            why = f"{site.attribute} of {site.path or 'the network'} may mean two sizes"
            _freeze(groups, list(apart.values()), why)


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


def _classes(family: Family) -> list[int]:
    return np.concatenate(family.clusters).tolist()


def _suspects(groups: Groups) -> dict[object, list[Family]]:
    """Families that change a literal size, by the classes of the modules whose literals they
    change.
    """
    touched: dict[tuple[str, str], Mask] = {}
    for step, size in ((x, size) for x in groups.steps for size in x.sizes):
        module = groups.model.get_submodule(location(step.node)[0])
        if isinstance(module, NORM_AND_CONV):
            continue  # its attributes are known
        place = (type(module).__name__, size.arg)
        mask = touched.setdefault(place, np.zeros(groups.units.count, bool))
        for layer in (x for x in size.labels.layers if size.axis in x.axes):
            mask[groups.units.label[layer.ids]] = True
    found: dict[object, list[Family]] = {}
    for family in groups.units.families:
        closure = groups.units.closure(_classes(family))
        key = frozenset(place for place, mask in touched.items() if mask[closure].any())
        if key:
            found.setdefault((family.kind, key), []).append(family)
    return found


def _without(groups: Groups, families: Iterable[Family], *, least: bool = False) -> Mask:
    """Return the classes left when about half of the units of each family (or the last unit) are
    gone.
    """
    alive = groups.everything()
    for family in families:
        gone = max(1, min(family.size, family.width - 1) // 2) if family.width > 1 else 0
        which = slice(family.size - 1, None) if least and gone else slice(gone)
        first = np.concatenate([cluster[: family.size][which] for cluster in family.clusters])
        alive[groups.units.closure(first.tolist())] = False
    return alive


def _runner(groups: Groups) -> Run:
    """Return a function that cuts on the meta device, runs, and tells the error or None."""
    expected = _output_shapes(groups)

    @lru_cache(maxsize=1)
    def device() -> str:
        """Where the uncut model runs: code that needs values takes real tensors."""
        whole = _run(groups.model, groups, groups.everything(), "meta", None)
        return "meta" if whole is None else "cpu"

    def run(alive: Mask) -> str | None:
        error = _run(groups.model, groups, alive, "meta", expected)
        if error is None or device() == "meta":
            return error
        return _run(groups.model, groups, alive, "cpu", expected)

    return run


def _output_shapes(groups: Groups) -> list[tuple[int, ...]]:
    output = next(iter(reversed(groups.trace.graph.nodes)))
    values = [x.meta.get("val") for x in output.args[0] if hasattr(x, "meta")]
    return [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]


def _run(
    model: nn.Module,
    groups: Groups,
    alive: Mask,
    device: str,
    expected: list[tuple[int, ...]] | None,
) -> str | None:
    of_ids = alive[groups.units.label]
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        labels = groups.labels[groups.trace.aliases[name]]
        shape = new_shape(labels, of_ids) if labels.layers else tuple(tensor.shape)
        if device == "meta":
            tensors[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        elif shape != tuple(tensor.shape):
            tensors[name] = tensor.detach()[tuple(slice(0, n) for n in shape)]
    try:
        forwards = groups.replaced.at(of_ids)
    except Disagreement as error:
        return str(error)
    small = rebuild(model, tensors, attribute_values(model, groups.sites, of_ids), forwards).eval()
    args, kwargs = _to(groups.trace.args, device), _to(groups.trace.kwargs, device)
    try:
        with quiet_state(), torch.no_grad():
            out = small(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - any failure of the model's code is the answer sought
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    shapes = [
        tuple(x.shape) for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)
    ]
    if expected is not None and sorted(shapes) != sorted(expected):
        return f"puts out {shapes} instead of {expected}"
    return None


def _to(value: Any, device: str) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, value
    )


def _freeze(groups: Groups, families: list[Family], why: str) -> None:
    """Take families out of choice, and remember why for the channels that only they remove."""
    units = groups.units
    units.reasons.append(Reason(why))
    for family in families:
        if family not in units.families:
            continue
        units.families = [f for f in units.families if f is not family]
        closure = units.closure(_classes(family))
        units.frozen[closure[units.frozen[closure] < 0]] = len(units.reasons) - 1
