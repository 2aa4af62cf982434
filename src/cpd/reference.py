"""The reference that a cut network is proved against: the full-size graph, run node by node,
masked.

Every tensor keeps its full size with the removed entries zero, so it shares nothing with the cut
network's shapes. Only where a value is a statistic across channels (a LayerNorm, a mean over
channels) is it taken over the kept channels: the node's inputs are compressed, the op runs, and its
output is spread out again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from .graph import Step
from .groups import Groups
from .labels import Labels, Mask, alive_mask, axis_size, new_shape


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
        self.watch: Callable[[fx.Node, torch.Tensor], None] | None = None

    def run_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the flat outputs for inputs of the traced shapes."""
        inputs = iter(torch.utils._pytree.tree_leaves((args, kwargs)))
        values = []
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
        return super().run(*values, enable_io_processing=False)

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
        if step is None or not step.lossy:
            return super().run_node(n)
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            flat = list(args)
            names = [argument.name for argument in n.target._schema.arguments]  # type: ignore[union-attr]
            for position, node in enumerate(n.args):
                flat[position] = self._compressed(node, flat[position])
            for size in step.sizes:
                at = names.index(size.arg)
                new = axis_size(size.labels, size.axis, self.of_ids)
                flat[at] = new if size.index is None else _replaced(flat[at], size.index, new)
            result = n.target(*flat, **kwargs)  # type: ignore[operator]
            if isinstance(result, tuple | list):
                return [self._spread(y, labels) for y, labels in zip(result, step.out, strict=True)]
            return self._spread(result, step.out)

    def _compressed(self, node: Any, value: Any) -> Any:
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
        full = torch.zeros(labels.shape, dtype=value.dtype)
        full[self._mask(labels, labels.shape)] = value.reshape(-1)
        return full

    def _mask(self, labels: Labels, shape: Any) -> torch.Tensor:
        mask = alive_mask(labels, self.of_ids)
        return torch.from_numpy(np.broadcast_to(mask, tuple(shape)).copy())


def _replaced(values: Any, index: int, new: int) -> list[int]:
    result = list(values)
    result[index] = new
    return result
