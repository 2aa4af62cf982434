"""Pruner: the paper's loop inside a training loop of one's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .._shelf import one
from ..comb import comb
from ..cut import cut
from ..errors import InputError, PlanMismatch, VerifyError
from ..groups import Groups
from ..importance import resolve
from ..importance.base import inner_model
from ..mask import Masks
from ..plan import Plan
from ..prune import split
from ..trace import Inputs
from .attach import Attached
from .carry import carry, cuttable, untold
from .event import Event
from .rounds import Rounds, shared
from .schedule import Schedule
from .shrink import Shrinking, framed

__all__ = ["Event", "Pruner", "Rounds", "Schedule", "carry", "shared"]

FORMAT = 1


class Pruner:
    """Prunes a network while your own loop trains it.

        pruner = cpd.Pruner(model, example_inputs, importance="hessian", target="macs=0.5")
        for batch in loader:
            loss = ...
            loss.backward()
            pruner.step(optimizer)       # in place of optimizer.step() and zero_grad()
        small = pruner.finish()

    Every `interval` optimizer steps the units of the least importance go, until the target after
    `events` of them (J. Schmitt et al., CPD: Comb, Prune, Distill, ITSC 2024). What is gone is held
    at zero; with `cut_every` the network itself gets smaller as it trains, and with it the state of
    the optimizer.

    Where something else steps the optimizer, call `observe()` before that and `advance(optimizer)`
    after it, or once `attach(optimizer)`, which calls both.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        *,
        target: str | Mapping[str, float],
        importance: Any = "hessian",
        cut_every: int = 0,
        copies: Iterable[nn.Module] = (),
        **options: Any,
    ) -> None:
        """Comb the network and begin to watch it.

        Args:
            model: the network that trains, in place. Wrapped for data parallel, it can be masked.
            example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
            target: share of a cost to be left: "macs=0.5".
            importance: as `cpd.prune` takes it.
            cut_every: events between cuts of the network itself; 0: masks only, and `finish` cuts a
                copy. A cut also follows the last event.
            copies: networks of the same shapes (moving averages) to be masked and cut along.
            **options: `interval` (50), `events` (10) or `step`, and those of `comb` and `choose`.

        Raises what `comb` and `choose` raise: a target out of reach is met here.
        """
        times = {key: options.pop(key) for key in _TIMES if key in options}
        found = split("Pruner", options, (*_TIMES, "importance", "target", "cut_every", "copies"))
        self._comb, choice = found
        if "start" in choice:
            raise InputError("a Pruner begins with the whole network; cut it by the plan first")
        self.schedule = Schedule(target, **times)
        every: Any = cut_every
        if not isinstance(every, int) or every < 0:
            raise InputError(f"cut_every must be a whole number of at least 0, got {every!r}")
        self.model = _inner(model, cut_every)
        self.copies = [inner_model(each) for each in copies]
        _check_copies(self.model, self.copies)
        self.example_inputs, self.cut_every = example_inputs, cut_every
        groups = self._groups()
        self.rounds = Rounds(groups, resolve(importance), self.schedule, choice)
        self._run = {**_named(importance), **self.schedule.identity}
        self._try(groups, choice)
        self.shrinking = Shrinking(groups, self.model, example_inputs) if cut_every else None
        self.masks = [Masks(each) for each in (self.model, *self.copies)]
        self.steps = 0
        self.rounds.start(self.model)

    def _groups(self) -> Groups:
        if self.cut_every:
            return framed(self.model, self.example_inputs, self._comb)
        return comb(self.model, self.example_inputs, **self._comb)

    def _try(self, groups: Groups, choice: Mapping[str, Any]) -> None:
        """Meet a target out of reach now, whatever the scores will be."""
        equal = {group.name: torch.ones(group.size, dtype=torch.float64) for group in groups}
        Rounds(groups, None, self.schedule, choice).plan_at(self.schedule.count, equal)

    # --- where it is

    @property
    def plan(self) -> Plan | None:
        """What is kept of the unpruned network so far; None before the first event."""
        return self.rounds.plan

    @property
    def finished(self) -> bool:
        """Whether the target is reached."""
        return self.rounds.finished

    # --- what a loop calls

    def step(self, optimizer: Any, *, scaler: Any = None) -> Event | None:
        """Step the optimizer, forget the gradients, and prune where it is time.

        Call it after `loss.backward()`, once the gradients of all accumulated parts are there.
        `scaler`: the `torch.amp.GradScaler` that scaled the loss; it steps and is updated here. A
        step that it leaves out, for a gradient that is not finite, counts for nothing, but for the
        finite parts of an accumulated batch that were observed before.

        Returns the event that followed, or None.
        """
        attached = Attached(self, optimizer, scaler=scaler)
        try:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        finally:
            attached.remove()
        optimizer.zero_grad(set_to_none=True)
        return attached.event

    def attach(self, optimizer: Any, *, observe: bool = True, scaler: Any = None) -> Attached:
        """Observe before and advance after every step of an optimizer, whoever calls it.

        Where several optimizers train the network, call `observe()` and `advance(*optimizers)`
        instead. Where the step gets a closure that computes the gradients, call `observe()` in the
        closure and attach with `observe=False`. `scaler`: the GradScaler that scales the loss,
        where there is one. Returns a handle whose `remove()` ends it.
        """
        if self.cut_every:
            cuttable(optimizer)
        return Attached(self, optimizer, observe=observe, scaler=scaler)

    def before_backward(self, loss: torch.Tensor) -> None:
        """Show the loss to an importance of curvature ("hutchinson", "kfac"); others need none."""
        if not self.finished:
            self.rounds.show(loss)

    def observe(self, *, whole: bool = True, scaler: Any = None) -> None:
        """Take in the gradients, before the optimizer steps; they are unscaled by then.

        `whole=False` after each part of an accumulated batch but the last: importances that look at
        single samples want to see every part. `scaler`: the GradScaler that scaled the loss, if one
        did: gradients inside the network are still scaled, and those of a batch that it will leave
        out, as they are not finite, are not taken in.
        """
        if self.finished:
            return
        if scaler is None or not scaler.is_enabled():
            self.rounds.observe(whole=whole)
        elif all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.model.parameters()):
            self.rounds.observe(whole=whole, scale=float(scaler.get_scale()))

    def advance(self, *optimizers: Any) -> Event | None:
        """Keep what is gone at zero, and prune where it is time; call it after every step.

        `optimizers`: those whose state is to be cut along; where several train the network, all.
        """
        for each in optimizers if self.cut_every else ():
            cuttable(each)
        self.steps += 1
        self._hold()
        if self.finished or not self.schedule.due(self.steps):
            return None
        event = self._prune(optimizers)
        if event.number == event.count:
            self.rounds.close()
        return event

    def finish(self, *optimizers: Any, verify: bool = True) -> nn.Module:
        """Return the small network, proved.

        With masks only it is a cut copy, and the network given stays as it is, masked. With
        `cut_every` it is the network given itself.

        Raises `VerifyError` where the small network does not compute what the masked one does.
        """
        self.rounds.close()
        if not self.finished:
            warnings.warn(
                f"the target is not reached: {self.rounds.done} of {self.schedule.count} events in "
                f"{self.steps} of {self.schedule.steps} steps. Train longer, or set a shorter "
                "interval or fewer events",
                stacklevel=2,
            )
        if self.plan is None:
            return self.model if self.cut_every else copy.deepcopy(self.model)
        self._hold()
        if self.shrinking is None:
            return cut(self.model, self.plan, verify=verify)
        if self.shrinking.by is not self.plan:
            self._cut(optimizers)
        if verify:
            proof = self.shrinking.proof(self.plan)
            if not proof:
                raise VerifyError(
                    f"{proof}\nThe network was cut while it trained: train it again "
                    "with cut_every=0, and report the network."
                )
        return self.model

    # --- an event

    def _hold(self) -> None:
        for masks in self.masks:
            masks.apply()

    def _prune(self, optimizers: tuple[Any, ...]) -> Event:
        scores = self.rounds.importance.scores()
        if self.shrinking is not None:
            scores = self.shrinking.scores(scores)
        plan = self.rounds.choose(_device(self.model), scores)
        done, count = self.rounds.done, self.schedule.count
        cutting = self.cut_every > 0 and (done % self.cut_every == 0 or done == count)
        if cutting:
            self._cut(optimizers)
        else:
            self._mask(plan)
        return Event(done, count, self.steps, plan, cutting)

    def _mask(self, plan: Plan) -> None:
        if self.shrinking is None:
            found = {n: m for n, m in plan.masks().items() if n == plan.aliases[n]}
        else:
            found = self.shrinking.masks(plan)
        for masks in self.masks:
            masks.set(found)

    def _cut(self, optimizers: tuple[Any, ...]) -> None:
        """Cut the network to the plan; what watches it begins to watch the smaller one."""
        assert self.shrinking is not None
        assert self.plan is not None
        self.rounds.close()
        if self.shrinking.by is None:
            untold(optimizers, self.model)
        self.shrinking.cut(self.plan, optimizers, self.copies)
        self.masks = [Masks(each) for each in (self.model, *self.copies)]
        if not self.finished:
            self.rounds.start(self.model, self.shrinking.now)

    # --- pause and go on

    def state_dict(self) -> dict[str, Any]:
        """Where it is, but for the network and the optimizer: texts, numbers and tensors.

        Of several processes each has to call it, as scores are added up over them; one may write.
        """
        state = getattr(self.rounds.importance, "state", None)
        by = None if self.shrinking is None else self.shrinking.by
        return {
            "format": FORMAT,
            "run": self._run,
            "steps": self.steps,
            "done": self.rounds.done,
            "plan": None if self.plan is None else self.plan.to_json(),
            "cut": None if by is None else by.to_json(),
            "importance": {} if state is None else state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, on the network before any cut.

        Where the network was cut, it is cut again here: load the network's and the optimizer's own
        states afterwards.

        Raises:
            InputError: the state is none of a pruner, or of one with another importance or
                schedule, or this pruner has begun.
            PlanMismatch: it is of another network.
        """
        if (
            not {"format", "steps", "done", "plan", "cut"} <= set(state)
            or state["format"] != FORMAT
        ):
            raise InputError("this is not the state of a Pruner; give what its state_dict returned")
        if self.steps:
            raise InputError("load the state into a new Pruner; this one has begun")
        was = state.get("run", {})
        changed = [
            f"{k} was {was[k]!r}, is {v!r}" for k, v in self._run.items() if was.get(k, v) != v
        ]
        if changed:
            raise InputError(
                f"the state is of another Pruner: {'; '.join(changed)}. Make this one as that one "
                "was, or begin anew, without the state"
            )
        plans = [
            None if state[key] is None else Plan.from_json(state[key], limited=False)
            for key in ("plan", "cut")
        ]
        for plan in filter(None, plans):
            plan.check(self.model)
        if plans[1] is not None and self.shrinking is None:
            raise PlanMismatch("the state is of a run that cut while training; set cut_every")
        self.steps, self.rounds.done = int(state["steps"]), int(state["done"])
        if plans[1] is not None:
            self.rounds.plan = plans[1]
            self._cut(())
        self.rounds.plan = plans[0]
        if plans[0] is not None and state["plan"] != state["cut"]:
            self._mask(plans[0])
        if self.finished:
            self.rounds.close()
        elif state["importance"]:
            self.rounds.importance.load_state(state["importance"])


_TIMES = ("interval", "events", "step")


def _named(importance: Any) -> dict[str, str]:
    """The name of an importance and its options, or the name of what was given in its place."""
    if isinstance(importance, str | Mapping):
        name, options = one("importance", importance)
        return {"importance": name, "importance's options": repr(sorted(options.items()))}
    return {"importance": str(getattr(importance, "__name__", type(importance).__name__))}


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _check_copies(model: nn.Module, copies: Iterable[nn.Module]) -> None:
    """Refuse a copy that masks of this network's tensors do not fit."""
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    for number, each in enumerate(copies):
        found = {name: parameter.shape for name, parameter in each.named_parameters()}
        wrong = next((name for name in wanted if found.get(name) != wanted[name]), None)
        if wrong is not None:
            have = "none" if wrong not in found else f"one of {tuple(found[wrong])}"
            raise InputError(
                f"copies[{number}], a {type(each).__name__}, has not the network's parameter "
                f"{wrong!r} of {tuple(wanted[wrong])}, but {have}: give the copy of the network "
                "itself, not what holds it"
            )


def _inner(model: nn.Module, cut_every: int) -> nn.Module:
    """The network itself, out of a wrapper for data parallel."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    if wrapped and cut_every:
        raise InputError(
            f"a {type(model).__name__} cannot be cut while it trains: it keeps the old shapes. "
            "Give the network inside and wrap it anew after every event that cut, or leave "
            "cut_every out"
        )
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise InputError(
            f"the {type(model).__name__} lies in shards (FSDP): scores, masks and cuts need whole "
            "tensors. Prune it whole, under DistributedDataParallel, and shard what comes out"
        )
    return inner_model(model) if wrapped else model
