"""The page of all records; nothing of it is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from cpd.files import write_text

from .cells import MAIN, OPTIONS, RANKED, SEEDS, SETTINGS, SHELF, STRATEGIES, TARGETS, Cell
from .networks import NETWORKS
from .plots import write_plots
from .records import Records
from .summary import differences, mean, of_seed

STAGES = ("cut", "recovered", "distilled")
THEIRS = ("magnitude", "taylor", "hessian")
TESTED = 600  # images
HEAD = """\
# Accuracy after pruning

Made by `make bench-accuracy` (`python -m bench.accuracy`) of `docs/results.jsonl`; not written by
hand. {done} of {all} cells have a record. A cell that has not been run is shown as "·"; (1) and
(2) say that a mean has fewer than three seeds. {main} cells are the comparison: by their recorded
seconds they take two workers {minutes:.0f} minutes. The others, other forms of an importance,
rankings and floors, are those of `make bench-accuracy-more`.

Test accuracy in per cent, mean ± standard deviation over seeds. **cut**: without any training.
**recovered**: after {epochs} epochs on the task. **distilled**: after the same epochs on the task
and the unpruned network's logits. One budget of training, one set of epochs and one learning rate
for all tools and cells of a network.

Settings:

{settings}

"ours": `cpd.choose(ranking="isomorphic", strategy="oneshot", min_keep=0.1)` where nothing else is
said. "TP": Torch-Pruning 1.6.1, one ratio for all layers ("local", its default) or its isomorphic
option with global ranking and at most 90 % of a layer; the ratio is searched that leaves the MACs
nearest to the target. Both score on the same samples, TP's Hessian, as its example does, sample by
sample on 64 of them (its `accumulate_grad` keeps only the last one's gradient). "scratch": the
shape that ours (fisher, knapsack) leaves, with new weights, trained for the base's and the
recovery's epochs together. "time": a pass of 64 images in eager mode on one thread, the median
of twenty pairs with the unpruned network. Other forms of a criterion have names of their own:
{forms}.

The way in bold was chosen among about ten, by what they gave at 0.1 on these very test images with
seed 0; seeds 1 and 2 had no say in it. Torch-Pruning has no repair: what the lead owes to it is in
the rows without.
"""


def write_page(folder: Path, cells: Sequence[Cell], found: Records) -> None:
    """Write results.md and its plots."""
    plots = write_plots(folder / "results", found)
    done = sum(cell.key in found for cell in cells)
    main = [cell for cell in cells if not cell.more]
    settings = "\n".join(f"- {name.replace('_', ' ')}: {_said(v)}" for name, v in SETTINGS.items())
    parts = [
        HEAD.format(
            done=done,
            all=len(cells),
            main=len(main),
            minutes=sum(found.get(cell.key, {}).get("seconds", 0.0) for cell in main) / 120,
            epochs=SETTINGS["recovery_epochs"],
            settings=settings,
            forms=", ".join(f"`{name}` is `{form}`" for name, form in OPTIONS.items()),
        ),
        "## Networks\n",
        *_bases(found),
        "## Ours beside Torch-Pruning\n",
        *_verdict(found),
        *(f"![{name}](results/{name})\n" for name in plots),
        *(line for network in NETWORKS for line in _network(found, network)),
        "## The shelf\n",
        *_shelf(found),
        "## Strategies, rankings, floors, repair\n",
        "Importance `fisher` where nothing else is said. Mean over all networks and seeds that "
        "have been run; in parentheses by how much it is above (+) what the first line gives for "
        "the same networks and seeds, and how many these are.\n",
        *_choices(found),
        *_failures(cells, found),
    ]
    write_text(folder / "results.md", "\n".join(parts).rstrip() + "\n")


def _said(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    others = [f"{v:g} ({k})" for k, v in value.items() if k]
    return ", ".join([f"{value['']:g}", *others])


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return [*lines, ""]


def _bases(found: Records) -> list[str]:
    rows = []
    for name in NETWORKS:
        cell = Cell(name, 0, "base")
        record = found.get(cell.key, {})
        sizes = [f"{record[k]:,}" if k in record else "·" for k in ("macs", "params")]
        rows.append([name, *sizes, mean(found, cell, "accuracy")])
    return _table(("network", "MACs of two images", "parameters", "accuracy"), rows)


def ours(network: str, importance: str, target: float, **other: object) -> Cell:
    """A cell of CPD with the defaults of `choose`, but for `other`."""
    cell = Cell(network, 0, "cpd", importance, target, "isomorphic", "oneshot")
    return replace(cell, **other)  # type: ignore[arg-type]


def theirs(network: str, importance: str, target: float, ranking: str) -> Cell:
    """A cell of Torch-Pruning."""
    return Cell(network, 0, "torch-pruning", importance, target, ranking)


def lines_of(network: str, target: float) -> list[tuple[str, Cell]]:
    """What is compared for a network and a target, with what it is called."""
    fisher = ours(network, "fisher", target)
    found = [(f"ours, {name}", ours(network, name, target)) for name in MAIN]
    found.append(("ours, fisher, repaired", replace(fisher, repair=True)))
    found.append(("ours, fisher, knapsack", replace(fisher, strategy="knapsack")))
    both = replace(fisher, strategy="knapsack", repair=True)
    found.append(("**ours, fisher, knapsack, repaired**", both))
    found += [
        (f"TP, {name}, {ranking}", theirs(network, name, target, ranking))
        for name in THEIRS
        for ranking in ("local", "isomorphic")
    ]
    scratch = replace(fisher, tool="scratch", strategy="knapsack")
    return [*found, ("scratch", scratch)]


def _network(found: Records, network: str) -> list[str]:
    head = ["", *(f"{target:g} {stage}" for target in TARGETS for stage in STAGES), "MACs", "time"]
    rows = []
    for number, (name, _) in enumerate(lines_of(network, TARGETS[0])):
        row: list[object] = [name]
        cells = [lines_of(network, target)[number][1] for target in TARGETS]
        row += [mean(found, cell, stage) for cell in cells for stage in STAGES]
        row += [
            " / ".join(str(mean(found, cell, key)) for cell in cells) for key in ("macs", "time")
        ]
        rows.append(row)
    note = "MACs and time of a pass at the three targets, in per cent of the unpruned network's.\n"
    return [f"### {network}\n", *_table(head, rows), note]


def _verdict(found: Records) -> list[str]:
    """Ours minus TP: the best way of each, and criterion by criterion."""
    lines = [
        "**The best way of each.** Ours is always fisher, knapsack and repair; TP is whichever "
        "of its six ways (three importances, local and isomorphic) has the highest mean in that "
        "very column, of those that have been run. Ours minus TP in points, mean ± standard "
        "deviation over seeds, with the number of seeds.\n"
    ]
    head = ["", *(f"{target:g} {stage}" for target in TARGETS for stage in STAGES)]
    rows = [[network, *map(_said_gap, _best_gaps(found, network))] for network in NETWORKS]
    lines += _table(head, rows)
    lines += [_behind(found, _best_gaps), _worse_recovered(found)]
    lines.append(
        "**Without repair**, which Torch-Pruning does not have. Of both whichever way has the "
        "highest mean in that very column: of ours the four importances ranked, and fisher by "
        "knapsack.\n"
    )
    rows = [[network, *map(_said_gap, _bare_gaps(found, network))] for network in NETWORKS]
    lines += [*_table(head, rows), _behind(found, _bare_gaps), *_from_scratch(found)]
    lines.append(
        "**The same criterion.** Ours minus TP in points, mean over all networks and seeds that "
        "have both, with how often ours is not lower. TP's better one of local and isomorphic "
        "counts, of those that have been run.\n"
    )
    rows = [[name, *_gaps(found, name, {})] for name in THEIRS]
    rows.append(["fisher against TP's hessian", *_gaps(found, "hessian", {"importance": "fisher"})])
    return [*lines, *_table(head, rows)]


def _best_gaps(found: Records, network: str) -> list[list[float]]:
    """For each target and stage the gap of every seed, of the best way of ours to the best of TP's
    in the mean over seeds.
    """
    places = [(target, stage) for target in TARGETS for stage in STAGES]
    return [_to_the_best(found, _best(network, target), stage) for target, stage in places]


def _bare_gaps(found: Records, network: str) -> list[list[float]]:
    """The same of the best of our ways without repair."""
    gaps = []
    for target in TARGETS:
        ways = [cell for _, cell in lines_of(network, target) if cell.tool == "cpd"]
        for stage in STAGES:
            each = [_to_the_best(found, way, stage) for way in ways if not way.repair]
            gaps.append(max((x for x in each if x), key=fmean, default=[]))
    return gaps


def _to_the_best(found: Records, mine: Cell, stage: str) -> list[float]:
    """The gap of every seed to the best of TP's ways in the mean over seeds."""
    ways = [(name, ranking) for name in THEIRS for ranking in ("local", "isomorphic")]
    cells = [theirs(mine.network, name, mine.target, ranking) for name, ranking in ways]
    each = [[gap for _, gap in differences(found, [(mine, x)], stage)] for x in cells]
    return min((x for x in each if x), key=fmean, default=[])


def _best(network: str, target: float) -> Cell:
    return ours(network, "fisher", target, strategy="knapsack", repair=True)


def _said_gap(values: Sequence[float]) -> str:
    if not values:
        return "·"
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):+.1f}{spread} ({len(values)})"


def _behind(found: Records, gaps: Callable[[Records, str], list[list[float]]]) -> str:
    """Name what is not ahead of Torch-Pruning."""
    columns = [(target, stage) for target in TARGETS for stage in STAGES]
    behind: dict[bool, list[str]] = {False: [], True: []}
    for network in NETWORKS:
        for (target, stage), gap in zip(columns, gaps(found, network), strict=True):
            if gap and fmean(gap) < 0:
                noise = max(1 / TESTED, stdev(gap) if len(gap) > 1 else 0.0)
                text = f"{network} at {target:g} {stage} {_said_gap(gap)}"
                behind[-fmean(gap) <= noise].append(text)
    far, near = ("; ".join(behind[within]) or "nowhere" for within in (False, True))
    return (
        f"Ours is behind by more than noise: {far}. Behind within noise: {near}. Noise is one "
        f"standard deviation over seeds, and at least one of the {TESTED} test images, "
        f"{100 / TESTED:.2f} points.\n"
    )


def _worse_recovered(found: Records) -> str:
    """Name where ours has less after recovery than before any training."""
    texts = []
    for network in NETWORKS:
        for target in TARGETS:
            means = [mean(found, _best(network, target), stage) for stage in STAGES[:2]]
            if all(one.seeds for one in means) and means[0].value > means[1].value:
                texts.append(f"{network} at {target:g} ({means[0]} as cut, {means[1]} recovered)")
    return (
        "Recovery lowers what the repaired network has as cut, and so its lead: "
        f"{'; '.join(texts) or 'nowhere'}.\n"
    )


def _from_scratch(found: Records) -> list[str]:
    """Ours minus a network with new weights, trained for far longer."""
    text = (
        "**From scratch.** The same way of ours, recovered and distilled, minus a network of the "
        "shape that knapsack leaves, trained from new weights for the epochs of base and recovery "
        "together: seven times as many epochs as recovery has, and more.\n"
    )
    rows = []
    for network in NETWORKS:
        row: list[object] = [network]
        for target in TARGETS:
            one = _best(network, target)
            other = replace(one, tool="scratch", repair=False)
            for stage in STAGES[1:]:
                gaps = [_minus(found, one, other, seed, stage) for seed in SEEDS]
                row.append(_said_gap([gap for gap in gaps if gap is not None]))
        rows.append(row)
    head = ["", *(f"{target:g} {stage}" for target in TARGETS for stage in STAGES[1:])]
    return [text, *_table(head, rows)]


def _minus(found: Records, one: Cell, other: Cell, seed: int, stage: str) -> float | None:
    a = found.get(replace(one, seed=seed).key, {}).get(stage)
    b = found.get(replace(other, seed=seed).key, {}).get("recovered")
    return None if a is None or b is None else a - b


def _least(found: Records, pairs: Sequence[tuple[Cell, Cell]], stage: str) -> list[float]:
    """Of each seed the least that the first cells are ahead of the second ones."""
    gaps: dict[Cell, float] = {}
    for pair in pairs:
        for cell, gap in differences(found, [pair], stage):
            gaps[cell] = min(gap, gaps.get(cell, gap))
    return list(gaps.values())


def _gaps(found: Records, name: str, options: dict[str, object]) -> list[str]:
    texts = []
    for target in TARGETS:
        for stage in STAGES:
            values: list[float] = []
            for network in NETWORKS:
                mine = replace(ours(network, name, target), **options)  # type: ignore[arg-type]
                pairs = [(mine, theirs(network, name, target, r)) for r in ("local", "isomorphic")]
                values += _least(found, pairs, stage)
            better = sum(value >= 0 for value in values)
            texts.append(
                f"{100 * fmean(values):+.1f} ({better} of {len(values)})" if values else "·"
            )
    return texts


def _shelf(found: Records) -> list[str]:
    head = ["importance", *(f"{target:g} {stage}" for target in TARGETS for stage in STAGES)]
    lines: list[str] = []
    for network in NETWORKS:
        rows = [
            [name, *_row(found, [ours(network, name, target) for target in TARGETS])]
            for name in (*MAIN, *SHELF)
        ]
        lines += [f"### {network}, all importances\n", *_table(head, rows)]
    return lines


def _row(found: Records, cells: Iterable[Cell]) -> list[object]:
    return [mean(found, cell, stage) for cell in cells for stage in STAGES]


def _choices(found: Records) -> list[str]:
    options: list[tuple[str, dict[str, object]]] = [("oneshot, isomorphic, floor 0.1", {})]
    options.append(("… repaired", {"repair": True}))
    for name in STRATEGIES:
        options.append((name, {"strategy": name}))
        options.append(("… repaired", {"strategy": name, "repair": True}))
    options += [(f"{name}, isomorphic", {"strategy": f"ranked {name}"}) for name in RANKED]
    options += [(f"ranking {name}", {"ranking": name}) for name in ("global", "uniform")]
    options += [(f"floor {least:g}", {"min_keep": least}) for least in (0.0, 0.2)]
    options += [
        ("magnitude", {"importance": "magnitude"}),
        ("magnitude, repaired", {"importance": "magnitude", "repair": True}),
        ("magnitude, ranking uniform", {"importance": "magnitude", "ranking": "uniform"}),
    ]
    rows = []
    for text, changed in options:
        row: list[object] = [text]
        row += [_over_networks(found, changed, t, stage) for t in TARGETS for stage in STAGES]
        rows.append(row)
    head = ["", *(f"{target:g} {stage}" for target in TARGETS for stage in STAGES)]
    return _table(head, rows)


def _over_networks(found: Records, changed: dict[str, object], target: float, stage: str) -> str:
    """Mean over networks, with the mean of what oneshot gives for the same networks and seeds."""
    values, plain = [], []
    for network in NETWORKS:
        cell = replace(ours(network, "fisher", target), **changed)  # type: ignore[arg-type]
        pair = [(cell, cell), (ours(network, "fisher", target), ours(network, "fisher", target))]
        values += [found[c.key][stage] for c, _ in differences(found, pair[:1], stage)]
        plain += [v for _, v in differences(found, [(cell, pair[1][0])], stage)]
    if not values:
        return "·"
    text = f"{100 * fmean(values):.1f}"
    return text + (f" ({100 * fmean(plain):+.1f}, {len(plain)})" if plain and changed else "")


def _failures(cells: Sequence[Cell], found: Records) -> list[str]:
    failed = [c for c in of_seed(cells, lambda _: True) if "error" in found.get(c.key, {})]
    if not failed:
        return []
    lines = ["## Exceptions\n"]
    for cell in failed:
        what = f"{cell.network}, {cell.tool}, {cell.importance}, {cell.ranking}, {cell.target:g}"
        lines.append(f"- {what}: {found[cell.key]['error']}")
    return [*lines, ""]
