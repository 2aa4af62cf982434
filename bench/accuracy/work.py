"""One cell after the other, in a process with one thread; what cells share is made once."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import cpd
from cpd.plan import Plan

from .. import networks as counted
from . import theirs
from .cells import OPTIONS, Cell, mark, of
from .networks import INPUTS, NETWORKS
from .training import Samples, recovered, share_of_time, taught, tested, trained

BASES = Path("out") / "bench-accuracy"
_contexts: dict[tuple[str, int], Context] = {}


def begin() -> None:
    """Set a worker up: one thread, and Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from cpd import _torchvision

    _torchvision.ensure()


class Context:
    """A trained network with its data, groups and scores."""

    def __init__(self, network: str, seed: int) -> None:
        self.network, self.seed = network, seed
        self.samples = Samples(seed)
        self.model, self.seconds = self._base()
        self.macs = counted.macs(self.model, INPUTS)
        self._groups: Any = None
        self._teacher: list[torch.Tensor] | None = None
        self._scores: dict[str, Any] = {}
        self._gradients: dict[str, Any] = {}

    def _base(self) -> tuple[nn.Module, float]:
        torch.manual_seed(self.seed)
        model = NETWORKS[self.network]()
        path = BASES / f"{self.network}-{self.seed}-{mark(self.network)}.safetensors"
        start = perf_counter()
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            model = trained(model, self.samples, self.network, of(self.network)["epochs"])
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            save_file(model.state_dict(), temporary)
            temporary.replace(path)
        return model.eval(), perf_counter() - start

    @property
    def groups(self) -> Any:
        """The coupling groups."""
        if self._groups is None:
            self._groups = cpd.comb(self.model, INPUTS)
        return self._groups

    @property
    def teacher(self) -> list[torch.Tensor]:
        """The base's logits for the epochs of recovery."""
        if self._teacher is None:
            self._teacher = taught(self.model, self.samples)
        return self._teacher

    def scores(self, name: str) -> Any:
        """Scores of an importance, over the batches that all get."""
        if name not in self._scores:
            self._scores[name] = cpd.importance.collect(
                OPTIONS.get(name, name),
                self.model,
                self.groups,
                self.samples.batches(8),
                lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            )
        return self._scores[name]

    def gradients(self, name: str) -> Any:
        """What Torch-Pruning's importances read."""
        if name not in self._gradients:
            self._gradients[name] = theirs.gradients(name, self.model, self.samples)
        return self._gradients[name]


def run(cell: Cell) -> dict[str, Any]:
    """Return the record of a cell; what raises is recorded as such."""
    start = perf_counter()
    try:
        found = _found(cell)
    except Exception as error:  # noqa: BLE001 - an exception is a result of the comparison
        text = " ".join(f"{type(error).__name__}: {error}".split())
        found = {"error": text[:200]}
    return found | {"seconds": round(perf_counter() - start, 1)}


def _found(cell: Cell) -> dict[str, Any]:
    context = _contexts.get((cell.network, cell.seed))
    if context is None:
        context = Context(cell.network, cell.seed)
        _contexts[cell.network, cell.seed] = context
    if cell.tool == "base":
        accuracy, loss = tested(context.model, context.samples)
        sizes = {"macs": context.macs, "params": _count(context.model)}
        return sizes | {"accuracy": accuracy, "loss": loss}
    if cell.tool == "torch-pruning":
        found = context.gradients(cell.importance)
        args = (cell.importance, cell.ranking, context.model, found, cell.target)
        return _measured(cell, context, theirs.pruned(*args))
    small, plan = _ours(cell, context)
    if cell.tool == "scratch":
        return _from_scratch(cell, context, small)
    least = min(width.after / width.before for width in plan.widths)
    return _measured(cell, context, small) | {"narrowest": round(least, 3)}


def _ours(cell: Cell, context: Context) -> tuple[nn.Module, Plan]:
    ranked, _, name = cell.strategy.rpartition(" ")
    plan = cpd.choose(
        context.groups,
        context.scores(cell.importance),
        {"macs": cell.target},
        strategy={name: {"ranked": True}} if ranked else name,
        ranking=cell.ranking,
        min_keep=cell.min_keep,
    )
    model = context.model
    if cell.repair:
        model = cpd.repair(model, plan, [images for images, _ in context.samples.batches(4)])
    return cpd.cut(model, plan, verify=False), plan


def _measured(cell: Cell, context: Context, small: nn.Module) -> dict[str, Any]:
    """Costs, and the accuracy as cut, after recovery, and after recovery with the teacher."""
    found: dict[str, Any] = {
        "macs": round(counted.macs(small, INPUTS) / context.macs, 4),
        "params": round(_count(small) / _count(context.model), 4),
        "time": share_of_time(small, context.model),
    }
    found["cut"], found["cut_loss"] = tested(small, context.samples)
    for name, teacher in (("recovered", None), ("distilled", context.teacher)):
        again = recovered(copy.deepcopy(small), context.samples, cell.network, teacher)
        found[name], found[f"{name}_loss"] = tested(again, context.samples)
    return found


def _from_scratch(cell: Cell, context: Context, small: nn.Module) -> dict[str, Any]:
    """The pruned shape with new weights, trained as long as base and recovery together."""
    small = copy.deepcopy(small)
    torch.manual_seed(cell.seed + 100)
    for module in small.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.trunc_normal_(parameter.data, std=0.02)
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    epochs = of(cell.network)["epochs"] + of(cell.network)["recovery_epochs"]
    again = trained(small, context.samples, cell.network, epochs)
    accuracy, loss = tested(again, context.samples)
    return {
        "macs": round(counted.macs(small, INPUTS) / context.macs, 4),
        "time": share_of_time(small, context.model),
        "recovered": accuracy,
        "recovered_loss": loss,
    }


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
