"""Measurers: how long a module takes on this machine, in milliseconds; kept on disk.

A measurer is a function (module, inputs) -> milliseconds. The ones here take medians, in PyTorch
("eager", on the CPU or a GPU) and in ONNX Runtime on the CPU ("onnx"); a function of one's own may
send the module to a farm of devices.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._numbers import whole
from ._shelf import check_options, one
from .costs import latency
from .errors import InputError, UnknownName
from .files import write_text
from .onecall import OneCall, as_onnx
from .surgery import share

Measure = Callable[[nn.Module, tuple[torch.Tensor, ...]], float]
Run = Callable[[int], list[float]]  # how often -> the milliseconds of each time
Prepare = Callable[[nn.Module, tuple[torch.Tensor, ...]], Run]
BLOCK = 5  # runs of one network in a row, before the other's
NAMES = ("eager", "onnx")
OPTIONS = ("cache", "device", "runs", "threads", "warmup")


@dataclass(frozen=True)
class Clock:
    """What makes a module ready to be run and timed, and how often that is done."""

    prepare: Prepare
    runs: int
    warmup: int
    _ready: list[tuple[nn.Module, Run]] = field(default_factory=list, compare=False)

    def ready(self, module: nn.Module, inputs: Any) -> Run:
        """Return what runs a module; that of the last two is kept, since an export takes long."""
        held = [run for known, run in self._ready if known is module]
        run = held[0] if held else self.prepare(module, inputs)
        if not held:
            run(self.warmup)
        others = [pair for pair in self._ready if pair[0] is not module]
        self._ready[:] = [*others[-1:], (module, run)]
        return run

    def share(self, module: nn.Module, whole: nn.Module, inputs: Any) -> float:
        """Return the time of a module over that of another one, from runs that take turns.

        What slows a machine for a while slows both then: the median is taken of the turns' ratios.
        """
        second = self.ready(whole, inputs)  # first, so that it is still kept at the next call
        pair = [self.ready(module, inputs), second]
        ratios = []
        for number in range(max(self.runs // BLOCK, 1) * 2):
            turn = pair if number % 2 else pair[::-1]
            taken = {}
            for run in turn:
                run(1)  # the caches still hold the other one
                taken[run] = statistics.median(run(BLOCK))
            ratios.append(taken[pair[0]] / taken[pair[1]])
        return statistics.median(ratios)


class Measurer:
    """A measurer with a memory: what was measured once, on the same machine, is not again.

    `fingerprint` names what measures; results of others in the same file are left alone. `fused`:
    only products are measured one by one, what stands between them is fused into them.
    """

    def __init__(
        self, measure: Measure, fingerprint: str, *, cache: Path | None, fused: bool = False
    ) -> None:
        self.measure, self.fingerprint, self.cache, self.fused = measure, fingerprint, cache, fused
        self.clock: Clock | None = None
        self.known: dict[str, float] = _read(cache).get(fingerprint, {}) if cache else {}
        self.fresh = 0

    def __call__(self, key: str, make: Callable[[], tuple[nn.Module, Any]]) -> float:
        """Return the milliseconds of what `key` describes and `make` makes."""
        if key not in self.known:
            module, inputs = make()
            self.known[key] = self.now(module, inputs)
            self.fresh += 1
        return self.known[key]

    def now(self, module: nn.Module, inputs: Any) -> float:
        """Measure, whatever is known. Raises `InputError` for what is no time."""
        taken = float(self.measure(module, inputs))
        if not 0 <= taken < float("inf"):
            raise InputError(f"the measurer gave {taken!r}; milliseconds of at least 0 are wanted")
        return taken

    def beside(self, module: nn.Module, whole: nn.Module, known: float, inputs: Any) -> float:
        """Measure a module in turn with another one, of which `known` is what it takes.

        A function of one's own measures the module alone.
        """
        if self.clock is None:
            return self.now(module, inputs)
        return known * self.clock.share(module, whole, inputs)

    def save(self) -> None:
        """Write what is new to the file, beside what others have written since."""
        if self.cache is not None and self.fresh:
            held = _read(self.cache)
            held[self.fingerprint] = {**held.get(self.fingerprint, {}), **self.known}
            write_text(self.cache, json.dumps(held, indent=1, sort_keys=True))
            self.fresh = 0


def measurer(spec: Any) -> Measurer:
    """Return the measurer of "eager", "onnx", one of these with options, or a function.

    Options: `runs` and `warmup`, `threads`, `device` ("eager" only), `cache` (a file; None for
    none). A function is kept on disk only where it has a `fingerprint`, a text, of its own, and
    then in the file `cache` of it, if it has one.
    """
    if isinstance(spec, Measurer):
        return spec
    if callable(spec):
        mark, cache = getattr(spec, "fingerprint", None), getattr(spec, "cache", None)
        kept = Path(cache) if cache and mark else None
        return Measurer(spec, str(mark or "own"), cache=kept)
    name, options = one("measurer", spec)
    if name not in NAMES:
        raise UnknownName("measurer", name, NAMES)
    check_options("measurer", name, options, OPTIONS)
    cache = options.pop("cache", _default())
    runs, warmup = options.get("runs", 30), options.get("warmup", 5)
    threads, device = options.get("threads"), str(options.get("device", "cpu"))
    whole("runs", runs, 1)
    whole("warmup", warmup, 0)
    whole("threads", 1 if threads is None else threads, 1)
    _check_device(name, device)
    prepare, mark = (
        (_eager(threads, device), _torch_mark(device))
        if name == "eager"
        else (_onnx(threads), latency.device())
    )
    mark = f"{name}: {mark}, {threads or 'all'} threads, median of {runs}"
    kept = Path(cache) if cache else None
    found = Measurer(_median(prepare, runs, warmup), mark, cache=kept, fused=name == "onnx")
    found.clock = Clock(prepare, runs, warmup)
    return found


def _check_device(name: str, device: str) -> None:
    """Raise `InputError` for a device that cannot be measured on."""
    if name == "onnx" and device != "cpu":
        raise InputError(f"onnx is measured on the CPU, not on {device!r}; measure eager there")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        text = str(error).strip().splitlines()[0]
        raise InputError(f"cannot measure on the device {device!r}: {text}") from error


def _default() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cpd" / "latency.json"


def _read(path: Path) -> dict[str, dict[str, float]]:
    """What a file holds; nothing where there is none, or it is damaged: all is measured again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"cannot read {path}: {error}; latencies are measured anew", stacklevel=3)
        return {}
    return found if isinstance(found, dict) else {}


def _torch_mark(device: str) -> str:
    where = latency.machine() if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{where}, torch {torch.__version__}"


def _eager(threads: int | None, device: str) -> Prepare:
    def prepare(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Run:
        module = _ready(module, device)
        args, kwargs = _split(torch.utils._pytree.tree_map(lambda x: _to(x, device), inputs))

        def once() -> float:
            start = time.perf_counter()
            module(*args, **kwargs)
            if device != "cpu":
                torch.cuda.synchronize(device)
            return 1e3 * (time.perf_counter() - start)

        def run(count: int) -> list[float]:
            before = torch.get_num_threads()
            torch.set_num_threads(threads or before)
            try:
                with torch.inference_mode():
                    return [once() for _ in range(count)]
            finally:
                torch.set_num_threads(before)

        return run

    return prepare


def _ready(module: nn.Module, device: str) -> nn.Module:
    """Return a module in evaluation mode on a device; the one given, which is the user's, stays in
    its mode and place.
    """
    tensors = [*module.parameters(), *module.buffers()]
    here = all(tensor.device == torch.device(device) for tensor in tensors)
    return (share(module) if here else copy.deepcopy(module).to(device)).eval()


def _to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _split(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})


def _onnx(threads: int | None) -> Prepare:
    def prepare(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Run:
        args, kwargs = _split(inputs)
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        batch = next((x.shape[0] for x in tensors if isinstance(x, torch.Tensor) and x.ndim), 1)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, about its own inside
            path = Path(folder) / "measured.onnx"
            written = as_onnx(module, args) if isinstance(module, OneCall) else None
            if written is not None:
                path.write_bytes(written.SerializeToString())
            else:
                program = torch.export.export(share(module).eval(), args, kwargs, strict=False)
                torch.onnx.export(program, dynamo=True, verbose=False).save(str(path))  # type: ignore[union-attr]
            session = latency.session(path, batch=int(batch), threads=threads)
        return lambda count: [taken / 1e6 for taken in session.times(count)]

    return prepare


def _median(prepare: Prepare, runs: int, warmup: int) -> Measure:
    def measure(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
        run = prepare(module, inputs)
        run(warmup)
        return statistics.median(run(runs))

    return measure
