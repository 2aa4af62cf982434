"""Recorded: what the modules of a network are called with, at several sizes of its inputs.

The network runs on the meta device where that is possible, and else on its values. It may also run
as it does while it is traced, where code may choose another way: what modules are then called with
may have another form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .calls import Bound, Made, Uncapturable, leaves_of, record
from .forward import Data
from .on_meta import OnMeta
from .surgery import rebuild, share
from .trace import Trace, named_tensors, quiet_state

Mode = AbstractContextManager[Any]
Which = Callable[[int, int], bool]  # (axis, its size): whether it varies
_SHORT = 4
Runs = dict[str, tuple[list[Bound], list[list[Made]]]]


class Recorded:
    """The calls of the modules at `paths`, and what their children return to them in these."""

    def __init__(self, model: nn.Module, trace: Trace, paths: list[str]) -> None:
        self.model, self.paths = model, paths
        self.args, self.kwargs = trace.args, trace.kwargs
        self.batch = _batch(self.args, self.kwargs)
        self.on_values, self.one_length = False, True
        self.why_not: dict[str, str] = {}
        self.often: dict[str, int] = {}  # how often each is called in a run
        self.children: dict[str, list[list[Made]]] = {}
        self.batches: dict[str, list[int]] = {}  # of the network, in these

    def of(self, path: str) -> list[Data]:
        """Return the calls of a module that have the form of those in the first run: a forward is
        captured in one.
        """
        calls = [call() for call in self.calls.get(path, [])]
        try:
            forms = [str(leaves_of(call)[1]) for call in calls]
        except Uncapturable:
            return calls  # said again where it is captured
        first = set(forms[: self.often.get(path, 0)])
        return [call for call, form in zip(calls, forms, strict=True) if form in first]

    @cached_property
    def calls(self) -> dict[str, list[Bound]]:
        """Path -> calls; nothing where the model runs nowhere."""
        run, runs = self._two_batches()
        if not runs:
            return {}
        first = runs[0][1]
        calls: dict[str, list[Bound]] = {path: [] for path in first}
        self.often = {path: len(given) for path, (given, _) in first.items()}
        self.children = {path: [] for path in first}
        self.batches = {path: [] for path in first}
        uneven: set[str] = set()

        def add(batch: int, found: Runs) -> bool:
            for path, (given, made) in found.items():
                if len(given) != self.often[path]:
                    uneven.add(path)  # which of them is which call?
                    continue
                calls[path] += given
                self.children[path] += made
                self.batches[path] += [batch] * len(made)
            return bool(found)

        for batch, found in runs:
            add(batch, found)
        batch = runs[0][0]
        varied = self._lengthen(lambda which, longer: add(batch, run(batch, which, longer)))
        self.one_length = not varied
        for path in uneven:
            self.why_not[path], calls[path] = "its inputs decide how often it is called", []
        return calls

    def _two_batches(self) -> tuple[Callable[..., Runs], list[tuple[int, Runs]]]:
        """Return a function that runs the network, and its runs at two batches, each with its own.

        Without values one batch alone tells nothing: there the network may live on what it has
        kept since it was traced (boxes of a detector, say), and the batch would be a constant.
        """
        runs: list[tuple[int, Runs]] = []
        for model, device, mode in self._ways():
            run = partial(self._run, model, device, mode)
            batches = dict.fromkeys((2 * self.batch, 3 * self.batch, self.batch, 1))
            tried = ((k, run(k)) for k in batches)
            found = [*islice(((k, made) for k, made in tried if made), 2)]
            if len(found) > 1 or (found and device == "cpu"):
                self.on_values = device == "cpu"
                alone = run(1) if all(k > 1 for k, _ in found) else {}
                return run, found + ([(1, alone)] if alone else [])
            runs = runs or found
        if runs:
            why = "without values the network runs at one batch alone"
            self.why_not = dict.fromkeys(runs[0][1], why)
        return run, []

    def _ways(self) -> Iterator[tuple[nn.Module, str, Mode]]:
        """Yield where the network may run: on the meta device, and on its values if it has any."""
        copied = _copy_in(self.model, None)
        yield copied, "meta", OnMeta()
        yield copied, "meta", nullcontext()
        if not any(t.is_meta for _, t in named_tensors(self.model)):
            yield share(self.model), "cpu", nullcontext()

    def _run(
        self,
        model: nn.Module,
        device: str,
        mode: Mode,
        batch: int,
        which: Which | None = None,
        longer: bool = True,
    ) -> Runs:
        given = _varied(self.args, self.kwargs, device, batch, which, longer=longer)
        return _runs(model, self.paths, mode, *given)

    @cached_property
    def traced(self) -> dict[str, list[Bound]]:
        """Path -> calls of the model as it runs while it is traced; nothing where it does not."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = _copy_in(self.model, mode)
        calls: dict[str, list[Bound]] = {}

        def vary(batch: int, which: Which | None, longer: bool = True) -> bool:
            given = _varied(self.args, self.kwargs, "cpu", batch, which, longer=longer)
            fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, given)
            found = _runs(model, self.paths, mode, *fake)
            for path, (made, _) in found.items():
                calls.setdefault(path, []).extend(made)
            return bool(found)

        if vary(2 * self.batch, None):
            vary(3 * self.batch, None)
            self._lengthen(partial(vary, 2 * self.batch))
        return calls

    def _lengthen(self, vary: Callable[[Which, bool], bool]) -> bool:
        """Make all axes but the batch's longer and shorter: the long ones at once, or where that
        fails those of one length (a mask has one twice), and one by one; the short ones, which are
        mostly an image's channels, by themselves. Say whether any could be.
        """
        tensors = pytree.tree_leaves((self.args, self.kwargs))
        shapes = [x.shape for x in tensors if isinstance(x, torch.Tensor)]
        lengths = sorted({size for shape in shapes for size in shape[1:] if size > 1})
        ways = [_of_length(size) for size in lengths if size <= _SHORT]
        whole = self._both(vary, lambda _, size: size > _SHORT)
        if not whole:
            ways += [_of_length(size) for size in lengths if size > _SHORT]
            ways += map(_of_axis, range(1, max(map(len, shapes), default=1)))
        return sum(self._both(vary, which) for which in ways) > 0 or whole

    def _both(self, vary: Callable[[Which, bool], bool], which: Which) -> bool:
        longer, shorter = vary(which, True), vary(which, False)
        return longer or shorter


def _of_length(length: int) -> Which:
    return lambda _, size: size == length


def _of_axis(axis: int) -> Which:
    return lambda at, size: at == axis and size > _SHORT


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
    args: Any, kwargs: Any, device: str, batch: int, which: Which | None, *, longer: bool
) -> tuple[Any, Any]:
    """Return the inputs with another batch, and twice as long along some axes, or half as long."""
    size = _batch(args, kwargs)

    def vary(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        shape = [*value.shape]
        for axis, n in enumerate(value.shape):
            if axis == 0 and n == size:
                shape[0] = batch
            elif which is not None and which(axis, n):
                shape[axis] = 2 * n if longer else n // 2
        times = [-(-a // b) if b else 1 for a, b in zip(shape, value.shape, strict=True)]
        return value.to(device).repeat(times)[tuple(slice(0, n) for n in shape)].contiguous()

    return pytree.tree_map(vary, (args, kwargs))


def _batch(args: Any, kwargs: Any) -> int:
    """Return the size of the first axis of the first tensor; 0 where there is none."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return tensors[0].shape[0] if tensors and tensors[0].ndim else 0
