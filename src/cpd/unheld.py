"""Unheld: literal sizes that cannot follow by an attribute, kept before anything is solved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx, nn

from .aliases import op_name
from .channels import Ids
from .graph import Reader, Step, place_of
from .handed import HandedOn
from .replace import Replacements
from .rules import Size
from .sizes import Site, Use
from .trace import location, named_tensors

_BY_NUMBER = ("mul", "div")


def uses(reader: Reader) -> list[Use]:
    """Return every literal size that a call carries."""
    return [
        Use(location(step.node)[0], op_name(step.node), size, _halves(step, size))
        for step in reader.steps
        for size in step.sizes
    ]


def _halves(step: Step, size: Size) -> bool:
    """Whether a size is the bound of a slice that cuts an axis into halves."""
    bound = size.arg in ("start", "end")
    return bound and 2 * size.old == step.args["self"].shape[size.axis]


def balance_shared(reader: Reader, sites: list[Site]) -> None:
    """Where one attribute is the width of rows of several tensors, they keep the same number, and
    so do axes that a module's code meets with one literal each time that it is called.
    """
    again = _met_again(reader)
    for site in sites:
        rows: dict[bytes, Ids] = {}
        for size in site.sizes:
            layer = size.labels.owned(size.axis)
            if layer is None:
                continue
            if layer.ids.ndim > 1 or size.arg == "split_sizes" or id(size) in again:
                rows[layer.ids.tobytes()] = layer.ids.reshape(-1, size.old)
        if len(rows) > 1:
            reader.channels.nest(np.concatenate(list(rows.values())))
            for whole in (row for row in rows.values() if len(row) == 1):  # not one of many heads
                blocks = reader.channels.rows(whole)
                reader.channels.freeze(blocks, "one of equal parts, must not vanish")


def _met_again(reader: Reader) -> set[int]:
    """Return the literals of one line of code that carry other channels in another call of its
    module: no attribute, and no forward that takes the module's place, holds two numbers there.

    Several on one line are told apart by their order in the call. Where the channels overlap, one
    number for both would keep all of them.
    """
    roots = reader.channels.labels()
    turns: Counter[tuple[Any, ...]] = Counter()
    met: dict[tuple[Any, ...], dict[bytes, Ids]] = {}
    sizes: dict[tuple[Any, ...], list[int]] = {}
    for step in reader.steps:
        for size in step.sizes:
            layer = size.labels.owned(size.axis)
            if layer is None or layer.ids.shape != (size.old,):
                continue
            literal = (place_of(step.node), size.arg, size.index, size.old)
            here = (_which_call(step.node), *literal)
            turns[here] += 1
            ids = np.unique(roots[layer.ids])
            met.setdefault((*literal, turns[here]), {})[ids.tobytes()] = ids
            sizes.setdefault((*literal, turns[here]), []).append(id(size))
    return {one for literal, found in met.items() if _apart(found) for one in sizes[literal]}


def _apart(found: Mapping[bytes, Ids]) -> bool:
    """Say whether these are several sets of channels without one in common."""
    every = np.concatenate(list(found.values()))
    return len(found) > 1 and len(np.unique(every)) == len(every)


def _which_call(node: fx.Node) -> str:
    """Return the innermost module of a node, with the number of its call where it has several."""
    return str(list(node.meta.get("nn_module_stack") or [""])[-1])


def freeze_unheld(reader: Reader, replaced: Replacements, sites: list[Site]) -> None:
    """Keep what moves the bound of a slice that neither an attribute nor a replaced forward holds.

    A half may be computed: where it is not, what reads it meets another shape. What is written
    through a slice meets none, so there it counts as well.
    """
    written = {node for step in reader.steps for node in step.written}
    held = {id(size) for site in sites for size in site.sizes}
    for step in reader.steps:
        for size in step.sizes:
            half = _halves(step, size) and step.node not in written
            if size.arg not in ("start", "end") or id(size) in held or half:
                continue
            path, why = location(step.node)[0], "no attribute holds the bound of a slice"
            if path in replaced.active or replaced.enable([path], why):
                continue
            reader.at(step.node)
            for layer in (x for x in size.labels.layers if size.axis in x.axes):
                reader.channels.freeze(layer.ids, why)
    reader.at(None)


def freeze_operands(reader: Reader, sites: list[Site], handed_on: HandedOn) -> None:
    """Keep the sizes that an attribute holds where the code multiplies or divides by it as well:
    a cut would change the values, not only the shapes.
    """
    operands = {
        (location(step.node)[0], other): step.node
        for step in reader.steps
        for other in [step.args.get("other")]
        if op_name(step.node).rstrip("_") in _BY_NUMBER and isinstance(other, int) and other > 1
    }
    found = [site for site in sites if (site.path, site.sizes[0].old) in operands]
    handed_on.ask([site.holder for site in found])
    for site in found:
        if not any(handed_on(site.holder, site.path, name) for name in _BY_NUMBER):
            continue  # another number of this value
        reader.at(operands[site.path, site.sizes[0].old])
        for size in site.sizes:
            layer = size.labels.at(size.axis, reader.channels)
            if layer is not None:
                reader.channels.freeze_inner(layer.ids, "the code computes with this size")
    reader.at(None)


def freeze_attentions(model: nn.Module, reader: Reader) -> None:
    """Keep what a layer of attention could lose only as a subclass: its class has one width."""
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    inside = {id(tensor) for module in attentions for _, tensor in named_tensors(module)}
    for name in [name for name, tensor in named_tensors(model) if id(tensor) in inside]:
        for layer in reader.labels[reader.trace.aliases[name]].layers:
            reader.channels.freeze(layer.ids, "the class is to be kept")
