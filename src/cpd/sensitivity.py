"""Sensitivity: the loss of a network when one family of units alone loses a share of them.

A coupling group has one family (channels) or several (heads, and the dims inside them); each is
measured by itself, and so is each residual branch where combing looked for them. What goes is
masked, nothing is trained. The result says which groups bear much and which little; as `limits` it
keeps `choose` from taking more than they bear.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .branches import Branch
from .candidates import Candidates, Rules, Scores, candidates
from .distill.evaluate import judged
from .errors import ArtefactError, InputError, OutputError
from .groups import Groups
from .mask import mask
from .planning import plan_of
from .reading import bounded

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)
Loss = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """`base`: the loss of the whole network. `losses`: name -> (share that went, loss), by share.

    A name is that of a group, or where it has several families that and the family's kind, such as
    "blocks.0.attn heads"; `groups` has the group of each such name. Shares are those that really
    went: at least one unit stays, and a group may hold some back. A residual branch goes whole.
    """

    base: float
    losses: dict[str, tuple[tuple[float, float], ...]]
    groups: dict[str, str] = field(default_factory=dict)

    def limits(self, rise: float) -> dict[str, float]:
        """Return group -> largest measured share at which the loss rises by at most `rise` of the
        whole network's, up to which it never rose more; as `limits` of `choose`.

        A limit is of all families of a group: that of the one which bears least. One of which no
        unit could go at these shares is left out, since none goes below them either.

        Raises `InputError` where `rise` is below 0 or no number.
        """
        if not rise >= 0:
            raise InputError(f"rise is {rise!r}; give a share of the loss, 0 or more")
        found: dict[str, float] = {}
        for name, points in self.losses.items():
            group, most = self.groups.get(name, name), 0.0
            for share, loss in points:
                if not loss <= self.base * (1 + rise):
                    break
                most = share
            if points:
                found[group] = min(most, found.get(group, 1.0))
        every = dict.fromkeys(self.groups.get(name, name) for name in self.losses)
        return {group: found.get(group, 0.0) for group in every}

    def __str__(self) -> str:
        width = max(map(len, self.losses), default=5)
        lines = [f"loss of the whole network: {self.base:.4g}"]
        for name, points in self.losses.items():
            cells = "  ".join(f"{share:4.0%}: {loss:<8.4g}" for share, loss in points)
            lines.append(f"  {name:<{width}}  {cells}".rstrip())
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """Return what `to_json` wrote. Raises `ArtefactError` for anything else."""
        try:
            data = json.loads(bounded(text))
            losses = {
                str(name): tuple((float(a), float(b)) for a, b in points)
                for name, points in data["losses"].items()
            }
            groups = {str(name): str(group) for name, group in data.get("groups", {}).items()}
            return cls(float(data["base"]), losses, groups)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtefactError(
                f"this is no sensitivity: {type(error).__name__}: {error}"
            ) from error

    def plot(self, path: str | Path) -> Path:
        """Draw loss against share, a line for each name, into a file (needs matplotlib).

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
    """Measure the loss with each family of units alone cut to shares of its width, untrained.

    Args:
        model: the network; a copy of it is masked.
        groups: of this network, from `comb`; with `depth=True` its branches are measured too.
        scores: group name -> importance of its channels: which units go first.
        batches: data to take the mean loss over; gone through once for each family and share.
        loss: (model, batch) -> one number, as `importance.collect` takes it.
        ratios: shares of the units of a family (channels, heads, head dims) that go.

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

    def points(number: int) -> tuple[tuple[float, float], ...]:
        taken: dict[float, float] = {}
        steps = [_least(found, number, ratio) for ratio in sorted(ratios)]
        for share, gone in {share: gone for gone, share in steps}.items():
            if gone:
                with mask(twin, plan_of(groups, found.without(gone), {})):
                    taken[share] = mean()
        return tuple(taken.items())

    base, names = mean(), _names(found)
    losses = {name: points(number) for number, name in names.items()}
    for branch in groups.branches:
        alive = groups.everything()
        alive[groups.units.closure([branch.number])] = False
        with mask(twin, plan_of(groups, alive, {})):
            losses[branch.name] = ((1.0, mean()),)
    several = {name: found.sources[number].group.name for number, name in names.items()}
    return Sensitivity(base, losses, {k: v for k, v in several.items() if k != v})


def _names(found: Candidates) -> dict[int, str]:
    """Return a name for each family: its group's, with its kind where the group has several, and
    a number where it has several of that kind.
    """
    names: dict[int, str] = {}
    for number, source in enumerate(found.sources):
        if isinstance(source.group, Branch):
            continue
        name = source.group.name
        if len(source.group.families) > 1:
            name = f"{name} {source.family.kind}"
            same = sum(x == name or x.startswith(f"{name} ") for x in names.values())
            name = f"{name} {same + 1}" if same else name
        names[number] = name
    return names


def _least(found: Candidates, number: int, ratio: float) -> tuple[list[int], float]:
    """Return the least important candidates of a family up to a share, and the share that they
    are.
    """
    mine = np.flatnonzero(found.family == number)
    width = found.sources[number].family.width
    gone = mine[np.cumsum(found.units[mine]) <= ratio * width + 1e-9]
    return gone.tolist(), float(found.units[gone].sum()) / width
