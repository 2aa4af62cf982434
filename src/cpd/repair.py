"""Repair: what a cut takes away is made good by what stays, in closed form and without training.

The network is run on calibration batches twice, node by node: whole, and with everything removed at
zero. Where both begin to differ, the readers of removed channels are mended in the order of the
graph, each from inputs that are mended already:

- **shift**: a bias takes over the mean that its layer has lost;
- **refit**: weights are fitted again so that the kept inputs give what all inputs gave;
- **recalibrate**: the statistics of a batch norm move as those of its input have moved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ._numbers import positive, whole
from .comb import comb
from .errors import InputError, UnknownName
from .groups import Groups
from .labels import Mask, alive_mask
from .plan import Plan
from .planning import alive_of
from .precision import widened
from .readers import Reader, readers_of
from .reference import Reference
from .refit import Fit
from .surgery import rebuild
from .trace import Inputs, named_tensors, quiet_state, split_inputs
from .views import View, Views

STEPS = ("shift", "refit", "recalibrate")


@dataclass(frozen=True)
class Repairs:
    """What is mended, and how; see `repair`."""

    steps: tuple[str, ...]
    damping: float
    rows: int


def repair(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Inputs],
    *,
    steps: Collection[str] = STEPS,
    damping: float = 0.01,
    rows: int = 16384,
) -> nn.Module:
    r"""Return a copy of a network whose kept weights stand in for those that a plan removes.

    The copy has the original's size: `cpd.cut(repaired, plan)` and `cpd.verify` take it as they
    take the original. For a layer y = W x + b that reads removed channels, with x' the inputs as
    they are without them and means over all samples and positions,

        shift:        b' = b + E[y - (W x' + b)]
        refit:        W' = W + E[(y - W x' - b) x'^T] (E[x' x'^T] + damping * mean diagonal * I)^-1
        recalibrate:  mean' = mean + E[z'] - E[z],   var' = var * Var(z') / Var(z)

    where refit takes covariances, E[. .] of centred values, if a bias or a batch norm takes the
    means. Sources: shift as in "Variance-Based Pruning" (2025); refit is a ridge regression around
    the weights there are, as in OBC (Frantar and Alistarh, NeurIPS 2022) and OSSCAR (Meng et al.,
    ICML 2024), whose damping it takes.

    Mended are linear layers, products and einsums with a weight, convolutions of any kind,
    projections of attention, and what the first cells of a recurrent layer read from its input. A
    weight that several calls read (tied tables), or that is computed from others, stays; so does
    what recurrent cells read of each other.

    Args:
        model: the network the plan was made for; it is not changed, and is run in evaluation mode.
        plan: what is going to be removed.
        batches: inputs as the network takes them (a tensor, a tuple of arguments, a dict), all of
            one shape. All of them together are held while the graph is walked.
        steps: which of "shift", "refit" and "recalibrate" to do.
        damping: how far the weights keep to what they were, over 0.
        rows: samples times positions that a layer is refitted from, at most; drawn by a fixed seed.

    Raises:
        PlanMismatch: the plan was made for another model.
        UnknownName: a step that there is not.
        InputError: no batches, batches of different shapes, a damping that is not over 0, or rows
            that are not a whole number of at least 1.
    """
    tensors = mended(model, plan, batches, steps=steps, damping=damping, rows=rows)
    copy = rebuild(model, tensors, {})
    for (_, made), (_, old) in zip(copy.named_modules(), model.named_modules(), strict=True):
        made.training = old.training
    return copy


def mended(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Inputs],
    *,
    steps: Collection[str] = STEPS,
    damping: float = 0.01,
    rows: int = 16384,
) -> dict[str, torch.Tensor]:
    """Return the tensors that `repair` makes other ones, by name, at the original's size."""
    for step in steps:
        if step not in STEPS:
            raise UnknownName("step of repair", step, STEPS)
    positive("damping", damping)
    whole("rows", rows, 1)
    plan.check(model)
    given = [split_inputs(batch) for batch in batches]
    if not given:
        raise InputError("no batch to repair with; is the loader empty or used up?")
    if len({str(_shapes(batch)) for batch in given}) > 1:
        raise InputError("batches to repair with must have one shape; drop the last, smaller one")
    repairs = Repairs(tuple(steps), damping, rows)
    with torch.no_grad(), quiet_state():
        groups = _groups_for(model, plan, given[0])
        return _Walk(model, groups, plan, given, repairs).run()


def helps(
    model: nn.Module, plan: Plan, tensors: dict[str, torch.Tensor], batches: Iterable[Inputs]
) -> bool:
    """Whether mended tensors (of `mended`) bring what the network puts out without the removed
    channels nearer to what it puts out whole, in the mean square over batches of other samples.
    """
    first = {n: t.detach() for n, t in named_tensors(model)}
    first = {n: first[n] for n in dict.fromkeys(plan.aliases.values())}
    lost = [0.0, 0.0]
    with torch.no_grad(), quiet_state():
        for batch in batches:
            given = split_inputs(batch)
            groups = _groups_for(model, plan, given)
            of_ids = alive_of(groups, plan)[groups.units.label]
            alive = _alive(groups, plan, of_ids, first)
            whole = Reference(groups, np.ones(len(of_ids), bool), first).outputs(*given)
            for number, made in enumerate((first, {**first, **tensors})):
                kept = {name: made[name] * alive[name].to(first[name].dtype) for name in first}
                outputs = Reference(groups, of_ids, kept).outputs(*given)
                lost[number] += sum(map(_distance, outputs, whole))
    return lost[1] < lost[0]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The square of what two outputs differ by, over that of the second."""
    if not b.is_floating_point():
        return 0.0
    return float((a - b).double().square().sum() / b.double().square().sum().clamp_min(1e-30))


def _alive(
    groups: Groups, plan: Plan, of_ids: Mask, first: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return what is left of every tensor, as masks of its own shape."""
    found = {
        name: torch.from_numpy(
            np.broadcast_to(alive_mask(groups.labels[name], of_ids), tuple(tensor.shape)).copy()
        ).to(tensor.device)
        for name, tensor in first.items()
    }
    for name in plan.gone & first.keys():
        found[name].zero_()
    return found


def _shapes(values: Any) -> list[Any]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in leaves]


def _groups_for(model: nn.Module, plan: Plan, given: tuple[Any, ...]) -> Groups:
    """Return groups whose trace takes batches of this shape."""
    found = plan.groups
    if found is not None and _shapes(given) == _shapes((found.trace.args, found.trace.kwargs)):
        return found
    options = {key: plan.options[key] for key in ("exact", "unknown") if key in plan.options}
    args, kwargs = given
    return comb(model, kwargs or args, **options)


class _Walk:
    """Both networks, one node after the other, for all batches."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        plan: Plan,
        batches: list[tuple[Any, ...]],
        repairs: Repairs,
    ) -> None:
        self.groups, self.repairs = groups, repairs
        self.trace = groups.trace
        self.whole = {n: t.detach() for n, t in named_tensors(model)}
        first = {n: self.whole[n] for n in dict.fromkeys(plan.aliases.values())}
        of_ids = alive_of(groups, plan)[groups.units.label]
        self.alive = _alive(groups, plan, of_ids, first)
        self.kept = {name: first[name] * self.alive[name].to(first[name].dtype) for name in first}
        everything = np.ones(len(of_ids), bool)
        self.big = [_begun(Reference(groups, everything, first), batch) for batch in batches]
        self.small = [_begun(Reference(groups, of_ids, self.kept), batch) for batch in batches]
        self.changed: set[str] = set()
        self.views = Views(self.trace, first)

    def run(self) -> dict[str, torch.Tensor]:
        """Walk the graph; return the tensors that became other ones, at full size."""
        with widened(self.big[0].dtype):
            for node in self.trace.graph.nodes:
                if node.op != "output":
                    self._step(node)
        return {
            name: torch.where(self.alive[name], self.kept[name], self.whole[name])
            for name in sorted(self.changed)
        }

    def _step(self, node: fx.Node) -> None:
        """Run a node in all networks, mended where it has to be; forget what none needs again."""
        both = (*self.big, *self.small)
        for interpreter in both:
            interpreter.env[node] = interpreter.run_node(node)
        if node.op == "call_function":
            self._mend(node)
        for interpreter in both:
            for gone in interpreter.user_to_last_uses.get(node, []):
                del interpreter.env[gone]

    def _mend(self, node: fx.Node) -> None:
        """Mend what a node reads with, where its inputs are other ones than before; it is run again
        each time, so that what is mended next makes good for the rest.
        """
        schema = getattr(node.target, "_schema", None)
        op = "" if schema is None else schema.name.rpartition("::")[2]
        if not node.args or node in self.small[0].whole:
            return
        if op == "batch_norm" and "recalibrate" in self.repairs.steps:
            mendings = [partial(self._recalibrate, node)]
        else:
            mendings = [partial(self._refit, node, reader) for reader in readers_of(node, op)]
        for mended in mendings:
            for interpreter in self.small if mended() else ():
                interpreter.env[node] = interpreter.run_node(node)

    def _same(self, source: fx.Node) -> bool:
        """Whether a value is what it was in all batches."""
        pairs = zip(self.big, self.small, strict=True)
        return all(torch.equal(a.env[source], b.env[source]) for a, b in pairs)

    def _recalibrate(self, node: fx.Node) -> bool:
        mean, var = (self.views.own(node, value) for value in node.args[3:5])
        if mean is None or var is None:
            return False
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before = _moments([reference.env[source] for reference in self.big])
        after = _moments([reference.env[source] for reference in self.small])
        self._change(mean, mean.of(self.kept) + (after[0] - before[0]))
        ratio = torch.where(before[1] > 0, after[1] / before[1].clamp_min(1e-30), 1)
        self._change(var, var.of(self.kept) * ratio)
        return True

    def _refit(self, node: fx.Node, reader: Reader) -> bool:
        held = self.views.seen(reader.weight)
        if held is None or self._same(reader.source):
            return False
        weight, bias = (self.views.own(node, x) for x in (reader.weight, reader.bias))
        weight = weight if "refit" in self.repairs.steps else None
        groups, outputs = reader.matrix(held.of(self.kept)).shape[:2]
        of_each = bias is not None and bias.of(self.kept).shape[-1:] == (groups * outputs,)
        bias = bias if of_each and "shift" in self.repairs.steps else None
        if weight is None and bias is None:
            return False
        free = self._is_normed(node) or bias is not None
        fit = Fit(reader, held.of(self.kept), held.of(self.alive), centred=free)
        rows = self.repairs.rows / len(self.small)
        for big, small in zip(self.big, self.small, strict=True):
            lost = reader.lost(node, big.env, small.env)
            fit.add(small.env[reader.source], lost, rows)
        change = None if weight is None else fit.solved(self.repairs.damping)
        if weight is not None and change is not None:
            self._change(weight, weight.of(self.kept) + change)
        if bias is not None:
            self._change(bias, bias.of(self.kept) + fit.shift(change))
        return True

    def _is_normed(self, node: fx.Node) -> bool:
        """Whether a batch norm that is recalibrated takes what means there are."""
        names = {
            str(getattr(user.target, "_schema", None)).partition("(")[0] for user in node.users
        }
        normed = all(name.startswith("aten::batch_norm") for name in names)
        return bool(names) and normed and "recalibrate" in self.repairs.steps

    def _change(self, place: View, value: torch.Tensor) -> None:
        """Write to a tensor of the smaller network, in place: every interpreter holds it."""
        tensor, alive = place.of(self.kept), place.of(self.alive)
        tensor.copy_(torch.where(alive, value.to(tensor.dtype), tensor))
        self.changed.add(place.name)


def _begun(reference: Reference, batch: tuple[Any, ...]) -> Reference:
    """An interpreter that has its inputs."""
    args, kwargs = torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, batch
    )
    reference.args_iter = iter(reference.placed(args, kwargs))
    reference.env = {}
    return reference


def _moments(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel over samples and positions."""
    flat = torch.cat([_by_channel(value) for value in values], 1)
    return flat.mean(1), flat.var(1, correction=0)


def _by_channel(value: torch.Tensor) -> torch.Tensor:
    return value.transpose(0, 1).flatten(1).double()
