"""Ultralytics: detectors and a segmenter from their configurations, without weights."""

from __future__ import annotations

from functools import partial

import torch

from .network import Built, Network

# configuration -> class
FILES = {
    "yolov5n": "DetectionModel",
    "yolov8n": "DetectionModel",
    "yolov8n-seg": "SegmentationModel",
    "yolov9t": "DetectionModel",
    "yolov10n": "DetectionModel",
    "yolo11n": "DetectionModel",
    "yolo12n": "DetectionModel",
    "rtdetr-l": "RTDETRDetectionModel",
}
SIZE = 128


def build(file: str, kind: str) -> Built:
    """Return a network and two images."""
    from ultralytics.nn import tasks

    return getattr(tasks, kind)(f"{file}.yaml", verbose=False), torch.randn(2, 3, SIZE, SIZE)


NETWORKS = tuple(
    Network(f"ultralytics:{file}", partial(build, file, kind), note=kind)
    for file, kind in FILES.items()
)
