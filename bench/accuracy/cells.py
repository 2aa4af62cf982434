"""The grid: which cells there are, in the order in which they matter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from .networks import NETWORKS

SEEDS = (0, 1, 2)
TARGETS = (0.5, 0.25, 0.1)
MAIN = ("magnitude", "taylor", "hessian", "fisher")
SHELF = (
    "mended",
    "random",
    "obd",
    "kfac",
    "wanda",
    "variance",
    "lamp",
    "fpgm",
    "bn_scale",
    "activation",
    "hutchinson",
    "diagonal",
    "l1",
    "taylor_abs",
)
OPTIONS: dict[str, Any] = {
    "mended": {"hessian": {"mended": True}},
    "diagonal": {"hutchinson": {"kind": "diagonal"}},
    "l1": {"magnitude": {"p": 1}},
    "taylor_abs": {"taylor": {"multivariable": False}},
}
FORMS = ("diagonal", "l1", "taylor_abs")  # of an importance that is there
STRATEGIES = ("knapsack", "greedy", "uniform")
RANKED = ("knapsack", "greedy")  # that may go by the isomorphic ranking too

SETTINGS: dict[str, Any] = {
    "data": "digits 32x32, shift 2, tested on the 600 images not trained on",
    "batch": 64,
    "optimizer": "AdamW, one cycle, weight decay 0.05",
    "memory": "channels last while it trains",
    "epochs": {"ViT": 90, "MobileNetV2": 40, "DenseNet": 30, "": 20},
    "rate": {"ViT": 2e-3, "": 5e-3},
    "recovery_epochs": 3,
    "recovery_rate": {"ViT": 1e-3, "": 2e-3},
    "distillation": "task + kd, temperature 2",
    "scored_on": "512 training images in batches of 64, evaluation mode",
    "repaired_on": "256 training images",
}


def of(network: str) -> dict[str, Any]:
    """The settings of a network: its own ones, or those of all others."""
    return {
        name: value.get(network, value[""]) if isinstance(value, dict) else value
        for name, value in SETTINGS.items()
    }


def mark(network: str) -> str:
    """Return a short text that is another one for other settings."""
    return hashlib.sha256(json.dumps(of(network), sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Cell:
    """All that decides a result, but for the settings."""

    network: str
    seed: int
    tool: str  # "cpd", "torch-pruning", "scratch", or "base" for the network itself
    importance: str = ""
    target: float = 1.0
    ranking: str = ""
    strategy: str = ""
    min_keep: float = 0.1
    repair: bool = False

    @property
    def more(self) -> bool:
        """Whether it is beside the comparison: another form of an importance, ranking or floor."""
        plain = self.tool != "cpd" or (self.ranking == "isomorphic" and self.min_keep == 0.1)
        repaired = self.repair and self.importance != "fisher"
        return self.importance in FORMS or "ranked" in self.strategy or repaired or not plain

    @property
    def key(self) -> str:
        """One text for all of it."""
        return json.dumps({**asdict(self), "settings": mark(self.network)}, sort_keys=True)


def grid() -> list[Cell]:
    """Return all cells: seed by seed, and of each first what the comparison is made of."""
    return list(
        dict.fromkeys(cell for seed in SEEDS for part in (_main, _rest) for cell in part(seed))
    )


def _main(seed: int) -> Iterator[Cell]:
    """The comparison: equal criteria of both tools, and the networks trained from scratch."""
    places = [(network, target) for target in (0.1, 0.25, 0.5) for network in NETWORKS]
    for network in NETWORKS:
        yield Cell(network, seed, "base")
    for network, target in places:
        fisher = _ours(network, seed, "fisher", target)
        yield replace(fisher, strategy="knapsack", repair=True)
        yield Cell(network, seed, "torch-pruning", "magnitude", target, "local")
        yield Cell(network, seed, "torch-pruning", "taylor", target, "isomorphic")
        yield fisher
    for network, target in places:
        yield _ours(network, seed, "magnitude", target)
        yield Cell(network, seed, "torch-pruning", "magnitude", target, "isomorphic")
        yield Cell(network, seed, "torch-pruning", "taylor", target, "local")
        yield replace(_ours(network, seed, "fisher", target), tool="scratch", strategy="knapsack")
    for network, target in places:
        fisher = _ours(network, seed, "fisher", target)
        yield from (replace(fisher, repair=True), replace(fisher, strategy="knapsack"))
        for name in ("taylor", "hessian"):
            yield _ours(network, seed, name, target)
        for ranking in ("local", "isomorphic"):
            yield Cell(network, seed, "torch-pruning", "hessian", target, ranking)


def _rest(seed: int) -> Iterator[Cell]:
    """What else may be chosen, one thing at a time; rankings and floors with one seed only."""
    for target in (0.25, 0.1, 0.5):
        for network in NETWORKS:
            ours = _ours(network, seed, "fisher", target)
            for strategy in STRATEGIES:
                yield replace(ours, strategy=strategy)
                yield replace(ours, strategy=strategy, repair=True)
            if seed != SEEDS[0]:
                continue
            for strategy in RANKED:
                yield replace(ours, strategy=f"ranked {strategy}")
            yield replace(ours, ranking="global")
            yield replace(ours, ranking="uniform")
            for least in (0.0, 0.2):
                yield replace(ours, min_keep=least)
            magnitude = replace(ours, importance="magnitude")
            yield replace(magnitude, repair=True)
            yield replace(magnitude, ranking="uniform")
    for name in SHELF:
        for network in NETWORKS:
            for target in (0.25, 0.1, 0.5):
                yield _ours(network, seed, name, target)


def _ours(network: str, seed: int, importance: str, target: float) -> Cell:
    return Cell(network, seed, "cpd", importance, target, "isomorphic", "oneshot")
