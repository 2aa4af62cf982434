"""Workers that stay over epochs give what no workers give."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from cpd.data import scenes
from cpd.distill import Batches


def test_workers_stay_and_see_every_epoch() -> None:
    plain, worked = (
        Batches(scenes(train=6, val=1, test=1).train, 2, seed=3, workers=count) for count in (0, 1)
    )
    processes = set()
    for number in (0, 1, 1, 0):
        pairs = zip(plain.epoch(number), worked.epoch(number), strict=True)
        assert all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))
        iterator = worked._loader[1]._iterator
        assert iterator is not None
        processes.add(iterator._workers[0].pid)  # type: ignore[attr-defined]
    assert len(processes) == 1


@pytest.mark.parametrize("there", [True, False])
def test_memory_is_pinned_where_an_accelerator_is(monkeypatch: Any, there: bool) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    _, loader = Batches(scenes(train=2, val=1, test=1).train, 2, seed=0)._loader
    assert loader.pin_memory is there


def test_an_epoch_broken_off_leaves_nothing_behind() -> None:
    worked = Batches(scenes(train=8, val=1, test=1).train, 2, seed=3, workers=1)
    first = list(islice(worked.epoch(0), 1))
    later = list(worked.epoch(1, skip=1))
    plain = Batches(scenes(train=8, val=1, test=1).train, 2, seed=3)
    assert torch.equal(first[0][0], next(plain.epoch(0))[0])
    wanted = list(plain.epoch(1))[1:]
    assert len(later) == len(wanted) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(later, wanted, strict=True))
