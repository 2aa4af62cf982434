"""Sensitivity: the loss of a network when one coupling group alone loses a share of its units.

What goes is masked, nothing is trained. The result says which groups bear much and which little;
as `limits` it keeps `choose` from taking more than they bear.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .candidates import Candidates, Rules, Scores, candidates
from .distill.evaluate import judged
from .errors import ArtefactError, InputError, OutputError
from .groups import Groups
from .mask import mask
from .planning import plan_of

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)
Loss = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """`base`: the loss of the whole network. `losses`: group -> (share that went, loss), by share.

    Shares are those that really went: at least one unit stays, and a group may hold some back.
    """

    base: float
    losses: dict[str, tuple[tuple[float, float], ...]]

    def limits(self, rise: float) -> dict[str, float]:
        """Return group -> largest measured share at which the loss rises by at most `rise` of the
        whole network's, up to which it never rose more; as `limits` of `choose`.
        """
        found = {}
        for name, points in self.losses.items():
            found[name] = 0.0
            for share, loss in points:
                if not loss <= self.base * (1 + rise):
                    break
                found[name] = share
        return found

    def __str__(self) -> str:
        width = max(map(len, self.losses), default=5)
        lines = [f"loss of the whole network: {self.base:.4g}"]
        for name, points in self.losses.items():
            cells = "  ".join(f"{share:4.0%}: {loss:<8.4g}" for share, loss in points)
            lines.append(f"  {name:<{width}}  {cells}".rstrip())
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return JSON text."""
        return json.dumps({"base": self.base, "losses": self.losses}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """Return what `to_json` wrote. Raises `ArtefactError` for anything else."""
        try:
            data = json.loads(text)
            losses = {
                str(name): tuple((float(a), float(b)) for a, b in points)
                for name, points in data["losses"].items()
            }
            return cls(float(data["base"]), losses)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(
                f"this is no sensitivity: {type(error).__name__}: {error}"
            ) from error

    def plot(self, path: str | Path) -> Path:
        """Draw loss against share, a line for each group, into a file (needs matplotlib).

        Raises `OutputError` where it cannot be written.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for name, points in self.losses.items():
            shares, losses = zip((0.0, self.base), *points, strict=True)
            axes.plot(shares, losses, marker="o", markersize=3, linewidth=1, label=name)
        axes.set_xlabel("share of units that went")
        axes.set_ylabel("loss, masked")
        if len(self.losses) <= 20:
            axes.legend(fontsize="x-small")
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot write {path}: {error}") from error
        return Path(path)


def sensitivity(
    model: nn.Module,
    groups: Groups,
    scores: Scores,
    batches: Iterable[Any],
    loss: Loss,
    *,
    ratios: Sequence[float] = RATIOS,
) -> Sensitivity:
    """Measure the loss with each group alone cut to shares of its width, without training.

    Args:
        model: the network; a copy of it is masked.
        groups: of this network, from `comb`.
        scores: group name -> importance of its channels: which units go first.
        batches: data to take the mean loss over; gone through once for each group and share.
        loss: (model, batch) -> one number, as `importance.collect` takes it.
        ratios: shares of the units of a group's first family (heads, channels) that go.

    Raises `InputError` for shares outside 0 to 1, or no batch.
    """
    if not all(0 < ratio < 1 for ratio in ratios):
        raise InputError(f"ratios are {list(ratios)}; give shares between 0 and 1")
    data, twin = list(batches), copy.deepcopy(model)
    if not data:
        raise InputError("sensitivity needs at least one batch")

    def mean() -> float:
        with judged(twin):
            return float(np.mean([float(loss(twin, batch)) for batch in data]))

    free = np.zeros(groups.units.count, bool)
    rules = Rules("global", 1, 0.0, {}, 0, False, free)
    found = candidates(groups, scores, groups.everything(), rules)

    def points(name: str) -> tuple[tuple[float, float], ...]:
        taken: dict[float, float] = {}
        steps = [_least(found, name, ratio) for ratio in sorted(ratios)]
        for share, gone in {share: gone for gone, share in steps}.items():
            if gone:
                with mask(twin, plan_of(groups, found.without(gone), {})):
                    taken[share] = mean()
        return tuple(taken.items())

    base = mean()
    return Sensitivity(base, {group.name: points(group.name) for group in groups})


def _least(found: Candidates, name: str, ratio: float) -> tuple[list[int], float]:
    """Return the least important candidates of a group's first family up to a share, and the share
    that they are.
    """
    mine = [k for k, source in enumerate(found.sources) if source.group.name == name]
    numbers = np.flatnonzero(found.family == mine[0])
    width = found.sources[mine[0]].family.width
    gone = numbers[np.cumsum(found.units[numbers]) <= ratio * width + 1e-9]
    return gone.tolist(), float(found.units[gone].sum()) / width
