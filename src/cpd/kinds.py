"""Kinds: what the units of a family are called. Names only; nothing is decided here.

`units` sees rows and columns and calls them heads and head dims. Whether rows are heads is seen in
the graph: an attention multiplies two activations, and what it keeps apart while it does are heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import fx

from .aliases import op_name
from .channels import Channels, Ids
from .graph import Reader, Step
from .labels import Labels, Mask
from .units import Family, Units

_OPERANDS = {
    "scaled_dot_product_attention": ("query", "key", "value"),
    "matmul": ("self", "other"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
}
_PICKS = ("index", "index_select")


@dataclass(frozen=True, eq=False)
class Attended:
    """Ids along axes that attentions keep apart (`heads`) and along those they read (`dims`)."""

    heads: Ids
    dims: Ids


def attended(reader: Reader) -> Attended:
    """Find the axes of heads and head dims in a graph that was read."""
    heads: list[Ids] = [np.empty(0, np.int64)]
    dims: list[Ids] = [np.empty(0, np.int64)]
    weights = _of_weights(reader)
    for step in reader.steps:
        apart: list[Ids] = []
        read: list[Ids] = []
        for labels, batch in _operands(step, weights):
            for axis in range(len(labels.shape)):
                (apart if axis in batch else read).append(_along(labels, axis, reader.channels))
        if sum(len(ids) for ids in apart):
            heads += apart
            dims += read
    return Attended(np.concatenate(heads), np.concatenate(dims))


def _of_weights(reader: Reader) -> set[fx.Node]:
    """Nodes made of weights alone, or picked of them by data: the experts of each token."""
    found = set(reader.weights)
    for step in reader.steps:
        inputs = step.node.all_input_nodes
        picked = op_name(step.node) in _PICKS and inputs[:1] and inputs[0] in found
        if picked or (inputs and found.issuperset(inputs)):
            found.add(step.node)
    return found


def _along(labels: Labels, axis: int, channels: Channels) -> Ids:
    layer = labels.at(axis, channels) if labels.carries(axis) else None
    return np.empty(0, np.int64) if layer is None else layer.ids.ravel()


def _operands(step: Step, weights: set[fx.Node]) -> Iterator[tuple[Labels, range | set[int]]]:
    """Return the activations that a step multiplies with each other, and the axes it keeps apart.

    Nothing where one of them is made of weights alone: that is a layer, however it is written.
    """
    op = op_name(step.node)
    if any(node in weights for node in _tensors(step.node.args[:2])):
        return
    if op == "einsum":
        yield from _einsum(step.args)
    for name in _OPERANDS.get(op, ()):
        labels = step.args.get(name)
        if isinstance(labels, Labels):
            yield labels, range(len(labels.shape) - 2)


def _einsum(args: dict[str, Any]) -> Iterator[tuple[Labels, set[int]]]:
    left, _, out = args["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or "." in left:
        return
    apart = set(terms[0]) & set(terms[1]) & set(out)
    for labels, term in zip(args["tensors"], terms, strict=True):
        yield labels, {axis for axis, letter in enumerate(term) if letter in apart}


def _tensors(args: Iterable[Any]) -> Iterator[fx.Node]:
    for arg in args:
        if isinstance(arg, fx.Node):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


def named_families(units: Units, found: Attended) -> list[Family]:
    """Return the families of `units`, each by its right name."""
    heads, dims = _classes(units, found.heads), _classes(units, found.dims)
    families = [_named(units, family, heads, dims) for family in units.families]
    return [_nested(units, family, families) for family in families]


def _nested(units: Units, family: Family, families: list[Family]) -> Family:
    """Heads whose removal takes other heads along (a key's, and the queries' that read it)."""
    if family.kind != "heads":
        return family
    inner = np.setdiff1d(units.closure(_members(family).tolist()), _members(family))
    others = [x for x in families if x.kind == "heads" and x is not family]
    nested = any(np.isin(_members(x), inner).all() for x in others)
    return replace(family, kind="head groups") if nested else family


def _members(family: Family) -> Ids:
    return np.concatenate(family.clusters)


def _named(units: Units, family: Family, heads: Mask, dims: Mask) -> Family:
    if family.kind not in ("heads", "head dims", "channels"):
        return family
    classes = _members(family)
    kind = family.kind
    if heads[classes].any():
        kind = "heads"
    elif kind != "channels" and not dims[units.closure(classes.tolist())].any():
        kind = {"heads": "channel groups", "head dims": "channels"}[kind]
    return replace(family, kind=kind)


def _classes(units: Units, ids: Ids) -> Mask:
    mask = np.zeros(units.count, bool)
    mask[units.label[ids]] = True
    return mask
