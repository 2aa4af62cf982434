"""PT2: the graph of torch.export as a file, checked against the model it came from. No pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpd.errors import ExportError
from cpd.exporters._call import agreed, brief, evaluation, prepared, quiet, tensors_of, traced
from cpd.files import publish, staging, unwritten

__all__ = ["pt2"]


def pt2(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | dict[str, Any],
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> Path:
    """Write ``model`` as an archive of ``torch.export`` and prove that it computes the same.

    ``torch.export.load(path).module()`` runs it without the model's code. The example inputs are
    not written, as torch would pickle them. The file holds what the graph holds; an existing one is
    replaced, and only once the new one is complete and checked.

    Args:
        model: any network ``torch.export`` can trace; it stays as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        path: the file to write, which has to end with ``.pt2``.
        dynamic_batch: leave the batch size open, see ``cpd.exporters.onnx``.
        check: load the file again and compare at the example batch size and, where the batch is
            dynamic, at one more; tolerances are those of ``cpd.exporters.onnx``.

    Raises:
        InputError: the example inputs are of another kind or hold no tensor with a batch axis.
        ExportError: the network cannot be exported, or the file computes something else.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ExportError(f"{path} must end with .pt2, or torch.export will not load it")
    call, batch, calls = prepared(model, example_inputs, dynamic_batch)
    with evaluation(model), quiet(), torch.no_grad():
        program = traced(model, call, batch)
        program._example_inputs = None  # they would be pickled
        with staging(path.parent) as temporary:
            draft = temporary / path.name
            try:
                torch.export.save(program, draft)
                again: Any = torch.export.load(draft).module() if check else None
            except Exception as error:  # torch's own tree of errors changes
                unwritten(draft, path, error)
                raise ExportError(f"the graph cannot be written: {brief(error)}") from error
            for each in calls if check else ():
                agreed(model, each, tensors_of(again(*each[0], **each[1])))
            publish(draft, path)
    return path
