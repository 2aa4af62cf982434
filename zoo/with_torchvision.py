"""torchvision: every network; detectors through the parts that export.

One of every family has images of its native size, the other depths and widths of it small ones.
"""

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
SIZES = (
    "convnext_base", "convnext_large", "convnext_small", "densenet161", "densenet169",
    "densenet201", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4",
    "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l",
    "efficientnet_v2_m", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mobilenet_v3_large",
    "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_800mf",
    "regnet_x_8gf", "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf",
    "regnet_y_3_2gf", "regnet_y_800mf", "regnet_y_8gf", "resnet101", "resnet152", "resnet34",
    "resnext101_32x8d", "resnext101_64x4d", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0", "squeezenet1_0", "swin_b", "swin_s", "swin_v2_b", "swin_v2_s",
    "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vit_b_32",
    "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2",
)  # fmt: skip
SMALL = {"vit_h_14": 56, "swin_b": 112, "swin_s": 112, "swin_v2_b": 128, "swin_v2_s": 128}
LARGE = ("regnet_y_128gf", "vit_h_14")
SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "deeplabv3_resnet101",
              "fcn_resnet50", "fcn_resnet101", "lraspp_mobilenet_v3_large")  # fmt: skip
VIDEO = {"r3d_18": 64, "mc3_18": 64, "r2plus1d_18": 64, "s3d": 224, "swin3d_t": 64, "swin3d_s": 64,
         "swin3d_b": 64, "mvit_v1_b": 224, "mvit_v2_s": 224}  # fmt: skip
WHY = "the rest depends on the values of its data (proposals, non-maximum suppression)"


def build(kind: str, shape: tuple[int, ...]) -> Built:
    """Return a network without weights and two samples."""
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if kind in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # slow, and made random later
    if kind.startswith("vit"):
        options["image_size"] = shape[-1]
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
    shapes |= {k: (3, SMALL.get(k, 64), SMALL.get(k, 64)) for k in SIZES}
    shapes |= dict.fromkeys(SEGMENTERS, (3, 128, 128))
    shapes |= {k: (3, 16, s, s) for k, s in VIDEO.items()}
    return [
        Network(f"torchvision:{k}", partial(build, k, shape), memory=22 if k in LARGE else 14)
        for k, shape in shapes.items()
    ]


NETWORKS = (*_entries(), *PARTS)
