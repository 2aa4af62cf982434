"""Prune, then quantize: what each step leaves of accuracy, size and latency.

python -m examples.quantize
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from cpd import exporters
from cpd.costs import latency
from examples import plain
from examples.common import EXAMPLE, accuracy, loader, network, optimizer_of

NAMES = ("trained", "pruned", "pruned, int8")


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
    paths = [folder / f"{number}.onnx" for number in range(len(NAMES))]
    exporters.onnx(trained(), images, paths[0])
    exporters.onnx(small, images, paths[1])
    batches = [batch["pixel_values"] for batch, _ in zip(loader(), range(8), strict=False)]
    exporters.int8(paths[1], paths[2], batches)
    times = latency.compare(paths, runs=runs, threads=1)
    return [
        (name, accuracy(exporters.Running(path)), path.stat().st_size, time.median_ms)
        for name, path, time in zip(NAMES, paths, times, strict=True)
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name, share, size, milliseconds in main(Path(temporary)):
            print(f"{name:13} accuracy {share:.1%}, {size:,} bytes, {milliseconds:.4f} ms")
