"""What `export` writes beside ONNX, and what `bench` measures of the files."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpd import data as data_shelf
from cpd import exporters
from cpd import tasks as task_shelf
from cpd.costs import latency
from cpd.distill import Batches, evaluate
from cpd.distill.batches import unpack
from cpd.errors import InputError, UnknownName
from cpd.report import Measures

__all__ = ["FORMATS", "INT8", "calibration", "measured", "written"]

FORMATS = {
    "onnx": "model.onnx",
    "pt2": "model.pt2",
    "openvino": "model.xml",
    "int8": "model.int8.onnx",
}
INT8 = FORMATS["int8"]


def calibration(data: Any, batches: int, batch_size: int) -> list[Any]:
    """Inputs to take ranges from: the first batches of training data, in the order of seed 0.

    Raises:
        InputError: no data is named, or its batches are mappings.
    """
    if data is None:
        raise InputError("int8 takes ranges from data: name it, such as --data digits")
    source = Batches(data_shelf.resolve(data).train, batch_size, seed=0)
    found = [unpack(batch) for batch in itertools.islice(source.epoch(0), batches)]
    if any(kwargs for _, kwargs, _ in found):
        raise InputError("int8 needs data of (inputs, targets), not of named inputs")
    return [args for args, _, _ in found]


def written(
    network: nn.Module, inputs: Any, path: Path, kind: str, *, dynamic_batch: bool, calibrate: Any
) -> Path:
    """Write a network in a format.

    Raises:
        UnknownName: no such format.
    """
    if kind not in FORMATS:
        raise UnknownName("format", kind, FORMATS)
    if kind != "int8":
        write: Any = getattr(exporters, kind)
        made: Path = write(network, inputs, path, dynamic_batch=dynamic_batch)
        return made
    batches = calibrate()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.onnx"
        exporters.onnx(network, inputs, plain, dynamic_batch=dynamic_batch)
        return exporters.int8(plain, path, batches)


def measured(
    paths: list[Path], data: Any, task: Any, progress: Callable[[int, int], None], **how: Any
) -> list[Measures]:
    """Size and latency of ONNX files, measured in turns, and their accuracy where data is named."""
    accuracies: list[dict[str, float]] = [{} for _ in paths]
    if data is not None:
        judge = task_shelf.resolve(task)
        source = Batches(data_shelf.resolve(data).test, 64, seed=0, train=False)
        cpu = torch.device("cpu")
        accuracies = [evaluate(exporters.Running(p), source, judge, cpu) for p in paths]
    times = latency.compare(paths, progress=progress, **how)
    rows = zip(paths, accuracies, times, strict=True)
    return [
        Measures(accuracy=found, onnx_bytes=path.stat().st_size, latency=time)
        for path, found, time in rows
    ]
