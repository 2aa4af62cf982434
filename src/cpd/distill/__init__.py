"""Verb: train a student by a task and a teacher. One loop for every stage, one device or many."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpd import data as data_shelf
from cpd import losses as loss_shelf
from cpd import tasks as task_shelf
from cpd.distill.batches import Batches, examples
from cpd.distill.callbacks import Callback, State
from cpd.distill.checkpoint import exists, newest, read, write
from cpd.distill.evaluate import evaluate
from cpd.distill.interrupt import Stopper, Stops
from cpd.distill.loop import Loop, Pieces
from cpd.distill.optim import check_patterns
from cpd.distill.options import LoopOptions, TrainOptions, coerce, plain
from cpd.distill.resume import go_on, identity
from cpd.distill.seeds import derive, isolated
from cpd.distill.spread import snapshot
from cpd.errors import CPDError, InputError
from cpd.files import swept
from cpd.plan import Plan

__all__ = [
    "Batches",
    "Callback",
    "Distilled",
    "Loop",
    "LoopOptions",
    "Pieces",
    "State",
    "Stopper",
    "Stops",
    "TrainOptions",
    "coerce",
    "derive",
    "distill",
    "evaluate",
    "examples",
    "exists",
    "isolated",
    "keep_batch",
    "newest",
    "plain",
    "read",
    "snapshot",
    "write",
]


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distilled:
    """What ``distill`` gives back.

    Attributes:
        model: the trained network, of the student's class.
        history: one entry for each evaluation: stage, step, epoch, rate, losses, metrics.
        best: value of the task's primary metric for ``model`` on the validation data, or None.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    best: float | None

    def __str__(self) -> str:
        """One line."""
        best = "no validation data" if self.best is None else f"best {self.best:.4f}"
        steps = self.history[-1]["step"] if self.history else 0
        return f"{type(self.model).__name__} after {steps} steps, {best}"


class Saver(Callback):
    """Writes a checkpoint after every evaluation, two generations of it."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        """``path``: the file. ``run``: what tells the run from others."""
        self.path, self.run = path, run
        self.loop: Loop | None = None

    def begin(self, loop: Loop, *, resume: bool) -> None:
        """Save the state of ``loop`` from now on; with ``resume``, go on from what is saved."""
        self.loop = loop
        if loop.state.main:
            swept(self.path.parent, shared=True)
        if resume and exists(self.path):
            go_on(loop, self.path, self.run)

    def after_evaluate(self, state: State, metrics: dict[str, float]) -> None:  # noqa: ARG002
        """Write the loop's state from the main process."""
        self.save()

    def save(self) -> None:
        """Write the loop's state from the main process; every process gives its part of it."""
        if self.loop is None:
            return
        value = self.loop.state_dict()
        if self.loop.state.main:
            write(self.path, {**value, "run": self.run}, generations=True)

    def on_bad_batch(self, state: State, details: dict[str, Any]) -> None:  # noqa: ARG002
        """Keep the batch beside the checkpoint."""
        keep_batch(self.path.parent, details)


def distill(
    student: nn.Module,
    *,
    data: Any,
    teacher: nn.Module | None = None,
    task: Any = "classification",
    losses: Any = "kd",
    plan: Plan | None = None,
    options: TrainOptions | Mapping[str, Any] | None = None,
    seed: int = 0,
    callbacks: tuple[Any, ...] = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Distilled:
    """Train a copy of ``student`` on the task's loss and, with a teacher, on distillation losses.

    L = task_weight · L_task(s(x), y) + Σ_i w_i · L_i(s(x), t(x)), the sum of weighted terms of
    G. Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531).

    Args:
        student: neither it nor the teacher is changed.
        data: a name of the data shelf, or any object with ``train`` and ``val``: datasets of
            (input, target), or loaders of batches.
        teacher: a frozen network of the same task, or None for training on the task alone.
        task: a name of the task shelf, or an object with loss, metrics, logits, primary.
        losses: a name, a mapping of names to options with ``weight``, or a callable. See
            ``cpd.losses``. Unused without a teacher.
        plan: what the student was cut by, where losses compare its features with those of the
            teacher it was cut from; as ``choose`` made it, with its groups.
        options: ``TrainOptions``, or a mapping of its fields.
        seed: of order, dropout and transforms; the same seed gives the same weights on one machine.
        callbacks: objects with any methods of ``Callback``.
        checkpoint: a file, written after every evaluation. With ``resume`` the run goes on from it.
        resume: go on from ``checkpoint`` where it exists; the end is the same as without the break.
            All must be given as it was, but for ``workers``, ``accumulate``, ``teacher_cache``.

    Raises:
        UnknownName: no loss, task, data, optimizer or schedule of that name.
        NonFiniteLoss: the loss became NaN or infinite; its batch lies beside the checkpoint. Or
            weights did, where a checkpoint was to be written; the one before stays.
        InputError: the checkpoint to go on from is of another run or network.
        OutOfMemory, DataError: no memory is left; a process that loads data died.
        KeyboardInterrupt, Interrupted: Ctrl-C or SIGTERM, after the step; a checkpoint is written.
        OutputError: the checkpoint cannot be written. ArtefactError: it cannot be read.
    """
    if resume and checkpoint is None:
        raise InputError("resume=True needs checkpoint=, the file to go on from")
    options = coerce(TrainOptions, options)
    check_patterns(student, options.no_decay)
    samples = data_shelf.resolve(data) if isinstance(data, str | Mapping) else data
    pieces = Pieces(
        copy.deepcopy(student),
        copy.deepcopy(teacher),
        task_shelf.resolve(task),
        loss_shelf.resolve(losses),
        samples.train,
        getattr(samples, "val", None),
        _kept(plan, loss_shelf.resolve(losses)),
    )
    run = identity(options, seed=seed, task=task, losses=losses, teacher=teacher)
    saver = Saver(Path(checkpoint), run) if checkpoint is not None else None
    stops = Stops(active=saver is not None)
    watching = callbacks if saver is None else (*callbacks, saver, Stopper(stops, saver.save))
    with isolated(seed), stops:
        loop = Loop(pieces, options, stage="distill", seed=seed, callbacks=watching)
        if saver is not None:
            saver.begin(loop, resume=resume)
        model = loop.run()
    for copied, original in zip(model.modules(), student.modules(), strict=True):
        copied.training = original.training
    return Distilled(model, loop.state.history, _best(loop))


def keep_batch(folder: Path, details: dict[str, Any]) -> None:
    """Write a batch whose loss is not finite, and note where; what cannot be written is logged."""
    path = folder / f"bad-batch-{_rank()}.safetensors"
    try:
        write(path, {name: details[name] for name in ("batch", "terms")})
    except CPDError as error:
        log.warning("the batch whose loss is not finite is not kept: %s", error)
    else:
        details["saved"] = path


def _rank() -> int:
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if known else 0


def _kept(plan: Plan | None, losses: loss_shelf.Losses) -> loss_shelf.Kept:
    if plan is None or not losses.points:
        return {}
    if plan.groups is None:
        raise InputError(
            "the plan does not say where its channels run: comb the teacher again and give "
            "losses the plan that choose makes, not one read from JSON"
        )
    return loss_shelf.kept_at(plan.groups, plan, losses.points)


def _best(loop: Loop) -> float | None:
    if loop.best is None:
        return None
    return float(loop.best["value"]) * (1 if loop.pieces.task.higher_is_better else -1)
