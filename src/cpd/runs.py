"""Runs: a network is cut as a trial and run, where that will do on a device that computes nothing.

What fails is told with the module whose code it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from traceback import extract_tb
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .channels import Place
from .graph import place_of
from .groups import Groups
from .handed import Watch
from .labels import Mask, new_shape
from .literals import Disagreement
from .on_meta import OnMeta
from .opened import WatchedCall, calls_of
from .sizes import attribute_values
from .surgery import rebuild
from .trace import innermost, location, quiet_state

Mode = AbstractContextManager[Any]


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


class Runs:
    """Cuts, runs, and tells what fails."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.expected = groups, _output_shapes(groups)
        self.modes = {"meta": OnMeta(), "fake": FakeTensorMode(allow_non_fake_inputs=True)}
        self.known = ""  # where the uncut model runs, once it has been asked

    def __call__(self, alive: Mask, watch: Watch | None = None) -> Failure | None:
        """Return what fails where the classes in `alive` are left, or None."""
        place = self.known or "meta"
        error = self._cut(alive, place, self.expected, watch)
        if error is not None and place != self.device():
            place = self.device()
            error = self._cut(alive, place, self.expected, watch)
        if error is None and any(t.others for t in self.groups.replaced.active.values()):
            return self._cut(alive, _other_way(self.groups, place), self.expected)
        return error

    @cached_property
    def uncut(self) -> list[WatchedCall]:
        """The calls of the uncut network."""
        return calls_of(self.groups.everything(), self)

    def device(self) -> str:
        """Where the uncut model runs: on the meta device, all of it or without what the code makes
        elsewhere and reads ("bare"); code that asks for values may do without while it is traced
        ("fake"), or else takes real tensors ("cpu").
        """
        for place in () if self.known else ("meta", "bare", "fake"):
            if self._cut(self.groups.everything(), place, None) is None:
                self.known = place
                break
        without_values = any(tensor.is_meta for tensor in self.groups.model.parameters())
        self.known = self.known or ("fake" if without_values else "cpu")
        return self.known

    def _cut(
        self, alive: Mask, device: str, expected: Any, watch: Watch | None = None
    ) -> Failure | None:
        mode = self.modes.get(device) or nullcontext()
        failure = _run(self.groups.model, self.groups, alive, device, mode, expected, watch)
        return None if failure is None else replace(failure, alive=alive)


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
