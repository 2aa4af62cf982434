"""The usual transforms of dense prediction, from torchvision's v2, on (image, labels)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cpd import _torchvision
from cpd.data._files import MEAN, STD

__all__ = ["IGNORED", "distortion", "training", "whole"]

IGNORED = 255
_TRIES = 10

Transform = Callable[[Any, Any], tuple[Any, Any]]


def training(scale: tuple[int, int], crop: tuple[int, int], *, most: float = 0.75) -> Transform:
    """Scale by 0.5 to 2, crop, flip, distort the colours, normalise.

    scale: (longer, shorter) side that an image fits into at ratio 1. crop: (height, width); what
    the image does not fill is mean colour, labelled 255. most: largest share of one class in a
    crop; ten crops are tried.
    """
    _torchvision.ensure()
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    fill = {tv_tensors.Image: [round(255 * m) for m in MEAN], tv_tensors.Mask: IGNORED}
    pad = v2.RandomCrop(crop, pad_if_needed=True, fill=fill)
    after = v2.Compose([v2.RandomHorizontalFlip(), distortion(), *_values(v2)])

    def transform(image: Any, labels: Any) -> tuple[Any, Any]:
        ratio = float(torch.empty(()).uniform_(0.5, 2.0))
        image, labels = _fitted(image, labels, (scale[0] * ratio, scale[1] * ratio))
        for _ in range(_TRIES):
            x, y = pad(image, labels)
            if _largest(y) < most:
                break
        made: tuple[Any, Any] = after(x, y)
        return made

    return transform


def distortion() -> Any:
    """Brightness, contrast, saturation and hue at random, with MMSegmentation's ranges.

    torchvision's transform is that of SSD, which also permutes the colours; here they stay.
    Brightness is a factor in it, where MMSegmentation adds up to 32 of 255 to every pixel.
    """
    from torchvision.transforms import v2

    class Distortion(v2.RandomPhotometricDistort):
        def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
            return {**super().make_params(flat_inputs), "channel_permutation": None}

    return Distortion(hue=(-0.1, 0.1))


def whole(scale: tuple[int, int]) -> Transform:
    """The whole image, fitted into (longer, shorter); the labels stay at their own size."""
    _torchvision.ensure()
    from torchvision.transforms import v2

    values = v2.Compose(_values(v2))

    def transform(image: Any, labels: Any) -> tuple[Any, Any]:
        return values(_fitted(image, labels, scale)[0]), labels

    return transform


def _values(v2: Any) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def _fitted(image: Any, labels: Any, scale: tuple[float, float]) -> tuple[Any, Any]:
    """Both resized by one factor so that the image just fits into (longer, shorter)."""
    from torchvision.transforms.v2 import functional

    high, wide = image.shape[-2:]
    factor = min(max(scale) / max(high, wide), min(scale) / min(high, wide))
    size = [max(1, round(high * factor)), max(1, round(wide * factor))]
    nearest = functional.InterpolationMode.NEAREST
    return functional.resize(image, size), functional.resize(labels, size, interpolation=nearest)


def _largest(labels: Any) -> float:
    """Share of the commonest class among the labelled pixels; all where none is labelled."""
    known = labels[labels != IGNORED]
    return (
        float(torch.bincount(known.flatten().long()).max() / known.numel())
        if known.numel()
        else 1.0
    )
