"""Value: every decision of a run. One field is one key of the YAML, one flag and one keyword."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cpd.distill import LoopOptions, TrainOptions, coerce
from cpd.distill import plain as plain_value
from cpd.errors import InputError, UnknownName
from cpd.pruner import Schedule

__all__ = ["BenchOptions", "CompressConfig", "plain"]

SCORED = ("all", "task", "distillation")
# What changes where a run writes or how it is measured, but no weight: may differ on resume.
FREE = ("output", "overwrite", "resume", "onnx", "bench")


@dataclass(frozen=True)
class BenchOptions:
    """How latency is measured, before and after.

    Attributes:
        runs: timed runs. warmup: untimed runs before them.
        batch: samples of a run.
        threads: threads of the runtime; nothing: as many as there are cores.
    """

    runs: int = 1000
    warmup: int = 50
    batch: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be measured, before anything is trained."""
        for name in ("runs", "warmup", "batch", "threads"):
            value, least = getattr(self, name), 0 if name == "warmup" else 1
            if value is not None and (not isinstance(value, int) or value < least):
                text = f"bench.{name} must be a whole number of at least {least}, got {value!r}"
                raise InputError(text)


@dataclass(frozen=True)
class CompressConfig:
    """Every decision of ``cpd.compress``.

    Attributes:
        target: the costs to reach, as shares of the unpruned network: "macs=0.5", or a mapping.
        data: a name of the data shelf, a mapping of it to its options, or an object of your own.
        model: where the network comes from; to Python a callable that makes it.
        model_args: keyword arguments of that callable.
        weights: a safetensors file with the unpruned network's weights.
        task: a name of the task shelf, a mapping of it to its options, or an object of your own.
        importance: a name of the importance shelf, or a callable.
        scored: the losses whose gradients the importance sees: "all" that the network trains on,
            "task", or "distillation".
        repair: batches of training data by which what is left makes good for what goes, at every
            event (see ``cpd.repair``); 0 for none. "auto": four, and one more that judges at each
            event whether the outputs come nearer to the whole network's; else it is left.
        teacher: "self" (the unpruned network), another network, or nothing.
        losses: distillation losses: a name, or a mapping of names to options with their weight.
        base: how the unpruned network is trained first; nothing: it comes trained.
        ignore: modules or names whose width stays.
        exact: keep the width of all that feeds a statistic across channels.
        unknown: what to do at an operation without a rule: "freeze" or "error".
        keep_class: "loose" lets a module whose own code cannot follow run a forward as data;
            "strict" keeps its channels instead.
        depth: residual branches may go whole, too.
        interval: steps over which importance is accumulated before each pruning event.
        events: pruning events until the target; nothing: as many as ``step`` asks for, or 10.
        step: largest share of a cost to take at one event, in place of ``events``.
        strategy: what goes at an event: "oneshot" (the least important units of each kind),
            "greedy" (one group after the other, as in the paper), "knapsack" (the least importance
            in all), "uniform" (the same share of each), or a callable.
        ranking: which units compete: "isomorphic", "global" or "uniform".
        multiple_of: widths are cut to multiples of it; "auto" measures which pays.
        measure: what measures latency where the target names it: "onnx", "eager", one of these with
            options, or a callable (module, inputs) -> milliseconds.
        min_keep: share of each group that stays.
        limits: largest share that may go of single groups, by name or pattern of a group or module.
        keep: numbers of the channels that stay, or "all", by module.
        uniform: layers that are alike keep the same number.
        unreachable: "error", or "closest" for the plan nearest to a target out of reach.
        prune: how a step is taken while units are pruned.
        recover: how the cut network is trained.
        onnx: export both networks and measure their latency.
        bench: how.
        seed: of everything random.
        output: folder for the artefact, the report, the log and the checkpoints.
        overwrite: replace a run that is there already.
        resume: go on from the last checkpoint in ``output``, where there is one.
    """

    target: Any
    data: Any
    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    task: Any = "classification"
    importance: Any = "hessian"
    scored: str = "all"
    repair: Any = 0
    teacher: Any = "self"
    losses: Any = "kd"
    base: TrainOptions | None = None
    ignore: list[str] = field(default_factory=list)
    exact: bool = False
    unknown: str = "freeze"
    keep_class: str = "loose"
    depth: bool = False
    interval: int = 50
    events: int | None = None
    step: float | None = None
    strategy: Any = "oneshot"
    ranking: str = "isomorphic"
    multiple_of: Any = 1
    measure: Any = "onnx"
    min_keep: float = 0.1
    limits: dict[str, Any] | None = None
    keep: dict[str, Any] | None = None
    uniform: bool = False
    unreachable: str = "error"
    prune: LoopOptions = field(default_factory=LoopOptions)
    recover: TrainOptions = field(default_factory=TrainOptions)
    onnx: bool = True
    bench: BenchOptions = field(default_factory=BenchOptions)
    seed: int = 0
    output: str | None = None
    overwrite: bool = False
    resume: bool = False

    @classmethod
    def of(cls, **values: Any) -> CompressConfig:
        """A configuration from keywords; stages may be mappings.

        Raises:
            UnknownName: a keyword, or a key of a stage, that does not exist.
            InputError: a value that cannot work.
        """
        valid = [item.name for item in fields(cls)]
        for name in values:
            if name not in valid:
                raise UnknownName("keyword of compress", name, valid)
        for name, kind in (("prune", LoopOptions), ("recover", TrainOptions)):
            values[name] = coerce(kind, values.get(name))
        if values.get("base") is not None:
            values["base"] = coerce(TrainOptions, values["base"])
        if isinstance(values.get("bench"), Mapping):
            values["bench"] = _bench(values["bench"])
        if values.get("output") is not None:
            values["output"] = str(values["output"])
        return cls(**values)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is trained."""
        _ = self.schedule  # refuses what it cannot use
        if isinstance(self.teacher, str) and self.teacher != "self":
            text = f"teacher must be 'self', a network or None, got {self.teacher!r}"
            raise InputError(text)
        if self.prune.parallel != "ddp":
            raise InputError(
                "prune.parallel must be ddp: scores and masks need whole tensors. base and recover "
                "may be fsdp"
            )
        whole = isinstance(self.repair, int) and self.repair >= 0
        if not whole and self.repair != "auto":
            text = f"repair must be a whole number of at least 0, or 'auto', got {self.repair!r}"
            raise InputError(text)
        if self.scored not in SCORED:
            raise UnknownName("losses to score by", self.scored, SCORED)
        if self.scored == "distillation" and self.teacher is None:
            raise InputError('scored="distillation" needs a teacher')
        if self.resume and self.output is None:
            raise InputError("resume=True needs output=, the folder with the checkpoint")

    @property
    def schedule(self) -> Schedule:
        """When units go, and how many."""
        return Schedule(self.target, self.interval, self.events, self.step)

    @property
    def choice(self) -> dict[str, Any]:
        """What every call of ``choose`` gets."""
        bounds = ("multiple_of", "measure", "min_keep", "limits", "keep", "uniform", "unreachable")
        return {name: getattr(self, name) for name in ("strategy", "ranking", *bounds, "seed")}

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON can hold it; objects by their name."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}

    def fingerprint(self) -> str:
        """All that decides the weights, as JSON: what a checkpoint must agree with."""
        kept = {name: value for name, value in self.to_dict().items() if name not in FREE}
        return json.dumps(kept, sort_keys=True)


def _bench(values: Mapping[str, Any]) -> BenchOptions:
    valid = [item.name for item in fields(BenchOptions)]
    for name in values:
        if name not in valid:
            raise UnknownName("key of bench", name, valid)
    return BenchOptions(**values)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: options as mappings, objects by what they came from or are."""
    if isinstance(value, BenchOptions):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    return plain_value(value)
