"""Prune, then quantize: what each step leaves of accuracy, size and latency.

python -m examples.quantize
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from cpd import exporters
from cpd.costs import latency
from examples import plain
from examples.common import EXAMPLE, accuracy, loader, network, optimizer_of

NAMES = ("trained", "pruned", "pruned, int8", "pruned, OpenVINO")


class OpenVino(nn.Module):
    """Files of OpenVINO as a module, on one thread of the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import openvino

        options = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        self.compiled: Any = openvino.Core().compile_model(path, "CPU", options)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The files' logits."""
        return torch.from_numpy(self.compiled([images.numpy()])[0].copy())

    def milliseconds(self, image: torch.Tensor, runs: int, warmup: int = 50) -> float:
        """Median of one image, as `latency.compare` takes it of ONNX files."""
        request, given, times = self.compiled.create_infer_request(), [image.numpy()], []
        for _ in range(warmup + runs):
            begun = time.perf_counter_ns()
            request.infer(given)
            times.append(time.perf_counter_ns() - begun)
        return median(times[warmup:]) / 1e6


def trained() -> nn.Module:
    """The same network after the same batches, whole."""
    model = network().train()
    optimizer = optimizer_of(model)
    for batch in loader():
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main(folder: Path, *, runs: int = 2000) -> list[tuple[str, float, int, float]]:
    """Name, accuracy, bytes of the file and median milliseconds of one image, of each step."""
    small, _ = plain.main()
    images = EXAMPLE["pixel_values"]
    paths = [folder / f"{number}.onnx" for number in range(3)]
    exporters.onnx(trained(), images, paths[0])
    exporters.onnx(small, images, paths[1])
    batches = [batch["pixel_values"] for batch, _ in zip(loader(), range(8), strict=False)]
    exporters.int8(paths[1], paths[2], batches)
    times = latency.compare(paths, runs=runs, threads=1)
    rows = [
        (name, accuracy(exporters.Running(path)), path.stat().st_size, each.median_ms)
        for name, path, each in zip(NAMES, paths, times, strict=False)
    ]
    path = exporters.openvino(small, images, folder / "small.xml")
    other = OpenVino(path)
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return [*rows, (NAMES[-1], accuracy(other), size, other.milliseconds(images[:1], runs))]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name, share, size, milliseconds in main(Path(temporary)):
            print(f"{name:16} accuracy {share:.1%}, {size:,} bytes, {milliseconds:.4f} ms")
