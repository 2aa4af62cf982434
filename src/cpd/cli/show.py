"""What a person sees: tables and progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cpd.distill import Callback, State

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from cpd.groups import Groups
    from cpd.stays import Kept

__all__ = ["Bars", "coverage", "group_table", "kept_table"]

TITLES = {
    "base": "train the base",
    "prune": "prune",
    "recover": "recover",
    "bench": "measure latency",
}
SAID = {
    "comb": "comb: find the coupling groups",
    "cut": "cut and prove",
    "measure": "measure before and after",
}


class Bars(Callback):
    """A bar for every stage, and a line for every part between them."""

    def __init__(self, console: Console) -> None:
        """Bars on a console; use it as a context manager."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.table import Column

        self.progress: Progress = Progress(
            TextColumn("{task.description:<15}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            console=console,
        )
        self.tasks: dict[str, Any] = {}
        self.notes: dict[str, str] = {}

    def __enter__(self) -> Bars:
        """Begin to draw."""
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop drawing; what is drawn stays."""
        self.progress.stop()

    def _update(self, name: str, done: int, total: int, note: str = "") -> None:
        if name not in self.tasks:
            title = TITLES.get(name, name)
            self.tasks[name] = self.progress.add_task(title, total=total, note=note)
        self.progress.update(self.tasks[name], completed=done, total=total, note=note)

    def _note(self) -> str:
        """The newest numbers; the last told come first, as a narrow screen cuts off the rest."""
        return " ".join(f"{name} {value}" for name, value in reversed(self.notes.items()))

    def on_start(self, state: State) -> None:
        """A new bar."""
        self.notes = {}
        self._update(state.stage, state.step, state.total)

    def after_step(self, state: State) -> None:
        """The bar grows."""
        self.notes["loss"] = f"{state.losses['total']:.3f}"
        self._update(state.stage, state.step, state.total, self._note())

    def after_evaluate(self, state: State, metrics: dict[str, float]) -> None:
        """The newest metrics stand next to the bar."""
        first = next(iter(metrics), None)
        if first is not None:
            self.notes[first] = f"{metrics[first]:.3f}"
        self._update(state.stage, state.step, state.total, self._note())

    def on_event(self, name: str, details: dict[str, Any]) -> None:
        """A line, a bar of its own, or a note."""
        if name == "bench":
            self._update(name, details["done"], details["of"])
        elif name == "prune":
            self.notes |= {cost: f"{share:.0%}" for cost, share in details["shares"].items()}
        elif name == "export":
            self.progress.console.print(f"export to ONNX: {details['network']}")
        elif name in SAID:
            self.progress.console.print(SAID[name])


def group_table(groups: Groups) -> Table:
    """Every coupling group: what can go, where it lives, and what hangs on it."""
    from rich.table import Table
    from rich.text import Text

    count = "1 coupling group" if len(groups) == 1 else f"{len(groups)} coupling groups"
    table = Table(title=count, title_justify="left")
    table.add_column("group", overflow="fold")
    table.add_column("units", justify="right")
    for name in ("tensors", "params", "MACs"):
        table.add_column(name, justify="right")
    for group in groups:
        shares = [f"{group.share[cost]:.1%}" for cost in ("params", "macs")]
        table.add_row(Text(group.name), group.kinds, str(len(group.members)), *shares)
    table.caption = (
        "units: what can go one by one · tensors: parameters and buffers they run through · "
        "params, MACs: share of the whole network that hangs on the group"
    )
    return table


def coverage(groups: Groups, seconds: float) -> str:
    """How long combing took, and how much of the network hangs on what can go."""
    whole = groups.everything()
    shares = [
        f"{groups.coverage[cost]:.1%} of {groups.cost(cost, whole):,} {name}"
        for cost, name in (("params", "parameters"), ("macs", "MACs"))
    ]
    return f"combed in {seconds:.1f} s; can go: {' and '.join(shares)}"


def kept_table(kept: Iterable[Kept]) -> Table:
    """What stays and why: a row for each line of code that demands it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="kept as it is", title_justify="left")
    table.add_column("reason", overflow="fold")
    table.add_column("axes", justify="right")
    table.add_column("which", overflow="fold")
    table.add_column("demanded by", overflow="fold")
    before = ""
    for each in kept:
        reason = "" if each.reason == before else each.reason
        before = each.reason
        cells = (Text(reason), str(len(each.items)), Text(each.tensors), Text(each.place))
        table.add_row(*cells)
    return table
