"""What a run gained: both networks measured on the same data and by the same runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cpd import costs, exporters
from cpd.budgets import parse_target
from cpd.compress.pictures import pictures
from cpd.compress.run import Run
from cpd.costs import latency
from cpd.distill import Batches, evaluate
from cpd.groups import Groups
from cpd.plan import Plan
from cpd.report import Measures, Report, environment

__all__ = ["report"]

FILES = {"before": "base.onnx", "after": "model.onnx"}


def report(
    run: Run, networks: Mapping[str, nn.Module], groups: Groups, plan: Plan, proof: str
) -> Report:
    """The report on the networks "before" and "after". Only the main process measures latency."""
    run.tell("on_event", "measure", {})
    found = {name: _counted(run, network) for name, network in networks.items()}
    if run.config.onnx and run.main:
        for name, more in _timed(run, networks).items():
            found[name] |= more
    config = run.config
    return Report(
        before=Measures(**found["before"]),
        after=Measures(**found["after"]),
        history=run.journal.history,
        widths=plan.widths,
        frozen=groups.frozen,
        config=config.to_dict(),
        environment=environment() if run.main else {},
        proof=proof,
        notes=(*plan.notes, *_of_the_teacher(run)),
        pictures=pictures(run, networks) if run.main else (),
        title=f"{config.model or type(networks['before']).__name__} → {_shown(config.target)}",
    )


def _shown(target: Any) -> str:
    if isinstance(target, str):
        return target
    return ", ".join(f"{cost}={share:g}" for cost, share in target.items())


def _of_the_teacher(run: Run) -> tuple[str, ...]:
    """What another network that taught can do itself: a student is to be judged beside it."""
    if run.teacher is None or run.config.teacher == "self":
        return ()
    said = [f"{costs.params(run.teacher):,} parameters"]
    said += [f"{k} {v:.4f}" for k, v in _accuracy(run, run.teacher).items() if "_" not in k]
    return (f"The teacher on the same data: {', '.join(said)}.",)


def _counted(run: Run, network: nn.Module) -> dict[str, Any]:
    """Metrics, parameters and MACs."""
    found: dict[str, Any] = {
        "accuracy": _accuracy(run, network),
        "params": costs.params(network),
        "macs": costs.macs(network, run.example_inputs),
    }
    if "memory" in parse_target(run.config.target):
        found["memory"] = costs.memory(network, run.example_inputs)
    return found


def _accuracy(run: Run, network: nn.Module) -> dict[str, float]:
    """Metrics on the test data (or, without, the validation data)."""
    source = getattr(run.data, "test", None)
    source = getattr(run.data, "val", None) if source is None else source
    if source is None:
        return {}
    accuracy = evaluate(network.to(run.device), _batches(run, source), run.task, run.device)
    network.to(run.home)
    return accuracy


def _batches(run: Run, source: Any) -> Batches:
    from accelerate import PartialState

    state, stage = PartialState(), run.config.recover
    return Batches(
        source,
        stage.batch_size,
        seed=0,
        train=False,
        workers=stage.workers,
        rank=state.process_index,
        world=state.num_processes,
    )


def _timed(run: Run, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Both networks as ONNX: size of the file and latency, measured in turns."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = run.journal.folder or Path(temporary)
        paths = {}
        for name, network in networks.items():
            run.tell("on_event", "export", {"network": name})
            path = folder / FILES[name]
            paths[name] = exporters.onnx(network, run.example_inputs, path)
        bench = run.config.bench
        times = latency.compare(
            list(paths.values()),
            runs=bench.runs,
            warmup=bench.warmup,
            batch=bench.batch,
            threads=bench.threads,
            progress=_progress(run),
        )
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    pairs = zip(networks, times, strict=True)
    return {name: {"onnx_bytes": sizes[name], "latency": time} for name, time in pairs}


def _progress(run: Run) -> Callable[[int, int], None]:
    def told(done: int, total: int) -> None:
        run.tell("on_event", "bench", {"done": done, "of": total})

    return told
