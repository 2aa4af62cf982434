"""The training loop of one stage: forward, losses, backward, step; evaluated and resumable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cpd import losses as loss_shelf
from cpd.distill.batches import Batches, examples, labels, parts, size, to_device, unpack
from cpd.distill.callbacks import Callbacks, State
from cpd.distill.evaluate import evaluate
from cpd.distill.failures import explaining
from cpd.distill.optim import Schedule, build_optimizer
from cpd.distill.options import LoopOptions, TrainOptions
from cpd.distill.seeds import derive, seed_all
from cpd.distill.spread import Sharded, not_finite, snapshot, spread
from cpd.distill.teacher import Sample, Teacher, samples
from cpd.errors import InputError, NonFiniteLoss

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Loop", "Pieces"]


@dataclass(frozen=True)
class Pieces:
    """What is trained, by what, on what.

    Attributes:
        student: trained in place. teacher: frozen, in evaluation mode, or None. Private copies.
        task: see ``cpd.tasks``. losses: ``(student logits, teacher logits) -> weighted terms``.
        train, val: sources of batches, see ``Batches``; ``val`` may be None.
        kept: which channels of the teacher's features the student has, see ``cpd.losses.kept_at``.
    """

    student: nn.Module
    teacher: nn.Module | None
    task: Any
    losses: Any
    train: Any
    val: Any = None
    kept: Mapping[str, Any] | None = None


class Loop:
    """One stage. ``run`` takes it to its end; between steps its state can be saved and loaded."""

    def __init__(
        self,
        pieces: Pieces,
        options: LoopOptions,
        *,
        stage: str,
        seed: int,
        steps: int | None = None,
        callbacks: tuple[Any, ...] = (),
        keep: str = "best",
    ) -> None:
        """``steps``: length of the stage, by default what the options say.

        ``keep="best"`` ends with the weights that did best on the validation data, "last" with the
        newest. Raises InputError and UnknownName for options that cannot be used.
        """
        from accelerate import Accelerator

        cpu = not torch.accelerator.is_available()
        self.accelerator: Accelerator = Accelerator(cpu=cpu, mixed_precision="no")
        self.device: torch.device = self.accelerator.device
        self.pieces, self.options, self.keep = pieces, options, keep
        self.seed = derive(seed, stage)
        self.callbacks = Callbacks(callbacks)
        self.train = self._batches(pieces.train, train=True)
        self.val = None if pieces.val is None else self._batches(pieces.val, train=False)
        total = self._length() if steps is None else steps
        self.infinite = set(not_finite(pieces.student.state_dict()))
        self.state = State(stage, total, pieces.student, main=self.accelerator.is_main_process)
        self.spread = spread(self.accelerator, pieces.student, options.parallel)
        self.model: nn.Module = self.spread.model
        self.teacher = self._teacher()
        self.losses = self._attached()
        self.optimizer, self.schedule = self._optimizer(total)
        self.best: dict[str, Any] | None = None
        self.evaluated = -1
        self.sums: dict[str, float] = {}
        self.counted = 0

    def _teacher(self) -> Teacher | None:
        pieces, options = self.pieces, self.options
        if pieces.teacher is None:
            return None
        made = Teacher(
            pieces.teacher,
            pieces.task,
            device=self.device,
            precision=options.teacher_precision or options.precision,
            cache=options.teacher_cache,
            rank=self.accelerator.process_index,
        )
        made.check(self.train, loss_shelf.resolve(pieces.losses).points)
        return made

    def _attached(self) -> loss_shelf.Attached | None:
        """The losses between student and teacher, checked before anything is trained."""
        pieces = self.pieces
        if pieces.teacher is None:
            return None
        made = loss_shelf.attach(
            loss_shelf.resolve(pieces.losses),
            pieces.student,
            pieces.teacher,
            inputs=lambda: to_device(examples(pieces.train), self.device),
            logits=pieces.task.logits,
            kept=pieces.kept,
            seed=derive(self.seed, "losses"),
        )
        made.modules.to(self.device)
        return made

    def _learning(self) -> list[nn.Parameter]:
        """Parameters of losses that learn along."""
        return [] if self.losses is None else list(self.losses.modules.parameters())

    def _optimizer(self, total: int) -> tuple[torch.optim.Optimizer, Schedule]:
        options = self.options
        if isinstance(self.spread, Sharded) and self._learning():
            raise InputError("losses that learn along need parallel: ddp, not fsdp")
        optimizer = build_optimizer(
            self.pieces.student,
            options.optimizer,
            norm_decay=options.norm_decay,
            no_decay=options.no_decay,
            beside=self._learning(),
        )
        by_epoch = isinstance(options.schedule, Mapping) and options.schedule.get("per") == "epoch"
        epoch = len(self.train) if by_epoch else 1
        schedule = Schedule(
            optimizer, options.schedule, steps=total, epoch=epoch, warmup=options.warmup
        )
        return optimizer, schedule

    def _batches(self, source: Any, *, train: bool) -> Batches:
        accelerator = self.accelerator
        return Batches(
            source,
            self.options.batch_size,
            self.seed,
            train=train,
            workers=self.options.workers,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )

    def _length(self) -> int:
        assert isinstance(self.options, TrainOptions), "the options give no length; pass steps"
        if self.options.steps is not None:
            return self.options.steps
        return self.options.epochs * len(self.train) if self.options.epochs else 0

    # --- the way through the stage

    def run(self) -> nn.Module:
        """Train from where the loop is to the end of the stage; return the student.

        Raises:
            NonFiniteLoss: a loss became NaN or infinite; nothing was stepped with it.
            OutOfMemory, DataError: no memory is left; a process that loads data died.
        """
        with explaining(self._where):
            return self._run()

    def _where(self) -> str:
        state = self.state
        step = min(state.step + 1, state.total)  # the last evaluation comes after the last step
        return f"at step {step} of {state.total} in stage {state.stage!r}"

    def _run(self) -> nn.Module:
        state = self.state
        self._training()
        self.optimizer.zero_grad(set_to_none=True)
        self.callbacks("on_start", state)
        while not self._finished():
            self._epoch()
        if state.step and self.evaluated != state.step:
            self._evaluate()
        if self.best is not None and self.keep == "best":
            self.spread.load(self.best["weights"])
        self.optimizer.zero_grad(set_to_none=True)
        self.callbacks("on_end", state)
        return self.spread.whole()

    def _finished(self) -> bool:
        return self.state.stop or self.state.step >= self.state.total

    def _epoch(self) -> None:
        """The rest of the current epoch."""
        state = self.state
        cached = self.teacher is not None and self.teacher.folder is not None
        for numbers, batch in self.train.numbered(state.epoch, state.batch):
            state.batch += 1
            known = samples(numbers, batch) if cached else []
            placed = to_device(batch, self.device, channels_last=self.options.channels_last)
            self._step(placed, known)
            if self._finished() and state.batch != self.train.length:
                return
        if not state.batch:
            raise InputError("the training data gave no batch; is the loader empty or used up?")
        state.epoch, state.batch = state.epoch + 1, 0
        every = self.options.evaluate_every
        if every and state.epoch % every == 0:
            self._evaluate()

    def _training(self) -> None:
        """Training mode, with frozen statistics where the options say so."""
        self.state.student.train()
        if not self.options.freeze_norms:
            return
        for module in self.state.student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    # --- one step

    def _step(self, batch: Any, known: list[Sample]) -> None:
        state = self.state
        seed_all(derive(self.seed, "step", state.step, self.accelerator.process_index))
        self.spread.before_step()
        rows = size(batch)
        chunks = parts(batch, self.options.accumulate)
        state.losses, state.rate = {}, self.schedule.rate
        first = 0
        for number, chunk in enumerate(chunks, start=1):
            state.synced = number == len(chunks)
            count = size(chunk)
            self._backward(chunk, count / rows, known[first : first + count])
            first += count
        if self.accelerator.num_processes > 1:
            for parameter in self._learning():  # of no wrapped module: averaged by hand
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        if self.options.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        state.step += 1
        for name, value in state.losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.counted += 1
        self.callbacks("after_step", state)

    def _backward(self, chunk: Any, share: float, known: list[Sample]) -> None:
        with self.spread.waiting(self.state.synced):
            terms = self._terms(chunk, known)
            self._record(terms, share, chunk)
            shares = {name: term * share for name, term in terms.items()}
            self.callbacks("before_backward", self.state, shares)
            self.accelerator.backward(torch.stack(list(shares.values())).sum())
        self.callbacks("after_backward", self.state)

    def _terms(self, chunk: Any, known: list[Sample]) -> dict[str, torch.Tensor]:
        """Every weighted term of the loss; their sum is what is minimised."""
        args, kwargs, targets = unpack(chunk)
        task, state = self.pieces.task, self.state
        with self._autocast():
            if self.teacher is None or self.losses is None:
                outputs = self.model(*args, **kwargs)
                return {"task": self.options.task_weight * task.loss(outputs, targets).float()}
            with self.losses.watching() as (own, other):
                outputs = self.model(*args, **kwargs)
                taught = self.teacher.logits(args, kwargs, known)
            terms = {"task": self.options.task_weight * task.loss(outputs, targets).float()}
        given = labels(targets, task)
        seen = loss_shelf.Seen(given, own, other, state.step, state.total)
        return terms | self.losses(task.logits(outputs), taught, seen)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.options.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _record(self, terms: Mapping[str, torch.Tensor], share: float, chunk: Any) -> None:
        """Note the terms, averaged over processes; stop every process where one is not finite."""
        values = torch.stack([term.detach().float() for term in terms.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, reduction="mean")
        named = dict(zip(terms, values.tolist(), strict=True))
        if not all(map(math.isfinite, named.values())):
            state, shown = self.state, ", ".join(f"{n} = {v:.6g}" for n, v in named.items())
            details: dict[str, Any] = {"batch": chunk, "terms": named}
            self.callbacks("on_bad_batch", state, details)
            kept = f" The batch is in {details['saved']}." if "saved" in details else ""
            raise NonFiniteLoss(
                f"the loss is not finite at step {state.step + 1} of {state.total} in stage "
                f"{state.stage!r}: {shown} (learning rate {state.rate:.3g}). Nothing was stepped "
                "with it; the last checkpoint is intact. Try a lower rate, a warm-up, or clip=1."
                f"{kept}"
            )
        losses = self.state.losses
        named["total"] = sum(named.values())
        for name, value in named.items():
            losses[name] = losses.get(name, 0.0) + share * value

    # --- evaluation

    def _evaluate(self) -> None:
        """Metrics on the validation data, a line of history, and the best weights so far."""
        state = self.state
        self.evaluated = state.step
        if self.teacher is not None:
            self.teacher.save()
        metrics = {}
        if self.val is not None:
            metrics = evaluate(
                self.spread.whole(), self.val, self.pieces.task, self.device,
                channels_last=self.options.channels_last,
            )  # fmt: skip
            self._compare(metrics)
        means = {name: total / max(1, self.counted) for name, total in self.sums.items()}
        self.sums, self.counted = {}, 0
        state.history.append(
            {
                "stage": state.stage,
                "step": state.step,
                "epoch": state.epoch,
                "rate": state.rate,
                "losses": means,
                "metrics": metrics,
            }
        )
        self.callbacks("after_evaluate", state, metrics)

    def _compare(self, metrics: Mapping[str, float]) -> None:
        """Keep the best weights so far; tell a schedule that watches the metric."""
        task = self.pieces.task
        if task.primary not in metrics:
            raise InputError(
                f"the task's primary metric {task.primary!r} is none of {list(metrics)}"
            )
        value = metrics[task.primary] * (1 if task.higher_is_better else -1)
        self.schedule.measured(-value)
        if self.keep == "best" and (self.best is None or value > self.best["value"]):
            weights = snapshot(self.spread.whole())
            self.best = {"value": value, "step": self.state.step, "weights": weights}

    # --- pause and go on

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the stage depends on, the student's weights included.

        Every process has to call it: the student may lie in shards, and each keeps in the cache
        what its teacher has said so far, which the rest of the stage depends on as well.

        Raises:
            NonFiniteLoss: weights are not finite that were so when the stage began.
        """
        state, student = self.state, snapshot(self.spread.whole())
        for name in not_finite(student):
            if name not in self.infinite:
                raise NonFiniteLoss(
                    f"{name} is not finite after step {state.step} of stage {state.stage!r}; the "
                    "last checkpoint is intact. Try a lower rate, a warm-up, or clip=1."
                )
        if self.teacher is not None:
            self.teacher.save()
        return {
            "at": {"step": state.step, "epoch": state.epoch, "batch": state.batch},
            "stop": state.stop,
            "rate": state.rate,
            "student": student,
            "optimizer": self.spread.optimizer_state(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "evaluated": self.evaluated,
            "running": {"sums": self.sums, "counted": self.counted},
            "losses": {} if self.losses is None else snapshot(self.losses.modules),
            "history": state.history,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, exactly."""
        state, at = self.state, saved["at"]
        state.step, state.epoch, state.batch = at["step"], at["epoch"], at["batch"]
        state.stop, state.rate = saved["stop"], saved["rate"]
        state.history = list(saved["history"])
        self.spread.load(saved["student"])
        self.spread.load_optimizer(self.optimizer, saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if self.losses is not None:
            self.losses.modules.load_state_dict(saved.get("losses", {}))
        self.best, self.evaluated = saved["best"], saved["evaluated"]
        self.sums, self.counted = dict(saved["running"]["sums"]), saved["running"]["counted"]
