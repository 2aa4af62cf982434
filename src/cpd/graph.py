"""Reading the graph: every node's call goes through its rule; what the rules demand is collected.

Values: `Step` (one node, its outputs' labels and literal sizes), `Pinned` (rows of weights to
rescale where an attention's default scale depends on the head size).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from .aliases import Storages, base, needed, op_name, sole_chain, views, writes
from .channels import Channels, Ids, Place
from .errors import TraceError
from .labels import Labels, Layer
from .rules import NO_CHANNELS, Call, Factor, Pin, Size, find
from .trace import Trace, location, source_line, used_tensors


@dataclass
class Step:
    """One node of the graph: the labels of its outputs, its literal sizes, whether it is a
    statistic. `written`: what the tensors that it writes into in place carry from then on.
    """

    node: fx.Node
    out: Any
    args: dict[str, Any] = field(default_factory=dict)
    sizes: list[Size] = field(default_factory=list)
    lossy: bool = False
    macs: list[tuple[int, tuple[Factor, ...]]] = field(default_factory=list)
    written: dict[fx.Node, Labels] = field(default_factory=dict)


@dataclass(frozen=True)
class Pinned:
    """`rows[tensor]`: rows to multiply by sqrt(size now / size before) of `axis` of the query's
    labels. `path` is the module that computes the attention.
    """

    rows: dict[str, Ids]
    labels: Labels
    axis: int
    path: str


class Reader:
    """Walks a traced graph once and collects what all calls demand."""

    def __init__(self, trace: Trace, *, exact: bool = False, unknown: str = "freeze") -> None:
        self.trace, self.exact, self.unknown = trace, exact, unknown
        self.channels = Channels()
        self.labels: dict[str, Labels] = {}
        self.steps: list[Step] = []
        self.pins: list[tuple[fx.Node, Pin]] = []
        self.macs: list[tuple[int, tuple[Factor, ...]]] = []
        self.consumed: list[Ids] = []
        self.activation: dict[str, float] = {}
        self.unruled: dict[str, str] = {}
        self.env: dict[fx.Node, Any] = {}
        self.weights: set[fx.Node] = set()
        self.used = used_tensors(trace)
        self.storages = Storages(trace.graph)
        self.needed = needed(trace.graph)

    def read_training(self, training: Trace) -> None:
        """Read the same network as it trains: what only training computes binds channels too."""
        other = Reader(training, unknown=self.unknown)
        other.channels, other.labels, other.used = self.channels, self.labels, self.used
        other.read()
        known = {location(step.node)[0] for step in self.steps}
        self.steps += [step for step in other.steps if location(step.node)[0] not in known]
        self.consumed += other.consumed
        self.unruled = {**other.unruled, **self.unruled}

    def read(self) -> None:
        """Read every node in order."""
        for node in self.trace.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self._placeholder(node)
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            inputs = node.all_input_nodes
            if node.name in self.trace.tensors or (inputs and self.weights.issuperset(inputs)):
                self.weights.add(node)
            elif node.op == "output":
                self._keep_outputs(node)
        self.at(None)

    def _keep_outputs(self, output: fx.Node) -> None:
        for made in output.all_input_nodes:
            self.at(made)
            for value in _flat(self.env.get(made)):
                self.channels.freeze(value.all_ids(), "model output")

    def at(self, node: fx.Node | None) -> None:
        """Say which call demands what is recorded from now on; None where none does."""
        self.channels.place = Place()
        if node is not None and node.op == "call_function":
            self.channels.place = place_of(node)

    def _placeholder(self, node: fx.Node) -> Labels | None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        name = self.trace.tensors.get(node.name)
        if name is None:
            return Labels(_shape(value))
        if name not in self.labels:
            self.labels[name] = self._fresh(node, _shape(value))
        return self.labels[name]

    def _fresh(self, node: fx.Node, shape: tuple[int, ...]) -> Labels:
        layers = [Layer((k,), self.channels.new(size)) for k, size in enumerate(shape) if size > 1]
        groups = _weight_groups(node)
        if groups > 1 and len(shape) > 1 and shape[1] > 1:
            rows = self.channels.new(groups, 1, shape[1])
            ids = np.broadcast_to(rows, (groups, shape[0] // groups, shape[1])).reshape(shape[:2])
            layers = [layer for layer in layers if layer.axes != (1,)] + [Layer((0, 1), ids)]
        if self.trace.tensors[node.name] not in self.used:
            for layer in layers:
                self.channels.freeze(layer.ids, "not used in the forward pass")
        return Labels(shape, tuple(layers))

    def _lookup(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.env.get(value)
        if isinstance(value, list | tuple):
            return [self._lookup(item) for item in value]
        if isinstance(value, dict):
            return {key: self._lookup(item) for key, item in value.items()}
        return value

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        if getattr(target, "__name__", "") == "getitem":
            source = self.env.get(node.args[0])  # type: ignore[arg-type]
            return source[int(node.args[1])] if isinstance(source, list) else source  # type: ignore[arg-type]
        out = [_shape(value) for value in _tensors(node.meta.get("val"))]
        if not (out or _asks_values(node)):
            return None
        self.at(node)
        call = self._bind(node, out)
        result = self._rule(node, call)
        if not out:
            return None  # a number
        if isinstance(result, Labels) and isinstance(node.meta.get("val"), tuple | list):
            result = [result] * len(out)
        written = self._mutated(node, call, result)
        self.env.update(written)
        sizes = call.sizes
        self.steps.append(Step(node, result, call.args, sizes, call.lossy, call.macs, written))
        self.pins += [(node, pin) for pin in call.pins]
        self.macs += call.macs
        if any(arg in self.weights for arg in _nodes(node.args[1:3])):
            self.consumed += call.consumed
        self._note_activation(node, call)
        return result

    def _bind(self, node: fx.Node, out: list[tuple[int, ...]]) -> Call:
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        args: dict[str, Any] = {}
        if schema is None:
            args = {str(k): self._lookup(v) for k, v in enumerate(node.args)}
        else:
            for argument, value in zip(schema.arguments, node.args, strict=False):
                args[argument.name] = self._lookup(value)
            for argument in schema.arguments[len(node.args) :]:
                if argument.name in node.kwargs:
                    args[argument.name] = self._lookup(node.kwargs[argument.name])
                elif argument.has_default_value() and argument.default_value is not None:
                    args[argument.name] = argument.default_value
        kind, place = location(node)[1], self.channels.place
        where = " ".join(x for x in (place.path, f"[{kind}]" if kind else "", place.source) if x)
        exact = self.exact and node in self.needed  # what nothing comes of may differ
        return Call(place.op, args, out, self.channels, target, exact, where)

    def _rule(self, node: fx.Node, call: Call) -> Any:
        rule = find(call.op) or (find("pointwise") if _is_pointwise(node.target) else None)
        labels = list(_flat(list(call.args.values())))
        if rule is None:
            if any(label.layers for label in labels):
                if self.unknown == "error":
                    raise TraceError(
                        f"no rule for operator {node.target} ({call.where}). Add one to cpd.rules, or comb "  # noqa: E501
                        'with unknown="freeze", which keeps every channel it touches.'
                    )
                self.unruled[call.op] = call.where
            for label in labels:
                call.freeze_all(label, "operator without a rule")
            results = [Labels(shape) for shape in call.out]
            several = isinstance(node.meta.get("val"), tuple | list) or not results
            return results if several else results[0]
        return rule(call)

    def _mutated(self, node: fx.Node, call: Call, result: Any) -> dict[fx.Node, Labels]:
        """Return what everything that shows a tensor written in place carries from then on.

        A write into a slice of a tensor made on the way is a new tensor to all that reads it later.
        Where other views show it, nothing behind it may be cut.
        """
        changed: dict[fx.Node, Labels] = {}
        for value in writes(node):
            whole, inplace = base(value), call.op.endswith("_")
            touched = {whole, value, *views(whole)}
            if inplace and sole_chain(whole, value) and not views(value):
                continue
            if call.op == "zero_" and whole.op == "call_function":
                continue  # a channel that is gone shows zeros anyway
            whole_result = inplace and value is node.args[0] and _carry(call)
            chain = self.storages.chain(value) if whole_result else []
            if chain and not self.storages.seen_otherwise(node, chain):
                changed.update(self._written(chain, result))
                continue
            held = [self.env.get(other) for other in touched]
            for label in _flat([*held, *call.args.values()]):
                call.freeze_all(label, "written in place through a view")
            for other in touched:
                if isinstance(self.env.get(other), Labels):
                    changed[other] = Labels(self.env[other].shape)
        return changed

    def _written(self, chain: list[fx.Node], part: Labels) -> dict[fx.Node, Labels]:
        """Return what tensors carry once `part` is written into the first, a slice of the next."""
        changed = {chain[0]: part}
        for view, whole in itertools.pairwise(chain):
            scatter = find(f"{op_name(view)}_scatter")
            if scatter is not None:
                before = self.env[whole]
                call = self._bind(view, [before.shape])
                args = {**call.args, "self": before, "src": part}
                made = scatter(replace(call, op=f"{op_name(view)}_scatter", args=args))
                assert isinstance(made, Labels)
                part = made
            changed[whole] = part
        return changed

    def _note_activation(self, node: fx.Node, call: Call) -> None:
        """Elements per sample and output channel of the op that first uses each tensor."""
        for value in node.args:
            name = self.trace.tensors.get(value.name) if isinstance(value, fx.Node) else None
            if name is None or name in self.activation:
                continue
            shape = call.shape
            axis = 1 if call.op.startswith(("conv", "batch_norm", "group_norm", "instance")) else -1
            total = float(np.prod(shape)) / max(self.trace.batch, 1)
            self.activation[name] = total / max(shape[axis] if shape else 1, 1)


def place_of(node: fx.Node) -> Place:
    """Return the call of a node: its operator, the module that makes it, the line of code."""
    return Place(op_name(node), location(node)[0], source_line(node))


def _asks_values(node: fx.Node) -> bool:
    """Whether a call that puts out no tensor may read the values of one, not only its form."""
    name = op_name(node)
    operator = isinstance(node.target, torch._ops.OpOverload)
    return operator and not name.startswith("sym_") and name not in NO_CHANNELS


def _is_pointwise(target: Any) -> bool:
    """Say whether PyTorch tags an operator, or the twin of an in-place one, as pointwise."""
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return True
    name = getattr(getattr(target, "_schema", None), "name", "").removeprefix("aten::")
    twin = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    overloads = twin.overloads() if twin is not None else []
    return any(torch.Tag.pointwise in getattr(twin, overload).tags for overload in overloads)


def _weight_groups(node: fx.Node) -> int:
    """Return the groups of the convolution that a placeholder is the weight of; 1 otherwise."""
    for user in node.users:
        name = getattr(getattr(user.target, "_schema", None), "name", "")
        if not name.startswith("aten::conv") or len(user.args) < 2 or user.args[1] is not node:
            continue
        names = [argument.name for argument in user.target._schema.arguments]  # type: ignore[union-attr]
        if "groups" in names:
            at = names.index("groups")
            value = user.args[at] if len(user.args) > at else user.kwargs.get("groups", 1)
            return value if isinstance(value, int) else 1
    return 1


def _carry(call: Call) -> bool:
    """Say whether what a call is given has channels: parts of a constant that differ have none."""
    return any(x.layers and not x.uniform for x in _flat(list(call.args.values())))


def _shape(value: torch.Tensor) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in value.shape)
    except Exception as error:  # symbols that values decide
        raise TraceError(
            "a tensor's size depends on values (a boolean index, say). Comb a submodule without it."
        ) from error


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [item for item in value if isinstance(item, torch.Tensor)]
    return []


def _flat(value: Any) -> Iterable[Labels]:
    if isinstance(value, Labels):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))


def _nodes(args: Any) -> Iterable[fx.Node]:
    for arg in args:
        yield from _nodes(arg) if isinstance(arg, list | tuple) else ()
        if isinstance(arg, fx.Node):
            yield arg
