"""ADE20K (SceneParse150) as its official folder: 150 classes, label 0 is none."""

from __future__ import annotations

from pathlib import Path

import torch

from cpd.data._augment import IGNORED, training, whole
from cpd.data._data import Data
from cpd.data._files import Pairs, held_out, listed, pixels, under
from cpd.errors import InputError

__all__ = ["ade20k"]

_CLASSES = 150


def ade20k(root: str, size: int = 512, *, scale: int = 2048, hold_out: int = 0) -> Data:
    """Return the scenes as x float32 (3, H, W), normalised, and y int64 (H, W) in 0 … 149 or 255.

    root: holds images/training, images/validation, annotations/training, annotations/validation;
        each image *.jpg has an annotation *.png of its name with 0 for none and 1 … 150.
    size: side of the training crops, and shorter side of images at ratio 1 and of validation
        images. scale: the longest side allowed; images that would be longer become smaller.
    hold_out: training images taken out for decisions; 0: the validation part decides.

    Training: scaled by 0.5 to 2, cropped (the first of at most ten crops without a class over
    75 %, or the last), flipped, colours distorted.
    Validation: whole images fitted into (scale, size), labels at their own size; samples differ in
    size, so they come one by one.

    Raises InputError for sizes that are none, for folders and partners that are missing, and later,
    when a file is read, for one that does not fit; ``check()`` of a part reads them all. Needs
    torchvision.

    Source: B. Zhou, H. Zhao, X. Puig, S. Fidler, A. Barriuso, A. Torralba, "Scene Parsing through
    ADE20K Dataset", CVPR 2017.
    """
    pixels(size=size, scale=scale)
    table = torch.full((256,), -1, dtype=torch.int64)
    table[0] = IGNORED
    table[1 : _CLASSES + 1] = torch.arange(_CLASSES)
    files = {part: _partners(root, part) for part in ("training", "validation")}
    augmented, plain = training((scale, size), (size, size)), whole((scale, size))
    train, val, test = held_out(
        Pairs(files["training"], table, augmented),
        Pairs(files["validation"], table, plain, ragged=True),
        Pairs(files["training"], table, plain, ragged=True),
        hold_out,
    )
    return Data(train, val, test, num_classes=_CLASSES, input_shape=(3, size, size), name="ade20k")


def _partners(root: str, part: str) -> list[tuple[Path, Path]]:
    images = listed(under(root, "images", part))
    annotations = under(root, "annotations", part)
    pairs = [(image, annotations / f"{image.stem}.png") for image in images]
    for image, annotation in pairs:
        if not annotation.is_file():
            raise InputError(f"{image} has no annotation: {annotation} is missing.")
    return pairs
