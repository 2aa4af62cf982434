"""torchvision: one network of every family; detectors through the parts that export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .network import Built, Network

# name -> size of the image
CLASSIFIERS = {
    "alexnet": 224,
    "convnext_tiny": 224,
    "densenet121": 224,
    "efficientnet_b0": 224,
    "efficientnet_v2_s": 224,
    "googlenet": 224,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 224,
    "mobilenet_v2": 224,
    "mobilenet_v3_small": 224,
    "regnet_x_400mf": 224,
    "regnet_y_400mf": 224,
    "resnet18": 224,
    "resnet50": 224,
    "resnext50_32x4d": 224,
    "shufflenet_v2_x0_5": 224,
    "squeezenet1_1": 224,
    "swin_t": 224,
    "swin_v2_t": 256,
    "vgg11": 224,
    "vit_b_16": 224,
    "wide_resnet50_2": 224,
}
SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50",
              "lraspp_mobilenet_v3_large")  # fmt: skip
VIDEO = {"r3d_18": 64, "mc3_18": 64, "r2plus1d_18": 64, "s3d": 224, "swin3d_t": 64}
WHY = "the rest depends on the values of its data (proposals, non-maximum suppression)"


def build(kind: str, shape: tuple[int, ...]) -> Built:
    """Return a network without weights and two samples."""
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if kind in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # slow, and made random later
    if kind in SEGMENTERS:
        options["weights_backbone"] = None
    return torchvision.models.get_model(kind, **options), torch.randn(2, *shape)


def part(kind: str, take: Callable[[Any], nn.Module], inputs: Callable[[], Any]) -> Built:
    """Return a part of a detector and two samples of what it gets."""
    import torchvision

    detector = torchvision.models.get_model(kind, weights=None, weights_backbone=None)
    return take(detector), inputs()


def _image() -> Any:
    return torch.randn(2, 3, 128, 128)


def _pyramid(*channels: int, first: int = 16) -> Callable[[], Any]:
    return lambda: ([torch.randn(2, c, first >> k, first >> k) for k, c in enumerate(channels)],)


def _boxes(size: int) -> Callable[[], Any]:
    return lambda: torch.randn(2, 256, size, size)


def _roi(head: str) -> Callable[[Any], nn.Module]:
    def take(detector: Any) -> nn.Module:
        heads = detector.roi_heads
        return nn.Sequential(getattr(heads, f"{head}_head"), getattr(heads, f"{head}_predictor"))

    return take


def _detector(kind: str, what: str, take: Callable[[Any], nn.Module], inputs: Any) -> Network:
    name = f"torchvision:{kind}.{what}"
    return Network(name, partial(part, kind, take, inputs), part=f"{what} of {kind}: {WHY}")


def _backbone(detector: Any) -> nn.Module:
    return detector.backbone


def _head(detector: Any) -> nn.Module:
    return detector.head


FPN = (256,) * 5
PARTS = (
    _detector("fasterrcnn_resnet50_fpn", "backbone", _backbone, _image),
    _detector("fasterrcnn_resnet50_fpn", "rpn.head", lambda d: d.rpn.head, _pyramid(*FPN)),
    _detector("fasterrcnn_resnet50_fpn", "box", _roi("box"), _boxes(7)),
    _detector("fasterrcnn_resnet50_fpn_v2", "backbone", _backbone, _image),
    _detector("fasterrcnn_mobilenet_v3_large_320_fpn", "backbone", _backbone, _image),
    _detector("maskrcnn_resnet50_fpn_v2", "mask", _roi("mask"), _boxes(14)),
    _detector("keypointrcnn_resnet50_fpn", "keypoint", _roi("keypoint"), _boxes(14)),
    _detector("retinanet_resnet50_fpn_v2", "backbone", _backbone, _image),
    _detector("retinanet_resnet50_fpn_v2", "head", _head, _pyramid(*FPN)),
    _detector("fcos_resnet50_fpn", "backbone", _backbone, _image),
    _detector("fcos_resnet50_fpn", "head", _head, _pyramid(*FPN)),
    _detector("ssd300_vgg16", "backbone", _backbone, lambda: torch.randn(2, 3, 300, 300)),
    _detector("ssd300_vgg16", "head", _head, _pyramid(512, 1024, 512, 256, 256, 256, first=32)),
    _detector("ssdlite320_mobilenet_v3_large", "backbone", _backbone,
              lambda: torch.randn(2, 3, 320, 320)),
    _detector("ssdlite320_mobilenet_v3_large", "head", _head,
              _pyramid(672, 480, 512, 256, 256, 128, first=32)),
)  # fmt: skip


def _entries() -> list[Network]:
    shapes: dict[str, tuple[int, ...]] = {k: (3, s, s) for k, s in CLASSIFIERS.items()}
    shapes |= dict.fromkeys(SEGMENTERS, (3, 128, 128))
    shapes |= {k: (3, 16, s, s) for k, s in VIDEO.items()}
    return [Network(f"torchvision:{k}", partial(build, k, shape)) for k, shape in shapes.items()]


NETWORKS = (*_entries(), *PARTS)
