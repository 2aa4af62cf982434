"""Trial: which units the network's own Python code can follow.

A unit may be free in the graph and still not be removable, because the forward of some module
carries a size that no attribute holds. So the units whose sizes appear as literals are cut once on
the meta device, where nothing is computed: if the copy runs and puts out the same shapes, its code
follows; if not, they are kept, with the error as the reason. Kinds of units that occur many times
are tried once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from traceback import extract_tb
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .channels import Place
from .graph import place_of
from .groups import Groups
from .handed import Watch
from .labels import Mask, new_shape
from .on_meta import OnMeta
from .opened import at_fault, hold_open
from .replace import Disagreement
from .settle import classes_of, freeze, settle, without
from .sizes import NORM_AND_CONV, attribute_values
from .surgery import rebuild
from .trace import innermost, location, quiet_state
from .units import Family


@dataclass(frozen=True)
class Failure:
    """What a trial ended with, the modules in whose code it did, from the inside out, and the
    "file:line" of it. `call`: the call of the traced graph, where no code failed. `alive`: what
    was left.
    """

    text: str
    paths: tuple[str, ...] = ()
    source: str = ""
    call: fx.Node | None = None
    alive: Mask | None = field(default=None, repr=False, compare=False)

    @property
    def place(self) -> Place:
        """Where it ended, or the call of the graph that cannot follow."""
        if self.call is not None:
            return place_of(self.call)
        return Place("", "".join(self.paths[:1]), self.source)


Run = Callable[..., Failure | None]  # of what is left, and what watches
Mode = AbstractContextManager[Any]
_PARTS = ("start", "end", "length", "groups", "num_groups", "split_size")


def freeze_unfollowed(groups: Groups) -> None:
    """Keep the units of families that the network's code cannot follow.

    Where attributes hold all literals one trial of everything will do. A literal that none holds
    may fit by chance, so families that change one are tried kind by kind, and at two widths.
    """
    run = _runner(groups)
    hold_open(groups, run)
    _freeze_unfollowed(groups, run)
    held = hold_open(groups, run)  # of code that ran no further before
    error = run(without(groups, groups.units.families)) if held else None
    if error is not None:
        freeze(groups, held, f"the code cannot follow: {error.text}", error.place)


def _freeze_unfollowed(groups: Groups, run: Run) -> None:
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
        error = _tried(groups, kind, run, halves=open_)
        if error is not None:
            error = _tried_replaced(groups, kind, run, error)
        if error is not None:
            freeze(groups, kind, f"the code cannot follow: {error.text}", error.place)
    kept = [f for kind in suspects.values() for f in kind if f in groups.units.families]
    error = run(without(groups, kept))
    if error is not None:
        error = _tried_replaced(groups, kept, run, error)
    if error is not None:
        why = f"the code cannot follow together with others: {error.text}"
        freeze(groups, kept, why, error.place)


def _followed(groups: Groups, families: list[Family], run: Run) -> Failure | None:
    """Cut all at once; where the code of a class fails, replace its forwards and go on."""
    error = run(without(groups, families))
    while error is not None:
        paths = _of_one_class(groups, error.paths[:1])
        if not groups.replaced.enable(paths, error.text):
            return error
        error = run(without(groups, families))
    return None


def _tried(groups: Groups, kind: list[Family], run: Run, *, halves: bool) -> Failure | None:
    error = run(without(groups, kind))
    for part in (kind[::2], kind[1::2]) if halves else ():
        if error is None and part:
            error = run(without(groups, part, least=True))
    return error


def _tried_replaced(groups: Groups, kind: list[Family], run: Run, error: Failure) -> Failure | None:
    """Try again with replaced forwards, where the code failed and wherever it is the same code.

    Around the module whose code failed only those can help that have a size to be changed, and
    whose code was seen to use the old one: the forward of another would be the calls that its code
    makes. Where the code runs but puts out other shapes, the modules that hold the sizes are taken.
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
    groups: Groups, failure: Failure, holders: dict[str, bool], run: Run
) -> dict[str, bool]:
    """Return the holders that a run of what failed does not clear."""
    both_ways = any(t.others for t in groups.replaced.active.values())
    if failure.alive is None or both_ways or not holders:
        return holders
    found = at_fault(groups, failure.alive, holders, run)
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


def _runner(groups: Groups) -> Run:
    """Return a function that cuts on the meta device, runs, and tells the error or None."""
    expected = _output_shapes(groups)
    modes = {"meta": OnMeta(), "fake": FakeTensorMode(allow_non_fake_inputs=True)}

    def cut(alive: Mask, device: str, expected: Any, watch: Watch | None = None) -> Failure | None:
        mode = modes.get(device) or nullcontext()
        failure = _run(groups.model, groups, alive, device, mode, expected, watch)
        return None if failure is None else replace(failure, alive=alive)

    @lru_cache(maxsize=1)
    def device() -> str:
        """Where the uncut model runs: on the meta device, all of it or without what the code makes
        elsewhere and reads ("bare"); code that asks for values may do without while it is traced
        ("fake"), or else takes real tensors ("cpu").
        """
        for place in ("meta", "bare", "fake"):
            if cut(groups.everything(), place, None) is None:
                return place
        return "fake" if any(tensor.is_meta for tensor in groups.model.parameters()) else "cpu"

    def run(alive: Mask, watch: Watch | None = None) -> Failure | None:
        place = device() if device.cache_info().currsize else "meta"
        error = cut(alive, place, expected, watch)
        if error is not None and place != device():
            place = device()
            error = cut(alive, place, expected, watch)
        if error is None and any(t.others for t in groups.replaced.active.values()):
            return cut(alive, _other_way(groups, place), expected)
        return error

    return run


def _other_way(groups: Groups, place: str) -> str:
    """Return where code runs that takes another way while it is traced than it did at `place`."""
    without_values = any(tensor.is_meta for tensor in groups.model.parameters())
    return "fake" if place != "fake" or without_values else "cpu"


def _outputs(groups: Groups) -> list[fx.Node]:
    """Return the calls whose tensors the network puts out."""
    output: Any = next(iter(reversed(groups.trace.graph.nodes)))
    nodes = [x for x in output.args[0] if isinstance(x, fx.Node)]
    return [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def _output_shapes(groups: Groups) -> list[tuple[int, ...]]:
    return [tuple(node.meta["val"].shape) for node in _outputs(groups)]


def _run(
    model: nn.Module,
    groups: Groups,
    alive: Mask,
    device: str,
    mode: Mode,
    expected: list[tuple[int, ...]] | None,
    watch: Watch | None = None,
) -> Failure | None:
    of_ids = alive[groups.units.label]
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        labels = groups.labels[groups.trace.aliases[name]]
        shape = new_shape(labels, of_ids) if labels.layers else tuple(tensor.shape)
        if device != "cpu":
            tensors[name] = _empty(shape, tensor.dtype, mode)
        elif shape != tuple(tensor.shape):
            tensors[name] = tensor.detach()[tuple(slice(0, n) for n in shape)]
    try:
        forwards = groups.replaced.at(of_ids)
    except Disagreement as error:
        return Failure(str(error), call=_call_in(groups, error.path))
    apart = _disagreement(groups, of_ids) if expected is not None else None
    if apart is not None:
        return apart
    small = rebuild(model, tensors, attribute_values(model, groups.sites, of_ids), forwards).eval()
    args, kwargs = _to(groups.trace.args, mode, device), _to(groups.trace.kwargs, mode, device)
    try:
        watched = nullcontext() if watch is None else watch.over(small)
        with quiet_state(), torch.no_grad(), watched, mode:
            out = small(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - any failure of the model's code is the answer sought
        text = (str(error).strip().splitlines() or [""])[0]
        frames = [(x.filename, x.lineno) for x in extract_tb(error.__traceback__)[1:]]
        source = innermost(frames)
        return Failure(f"{type(error).__name__}: {text}", _failed_in(small, error), source)
    shapes = [tuple(x.shape) for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
    if expected is not None and sorted(shapes) != sorted(expected):
        return Failure(f"puts out {shapes} instead of {expected}", call=_other(groups, shapes))
    return None


def _call_in(groups: Groups, path: str) -> fx.Node | None:
    """Return the first call with literal sizes that a module makes, or any that it makes."""
    steps = groups.replaced.steps.get(path, [])
    return next((step.node for step in sorted(steps, key=lambda step: not step.sizes)), None)


def _other(groups: Groups, shapes: list[tuple[int, ...]]) -> fx.Node | None:
    """Return the call behind the first output whose shape the cut network does not put out."""
    left = list(shapes)
    for node in _outputs(groups):
        shape = tuple(node.meta["val"].shape)
        if shape not in left:
            return node
        left.remove(shape)
    return None


def _disagreement(groups: Groups, of_ids: Mask) -> Failure | None:
    """Say where an attribute would need two values."""
    made = {id(size): step.node for step in groups.steps for size in step.sizes}
    for site in groups.sites:
        calls = [made[id(size)] for size in site.sizes]
        paths = dict.fromkeys(location(call)[0] for call in calls)
        if site.value(of_ids) is None and not groups.replaced.active.keys() >= paths.keys():
            text = f"{site.attribute} of {site.path or 'the network'} would need two values"
            return Failure(text, tuple(paths), call=calls[0])
    return None


def _failed_in(model: nn.Module, error: BaseException) -> tuple[str, ...]:
    """Return the modules in whose code an error arose, from the inside out."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    trace = error.__traceback__
    while trace is not None:
        path = paths.get(id(trace.tb_frame.f_locals.get("self")))
        if path is not None:
            found.append(path)
        trace = trace.tb_next
    return tuple(dict.fromkeys(reversed(found)))


def _empty(shape: Sequence[int], dtype: torch.dtype, mode: Mode) -> torch.Tensor:
    """Return a tensor without values: on the meta device, or a fake one."""
    if not isinstance(mode, FakeTensorMode):
        return torch.empty(shape, dtype=dtype, device="meta")
    with mode:
        return torch.empty(shape, dtype=dtype, device="cpu")


def _to(value: Any, mode: Mode, device: str) -> Any:
    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return _empty(x.shape, x.dtype, mode) if device != "cpu" else x.to(device)

    return pytree.tree_map(moved, value)
