"""One call of a graph as a module, and products among them as ONNX without an exporter.

A table of latencies asks for hundreds of convolutions and linear layers. PyTorch's exporter takes
seconds for each; written node by node they take milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

OPSET, IR = 18, 10  # of what is written here: old enough for every runtime of today


class Slot:
    """Where a tensor stands among the arguments; `weight` is its number if it is a weight."""

    def __init__(self, weight: int | None) -> None:
        self.weight = weight


class OneCall(nn.Module):
    """One call of a graph as a module: weights are its parameters, other tensors its inputs."""

    def __init__(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.target, self.args, self.kwargs = target, args, kwargs
        self.held = nn.ParameterList()

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Compute the call."""
        left = iter(inputs)

        def filled(value: Any) -> Any:
            if isinstance(value, Slot):
                return next(left) if value.weight is None else self.held[value.weight]
            if isinstance(value, list):
                return [filled(item) for item in value]
            return value

        return self.target(*filled(self.args), **{k: filled(v) for k, v in self.kwargs.items()})

    def product(self) -> tuple[str, dict[str, Any]] | None:
        """Return the operator and its arguments by name; None where it is no plain product."""
        schema = getattr(self.target, "_schema", None)
        if schema is None or schema.overload_name:
            return None
        names = [argument.name for argument in schema.arguments]
        given = {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        return str(schema.name.rpartition("::")[2]), given


def as_onnx(call: OneCall, inputs: Sequence[torch.Tensor]) -> Any:
    """Return a convolution, linear layer or matrix product as an ONNX model; None for others.

    inputs: what the call takes, float32, of fixed shapes. Weights are initializers, as an exporter
    makes them. Needs onnx.
    """
    found = call.product()
    if found is None or any(x.dtype != torch.float32 for x in (*inputs, *call.held)):
        return None
    name, given = found
    made = None
    if name in ("conv1d", "conv2d", "conv3d"):
        made = _convolution(call, given)
    elif name == "linear":
        made = _linear(call, given, inputs)
    elif name in ("matmul", "mm", "bmm"):
        made = _matmul(given)
    return None if made is None else _model(call, inputs, *made)


def _is_input(value: Any) -> bool:
    return isinstance(value, Slot) and value.weight is None


def _weight(value: Any) -> int | None:
    """The number of a weight; None for what is none."""
    return value.weight if isinstance(value, Slot) else None


def _convolution(call: OneCall, given: dict[str, Any]) -> tuple[list[Any], set[int]] | None:
    from onnx import helper

    weight, bias = _weight(given.get("weight")), _weight(given.get("bias"))
    if not _is_input(given.get("input")) or weight is None:
        return None
    if bias is None and given.get("bias") is not None:
        return None
    axes = call.held[weight].ndim - 2
    sizes = {name: _each(given.get(name, start), axes) for name, start in _CONV.items()}
    names = ["x0", f"w{weight}", *([f"w{bias}"] if bias is not None else [])]
    node = helper.make_node(
        "Conv",
        names,
        ["y"],
        strides=sizes["stride"],
        pads=sizes["padding"] * 2,
        dilations=sizes["dilation"],
        group=int(given.get("groups", 1)),
    )
    return [node], set()


_CONV = {"stride": 1, "padding": 0, "dilation": 1}


def _each(value: Any, axes: int) -> list[int]:
    values = [int(x) for x in value] if isinstance(value, list | tuple) else [int(value)]
    return values * axes if len(values) == 1 else values


def _linear(
    call: OneCall, given: dict[str, Any], inputs: Sequence[torch.Tensor]
) -> tuple[list[Any], set[int]] | None:
    from onnx import helper

    weight, bias = _weight(given.get("weight")), _weight(given.get("bias"))
    if not _is_input(given.get("input")) or weight is None or call.held[weight].ndim != 2:
        return None
    if bias is None and given.get("bias") is not None:
        return None
    added = [] if bias is None else [f"w{bias}"]
    if inputs[0].ndim == 2:
        names = ["x0", f"w{weight}", *added]
        return [helper.make_node("Gemm", names, ["y"], transB=1)], set()
    product = helper.make_node("MatMul", ["x0", f"w{weight}"], ["p" if added else "y"])
    nodes = [product, *([helper.make_node("Add", ["p", *added], ["y"])] if added else [])]
    return nodes, {weight}  # MatMul takes the weight turned


def _matmul(given: dict[str, Any]) -> tuple[list[Any], set[int]] | None:
    from onnx import helper

    names, count = [], 0
    for value in given.values():
        if not isinstance(value, Slot):
            return None
        names.append(f"x{count}" if value.weight is None else f"w{value.weight}")
        count += value.weight is None
    return [helper.make_node("MatMul", names, ["y"])], set()


def _model(
    call: OneCall, inputs: Sequence[torch.Tensor], nodes: list[Any], turned: set[int]
) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    with torch.no_grad():
        shape = tuple(call(*inputs).shape)
        weights = [
            (weight.t() if number in turned else weight).detach().contiguous().cpu().numpy()
            for number, weight in enumerate(call.held)
        ]
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "call",
        [
            helper.make_tensor_value_info(f"x{k}", kind, tuple(x.shape))
            for k, x in enumerate(inputs)
        ],
        [helper.make_tensor_value_info("y", kind, shape)],
        [numpy_helper.from_array(value, f"w{k}") for k, value in enumerate(weights)],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="cpd"
    )
