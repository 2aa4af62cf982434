"""The parts of the way, each able to begin where a checkpoint left off."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cpd import data as data_shelf
from cpd import importance as importance_shelf
from cpd import losses as loss_shelf
from cpd import tasks as task_shelf
from cpd.choose import choose
from cpd.comb import comb
from cpd.compress.config import CompressConfig
from cpd.compress.events import Events
from cpd.compress.journal import Journal, load_weights
from cpd.cut import cut
from cpd.distill import (
    Callback,
    Loop,
    LoopOptions,
    Pieces,
    State,
    Stopper,
    Stops,
    examples,
    keep_batch,
    snapshot,
)
from cpd.distill.batches import Batches, to_device, unpack
from cpd.distill.callbacks import Callbacks
from cpd.distill.optim import check_patterns, try_out
from cpd.distill.teacher import digest
from cpd.errors import InputError, VerifyError
from cpd.groups import Groups
from cpd.plan import Plan
from cpd.verify import verify

__all__ = ["Run", "built"]

STAGES = ("base", "prune", "recover")
AUTO_REPAIR = 5  # batches: four to repair with, and one that judges


def built(model: nn.Module | Callable[..., nn.Module], config: CompressConfig) -> nn.Module:
    """A private copy of the network given, or the network that a callable makes.

    Raises:
        InputError: the callable gives something else, or the weights do not fit.
    """
    if isinstance(model, nn.Module):
        if config.model_args:
            raise InputError("model_args go with a callable that makes the network, not a network")
        made = copy.deepcopy(model)
    else:
        made = model(**config.model_args)
    if not isinstance(made, nn.Module):
        raise InputError(f"{config.model or model!r} gave {type(made).__name__}, not a network")
    if config.weights is not None:
        load_weights(made, config.weights)
    return made


class Recorder(Callback):
    """Notes steps and evaluations in the journal, and saves where a stage asks for it."""

    def __init__(self, journal: Journal, save: Callable[[], None] | None = None) -> None:
        """``save`` is called after every evaluation."""
        self.journal, self.save = journal, save

    def after_step(self, state: State) -> None:
        """A line in the log."""
        losses = {name: value for name, value in state.losses.items() if name != "total"}
        self.journal.log(
            phase=state.stage,
            event="step",
            step=state.step,
            loss=state.losses["total"],
            lr=state.rate,
            terms=losses,
        )

    def on_bad_batch(self, state: State, details: dict[str, Any]) -> None:  # noqa: ARG002
        """Keep the batch beside the checkpoints."""
        if self.journal.folder is not None:
            keep_batch(self.journal.folder / "checkpoints", details)

    def after_evaluate(self, state: State, metrics: dict[str, float]) -> None:
        """A line in the log and the history; then the checkpoint."""
        newest = state.history[-1]
        self.journal.record(
            phase=state.stage,
            event="eval",
            step=state.step,
            epoch=state.epoch,
            loss=newest["losses"].get("total"),
            lr=newest["rate"],
            **metrics,
        )
        if self.save is not None:
            self.save()


class Run:
    """One run: what was given, resolved, and the parts of the way as methods."""

    def __init__(
        self,
        config: CompressConfig,
        model: nn.Module,
        *,
        example_inputs: Any,
        teacher: nn.Module | None,
        callbacks: tuple[Any, ...],
    ) -> None:
        """Resolve every name, so that a wrong one is met before anything is trained."""
        from accelerate import PartialState

        self.config, self.model, self.callbacks = config, model, callbacks
        self.tell = Callbacks(callbacks)
        named = isinstance(config.data, str | dict)
        self.data: Any = data_shelf.resolve(config.data) if named else config.data
        self.task = task_shelf.resolve(config.task)
        self.losses = loss_shelf.resolve(config.losses)
        self.importance = importance_shelf.resolve(config.importance)
        for stage in (config.base, config.prune, config.recover):
            if stage is not None:
                try_out(model, stage.optimizer, stage.schedule)
                check_patterns(model, stage.no_decay)
        self.teacher = copy.deepcopy(teacher)  # it is frozen and moved
        self.groups: Groups | None = None
        self.calibration: list[Any] = []
        first = next(model.parameters(), None)
        self.home = torch.device("cpu") if first is None else first.device
        val = getattr(self.data, "val", None)
        # Samples that differ in size come one by one, and one sample is no batch to trace with.
        source = self.data.train if getattr(val, "ragged", val is None) else val
        self.example_inputs = examples(source) if example_inputs is None else example_inputs
        state = PartialState(cpu=not torch.accelerator.is_available())
        self.main: bool = state.is_main_process
        self.device: torch.device = state.device
        self.journal = Journal(config, digest(model), main=self.main)
        self.stops = Stops(active=self.journal.folder is not None)

    def past(self, stage: str) -> bool:
        """Whether the checkpoint to go on from lies behind a stage."""
        resumed = self.journal.resumed
        return resumed is not None and STAGES.index(resumed["stage"]) > STAGES.index(stage)

    def _loop(self, stage: str, student: nn.Module, options: LoopOptions, **more: Any) -> Loop:
        """The loop of a stage, where a checkpoint left it."""
        teacher = None if stage == "base" else self.teacher
        val = getattr(self.data, "val", None)
        kept = self._kept(more.pop("plan", None))
        pieces = Pieces(student, teacher, self.task, self.losses, self.data.train, val, kept)
        loop = Loop(pieces, options, stage=stage, seed=self.config.seed, **more)
        resumed = self.journal.resumed
        if resumed is not None and resumed["stage"] == stage:
            loop.load_state_dict(resumed["loop"])
        return loop

    def _kept(self, plan: Plan | None) -> loss_shelf.Kept:
        """Which channels of the teacher the student has, where losses look at features."""
        alike = self.config.teacher == "self" and self.groups is not None
        if plan is None or not alike or not self.losses.points:
            return {}
        assert self.groups is not None
        return loss_shelf.kept_at(self.groups, plan, self.losses.points)

    def _train(
        self, stage: str, student: nn.Module, options: LoopOptions, **saved: Any
    ) -> nn.Module:
        """A whole stage with a checkpoint after every evaluation."""

        def save() -> None:
            self.journal.save(stage, loop, **saved)

        watching = (Recorder(self.journal, save), *self.callbacks, Stopper(self.stops, save))
        plan = Plan.from_json(saved["plan"], limited=False) if "plan" in saved else None
        loop = self._loop(stage, student, options, callbacks=watching, plan=plan)
        return loop.run().to(self.home)

    # --- the parts, in their order

    def comb(self) -> Groups:
        """Which channels must go together. A target out of reach is met here, not after training.

        Raises:
            UnreachableTarget: whatever the scores will be, the target cannot be met.
        """
        self.tell("on_event", "comb", {})
        config = self.config
        self.calibration = self._calibration()
        groups = comb(
            self.model,
            self.example_inputs,
            ignore=config.ignore,
            exact=config.exact,
            unknown=config.unknown,
            keep_class=config.keep_class,
            depth=config.depth,
        )
        equal = {group.name: torch.ones(group.size, dtype=torch.float64) for group in groups}
        plan = choose(
            groups, equal, config.schedule.target_at(config.schedule.count), **config.choice
        )
        self.groups = groups
        kept = self._kept(plan)  # a point that a loss cannot look at is met here too
        if config.base is not None and not self.past("base"):
            self._attachable(self.model, kept)
        apart = self.teacher is not None and config.teacher != "self"
        if apart and self.losses.points and self.journal.resumed is None:
            self._attachable(cut(self.model, plan, verify=False), kept)  # as wide as it will be
        if self.journal.resumed is None:
            self.journal.log(event="comb", groups=len(groups), frozen=len(groups.frozen))
        return groups

    def _attachable(self, model: nn.Module, kept: loss_shelf.Kept) -> None:
        """Bind the losses once, to copies: what fails would do so only after a stage is trained.

        Raises what ``attach`` raises.
        """
        other = self.model if self.config.teacher == "self" else self.teacher
        if other is None:
            return
        student, teacher = (copy.deepcopy(each).to(self.home) for each in (model, other))
        loss_shelf.attach(
            self.losses,
            student,
            teacher,
            inputs=lambda: to_device(examples(self.data.train), self.home),
            logits=self.task.logits,
            kept=kept,
        )

    def base(self) -> nn.Module:
        """The unpruned network: as given, or trained first. It also becomes the teacher."""
        config, name = self.config, "base.safetensors"
        base = self.model
        if config.base is not None and self.past("base"):
            self.journal.load_weights(base, name)
        elif config.base is not None:
            base = self._train("base", base, config.base)
            self.journal.save_weights(name, snapshot(base))
        if config.teacher == "self":
            self.teacher = copy.deepcopy(base)
        return base

    def prune(self, base: nn.Module, groups: Groups) -> tuple[nn.Module, Plan]:
        """The interval loop: a network with the removed units at zero, and the plan."""
        resumed = self.journal.resumed
        student = copy.deepcopy(base)
        if resumed is not None and self.past("prune"):
            return student, Plan.from_json(resumed["plan"], limited=False)

        def saved(plan: Plan, step: int) -> None:
            costs = {cost: after for cost, (_, after) in plan.costs.items()}
            mended = {} if events.repaired is None else {"repaired": events.repaired}
            self.journal.record(phase="prune", event="prune", step=step, **costs, **mended)
            self.journal.save("prune", loop, plan=plan.to_json(), done=events.done)
            if loop.losses is not None:
                loop.losses.keep(self._kept(plan))
            shares = {cost: after / before for cost, (before, after) in plan.costs.items()}
            told = {"done": events.done, "of": self.config.schedule.count, "shares": shares}
            self.tell("on_event", "prune", told)

        def save() -> None:
            """Between two events: with the scores so far."""
            text = None if events.plan is None else events.plan.to_json()
            scores = events.scores()
            if scores is not None:  # else the checkpoint of the last event has to do
                self.journal.save("prune", loop, plan=text, done=events.done, scores=scores)

        batches = self.calibration
        events = Events(student, groups, self.importance, self.config, saved, batches)
        watching = (Recorder(self.journal), events, *self.callbacks, Stopper(self.stops, save))
        loop = self._loop(
            "prune", student, self.config.prune, steps=events.steps, callbacks=watching, keep="last"
        )
        if resumed is not None and resumed["stage"] == "prune":
            plan = (
                None if resumed["plan"] is None else Plan.from_json(resumed["plan"], limited=False)
            )
            events.resume(plan, resumed["done"], resumed.get("scores"))
            if loop.losses is not None and plan is not None:
                loop.losses.keep(self._kept(plan))
        student = loop.run().to(self.home)
        assert events.plan is not None
        return student, events.plan

    def _calibration(self) -> list[Any]:
        """Inputs to repair with, the same on all processes: the first batches of training data."""
        if not self.config.repair:
            return []
        batches = Batches(self.data.train, self.config.prune.batch_size, self.config.seed)
        count = AUTO_REPAIR if self.config.repair == "auto" else self.config.repair
        found = itertools.islice(batches.epoch(0), count)
        inputs = [kwargs or args for args, kwargs in (unpack(batch)[:2] for batch in found)]
        if self.config.repair == "auto" and len(inputs) < 2:
            raise InputError("repair='auto' needs two batches of training data: one to judge by")
        return inputs

    def cut(self, student: nn.Module, plan: Plan) -> tuple[nn.Module, str]:
        """The smaller network and the proof that it computes what the masked one did.

        Raises:
            VerifyError: it does not.
        """
        self.tell("on_event", "cut", {})
        small = cut(student, plan, verify=False)
        resumed = self.journal.resumed
        if resumed is not None and self.past("prune"):
            return small, str(resumed["proof"])
        proof = verify(student, small, plan, self.example_inputs)
        if not proof:
            raise VerifyError(str(proof))
        self.journal.log(event="cut", proof=str(proof))
        return small, str(proof)

    def recover(self, small: nn.Module, plan: Plan, proof: str) -> nn.Module:
        """The cut network, trained with its teacher at a rate that starts anew."""
        return self._train("recover", small, self.config.recover, plan=plan.to_json(), proof=proof)
