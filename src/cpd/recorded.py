"""Recorded: what the modules of a network are called with, at several sizes of its inputs.

The network runs on the meta device where that is possible, and else on its values. It may also run
as it does while it is traced, where code may choose another way: what modules are then called with
may have another form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .calls import Made, record
from .forward import Data
from .on_meta import OnMeta
from .surgery import rebuild, share
from .trace import Trace, named_tensors, quiet_state

Mode = AbstractContextManager[Any]
Runs = dict[str, tuple[list[Data], list[list[Made]]]]


class Recorded:
    """The calls of the modules at `paths`, and what their children return to them in these."""

    def __init__(self, model: nn.Module, trace: Trace, paths: list[str]) -> None:
        self.model, self.paths = model, paths
        self.args, self.kwargs, self.batch = trace.args, trace.kwargs, trace.batch
        self.on_values = False
        self.why_not: dict[str, str] = {}
        self.children: dict[str, list[list[Made]]] = {}
        self.batches: dict[str, list[int]] = {}  # of the network, in these

    @cached_property
    def calls(self) -> dict[str, list[Data]]:
        """Path -> calls; nothing where the model runs nowhere."""
        run, times, first, other = self._two_batches()
        if not first:
            return {}
        calls: dict[str, list[Data]] = {path: [] for path in first}
        self.children = {path: [] for path in first}
        self.batches = {path: [] for path in first}

        def add(found: Runs, times: int) -> bool:
            for path, (given, made) in found.items():
                if len(given) == len(first[path][0]):
                    calls[path] += given
                    self.children[path] += made
                    self.batches[path] += [times * self.batch] * len(made)
            return bool(found)

        add(first, times)
        add(other, 3)
        if not self.on_values:
            self._lengthen(lambda axes: add(run(2, axes), 2))
        for path in other:
            if len(other[path][0]) != len(first[path][0]):  # which of them is which call?
                self.why_not[path], calls[path] = "the batch decides how often it is called", []
        return calls

    def _two_batches(self) -> tuple[Callable[..., Runs], int, Runs, Runs]:
        """Return a function that runs the network, and its runs at one batch (so many times the
        traced one) and at another.

        Without values one batch alone tells nothing: there the network may live on what it has
        kept since it was traced (boxes of a detector, say), and the batch would be a constant.
        """
        first, times, device = dict[str, Any](), 2, "meta"
        for model, device, mode in self._ways():
            run = partial(self._run, model, device, mode)
            first, times = run(2), 2
            if not first:
                first, times = run(1), 1
            other = run(3) if first else {}
            if other:
                break
        self.on_values = device != "meta"
        if first and not (other or self.on_values):
            why = "without values the network runs at one batch alone"
            self.why_not, first = dict.fromkeys(first, why), {}
        return run, times, first, other

    def _ways(self) -> Iterator[tuple[nn.Module, str, Mode]]:
        """Yield where the network may run: on the meta device, and on its values if it has any."""
        copied = _copy_in(self.model, None)
        yield copied, "meta", OnMeta()
        yield copied, "meta", nullcontext()
        if not any(t.is_meta for _, t in named_tensors(self.model)):
            yield share(self.model), "cpu", nullcontext()

    def _run(
        self, model: nn.Module, device: str, mode: Mode, batch: int, axes: tuple[int, ...] = ()
    ) -> Runs:
        return _runs(model, self.paths, mode, *self._varied(device, batch, axes))

    @cached_property
    def longer(self) -> dict[str, list[Data]]:
        """Path -> calls with longer inputs, where `calls` has none: it takes its time on values."""
        calls: dict[str, list[Data]] = {}

        def vary(axes: tuple[int, ...]) -> bool:
            found = _runs(self.model, self.paths, nullcontext(), *self._varied("cpu", 2, axes))
            return _add(calls, found)

        if self.on_values:
            self._lengthen(vary)
        return calls

    @cached_property
    def traced(self) -> dict[str, list[Data]]:
        """Path -> calls of the model as it runs while it is traced; nothing where it does not."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = _copy_in(self.model, mode)
        calls: dict[str, list[Data]] = {}

        def vary(batch: int, axes: tuple[int, ...]) -> bool:
            given = self._varied("cpu", batch, axes)
            fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, given)
            return _add(calls, _runs(model, self.paths, mode, *fake))

        if vary(2, ()):
            vary(3, ())
            self._lengthen(partial(vary, 2))
        return calls

    def _lengthen(self, vary: Callable[[tuple[int, ...]], bool]) -> None:
        """Vary all axes but the batch's at once, or one by one where that fails."""
        if not vary(self._axes):
            for axis in self._axes if len(self._axes) > 1 else ():
                vary((axis,))

    @property
    def _axes(self) -> tuple[int, ...]:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        ranks = [x.ndim for x in leaves if isinstance(x, torch.Tensor)]
        return tuple(range(1, max(ranks, default=1)))

    def _varied(self, device: str, batch: int, axes: tuple[int, ...] = ()) -> tuple[Any, Any]:
        return _varied(self.args, self.kwargs, device, batch, axes)


def _add(calls: dict[str, list[Data]], found: dict[str, tuple[list[Data], Any]]) -> bool:
    for path, (given, _) in found.items():
        calls.setdefault(path, []).extend(given)
    return bool(found)


def _copy_in(model: nn.Module, mode: FakeTensorMode | None) -> nn.Module:
    """Return a copy without values: on the meta device, or of fake tensors."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        if mode is None:
            return torch.empty_like(tensor, device="meta")
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    return rebuild(model, {n: empty(t) for n, t in named_tensors(model)}, {}).eval()


def _runs(model: nn.Module, paths: list[str], mode: Mode, args: Any, kwargs: Any) -> Runs:
    """Return what the modules are called with, and what their children return to them; nothing
    where the model does not run.
    """

    def run() -> None:
        with quiet_state(), torch.no_grad(), mode:
            model(*args, **kwargs)

    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        calls, made = record(model, paths, run)
        return {path: (calls[path], made[path]) for path in paths}
    except Exception:  # noqa: BLE001 - an input size that the model does not bear
        return {}
    finally:
        for module, trains in training.items():
            module.training = trains


def _varied(
    args: Any, kwargs: Any, device: str, batch: int, axes: tuple[int, ...] = ()
) -> tuple[Any, Any]:
    """Return the inputs with `batch` times the batch, and twice as long along `axes`; a short axis
    is that of an image's channels, and stays.
    """
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    size = tensors[0].shape[0] if tensors and tensors[0].ndim else 0

    def vary(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        times = [batch if value.shape[0] == size else 1]
        times += [2 if k in axes and n > 4 else 1 for k, n in enumerate(value.shape[1:], 1)]
        return value.to(device).repeat(times)

    return pytree.tree_map(vary, (args, kwargs))
