"""Pins: what keeps an attention's scale where its head size is cut.

`scaled_dot_product_attention` divides by the square root of the head size that it finds. After D
head dims became D', the rows of the weights that make the query are multiplied by sqrt(D' / D),
which restores the old scale exactly. Where the query is not a linear function of weights that serve
it alone, its head size is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isclose
from typing import Any

import numpy as np
from torch import fx, nn

from .channels import Ids
from .graph import Pinned, Reader
from .labels import Labels, Layer
from .replace import Replacements
from .trace import location

_LINEAR = frozenset(
    (
        "view",
        "reshape",
        "_unsafe_view",
        "permute",
        "transpose",
        "select",
        "unbind",
        "getitem",
        "slice",
        "split",
        "split_with_sizes",
        "chunk",
        "contiguous",
        "clone",
        "to",
        "_to_copy",
        "dropout",
        "mul",
        "div",
        "neg",
        "unflatten",
        "flatten",
        "squeeze",
        "unsqueeze",
        "add",
        "sub",
        "cat",
        "stack",
        "expand",
        "type_as",
        "alias",
    )
)
_MAKERS = {
    "linear": (1, 2),
    "conv1d": (1, 2),
    "conv2d": (1, 2),
    "layer_norm": (2, 3),
    "rms_norm": (2, 3),
}


def pin_queries(
    reader: Reader, replaced: Replacements, own_scale: Sequence[str] = ()
) -> list[Pinned]:
    """Find for each attention with a default scale the weight rows that make its query.

    Where there are none, the forward that computes it is replaced by one that writes the scale; or
    the head size is kept. Modules at the paths in `own_scale` keep their scale by themselves.
    """
    found = []
    for node, pin in reader.pins:
        layer = pin.labels.owned(pin.axis)
        path = location(node)[0]
        if layer is None or path in own_scale:
            continue
        rows = _rows(reader, node, layer.ids)
        template = replaced.template(path) if rows is None else None
        if rows is not None:
            found.append(Pinned(rows, pin.labels, pin.axis, path))
        elif template is not None and template.scales:
            replaced.enable([path], "the attention's default scale depends on the head size")
        else:
            why = (
                "the attention's default scale depends on the head size, and no weight can keep it"
            )
            reader.at(node)
            reader.channels.freeze_inner(layer.ids, why)
    reader.at(None)
    return found


def freeze_computed_scales(model: nn.Module, reader: Reader, replaced: Replacements) -> None:
    """Where the code scales by the root of a size and no attribute holds that, the forward is
    replaced by one that has the number; or the axis is kept.
    """
    for step in reader.steps:
        scale = step.args.get("other")
        if _op(step.node).rstrip("_") not in ("mul", "div") or not isinstance(scale, float):
            continue
        path = location(step.node)[0]
        if isinstance(model.get_submodule(path), nn.MultiheadAttention) or _holds(
            model, path, scale
        ):
            continue
        reader.at(step.node)
        for layer in _roots(reader, step.node.args[0], scale):
            why = "the code scales by this size"
            if path not in replaced.active and not replaced.enable([path], why):
                reader.channels.freeze_inner(layer.ids, why)
    reader.at(None)


def _roots(reader: Reader, node: Any, scale: float) -> Iterator[Layer]:
    """Return the layers of axes whose size's root is the scale."""
    places = [(x, axis) for x in _operands(reader, node) for axis in range(len(x.shape))]
    for labels, axis in places:
        root = any(isclose(scale, labels.shape[axis] ** p) for p in (0.5, -0.5))
        layer = labels.at(axis, reader.channels) if root and labels.carries(axis) else None
        if layer is not None:
            yield layer


def _operands(reader: Reader, node: Any) -> list[Labels]:
    """Return the labels of a value, and of what was contracted to make it."""
    nodes = [node]
    if isinstance(node, fx.Node) and _op(node) in ("matmul", "bmm", "einsum", "baddbmm"):
        nodes += [x for arg in node.args for x in (arg if isinstance(arg, list | tuple) else [arg])]
    found = [reader.env.get(x) for x in nodes if isinstance(x, fx.Node)]
    return [labels for labels in found if isinstance(labels, Labels)]


def _holds(model: nn.Module, path: str, value: float) -> bool:
    """Say whether a module, or one around it, has this number."""
    while True:
        held = vars(model.get_submodule(path)).values()
        if any(isinstance(x, float) and isclose(x, value) for x in held):
            return True
        if not path:
            return False
        path = path.rpartition(".")[0]


def _rows(reader: Reader, node: fx.Node, ids: Ids) -> dict[str, Ids] | None:
    """Return tensor -> rows that make the query and nothing else, or None."""
    wanted = np.zeros(reader.channels.count, bool)
    wanted[ids.ravel()] = True
    query = node.args[0]
    assert isinstance(query, fx.Node)
    if any(isinstance(x, fx.Node) and _carries(reader, x, wanted) for x in node.args[1:]):
        return None
    visited: set[fx.Node] = set()
    makers: list[fx.Node] = []
    if not _walk(reader, query, wanted, visited, makers):
        return None
    if not all(_serves_alone(reader, x, node, visited, wanted) for x in visited):
        return None
    rows: dict[str, Ids] = {}
    for maker in makers:
        made = _made_rows(reader, maker, wanted)
        if made is None or set(made) & set(rows):
            return None
        rows.update(made)
    return rows


def _walk(
    reader: Reader, node: fx.Node, wanted: np.ndarray, visited: set[fx.Node], makers: list[fx.Node]
) -> bool:
    """Go back from the query through linear operators to the weights; False where something else is
    met.
    """
    if node in visited:
        return True
    visited.add(node)
    op = _op(node)
    if op in _MAKERS:
        makers.append(node)
        return True
    if node.op != "call_function" or op not in _LINEAR:
        return False
    flat = [x for arg in node.args for x in (arg if isinstance(arg, list | tuple) else [arg])]
    inputs = [x for x in flat if isinstance(x, fx.Node)]
    carrying = [x for x in inputs if _carries(reader, x, wanted)]
    every = op in ("add", "sub", "cat", "stack")
    if not carrying or (every and len(carrying) < len([x for x in flat if not isinstance(x, int)])):
        return False
    if op == "div" and carrying[:1] != [node.args[0]]:
        return False
    if op in ("mul", "div"):
        carrying = carrying[:1]
    return all(_walk(reader, x, wanted, visited, makers) for x in carrying)


def _carries(reader: Reader, node: fx.Node, wanted: np.ndarray) -> bool:
    value = reader.env.get(node)
    parts = value if isinstance(value, list) else [value]
    return any(bool(wanted[part.all_ids()].any()) for part in parts if isinstance(part, Labels))


def _serves_alone(
    reader: Reader, node: fx.Node, attention: fx.Node, visited: set[fx.Node], wanted: np.ndarray
) -> bool:
    """Say whether what a node makes reaches nothing but the query (other parts may be picked from
    it).
    """
    for user in node.users:
        picks = _op(user) in ("getitem", "select", "slice") and not _carries(reader, user, wanted)
        if user not in visited and user is not attention and not picks:
            return False
    return True


def _made_rows(reader: Reader, maker: fx.Node, wanted: np.ndarray) -> dict[str, Ids] | None:
    """Return a maker's weight and bias with the rows to scale; None where others use them."""
    weight, bias = _MAKERS[_op(maker)]
    nodes = [maker.args[k] if len(maker.args) > k else None for k in (weight, bias)]
    given = [x for x in nodes if isinstance(x, fx.Node)]
    names = [reader.trace.tensors.get(x.name) for x in given]
    if (
        not given
        or given[0] is not nodes[0]
        or None in names
        or any(len(x.users) > 1 for x in given)
    ):
        return None
    layer = reader.labels[str(names[0])].owned(0)
    if layer is None:
        return None
    norm = _op(maker).endswith("norm")
    rows = np.arange(len(layer.ids)) if norm else np.flatnonzero(wanted[layer.ids])
    return {str(name): rows for name in names} if len(rows) else None


def _op(node: fx.Node) -> str:
    schema: Any = getattr(node.target, "_schema", None)
    return (
        schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", "")
    )
