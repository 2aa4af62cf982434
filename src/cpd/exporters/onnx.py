"""ONNX: export with torch's graph exporter, then check the file against the model it came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cpd.errors import ExportError
from cpd.exporters._call import (
    STATIC_HINT,
    Call,
    agreed,
    batch_of,
    brief,
    evaluation,
    prepared,
    quiet,
    traced,
)
from cpd.files import publish, staging

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch.export import ExportedProgram
    from torch.onnx import ONNXProgram

__all__ = ["onnx"]

_SINGLE_FILE_BYTES = 1_500_000_000  # protobuf ends at 2 GiB; room for the graph around the weights


def onnx(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | dict[str, Any],
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    check: bool = True,
    opset: int | None = None,
) -> Path:
    """Write ``model`` as an ONNX file at ``path`` and prove that it computes the same.

    The model is exported in evaluation mode; its training flags are as before afterwards. The file
    is a single one unless the weights pass 1.5 GB, where they go into ``<path>.data`` beside it. An
    existing file is replaced, and only once the new one is complete and checked.

    Args:
        model: any network ``torch.export`` can trace.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With
            ``dynamic_batch`` the first axis of the first tensor is the batch axis (size B), and so
            is the first axis of every other tensor of that size.
        path: the file to write; its folder is made where missing.
        dynamic_batch: leave the batch size open. A network that fixes it is an error, never
            exported with a fixed size silently.
        check: run ``onnx.checker`` and compare with PyTorch in ONNX Runtime (CPU) at the example
            batch size and, where the batch is dynamic, at one more. For every output
            max|pytorch - onnx| <= tolerance * max|pytorch|, with tolerance 1e-4 for float32 (1e-6
            for float64, 1e-2 for float16).
        opset: version of the ONNX operator set; None takes the exporter's own.

    Returns:
        The path written.

    Raises:
        InputError: the example inputs are of another kind or hold no tensor with a batch axis.
        ExportError: the network cannot be exported, the file is not valid ONNX, or it computes
            something else; the text has the largest difference.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    call, batch, calls = prepared(model, example_inputs, dynamic_batch)
    with evaluation(model), quiet(), torch.no_grad():
        program = traced(model, call, batch)
        converted = _convert(program, opset)
        with staging(path.parent) as temporary:
            draft = temporary / path.name
            converted.save(draft, external_data=_weight_bytes(model) > _SINGLE_FILE_BYTES)
            if check:
                _check(draft, model, calls, program)
            for file in sorted(temporary.iterdir(), reverse=True):  # weights before the graph
                publish(file, path.parent / file.name)
    return path


def _convert(program: ExportedProgram, opset: int | None) -> ONNXProgram:
    """Translate the graph to ONNX, without the source lines and paths the exporter notes in it."""
    try:
        converted = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset)
    except ImportError as error:
        raise ExportError(
            f"the ONNX exporter needs the package {error.name!r}: install onnx, onnxscript and "
            "onnxruntime."
        ) from error
    except Exception as error:  # the exporter's tree of errors is private and changes
        raise ExportError(
            f"the network was traced but could not be translated to ONNX: {brief(error)} "
            "Another opset= may know the operator."
        ) from error
    assert converted is not None
    graph = converted.model.graph
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    return converted


def _check(draft: Path, model: nn.Module, calls: list[Call], program: ExportedProgram) -> None:
    """Raise ExportError unless ``draft`` is valid ONNX and computes what ``model`` does."""
    import onnx as onnx_library
    import onnxruntime

    try:
        onnx_library.checker.check_model(str(draft), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: the rest is about optimisations it skipped
        session = onnxruntime.InferenceSession(
            str(draft), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # both libraries raise classes of their own C++ side
        raise ExportError(
            f"the exported file is not valid ONNX or cannot be run: {brief(error)} "
            "Some operators exist in float32 only; another opset= may help, and check=False writes "
            "the file as it is."
        ) from error
    for call in calls:
        _compare(session, model, call, program.graph_signature.user_inputs)


def _compare(
    session: InferenceSession, model: nn.Module, call: Call, names: tuple[Any, ...]
) -> None:
    """Run one call in PyTorch and in ONNX Runtime and compare every output."""
    given = dict(zip(names, pytree.tree_leaves(call), strict=True))
    batch = batch_of(call)
    try:
        feed = {node.name: given[node.name].cpu().numpy() for node in session.get_inputs()}
        found = [torch.from_numpy(array) for array in session.run(None, feed)]
    except Exception as error:  # ONNX Runtime raises classes of its own C++ side
        raise ExportError(
            f"ONNX Runtime cannot run the exported file at batch size {batch}: {brief(error)} "
            "Some operators exist in float32 only. If the network fixes its batch size, "
            f"{STATIC_HINT}"
        ) from error
    agreed(model, call, found, [node.name for node in session.get_outputs()])


def _weight_bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
