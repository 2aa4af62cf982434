"""One round of CPD: seconds of each step, with half of the MACs as the target."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

import torch
from torch import nn

import cpd

from .networks import macs, make


class Tool:
    """A network, ready to be pruned as often as asked."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs = make(name)

    def warm_up(self) -> dict[str, Any]:
        """One round, with what it leaves checked."""
        times, small, plan = self._prune()
        proof = cpd.verify(self.model, small, plan)
        before = macs(self.model, self.inputs)
        return {
            "first": times,
            "macs": macs(small, self.inputs) / before,
            "runs": True,
            "equal": bool(proof),
            "difference": proof.max_error,
            "how": f"cpd.verify, {proof.mode}, float64",
        }

    def round(self) -> dict[str, float]:
        """Return seconds of each step."""
        return self._prune()[0]

    def _prune(self) -> tuple[dict[str, float], nn.Module, cpd.Plan]:
        clock = _Clock()
        with _traced(clock):
            groups = clock("comb", cpd.comb, self.model, self.inputs)
        clock.seconds["comb"] -= clock.seconds["trace"]
        scores = clock("score", cpd.importance.score, "random", self.model, groups)
        plan = clock("choose", cpd.choose, groups, scores, "macs=0.5")
        clock.seconds["choose"] += clock.seconds.pop("score")
        small = clock("cut", cpd.cut, self.model, plan, verify=False)
        clock("verify", cpd.verify, self.model, small, plan)
        return clock.seconds, small, plan


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        result = function(*args, **kwargs)
        spent = perf_counter() - start
        self.seconds[step] = self.seconds.get(step, 0.0) + spent  # comb may trace twice
        return result


class _traced:
    """While it lasts, the clock sees the trace that `comb` makes."""

    def __init__(self, clock: _Clock) -> None:
        self.module = sys.modules["cpd.comb"]  # the name `cpd.comb` is the function
        self.clock, self.trace = clock, self.module.trace

    def __enter__(self) -> None:
        self.module.trace = lambda *args, **options: self.clock(
            "trace", self.trace, *args, **options
        )

    def __exit__(self, *error: object) -> None:
        self.module.trace = self.trace


torch.set_num_threads(1)
