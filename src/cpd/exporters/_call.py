"""What exporters share: one call of a network, its graph, and the comparison of what comes out."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cpd.errors import ExportError, InputError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = [
    "STATIC_HINT",
    "Call",
    "agreed",
    "batch_of",
    "brief",
    "call_of",
    "compared",
    "evaluation",
    "prepared",
    "quiet",
    "resized",
    "tensors_of",
    "traced",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""One call of the model: its positional and its keyword arguments."""

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERANCE_ELSE = 1e-4
TALKATIVE = ("onnx_ir", "onnxscript", "torch.export", "torch.onnx")
STATIC_HINT = "dynamic_batch=False exports it with the batch size of the example inputs."


def call_of(model: nn.Module, example_inputs: object) -> Call:
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


def prepared(
    model: nn.Module, example_inputs: object, dynamic_batch: bool
) -> tuple[Call, int | None, list[Call]]:
    """The call to trace with, its batch size where that stays open, and the calls to compare."""
    call = call_of(model, example_inputs)
    batch = batch_of(call)
    if not dynamic_batch:
        return call, None, [call]
    other = resized(call, batch, batch + 1)
    # an open axis of size 1 would be read as one that broadcasts
    return (other, 2, [call, other]) if batch == 1 else (call, batch, [call, other])


def tensors_of(outputs: object) -> list[Tensor]:
    """The tensors of what a network puts out, on the CPU, in order."""
    return [leaf.cpu() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def agreed(model: nn.Module, call: Call, found: list[Tensor], names: Sequence[str] = ()) -> None:
    """Raise ExportError where what an exported file gave differs from what the model gives."""
    wanted = tensors_of(model(*call[0], **call[1]))
    if len(found) != len(wanted):
        raise ExportError(f"the exported file has {len(found)} outputs, the model {len(wanted)}.")
    shown = names or [str(number) for number in range(len(wanted))]
    for name, want, have in zip(shown, wanted, found, strict=True):
        compared(name, want, have, batch_of(call))


def batch_of(call: Call) -> int:
    """Size of the first axis of the first tensor that has one."""
    for leaf in pytree.tree_leaves(call):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            if leaf.shape[0] > 0:
                return leaf.shape[0]
            raise InputError("example_inputs: the batch is empty; give at least one sample.")
    raise InputError("example_inputs: found no tensor with a batch axis.")


def resized(call: Call, batch: int, size: int) -> Call:
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
def evaluation(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def quiet() -> Iterator[None]:
    """Send the warnings of the tracer and the exporter to the log: they are about their own inside.

    The loggers of both keep to errors. What goes wrong for real is raised, and what the file
    computes is checked by numbers.
    """
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
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


def traced(model: nn.Module, call: Call, batch: int | None) -> ExportedProgram:
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
        hint = "" if batch is None else f" If the network fixes its batch size, {STATIC_HINT}"
        what = "could not be traced" if batch is None else "could not be traced with an open batch"
        raise ExportError(f"{name} {what}: {brief(error)}{hint}") from error


def compared(name: str, want: Tensor, have: Tensor, batch: int) -> None:
    where = f"output {name!r} at batch size {batch}"
    if want.shape != have.shape:
        raise ExportError(
            f"{where}: the exported file gives shape {tuple(have.shape)}, the model "
            f"{tuple(want.shape)}. If the network fixes its batch size, {STATIC_HINT}"
        )
    gap = difference(want, have)
    tolerance = TOLERANCE.get(want.dtype, TOLERANCE_ELSE)
    if not gap <= tolerance:
        raise ExportError(
            f"{where}: the exported file differs from the model by {gap:.3g} of the largest "
            f"value; {tolerance:g} is allowed. Try another opset=, or export in float32; "
            "check=False writes the file all the same."
        )


def difference(want: Tensor, have: Tensor) -> float:
    """max|want - have| / max|want|; positions where both are equal, inf or nan count as zero."""
    if want.numel() == 0:
        return 0.0
    want, have = want.to(torch.float64), have.to(torch.float64)
    same = (want == have) | (want.isnan() & have.isnan())
    gap = torch.where(same, 0.0, (want - have).abs()).max().item()
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    return gap / scale if scale > 0 else gap


def brief(error: BaseException, limit: int = 600) -> str:
    """The first paragraph of an error's text, on one line: the rest is in the chained error."""
    text = " ".join((str(error) or type(error).__name__).split("\n\n")[0].split())
    text = text if len(text) <= limit else text[:limit] + " …"
    return f"{type(error).__name__}: {text}" + ("" if text.endswith((".", "…")) else ".")
