"""What combing found for every attention of a network, fused or written as products around a
softmax: can heads go, can their dims?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import fx

import cpd
from cpd.labels import Labels
from cpd.trace import location

PRODUCTS = ("aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum")
FAR = 24  # calls between a product and the softmax, at most
KINDS = {"heads": ("heads", "head groups"), "head dims": ("head dims",)}


def attentions(groups: cpd.Groups) -> dict[str, Any]:
    """Return how many attentions there are, how many may lose heads and dims, and why others may
    not: [kind, path of the first, reason, how many] for each reason.
    """
    goes = {kind: _that_go(groups, names) for kind, names in KINDS.items()}
    channels = _that_go(groups, ("channels", "channel groups"))
    counts, why = dict.fromkeys(KINDS, 0), dict[tuple[str, str], list[Any]]()
    every = list(_classes(groups))
    for path, classes in every:
        for kind in KINDS:
            if goes[kind][classes].any():
                counts[kind] += 1
                continue
            reason = _reason(groups, classes, rows=kind == "heads")
            if kind == "head dims" and channels[classes].any():
                reason = "not as head dims but as channels, which go: there is one head"
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
    inside = {node for node in groups.trace.graph.nodes if _attends(groups, node)}
    out = {step.node: step.out for step in groups.steps}
    for step in groups.steps:
        if step.node not in inside:
            continue
        nodes, ids = list(step.node.all_input_nodes), [np.empty(0, np.int64)]
        for node in nodes:  # it grows
            layers = out[node].layers if isinstance(out.get(node), Labels) else ()
            ids += [layer.ids.ravel() for layer in layers]
            if not layers:
                nodes += [n for n in node.all_input_nodes if n not in nodes]
        yield location(step.node)[0], groups.units.label[np.concatenate(ids)]


def _attends(groups: cpd.Groups, node: fx.Node) -> bool:
    """Whether a call is a fused attention, or multiplies two activations for a softmax."""
    name = str(node.target)
    if "scaled_dot_product" in name:
        return True
    if not any(product in name for product in PRODUCTS):
        return False
    weights = groups.trace.tensors
    return all(_activation(x, weights) for x in node.all_input_nodes[:2]) and _softmaxed(node)


def _activation(node: fx.Node, weights: Mapping[str, str]) -> bool:
    """Whether a tensor depends on the network's inputs."""
    seen, left = {node}, [node]
    while left:
        at = left.pop()
        if at.op == "placeholder" and at.name not in weights:
            return True
        left += [x for x in at.all_input_nodes if x not in seen]
        seen.update(at.all_input_nodes)
    return False


def _softmaxed(node: fx.Node) -> bool:
    """Whether what a product puts out comes to a softmax, scaled, biased or masked at most."""
    left = list(node.users)
    for user in left:  # it grows
        name = str(user.target)
        if "softmax" in name:
            return True
        if len(left) < FAR and not any(product in name for product in PRODUCTS):
            left += [x for x in user.users if x not in left]
    return False


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
    return "one head, or none that the weights make" if rows else "a width of one"
