"""Latency of ONNX files in ONNX Runtime on the CPU, measured so that numbers compare."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpd.errors import ArtefactError, InputError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, NodeArg

__all__ = [
    "Latency",
    "Session",
    "compare",
    "device",
    "machine",
    "onnx",
    "session",
    "summary",
    "turns",
]

BLOCK = 25
"""Runs of one model in a row before ``compare`` goes on to the next."""

_PROVIDER = "CPUExecutionProvider"
_DTYPES = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "bool": np.bool_,
}


@dataclass(frozen=True)
class Latency:
    """Times of one run of one model, in milliseconds for the whole batch.

    ``median_ms``, ``p90_ms`` and ``p99_ms`` are percentiles over ``runs`` timed runs,
    which followed ``warmup`` untimed ones; ``threads`` is how many compute one operator.
    """

    median_ms: float
    mean_ms: float
    p90_ms: float
    p99_ms: float
    runs: int
    warmup: int
    batch: int
    provider: str
    threads: int

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"median {self.median_ms:.3f} ms, mean {self.mean_ms:.3f} ms, "
            f"p90 {self.p90_ms:.3f} ms, p99 {self.p99_ms:.3f} ms (batch {self.batch}, "
            f"{self.runs} runs after {self.warmup} warm-ups, {self.provider}, {threads})"
        )


def onnx(
    path: str | os.PathLike[str],
    *,
    runs: int = 1000,
    warmup: int = 50,
    batch: int = 1,
    threads: int | None = None,
    seed: int = 0,
) -> Latency:
    """Latency of one ONNX file; see :func:`compare` for arguments and errors."""
    return compare([path], runs=runs, warmup=warmup, batch=batch, threads=threads, seed=seed)[0]


def compare(
    paths: Sequence[str | os.PathLike[str]],
    *,
    runs: int = 1000,
    warmup: int = 50,
    batch: int = 1,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Latency]:
    """Latency of several ONNX files whose runs alternate, so that noise hits all alike.

    Each model is warmed up, then the models take turns of ``BLOCK`` runs, in an order that reverses
    every round. Idle threads of one session do not spin while another one runs.

    Args:
        paths: ONNX files with one open axis at most per input, the first: the batch.
        runs: timed runs of each model, at least 1.
        warmup: untimed runs of each before, at least 0.
        batch: samples per run; a file with a fixed batch must have this one.
        threads: threads within an operator; None takes every core this process may use.
        seed: for the input values (normal for floats, 0 or 1 for integers).
        progress: called after every block with the timed runs done and those wanted, of all models.

    Returns:
        One ``Latency`` for each path, in their order.

    Raises:
        InputError: a number is out of range, or an input has a type or open axes nobody can guess.
        ArtefactError: a file is missing or no valid ONNX, or fails to run.
    """
    _check_numbers(runs=(runs, 1), warmup=(warmup, 0), batch=(batch, 1), threads=(threads or 1, 1))
    threads = threads or _cores()
    models = [Session(Path(path), batch, threads, seed) for path in paths]
    for model in models:
        model.times(warmup)
    taken: list[list[int]] = [[] for _ in models]
    turns(models, taken, runs, progress)
    return [summary(times, warmup, batch, threads) for times in taken]


def turns(
    models: Sequence[Session],
    taken: Sequence[list[int]],
    runs: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Time models in turns until each has so many ``runs``.

    ``taken`` holds nanoseconds of each model's runs so far and grows after every block, so that who
    keeps them in ``progress`` can go on another day; the rest is as in :func:`compare`.
    """
    order = list(range(len(models)))
    while any(len(times) < runs for times in taken):
        for index in order:
            if len(taken[index]) >= runs:
                continue
            models[index].times(1)  # the caches still hold the other model
            taken[index] += models[index].times(min(BLOCK, runs - len(taken[index])))
            if progress is not None:
                progress(sum(map(len, taken)), runs * len(models))
        order.reverse()


def session(
    path: str | os.PathLike[str], *, batch: int = 1, threads: int | None = None, seed: int = 0
) -> Session:
    """One ONNX file, ready to be timed; see :func:`compare` for arguments and errors."""
    _check_numbers(batch=(batch, 1), threads=(threads or 1, 1))
    return Session(Path(path), batch, threads or _cores(), seed)


def device() -> str:
    """What the numbers were measured on: CPU model, cores, system, version of ONNX Runtime."""
    import onnxruntime

    return f"{machine()}, ONNX Runtime {onnxruntime.__version__}"


def machine() -> str:
    """The machine alone: CPU model, cores this process may use, system."""
    cores = f"{_cores()} of {os.cpu_count()} cores"
    return f"{_cpu()}, {cores}, {platform.system()} {platform.machine()}"


class Session:
    """One file with its inputs, ready to be timed."""

    def __init__(self, path: Path, batch: int, threads: int, seed: int) -> None:
        self.path, self.threads = path, threads
        self.session = _session(path, threads)
        generator = np.random.default_rng(seed)
        nodes = self.session.get_inputs()
        _check_batch(path, nodes, batch)
        self.feed = {node.name: _value(path, node, batch, generator) for node in nodes}

    def times(self, count: int) -> list[int]:
        """Nanoseconds of each of ``count`` runs."""
        run, feed, clock = self.session.run, self.feed, time.perf_counter_ns
        taken = []
        try:
            for _ in range(count):
                start = clock()
                run(None, feed)
                taken.append(clock() - start)
        except Exception as error:  # ONNX Runtime raises classes of its own C++ side
            raise ArtefactError(
                f"{self.path} fails to run with inputs of shapes "
                f"{ {name: value.shape for name, value in feed.items()} }: {error}"
            ) from error
        return taken


def _check_numbers(**bounds: tuple[Any, int]) -> None:
    for name, (value, least) in bounds.items():
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name}: expected a whole number of at least {least}, got {value!r}.")


def _session(path: Path, threads: int) -> InferenceSession:
    import onnxruntime

    if not path.is_file():
        raise ArtefactError(f"{path} does not exist: write it with cpd.exporters.onnx first.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: the rest is about optimisations it skipped
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), sess_options=options, providers=[_PROVIDER])
    except Exception as error:  # ONNX Runtime raises classes of its own C++ side
        raise ArtefactError(f"{path} is not a valid ONNX file: {error}") from error


def _check_batch(path: Path, nodes: list[NodeArg], batch: int) -> None:
    """Refuse a file whose batch is fixed at another size: none open, and the first one differs."""
    sizes = [node.shape[0] for node in nodes if node.shape]
    if sizes and all(isinstance(size, int) for size in sizes) and sizes[0] != batch:
        raise InputError(
            f"{path} has the fixed batch size {sizes[0]}, not {batch}: export it with "
            f"dynamic_batch=True, or measure with batch={sizes[0]}."
        )


def _value(path: Path, node: NodeArg, batch: int, generator: np.random.Generator) -> Any:
    """An array for one input of the session, from its type and shape."""
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    if kind not in _DTYPES:
        raise InputError(
            f"{path}: input {node.name!r} is a {node.type}, for which no value is known."
        )
    shape = list(node.shape)
    if shape and not isinstance(shape[0], int):
        shape[0] = batch
    if not all(isinstance(size, int) for size in shape):
        raise InputError(
            f"{path}: input {node.name!r} has shape {node.shape}; only its first axis may be open."
        )
    if kind in ("float", "double", "float16"):
        return generator.standard_normal(shape).astype(_DTYPES[kind])
    return generator.integers(0, 2, size=shape).astype(_DTYPES[kind])


def summary(times: Sequence[int], warmup: int, batch: int, threads: int) -> Latency:
    """What nanoseconds of timed runs come to."""
    milliseconds = np.asarray(times, dtype=np.float64) / 1e6
    median, p90, p99 = np.percentile(milliseconds, [50, 90, 99]).tolist()
    mean = float(milliseconds.mean())
    return Latency(median, mean, p90, p99, len(times), warmup, batch, _PROVIDER, threads)


def _cores() -> int:
    """Cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu() -> str:
    """The name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
