"""OpenVINO: its intermediate representation, checked against the model it came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cpd.errors import ExportError
from cpd.exporters._call import Call, agreed, brief, evaluation, prepared, quiet, traced
from cpd.files import publish, staging, unwritten

__all__ = ["openvino"]


def openvino(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | dict[str, Any],
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> Path:
    """Write ``model`` as OpenVINO's IR, ``path`` and a file ``.bin`` beside it, and prove it.

    Weights keep their precision. Needs the package openvino.

    Args:
        model: any network ``torch.export`` can trace; it stays as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        path: the file to write, which has to end with ``.xml``.
        dynamic_batch: leave the batch size open, see ``cpd.exporters.onnx``.
        check: run the files on the CPU in full precision and compare at the example batch size
            and, where the batch is dynamic, at one more; tolerances are those of
            ``cpd.exporters.onnx``.

    Raises:
        InputError: the example inputs are of another kind or hold no tensor with a batch axis.
        ExportError: openvino is not installed, the network cannot be exported, or the files compute
            something else.
        OutputError: the files cannot be written.
    """
    try:
        import openvino as library
    except ImportError as error:
        raise ExportError("the OpenVINO exporter needs the package openvino: install it") from error
    path = Path(path)
    if path.suffix != ".xml":
        raise ExportError(f"{path} must end with .xml, or OpenVINO will not find its weights")
    call, batch, calls = prepared(model, example_inputs, dynamic_batch)
    with evaluation(model), quiet(), torch.no_grad():
        program = traced(model, call, batch)
        with staging(path.parent) as temporary:
            draft = temporary / path.name
            try:
                converted = library.convert_model(program)
                library.save_model(converted, draft, compress_to_fp16=False)
            except Exception as error:  # classes of its own C++ side
                unwritten(draft.with_suffix(".bin"), path, error)
                raise ExportError(f"OpenVINO cannot convert the network: {brief(error)}") from error
            for each in calls if check else ():
                agreed(model, each, _run(library, draft, each))
            for name in (path.with_suffix(".bin").name, path.name):  # weights before the graph
                publish(temporary / name, path.parent / name)
    return path


def _run(library: Any, draft: Path, call: Call) -> list[Tensor]:
    """What the files give on the CPU, in the precision they have."""
    try:
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = library.Core().compile_model(draft, "CPU", options)
        leaves = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
        found = compiled([leaf.cpu().numpy() for leaf in leaves])
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]
    except Exception as error:  # classes of its own C++ side
        raise ExportError(f"OpenVINO cannot run the exported files: {brief(error)}") from error
