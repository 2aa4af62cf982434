"""Test samples as the teacher and the student see them, for tasks whose answer is a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from cpd.compress.run import Run
from cpd.distill import Batches
from cpd.distill.batches import to_device, unpack
from cpd.distill.evaluate import answer, judged
from cpd.report import Picture, picture

__all__ = ["pictures"]

log = logging.getLogger(__name__)

_COUNT = 6


def pictures(run: Run, networks: Mapping[str, nn.Module]) -> tuple[Picture, ...]:
    """The first test samples: image, label, what the teacher and what the student make of it.

    None for tasks without ``maps``, for data without a test part, and, with a line in the log,
    without matplotlib. Without a teacher the unpruned network stands in its place.
    """
    source = getattr(run.data, "test", None)
    if source is None or not hasattr(run.task, "maps"):
        return ()
    if find_spec("matplotlib") is None:
        log.warning("the report has no pictures: they need matplotlib")
        return ()
    first = ("unpruned", networks["before"]) if run.teacher is None else ("teacher", run.teacher)
    shown = dict([first, ("student", networks["after"])])
    found: list[Picture] = []
    for batch in Batches(source, _COUNT, seed=0, train=False).epoch(0):
        found += _drawn(run, shown, batch, len(found))
        if len(found) >= _COUNT:
            break
    return tuple(found[:_COUNT])


def _drawn(run: Run, shown: Mapping[str, nn.Module], batch: Any, start: int) -> list[Picture]:
    """Every sample of one batch."""
    batch = to_device(batch, run.device)
    task: Any = run.task
    args, kwargs, targets = unpack(batch)
    images = args[0] if args else next(iter(kwargs.values()))
    maps: dict[str, torch.Tensor] = {}
    for name, network in shown.items():
        with judged(network.to(run.device)):
            maps["label"], maps[name] = task.maps(answer(network, task, batch), targets)
        network.to(run.home)
    return [
        picture(
            f"test sample {start + row}",
            images[row].cpu().numpy(),
            {name: each[row].cpu().numpy() for name, each in maps.items()},
        )
        for row in range(len(images))
    ]
