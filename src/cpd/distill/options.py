"""Values: how one stage of training runs. Every field is a key of the YAML and a flag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from cpd.errors import InputError, UnknownName

__all__ = ["LoopOptions", "TrainOptions", "coerce", "plain"]

PRECISIONS = ("bf16", "no")
PARALLEL = ("ddp", "fsdp")
T = TypeVar("T", bound="LoopOptions")


@dataclass(frozen=True)
class LoopOptions:
    """How a step is taken.

    Attributes:
        batch_size: samples of one optimizer step, over all processes together. Only for datasets;
            a loader of your own keeps the batches that it gives.
        optimizer: name of ``torch.optim``, a mapping with ``name`` and its options, or a callable
            ``parameters -> Optimizer``.
        schedule: name of ``torch.optim.lr_scheduler``, a mapping with ``name`` and its options
            (``per: epoch`` steps it once an epoch instead of once a step), a callable
            ``optimizer -> scheduler``, or nothing for a constant rate. A length that the schedule
            asks for (``T_max``, ``total_steps``, ``total_iters``) is filled in where left out.
        warmup: steps over which the rate rises linearly from zero to its full value.
        norm_decay: False takes the weight decay off vectors and scalars: norms, biases.
        no_decay: patterns of parameters' names that have none either, such as "*.pos_embed".
        precision: "no" (as the parameters are) or "bf16" (autocast; the loss stays float32).
        accumulate: parts into which each batch is split; gradients add up over the parts.
        clip: largest total norm of the gradient.
        channels_last: images lie in memory channels last, which many convolutions take faster:
            the same function with other rounding.
        freeze_norms: batch norms keep their running statistics.
        task_weight: weight of the task's own loss next to the distillation losses.
        evaluate_every: epochs between evaluations on the validation data; 0: at the end only.
        workers: worker processes that load data, for each process that trains.
        parallel: on several processes, "ddp" (the network whole on each) or "fsdp" (in shards).
        teacher_precision: "bf16" (autocast) or "no" for the teacher alone; nothing: as
            ``precision``.
        teacher_cache: a folder that keeps the teacher's logits of every sample, for data that is
            not changed at random and losses that look at logits.
    """

    batch_size: int = 64
    optimizer: Any = field(default_factory=lambda: {"name": "SGD", "lr": 0.01, "momentum": 0.9})
    schedule: Any = None
    warmup: int = 0
    norm_decay: bool = True
    no_decay: Sequence[str] = ()
    precision: str = "no"
    accumulate: int = 1
    clip: float | None = None
    channels_last: bool = False
    freeze_norms: bool = False
    task_weight: float = 1.0
    evaluate_every: int = 1
    workers: int = 0
    parallel: str = "ddp"
    teacher_precision: str | None = None
    teacher_cache: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is trained."""
        if self.precision not in PRECISIONS:
            raise UnknownName("precision", self.precision, PRECISIONS)
        if self.parallel not in PARALLEL:
            raise UnknownName("parallel", self.parallel, PARALLEL)
        if self.teacher_precision not in (None, *PRECISIONS):
            raise UnknownName("teacher_precision", self.teacher_precision, PRECISIONS)
        least = {"batch_size": 1, "accumulate": 1, "warmup": 0, "evaluate_every": 0, "workers": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                text = f"{name} must be a whole number of at least {bound}, got {value!r}"
                raise InputError(text)
        named = isinstance(self.no_decay, list | tuple)
        if not named or not all(isinstance(each, str) for each in self.no_decay):
            raise InputError(f"no_decay must be a list of patterns, got {self.no_decay!r}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip must be above 0, or left out, got {self.clip!r}")


@dataclass(frozen=True)
class TrainOptions(LoopOptions):
    """How a step is taken, and how many.

    Attributes:
        epochs: passes over the training data.
        steps: optimizer steps; where given, they count instead of the epochs.
    """

    epochs: int = 10
    steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse lengths below zero."""
        super().__post_init__()
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise InputError(f"{name} must be a whole number of at least 0, got {value!r}")


def coerce(kind: type[T], value: T | Mapping[str, Any] | None) -> T:
    """Options from a mapping, from nothing (the defaults), or as they are.

    Raises:
        UnknownName: a key that the options do not have.
        InputError: neither a mapping nor options of that kind.
    """
    if isinstance(value, kind):
        return value
    if value is None:
        return kind()
    if not isinstance(value, Mapping):
        raise InputError(f"expected {kind.__name__} or a mapping of its fields, got {value!r}")
    valid = [item.name for item in fields(kind)]
    for name in value:
        if name not in valid:
            raise UnknownName(f"key of {kind.__name__}", name, valid)
    return kind(**value)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: options as mappings, objects by what they came from or are."""
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if isinstance(value, LoopOptions):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(getattr(value, "spec", None), str):
        return value.spec
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"
