"""int8: an ONNX file quantized after training by ONNX Runtime, from samples of the data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpd.errors import ArtefactError, ExportError, InputError
from cpd.exporters._call import brief, quiet
from cpd.files import publish, staging, unwritten

__all__ = ["Running", "int8"]


def int8(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    per_channel: bool = True,
    reduce_range: bool = True,
) -> Path:
    """Quantize an ONNX file to int8 at ``path``: static ranges, taken from ``batches``.

    Weights are symmetric int8, one scale for each output channel; activations are uint8. Pairs of
    QuantizeLinear and DequantizeLinear hold the scales (QDQ), which ONNX Runtime and TensorRT read.
    Nothing proves an int8 network equal to its original: measure its accuracy (``Running``).

    Args:
        source: what ``cpd.exporters.onnx`` wrote.
        batches: inputs, a tensor or a tuple of them, in the order of the file's inputs. They decide
            the ranges: give training samples as the network will see them.
        per_channel: one scale for each output channel, else one for each tensor.
        reduce_range: 7 bits for weights, as sums of 8 bits overflow on processors without VNNI.

    Raises:
        InputError: no batch. ArtefactError: ``source`` is missing or no valid ONNX.
        ExportError: ONNX Runtime cannot quantize it, or cannot run what came out.
        OutputError: the file cannot be written.
    """
    source, path = Path(source), Path(path)
    if not source.is_file():
        raise ArtefactError(f"{source} does not exist: write it with cpd.exporters.onnx first.")
    feeds = [_arrays(batch) for batch in batches]
    if not feeds:
        raise InputError("int8 needs at least one batch to take ranges from.")
    with staging(path.parent) as temporary, quiet():
        draft, plain = temporary / path.name, temporary / "plain.onnx"
        try:
            _quantized(source, plain, draft, feeds, (per_channel, reduce_range))
            Running(draft)(*(torch.from_numpy(array) for array in feeds[0]))
        except Exception as error:  # ONNX Runtime raises classes of its own C++ side
            unwritten(draft, path, error)
            raise ExportError(f"{source} cannot be quantized: {brief(error)}") from error
        publish(draft, path)
    return path


def _quantized(
    source: Path, plain: Path, draft: Path, feeds: list[Any], how: tuple[bool, bool]
) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(plain))

    class Reader(quantization.CalibrationDataReader):
        """Batches by the names of the inputs."""

        def __init__(self) -> None:
            self.left = self._feeds()

        def _feeds(self) -> Iterator[dict[str, Any]]:
            names = [node.name for node in Running(plain).session.get_inputs()]
            for arrays in feeds:
                yield dict(zip(names, arrays, strict=True))

        def get_next(self) -> dict[str, Any] | None:
            """The next batch."""
            return next(self.left, None)

    quantization.quantize_static(
        str(plain),
        str(draft),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=how[0],
        reduce_range=how[1],
    )


def _arrays(batch: Any) -> list[Any]:
    held = batch if isinstance(batch, tuple | list) else (batch,)
    if not all(isinstance(tensor, torch.Tensor) for tensor in held):
        raise InputError("batches for int8 must be tensors, or tuples of them")
    return [tensor.detach().cpu().numpy() for tensor in held]


class Running(nn.Module):
    """An ONNX file as a module, run by ONNX Runtime on the CPU; so metrics can be taken of it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path``: the file.

        Raises:
            ArtefactError: it is missing, or no valid ONNX.
        """
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises classes of its own C++ side
            raise ArtefactError(f"{path} is not a valid ONNX file: {brief(error)}") from error

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The file's outputs: a tensor, or a tuple of them."""
        names = [node.name for node in self.session.get_inputs()]
        feed = {n: t.cpu().numpy() for n, t in zip(names, inputs, strict=True)}
        found = tuple(torch.from_numpy(array) for array in self.session.run(None, feed))
        return found[0] if len(found) == 1 else found
