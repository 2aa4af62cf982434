"""Optimizers and learning-rate schedules of torch, by name."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from cpd.errors import InputError, UnknownName

__all__ = [
    "Schedule",
    "build_optimizer",
    "check_patterns",
    "optimizers",
    "schedules",
    "try_out",
]

LENGTHS = ("T_max", "total_steps", "total_iters")


def optimizers() -> dict[str, type[Optimizer]]:
    """Every optimizer of ``torch.optim`` that steps without a closure, by name."""
    found = vars(torch.optim).items()
    kinds = {n: k for n, k in found if inspect.isclass(k) and issubclass(k, Optimizer)}
    return {n: k for n, k in kinds.items() if n not in ("Optimizer", "LBFGS")}


def schedules() -> dict[str, type[Any]]:
    """Every schedule of ``torch.optim.lr_scheduler`` that takes plain numbers, by name."""
    base = lr_scheduler.LRScheduler
    kinds = {n: k for n, k in vars(lr_scheduler).items() if inspect.isclass(k) and n[0] != "_"}
    composed = ("LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler")
    return {n: k for n, k in kinds.items() if issubclass(k, base) and n not in composed}


def _split(kind: str, spec: Any, valid: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of a specification: a name, or a mapping with ``name``."""
    options = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise InputError(f"{kind} must be a name or a mapping with 'name', got {spec!r}")
    options = dict(options)
    name = options.pop("name")
    if name not in valid:
        raise UnknownName(kind, name, valid)
    return name, options


def _made(kind: str, name: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a constructor; what it refuses becomes an InputError that lists its options."""
    try:
        return make(*args, **options)
    except (TypeError, ValueError) as error:
        valid = ", ".join(list(inspect.signature(make).parameters)[1:])
        text = f"{kind} {name} cannot be made from {options}: {error}. Its options: {valid}"
        raise InputError(text) from error


def build_optimizer(
    model: nn.Module,
    spec: Any,
    *,
    norm_decay: bool = True,
    no_decay: Sequence[str] = (),
    beside: Iterable[nn.Parameter] = (),
) -> Optimizer:
    """The optimizer of a model's trainable parameters.

    ``spec``: a name, a mapping with ``name`` and options, or a callable.
    ``norm_decay=False`` takes the weight decay off parameters with fewer than two axes, and
    ``no_decay`` off those of the model whose names match one of its patterns. ``beside``: further
    parameters, of losses that learn along.

    Raises:
        UnknownName: no optimizer of that name. InputError: options that it does not take.
    """
    named = [*model.named_parameters(), *(("", parameter) for parameter in beside)]
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    trained = [parameter for _, parameter in named]
    if not trained:
        raise InputError("the student has no parameter that requires a gradient; nothing to train")
    parameters: Iterable[Any] = trained
    if not norm_decay or no_decay:
        free = [
            (p.ndim < 2 and not norm_decay) or any(fnmatchcase(name, each) for each in no_decay)
            for name, p in named
        ]
        parameters = [
            {"params": [p for p, without in zip(trained, free, strict=True) if not without]},
            {"params": list(itertools.compress(trained, free)), "weight_decay": 0.0},
        ]
    if callable(spec):
        made = spec(parameters)
        assert isinstance(made, Optimizer), f"{spec!r} gave {type(made)}, not an optimizer"
        return made
    kinds = optimizers()
    name, options = _split("optimizer", spec, kinds)
    optimizer: Optimizer = _made("optimizer", name, kinds[name], parameters, **options)
    return optimizer


def check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse patterns that match no parameter of a network, be it trained or frozen.

    Raises:
        InputError: there is one.
    """
    names = [name for name, _ in model.named_parameters()]
    for each in patterns:
        if not any(fnmatchcase(name, each) for name in names):
            raise InputError(f"no_decay: no parameter is named like {each!r}, such as {names[0]!r}")


def try_out(model: nn.Module, optimizer: Any, schedule: Any) -> None:
    """Meet a wrong name or option now rather than when a later stage begins.

    Raises:
        UnknownName, InputError: as ``build_optimizer`` and ``Schedule`` do.
    """
    made = build_optimizer(model, optimizer) if not callable(optimizer) else None
    if made is not None and not callable(schedule):
        Schedule(made, schedule, steps=2, epoch=1, warmup=0)


class Schedule:
    """The learning rate over a stage: a linear warm-up, then a schedule of torch.

    During the warm-up of W steps, step k (from 0) runs at ``lr · (k + 1) / (W + 1)``; the schedule
    of torch starts after it and sees only the steps that are left.
    """

    def __init__(
        self, optimizer: Optimizer, spec: Any, *, steps: int, epoch: int, warmup: int
    ) -> None:
        """``steps``: length of the stage; ``epoch``: of an epoch; ``warmup``: of its beginning.

        Raises:
            UnknownName: no schedule of that name. InputError: options that it does not take.
        """
        self.optimizer, self.epoch, self.warmup, self.done = optimizer, epoch, warmup, 0
        self.per = "step"
        self.torch = self._build(spec, max(1, steps - warmup)) if spec is not None else None
        self.full = [float(group["lr"]) for group in optimizer.param_groups]
        self._warm()

    def _build(self, spec: Any, steps: int) -> Any:
        if callable(spec):
            return spec(self.optimizer)
        kinds = schedules()
        name, options = _split("schedule", spec, kinds)
        self.per = options.pop("per", "step")
        if self.per not in ("step", "epoch"):
            raise UnknownName("schedule unit (per)", self.per, ("step", "epoch"))
        length = steps if self.per == "step" else max(1, steps // max(1, self.epoch))
        for asked in LENGTHS:
            if asked in inspect.signature(kinds[name]).parameters:
                options.setdefault(asked, length)
        return _made("schedule", name, kinds[name], self.optimizer, **options)

    def _warm(self) -> None:
        if self.done >= self.warmup:
            return
        for group, full in zip(self.optimizer.param_groups, self.full, strict=True):
            group["lr"] = full * (self.done + 1) / (self.warmup + 1)

    @property
    def rate(self) -> float:
        """The learning rate of the first group of parameters, for the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Call after every step of the optimizer."""
        self.done += 1
        if self.done <= self.warmup:
            self._warm()
            self._full()
            return
        by_metric = isinstance(self.torch, lr_scheduler.ReduceLROnPlateau)
        if self.torch is None or by_metric or self.done - self.warmup > self._last():
            return
        if self.per == "step" or (self.done - self.warmup) % max(1, self.epoch) == 0:
            self.torch.step()

    def _full(self) -> None:
        if self.done == self.warmup:
            for group, full in zip(self.optimizer.param_groups, self.full, strict=True):
                group["lr"] = full

    def _last(self) -> float:
        """Steps that the schedule can take: some refuse more than they were made for."""
        total = getattr(self.torch, "total_steps", None)
        return float("inf") if total is None else float(total) - 1

    def measured(self, value: float) -> None:
        """Tell a schedule that watches a metric its newest value (lower is better)."""
        if isinstance(self.torch, lr_scheduler.ReduceLROnPlateau):
            self.torch.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is."""
        inner = None if self.torch is None else self.torch.state_dict()
        return {"done": self.done, "full": self.full, "torch": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. The rates themselves are part of the optimizer's state."""
        self.done, self.full = state["done"], list(state["full"])
        if self.torch is not None:
            self.torch.load_state_dict(state["torch"])
