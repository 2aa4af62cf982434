"""What stays, and why: axes that no unit removes, joined by reason and line of code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .channels import Place

_PLACES = 3  # lines of code for one reason; `Groups.kept` has all


@dataclass(frozen=True)
class Frozen:
    """`count` indices of one axis of a tensor that stay, and why.

    `op`, `path` and `source` name the call that demands it: the operator, the module that calls it
    and the "file:line" of the code; "" where no single call does.
    """

    tensor: str
    axis: int
    reason: str
    count: int
    op: str = ""
    path: str = ""
    source: str = ""

    @property
    def of_kernel(self) -> bool:
        """Whether it is an axis that a kernel runs along, which never has channels."""
        return self.reason.startswith("kernel axis")

    @property
    def place(self) -> str:
        """The call in words: "linear in head, net.py:12"; "" where no single call demands it."""
        return str(Place(self.op, self.path, self.source))

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return f"{self.tensor} axis {self.axis}, {self.count} of it: {self.reason}{place}"


@dataclass(frozen=True)
class Kept:
    """All that stays for one reason that one line of code demands, in however many modules."""

    reason: str
    op: str
    source: str
    items: tuple[Frozen, ...]

    @property
    def tensors(self) -> str:
        """The axes in words: "q.weight axis 1 and 3 more"."""
        return first_of([f"{item.tensor} axis {item.axis}" for item in self.items])

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules whose calls demand it, each once."""
        return tuple(dict.fromkeys(item.path for item in self.items if item.path))

    @property
    def place(self) -> str:
        """The calls in words: "slice in blocks.0.attn and 11 more, attention.py:12"."""
        return str(Place(self.op, first_of(self.paths), self.source))


def first_of(words: Sequence[str]) -> str:
    """Return the first of several words, and how many more there are."""
    return f"{words[0]} and {len(words) - 1} more" if len(words) > 1 else "".join(words)


def joined(frozen: Iterable[Frozen]) -> tuple[Kept, ...]:
    """Join what stays for one reason in one line of code; reasons in the order they first come."""
    found: dict[str, dict[tuple[str, str], list[Frozen]]] = {}
    for item in frozen:
        if not item.of_kernel:
            at = (item.op, item.source)
            found.setdefault(item.reason, {}).setdefault(at, []).append(item)
    return tuple(
        Kept(reason, *at, tuple(items))
        for reason, lines in found.items()
        for at, items in lines.items()
    )


def kept_lines(kept: tuple[Kept, ...]) -> list[str]:
    """Return what stays in words, by reason and line of code."""
    lines = []
    for reason in dict.fromkeys(each.reason for each in kept):
        mine = [each for each in kept if each.reason == reason]
        count = sum(len(each.items) for each in mine)
        lines.append(f"    {reason}: {count} {'axis' if count == 1 else 'axes'}")
        for each in mine[:_PLACES]:
            where = f" ({each.place})" if each.place else ""
            lines.append(f"      {each.tensors}{where}")
        if len(mine) > _PLACES:
            lines.append(f"      and {len(mine) - _PLACES} more lines of code")
    return ["  kept:", *lines] if lines else []
