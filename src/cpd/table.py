"""Latency as a cost: the sum over calls of milliseconds measured at real widths.

Each call of the graph that makes something new is measured alone, at sizes on a ladder of eighths
of its widths, when they are first asked for; between rungs lies a straight line along each width.
The sum is scaled so that the whole network comes to what it takes end to end. It ranks what to cut;
what the cut network takes is measured again, see `choose`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from .channels import Ids
from .graph import Step
from .groups import Groups
from .labels import Labels
from .measure import Measurer
from .onecall import OneCall, Slot
from .rules import Factor
from .terms import Cost, Values

RUNGS = 8
IDLE = 0.25
TOGETHER = 3  # widths of one call between whose rungs lines are drawn; of more, the nearest rungs
PRODUCTS = ("conv", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot")


class Table(Cost):
    """Milliseconds of a network with so many channels alive."""

    def __init__(self, groups: Groups, measure: Measurer) -> None:
        self.groups, self.measure = groups, measure
        self.calls = [step for step in _new(groups) if not measure.fused or _product(step)]
        self._factor: dict[tuple[int, int], Factor] = {}
        self._same: dict[tuple[Any, ...], Factor] = {}
        super().__init__((1, tuple(self._factors(step))) for step in self.calls)
        self.base = np.array([f.layer.ids.shape[f.position] for f in self.factors], np.int64)
        self._memo: dict[tuple[Any, ...], float] = {}
        self.whole = measure.now(groups.model, whole_inputs(groups))
        counted = float(self.values(self.base).sum())
        self.scale = self.whole / counted if counted > 0 else 1.0

    def values(self, sizes: Ids, items: Any = slice(None)) -> Values:
        """Return the milliseconds of calls."""
        numbers = np.arange(len(self.calls))[items]
        return np.array([self._at(int(number), sizes) for number in numbers], np.float64)

    def total(self, values: Values) -> Any:
        """Return the predicted milliseconds of the network."""
        return float(values.sum()) * self.scale

    def _at(self, number: int, sizes: Ids) -> float:
        mine = [k for k in dict.fromkeys(self.rows[number].tolist()) if k < len(self.factors)]
        key = (number, *sizes[mine].tolist())
        if key not in self._memo:
            self._memo[key] = self._between(number, mine, sizes)
        return self._memo[key]

    def _between(self, number: int, mine: list[int], sizes: Ids) -> float:
        """Draw lines between the rungs below and above each size."""
        if any(sizes[k] == 0 for k in mine):
            return 0.0
        spans = []
        for k in mine:
            rungs = ladder(int(self.base[k]))
            above = int(np.searchsorted(rungs, sizes[k]))
            low, high = int(rungs[max(above - 1, 0)]), int(rungs[above])
            high_share = 1.0 if high == low else min(max((sizes[k] - low) / (high - low), 0.0), 1.0)
            if len(mine) > TOGETHER:
                high_share = float(high_share >= 0.5)
            spans.append([(n, s) for n, s in ((low, 1 - high_share), (high, high_share)) if s > 0])
        found = 0.0
        for corner in itertools.product(*spans):
            at = sizes.copy()
            at[mine] = [size for size, _ in corner]
            found += self.exact(number, at) * float(np.prod([share for _, share in corner]))
        return found

    def exact(self, number: int, sizes: Ids) -> float:
        """Return what is measured of a call at these very sizes.

        Where they do not fit each other (a product of two widths beside both of them, of which one
        was moved to a rung alone) the time at full width is taken, in proportion.
        """
        index = dict(zip(map(id, self.factors), sizes.tolist(), strict=True))
        shapes = _Shapes(self, self.calls[number], index)
        if (sizes == self.base).all() or shapes.fit():
            return self.measure(shapes.key(), shapes.make)
        mine = [k for k in dict.fromkeys(self.rows[number].tolist()) if k < len(self.factors)]
        return self.exact(number, self.base) * float(np.prod(sizes[mine] / self.base[mine]))

    def factor(self, labels: Labels, axis: int) -> Factor | None:
        """Return the width of an axis, one and the same for all axes of the same channels."""
        layer = labels.governing(axis)
        if layer is None:
            return None
        at = (id(layer.ids), layer.axes.index(axis))
        if at not in self._factor:
            classes = self.groups.units.label[layer.ids]
            one = Factor(layer, at[1])
            self._factor[at] = self._same.setdefault((classes.shape, classes.tobytes(), at[1]), one)
        return self._factor[at]

    def _factors(self, step: Step) -> list[Factor]:
        """Every width in the shapes of a call's inputs, once."""
        found: dict[int, Factor] = {}
        for labels in [*_labels(step), *(size.labels for size in step.sizes)]:
            for one in (self.factor(labels, axis) for axis in range(len(labels.shape))):
                if one is not None:
                    found.setdefault(id(one), one)
        return [*found.values(), *self.groups.gates.get(step.node, ())]


def ladder(width: int) -> Ids:
    """The widths at which a call is measured: eighths of it."""
    return np.unique(np.maximum(np.arange(1, RUNGS + 1) * width // RUNGS, 1))


def whole_inputs(groups: Groups) -> Any:
    """The inputs that a network was traced with, as a measurer takes them."""
    return groups.trace.kwargs or groups.trace.args


def alignment(groups: Groups, measure: Measurer, calls: int = 2) -> int:
    """Return the multiple of channels below which nothing is gained on this device.

    The largest m of 32, 16, 8, 4, 2 for which going down from a multiple to one channel above the
    one below saves at most `IDLE` of what the channels' share would be, in the calls that take
    longest; 1 where there is none.
    """
    table = Table(groups, measure)
    order = np.argsort(-table.values(table.base), kind="stable")
    heavy = [int(n) for n in order if _product(table.calls[int(n)]) and _widest(table, int(n)) >= 0]
    for multiple in (32, 16, 8, 4, 2):
        gains = []
        for number in heavy[:calls]:
            k = _widest(table, number)
            top = int(table.base[k]) // multiple
            for times in {q for q in (top, top - 1, top // 2 + 1) if q >= 2}:
                at, below = table.base.copy(), table.base.copy()
                at[k], below[k] = times * multiple, (times - 1) * multiple + 1
                saved = 1 - table.exact(number, below) / max(table.exact(number, at), 1e-9)
                gains.append(saved / (1 - below[k] / at[k]))
        if gains and float(np.median(gains)) <= IDLE:
            return multiple
    return 1


def _widest(table: Table, number: int) -> int:
    """The factor of a call that has most channels, which single channels may leave; -1 for none."""
    mine = [k for k in table.rows[number].tolist() if k < len(table.factors)]
    plain = [k for k in dict.fromkeys(mine) if table.factors[k].layer.ids.ndim == 1]
    return max(plain, key=lambda k: int(table.base[k]), default=-1)


def _new(groups: Groups) -> Iterable[Step]:
    """The calls that make a new tensor of others."""
    seen: set[int] = set()
    steps = {step.node: step for step in groups.steps}
    for node in groups.trace.graph.nodes:
        value = node.meta.get("val")
        tensors = [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage()._cdata for x in tensors}
        fresh = not storages & seen
        seen |= storages
        known = node in steps and getattr(node.target, "_schema", None) is not None
        if known and fresh and node.all_input_nodes:
            yield steps[node]


def _product(step: Step) -> bool:
    return step.node.target._schema.name.split("::")[-1].startswith(PRODUCTS)  # type: ignore[union-attr]


def _labels(step: Step) -> list[Labels]:
    leaves = torch.utils._pytree.tree_leaves(step.args, is_leaf=lambda x: isinstance(x, Labels))
    return [x for x in leaves if isinstance(x, Labels)]


class _Shapes:
    """A call at other widths: `sizes` gives that of each factor by its identity."""

    def __init__(self, table: Table, step: Step, sizes: dict[int, int]) -> None:
        self.table, self.step, self.sizes = table, step, sizes
        self.tensors = table.groups.trace.tensors
        self.names = [argument.name for argument in step.node.target._schema.arguments]  # type: ignore[union-attr]

    def _size(self, labels: Labels, axis: int) -> int:
        factor = self.table.factor(labels, axis)
        return labels.shape[axis] if factor is None else self.sizes[id(factor)]

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Arguments with ("tensor", shape, type, is it a weight) in place of tensors."""
        node = self.step.node
        literal = {
            (size.arg, size.index): self._size(size.labels, size.axis) for size in self.step.sizes
        }

        def given(name: str, value: Any, labels: Any, index: int | None = None) -> Any:
            if isinstance(value, fx.Node):
                held = value.meta["val"]
                known = isinstance(labels, Labels) and len(labels.shape) == held.ndim
                shape = [
                    self._size(labels, k) if known else int(n) for k, n in enumerate(held.shape)
                ]
                return ("tensor", tuple(shape), held.dtype, value.name in self.tensors)
            if isinstance(value, list | tuple):
                each = labels if isinstance(labels, list) else [None] * len(value)
                pairs = enumerate(zip(value, each, strict=True))
                return [given(name, item, one, k) for k, (item, one) in pairs]
            return literal.get((name, index), value)

        args = [
            given(name, value, self.step.args.get(name))
            for name, value in zip(self.names, node.args, strict=False)
        ]
        return args, {k: given(k, v, self.step.args.get(k)) for k, v in node.kwargs.items()}

    def key(self) -> str:
        """Say in words what is measured, the same for calls that are alike."""
        args, kwargs = self._arguments()
        return f"{self.step.node.target} {args} {kwargs}".replace("torch.", "")

    def fit(self) -> bool:
        """Say whether the call takes these shapes."""
        module, inputs = self.make("meta")
        try:
            module(*inputs)
        except (RuntimeError, ValueError, IndexError):
            return False
        return True

    def make(self, device: str = "cpu") -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """Return the call as a module, and inputs."""
        weights: list[torch.Tensor] = []
        inputs: list[torch.Tensor] = []

        def slot(value: Any) -> Any:
            if isinstance(value, tuple) and value[:1] == ("tensor",):
                _, shape, dtype, weight = value
                real = dtype.is_floating_point
                made = (
                    torch.rand(shape, device=device) if real else torch.zeros(shape, device=device)
                )
                tensor = made.to(dtype)
                (weights if weight and real else inputs).append(tensor)
                return Slot(len(weights) - 1 if weight and real else None)
            return [slot(item) for item in value] if isinstance(value, list) else value

        args, kwargs = self._arguments()
        filled = [slot(value) for value in args]
        module = OneCall(self.step.node.target, filled, {k: slot(v) for k, v in kwargs.items()})
        module.held.extend(nn.Parameter(tensor, requires_grad=False) for tensor in weights)
        return module, tuple(inputs)
