"""Units: the smallest sets of channels that can be removed together, as `solve` finds them.

One *class* is one channel, however many tensors it runs through. Classes that rows and columns bind
form *families*: a family is a list of clusters of equal width, and removing its k-th unit removes
one class from every cluster: one channel; one head; one conv group; one channel from each head.

NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from .channels import Ids, Place, Reason


@dataclass(frozen=True, eq=False)
class Family:
    """Units of one kind: unit k removes one class of each cluster. `width` counts the frozen ones
    too. `multiple`: the number of what stays must be a multiple of it.
    """

    kind: str
    clusters: tuple[Ids, ...]
    width: int
    multiple: int = 1

    @property
    def size(self) -> int:
        """The number of units that can be removed, in the order of each cluster."""
        return min(len(cluster) for cluster in self.clusters)


@dataclass
class Units:
    """The solution: `label[id]` is the class of an id; `reason(class)` why it stays, or None.

    `frozen` and `held` are places in `reasons`, or -1: a held class cannot go by itself, since the
    width of its row stays or since it is bound to others that cannot. `fold_of`: where in `places`
    the call is that binds a class to others last, or -1.
    """

    label: Ids
    count: int
    reasons: list[Reason]
    frozen: Ids
    held: Ids
    families: list[Family]
    below: dict[int, Ids]
    nonempty: list[Ids]
    fold_of: Ids
    places: list[Place]
    multiples: list[tuple[Ids, int, Reason]] = field(default_factory=list)
    _closures: dict[int, Ids] = field(default_factory=dict)

    def closure(self, classes: Iterable[int]) -> Ids:
        """Return the classes and, for blocks, everything that dies with them."""
        mine = np.unique(np.fromiter(classes, np.int64))
        blocks = [c for c in mine.tolist() if c in self.below] if self.below else []
        if len(blocks) == len(mine) == 1:
            return self._with_below(blocks[0])
        if not blocks:
            return mine
        return np.unique(np.concatenate([mine, *(self._with_below(c) for c in blocks)]))

    def _with_below(self, block: int, depth: int = 0) -> Ids:
        """One block and everything below it, found once."""
        if block not in self._closures:
            below = self.below[block]
            inner = [
                self._with_below(c, depth + 1)
                for c in below.tolist()
                if c in self.below and depth < 8
            ]
            found = np.unique(np.concatenate([[block], below, *inner]))
            found.flags.writeable = False
            self._closures[block] = found
        return self._closures[block]

    def keep_multiples(self) -> None:
        """Tell families the numbers that must divide their widths; keep those that cannot."""
        for ids, number, reason in self.multiples:
            mine = np.unique(self.label[ids])
            families = []
            for family in self.families:
                classes = np.concatenate(family.clusters)
                if not np.isin(self.closure(classes.tolist()), mine).any():
                    families.append(family)
                elif ids.ndim == 1 and np.isin(classes, mine).all() and family.width % number == 0:
                    multiple = math.lcm(family.multiple, number)
                    families.append(replace(family, multiple=multiple))
                else:
                    self.reasons.append(reason)
                    fill(self.frozen, classes, len(self.reasons) - 1)
            self.families = families

    def cause(self, c: int) -> Reason | None:
        """Return why a class stays and which call demands it, or None where it may go."""
        return None if self.frozen[c] < 0 else self.reasons[self.frozen[c]]

    def reason(self, c: int) -> str | None:
        """Return why a class stays, or None where it may go."""
        cause = self.cause(c)
        return None if cause is None else cause.text


def fill(places: Ids, classes: Ids, reason: int) -> None:
    """Set what is not set yet."""
    places[classes[places[classes] < 0]] = reason
