"""ONNX: export with torch's graph exporter, then check the file against the model it came from."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cpd.errors import ExportError, InputError
from cpd.files import publish, staging

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch.export import ExportedProgram
    from torch.onnx import ONNXProgram

__all__ = ["onnx"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""One call of the model: its positional and its keyword arguments."""

log = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOLERANCE_ELSE = 1e-4
_SINGLE_FILE_BYTES = 1_500_000_000  # protobuf ends at 2 GiB; room for the graph around the weights
_TALKATIVE = ("onnx_ir", "onnxscript", "torch.export", "torch.onnx")
_STATIC_HINT = "dynamic_batch=False exports it with the batch size of the example inputs."


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
    call = _call(model, example_inputs)
    batch = _batch(call)
    other = _resized(call, batch, batch + 1) if dynamic_batch else call
    calls = [call, other] if dynamic_batch else [call]
    if batch == 1:
        call, batch = other, 2  # an open axis of size 1 would be read as one that broadcasts
    with _evaluation(model), _quiet(), torch.no_grad():
        program = _trace(model, call, batch if dynamic_batch else None)
        converted = _convert(program, opset)
        with staging(path.parent) as temporary:
            draft = temporary / path.name
            converted.save(draft, external_data=_weight_bytes(model) > _SINGLE_FILE_BYTES)
            if check:
                _check(draft, model, calls, program)
            for file in sorted(temporary.iterdir(), reverse=True):  # weights before the graph
                publish(file, path.parent / file.name)
    return path


def _call(model: nn.Module, example_inputs: object) -> Call:
    """Example inputs of any of the three kinds as one call, keywords as ``forward`` orders them."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        order = inspect.signature(model.forward).parameters
        known = {name: example_inputs[name] for name in order if name in example_inputs}
        return (), known | dict(example_inputs)
    raise InputError(
        "example_inputs: expected a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments, found {type(example_inputs).__name__}."
    )


def _batch(call: Call) -> int:
    """Size of the first axis of the first tensor that has one."""
    for leaf in pytree.tree_leaves(call):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            if leaf.shape[0] > 0:
                return leaf.shape[0]
            raise InputError("example_inputs: the batch is empty; give at least one sample.")
    raise InputError("example_inputs: found no tensor with a batch axis.")


def _resized(call: Call, batch: int, size: int) -> Call:
    """``call`` with ``size`` samples: rows repeated, each scaled so that no two are alike.

    Only factors in (0, 1] are applied and only to floating point, so that zeros, signs and indices
    stay what they are.
    """

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != batch:
            return leaf
        rows = leaf[torch.arange(size, device=leaf.device) % batch]
        if not leaf.is_floating_point():
            return rows
        scale = torch.linspace(1.0, 0.5, size, dtype=leaf.dtype, device=leaf.device)
        return rows * scale.reshape(-1, *[1] * (leaf.ndim - 1))

    resized: Call = pytree.tree_map(resize, call)
    return resized


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _quiet() -> Iterator[None]:
    """Send the warnings of the tracer and the exporter to the log: they are about their own inside.

    The loggers of both keep to errors. What goes wrong for real is raised, and what the file
    computes is checked by numbers.
    """
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    for warning in caught:
        log.debug("while exporting: %s: %s", warning.category.__name__, warning.message)


def _trace(model: nn.Module, call: Call, batch: int | None) -> ExportedProgram:
    """The graph of ``model``; with ``batch``, axes of that size in front of a tensor stay open."""
    shapes: Any = None
    if batch is not None:
        axis = torch.export.Dim("batch")

        def spec(leaf: Any) -> dict[int, Any] | None:
            is_batch = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
            return {0: axis} if is_batch else None

        args, kwargs = pytree.tree_map(spec, call)
        shapes = kwargs if call[1] else args
    try:
        return torch.export.export(model, *call, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the model's own code or the tracer raises
        name = type(model).__name__
        hint = "" if batch is None else f" If the network fixes its batch size, {_STATIC_HINT}"
        what = "could not be traced" if batch is None else "could not be traced with an open batch"
        raise ExportError(f"{name} {what}: {_brief(error)}{hint}") from error


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
            f"the network was traced but could not be translated to ONNX: {_brief(error)} "
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
            f"the exported file is not valid ONNX or cannot be run: {_brief(error)} "
            "Some operators exist in float32 only; another opset= may help, and check=False writes "
            "the file as it is."
        ) from error
    for call in calls:
        _compare(session, model, call, program.graph_signature.user_inputs)


def _compare(
    session: InferenceSession, model: nn.Module, call: Call, names: tuple[Any, ...]
) -> None:
    """Run one call in PyTorch and in ONNX Runtime and compare every output."""
    leaves = pytree.tree_leaves(model(*call[0], **call[1]))
    expected = [leaf.cpu() for leaf in leaves if isinstance(leaf, Tensor)]
    given = dict(zip(names, pytree.tree_leaves(call), strict=True))
    batch = _batch(call)
    try:
        feed = {node.name: given[node.name].cpu().numpy() for node in session.get_inputs()}
        found = [torch.from_numpy(array) for array in session.run(None, feed)]
    except Exception as error:  # ONNX Runtime raises classes of its own C++ side
        raise ExportError(
            f"ONNX Runtime cannot run the exported file at batch size {batch}: {_brief(error)} "
            "Some operators exist in float32 only. If the network fixes its batch size, "
            f"{_STATIC_HINT}"
        ) from error
    if len(found) != len(expected):
        raise ExportError(f"the exported file has {len(found)} outputs, the model {len(expected)}.")
    outputs = [node.name for node in session.get_outputs()]
    for name, want, have in zip(outputs, expected, found, strict=True):
        _compare_output(name, want, have, batch)


def _compare_output(name: str, want: Tensor, have: Tensor, batch: int) -> None:
    where = f"output {name!r} at batch size {batch}"
    if want.shape != have.shape:
        raise ExportError(
            f"{where}: the exported file gives shape {tuple(have.shape)}, the model "
            f"{tuple(want.shape)}. If the network fixes its batch size, {_STATIC_HINT}"
        )
    difference = _difference(want, have)
    tolerance = _TOLERANCE.get(want.dtype, _TOLERANCE_ELSE)
    if not difference <= tolerance:
        raise ExportError(
            f"{where}: the exported file differs from the model by {difference:.3g} of the largest "
            f"value; {tolerance:g} is allowed. Try another opset=, or export in float32; "
            "check=False writes the file all the same."
        )


def _difference(want: Tensor, have: Tensor) -> float:
    """max|want - have| / max|want|; positions where both are equal, inf or nan count as zero."""
    if want.numel() == 0:
        return 0.0
    want, have = want.to(torch.float64), have.to(torch.float64)
    same = (want == have) | (want.isnan() & have.isnan())
    gap = torch.where(same, 0.0, (want - have).abs()).max().item()
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    return gap / scale if scale > 0 else gap


def _weight_bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _brief(error: BaseException, limit: int = 600) -> str:
    """The first paragraph of an error's text, on one line: the rest is in the chained error."""
    text = " ".join((str(error) or type(error).__name__).split("\n\n")[0].split())
    text = text if len(text) <= limit else text[:limit] + " …"
    return f"{type(error).__name__}: {text}" + ("" if text.endswith((".", "…")) else ".")
