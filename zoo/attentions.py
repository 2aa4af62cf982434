"""What combing found for every fused attention of a network: can heads go, can their dims?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import cpd
from cpd.labels import Labels
from cpd.trace import location

KINDS = {"heads": ("heads", "head groups"), "head dims": ("head dims",)}


def attentions(groups: cpd.Groups) -> dict[str, Any]:
    """Return how many attentions there are, how many may lose heads and dims, and why others may
    not: [kind, path of the first, reason, how many] for each reason.
    """
    goes = {kind: _that_go(groups, names) for kind, names in KINDS.items()}
    counts, why = dict.fromkeys(KINDS, 0), dict[tuple[str, str], list[Any]]()
    every = list(_classes(groups))
    for path, classes in every:
        for kind in KINDS:
            if goes[kind][classes].any():
                counts[kind] += 1
                continue
            reason = _reason(groups, classes, rows=kind == "heads")
            why.setdefault((kind, reason), [path, 0])[1] += 1
    return {
        "attentions": len(every),
        "heads": counts["heads"],
        "head_dims": counts["head dims"],
        "whole": [[kind, path, text[:300], n] for (kind, text), (path, n) in why.items()],
    }


def _classes(groups: cpd.Groups) -> Iterator[tuple[str, Any]]:
    """Yield the path of each attention and the channels that it reads.

    Where a call before it lets none through, they are those that this call reads.
    """
    inside = set(groups.trace.graph.nodes)
    out = {step.node: step.out for step in groups.steps}
    for step in groups.steps:
        if step.node not in inside or "scaled_dot_product" not in str(step.node.target):
            continue
        nodes, ids = list(step.node.all_input_nodes), [np.empty(0, np.int64)]
        for node in nodes:  # it grows
            layers = out[node].layers if isinstance(out.get(node), Labels) else ()
            ids += [layer.ids.ravel() for layer in layers]
            if not layers:
                nodes += [n for n in node.all_input_nodes if n not in nodes]
        yield location(step.node)[0], groups.units.label[np.concatenate(ids)]


def _that_go(groups: cpd.Groups, names: tuple[str, ...]) -> Any:
    mask = np.zeros(groups.units.count, bool)
    free = (f for group in groups for f in group.families if f.kind in names)
    for family in (f for f in free if f.width > 1):  # the last one stays
        mask[groups.units.closure(np.concatenate(family.clusters).tolist())] = True
    return mask


def _reason(groups: cpd.Groups, classes: Any, *, rows: bool) -> str:
    """Return why channels stay, or the blocks of rows over them."""
    if rows:
        mine = set(classes.tolist())
        blocks = [b for b, below in groups.units.below.items() if mine & set(below.tolist())]
        classes = np.array(blocks or sorted(mine), np.int64)
    causes = groups.causes[classes]
    found = causes[causes >= 0]
    if len(found):
        return str(groups.units.reasons[int(np.bincount(found).argmax())])
    return "one head, or none that the weights make" if rows else "no reason is told"
