"""What the records say: means over seeds, with their spread and how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from .cells import SEEDS, Cell
from .records import Records


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; `seeds` of `wanted` have a record, `failed` of these an exception."""

    value: float
    spread: float
    seeds: int
    failed: int = 0

    def __str__(self) -> str:
        if self.failed:
            return "exception"
        if not self.seeds:
            return "·"
        text = f"{100 * self.value:.1f}"
        if self.seeds > 1:
            text += f" ± {100 * self.spread:.1f}"
        return text + ("" if self.seeds == len(SEEDS) else f" ({self.seeds})")


def mean(found: Records, cell: Cell, name: str) -> Mean:
    """Return the mean of one figure over the seeds of a cell, and the deviation of the sample."""
    records = [found.get(replace(cell, seed=seed).key) for seed in SEEDS]
    there = [record for record in records if record is not None]
    values = [record[name] for record in there if name in record]
    failed = sum("error" in record for record in there)
    spread = stdev(values) if len(values) > 1 else 0.0
    return Mean(fmean(values) if values else 0.0, spread, len(values), failed)


def differences(
    found: Records, pairs: Iterable[tuple[Cell, Cell]], name: str
) -> list[tuple[Cell, float]]:
    """Return the first cell and first minus second, for every pair and seed that has both."""
    result = []
    for one, other in pairs:
        for seed in SEEDS:
            a = found.get(replace(one, seed=seed).key, {})
            b = found.get(replace(other, seed=seed).key, {})
            if name in a and name in b:
                result.append((replace(one, seed=seed), a[name] - b[name]))
    return result


def of_seed(cells: Iterable[Cell], wanted: Callable[[Cell], bool]) -> list[Cell]:
    """Return the cells of the first seed that are wanted: one for all seeds."""
    return [cell for cell in cells if cell.seed == SEEDS[0] and wanted(cell)]
