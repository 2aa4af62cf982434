"""The reference that a cut network is proved against: the full-size graph, run node by node,
masked.

Every tensor keeps its full size with the removed entries zero, so it shares nothing with the cut
network's shapes. Only where a value is a statistic across channels (a LayerNorm, a mean over
channels) is it taken over the kept channels: the node's inputs are compressed, the op runs, and its
output is spread out again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from .aliases import is_view, writes
from .graph import Step
from .groups import Groups
from .labels import Labels, Mask, alive_mask, axis_size, new_shape
from .precision import widened
from .trace import location, quiet_state


class Reference(fx.Interpreter):
    """Runs a traced graph with the tensors given, statistics taken over live channels only."""

    def __init__(self, groups: Groups, of_ids: Mask, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(torch.nn.Module(), graph=groups.trace.graph)
        self.groups, self.of_ids, self.tensors = groups, of_ids, tensors
        self.steps: dict[fx.Node, Step] = {step.node: step for step in groups.steps}
        self.labels: dict[fx.Node, Any] = {}
        for node in groups.trace.graph.nodes:
            if node.name in groups.trace.tensors:
                self.labels[node] = groups.labels[groups.trace.tensors[node.name]]
        self.labels.update({step.node: step.out for step in groups.steps})
        for node in groups.trace.graph.nodes:
            source = self.labels.get(node.args[0]) if node.target is operator.getitem else None
            if isinstance(source, list):
                self.labels[node] = source[node.args[1]]
        floating = (t.dtype for t in tensors.values() if t.is_floating_point())
        self.dtype = next(floating, None)
        model_types = (p.dtype for p in groups.model.parameters() if p.is_floating_point())
        self.traced = next(model_types, None)
        self.watch: Callable[[fx.Node, Any], None] | None = None
        # of a branch that goes whole the calls run as they are: that they end in zero is proved
        self.whole = {
            node
            for branch in groups.branches
            if not of_ids[branch.id]
            for node in branch.place.nodes
        }

    def outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Return the output tensors for inputs of the traced shapes."""
        with torch.no_grad():
            out = self.run_on(args, kwargs)
        return [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]

    def run_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the flat outputs for inputs of the traced shapes."""
        with widened(self.dtype):
            return super().run(*self.placed(args, kwargs), enable_io_processing=False)

    def placed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return what the graph's placeholders stand for: tensors, constants and inputs."""
        inputs = iter(torch.utils._pytree.tree_leaves((args, kwargs)))
        values: list[Any] = []
        trace = self.groups.trace
        for node in trace.graph.nodes:
            if node.op != "placeholder":
                break
            if node.name in trace.tensors:
                values.append(self.tensors[trace.tensors[node.name]])
            elif node.name in trace.constants:
                values.append(self._as_here(trace.constants[node.name]))
            else:
                values.append(next(inputs))
        return values

    def _as_here(self, constant: torch.Tensor) -> torch.Tensor:
        like = next((t for t in self.tensors.values() if t.is_floating_point()), None)
        return (
            constant.to(like.dtype)
            if like is not None and constant.is_floating_point()
            else constant
        )

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; a statistic runs on what is alive."""
        step = self.steps.get(n)
        if step is not None:
            self.labels[n] = step.out
        lossy = step is not None and step.lossy and n not in self.whole
        value = self._statistic(n) if lossy else self._plain(n)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and n not in self.whole:
            value = self._defined(n, value)
        if self.watch is not None:
            self.watch(n, value)
        if step is not None:
            self.labels.update(step.written)
        return value

    def _defined(self, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """Where a dead channel is not finite (0 / 0 after a statistic), it is zero.

        A view shows what was made elsewhere, and stays one: it may be written through.
        """
        labels = None if is_view(n) else self.labels.get(n)
        if not isinstance(labels, Labels) or not labels.layers or bool(value.isfinite().all()):
            return value
        dead = ~self._mask(labels, value.shape).to(value.device)
        wrong = dead & ~value.isfinite()
        return value.masked_fill_(wrong, 0.0) if writes(n) else value.masked_fill(wrong, 0.0)

    def _plain(self, n: fx.Node) -> Any:
        if "_assert" in str(n.target):
            return None  # of the traced type, which the reference need not run in
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            args, kwargs = torch.utils._pytree.tree_map(self._typed, (args, kwargs))
            return getattr(self, n.op)(n.target, args, kwargs)

    def _typed(self, value: Any) -> Any:
        """Casts that the trace has as literals follow the type that the reference runs in."""
        return self.dtype if value is self.traced and self.dtype is not None else value

    def _statistic(self, n: fx.Node) -> Any:
        step = self.steps[n]
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            args, kwargs = torch.utils._pytree.tree_map(self._typed, (args, kwargs))
            query = step.args.get("query")
            if isinstance(query, Labels) and step.args.get("scale") is None:
                kwargs = {**kwargs, "scale": query.shape[-1] ** -0.5}  # that of all head dims
            flat = list(args)
            names = [argument.name for argument in n.target._schema.arguments]  # type: ignore[union-attr]
            for position, node in enumerate(n.args):
                flat[position] = self._all_compressed(node, flat[position])
            for size in step.sizes:
                at = names.index(size.arg)
                new = axis_size(size.labels, size.axis, self.of_ids)
                flat[at] = new if size.index is None else _replaced(flat[at], size.index, new)
            result = n.target(*flat, **kwargs)  # type: ignore[operator]
            if isinstance(result, tuple | list):
                return [self._spread(y, labels) for y, labels in zip(result, step.out, strict=True)]
            return self._spread(result, step.out)

    def _all_compressed(self, nodes: Any, values: Any) -> Any:
        if isinstance(nodes, list | tuple) and isinstance(values, list | tuple):
            pairs = zip(nodes, values, strict=True)
            return [self._all_compressed(node, value) for node, value in pairs]
        return self.compressed(nodes, values)

    def compressed(self, node: Any, value: Any) -> Any:
        """Return a node's value without its dead channels."""
        labels = self.labels.get(node) if isinstance(node, fx.Node) else None
        if (
            not isinstance(labels, Labels)
            or not labels.layers
            or not isinstance(value, torch.Tensor)
        ):
            return value
        mask = self._mask(labels, value.shape)
        return value[mask].reshape(new_shape(labels, self.of_ids))

    def _spread(self, value: torch.Tensor, labels: Labels) -> torch.Tensor:
        if not labels.layers:
            return value
        full = torch.zeros(labels.shape, dtype=value.dtype, device=value.device)
        full[self._mask(labels, labels.shape)] = value.reshape(-1)
        return full

    def _mask(self, labels: Labels, shape: Any) -> torch.Tensor:
        mask = alive_mask(labels, self.of_ids)
        return torch.from_numpy(np.broadcast_to(mask, tuple(shape)).copy())


def _replaced(values: Any, index: int, new: int) -> list[int]:
    result = list(values)
    result[index] = new
    return result


def first_difference(
    reference: Reference,
    small: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    limit: float,
    skip: Collection[str] = (),
) -> str:
    """Name the first module of a cut network that differs from the masked reference, or "".

    `skip`: modules that may differ, since their outputs are rescaled on purpose.
    """
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(_keep(outputs, path))
        for path, module in small.named_modules()
        if path
    ]
    with torch.no_grad(), quiet_state():
        try:
            small(*inputs[0], **inputs[1])
        finally:
            for handle in handles:
                handle.remove()
        wanted = _by_module(reference, inputs)
    for path, value in wanted.items():
        got = outputs.get(path)
        if got is None or got.shape != value.shape or path in skip:
            continue
        scale = value.abs().max().clamp_min(1e-30)
        if not float((got - value).abs().max() / scale) <= limit:
            return path
    return ""


def _keep(outputs: dict[str, torch.Tensor], path: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            outputs.setdefault(path, result.clone())  # a later op may write into it

    return hook


def _by_module(
    reference: Reference, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """Return module path -> what the reference has at its last node, without the dead channels."""
    last = {location(step.node)[0]: step.node for step in reference.groups.steps}
    paths = {node: path for path, node in last.items() if path}
    found: dict[str, torch.Tensor] = {}

    def watch(node: fx.Node, value: Any) -> None:
        if node in paths and isinstance(value, torch.Tensor) and value.is_floating_point():
            found[paths[node]] = reference.compressed(node, value).clone()

    reference.watch = watch
    reference.run_on(*inputs)
    return found
