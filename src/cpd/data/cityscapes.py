"""Cityscapes as its official folder: 19 classes of 34 annotated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cpd.data._augment import IGNORED, training, whole
from cpd.data._data import Data
from cpd.data._files import Pairs, held_out, listed, pixels, under
from cpd.errors import InputError

__all__ = ["cityscapes"]

_CLASSES = 19
# Numbers of the official label table that count in its benchmark, in the order of the classes.
_COUNTED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_IDS = "_gtFine_labelIds.png"
_TRAIN_IDS = "_gtFine_labelTrainIds.png"


def cityscapes(
    root: str, size: tuple[int, int] = (512, 1024), *, scale: int = 2048, hold_out: int = 0
) -> Data:
    """Return street scenes as x float32 (3, H, W), normalised, and y int64 (H, W) in 0 … 18 or 255.

    root: holds leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png and gtFine/{train,val}/CITY/ with
        NAME_gtFine_labelTrainIds.png, or else NAME_gtFine_labelIds.png of the download.
    size: (height, width) of the training crops. scale: longer side that images fit into, twice the
        shorter one. hold_out: training images taken out for decisions; 0: the validation part
        decides.

    Training and validation as ``ade20k``; validation images are whole, 1024 x 2048 at scale 2048.

    Raises InputError for sizes that are none, for folders and partners that are missing, and later,
    when a file is read, for one that does not fit; ``check()`` of a part reads them all. Needs
    torchvision.

    Source: M. Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR
    2016.
    """
    given: Any = size  # of a recipe, where anything may stand
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise InputError(f"size must be (height, width) of the training crops, got {size!r}.")
    high, wide = given
    pixels(height=high, width=wide, scale=scale)
    files = {part: _partners(root, part) for part in ("train", "val")}
    named = {
        annotation.name.endswith(_TRAIN_IDS) for pairs in files.values() for _, annotation in pairs
    }
    if len(named) > 1:
        raise InputError(f"{root} has {_TRAIN_IDS[1:]} for some images only; make them for all.")
    table = _table(direct=named.pop())
    augmented, plain = training((scale, scale // 2), (high, wide)), whole((scale, scale // 2))
    train, val, test = held_out(
        Pairs(files["train"], table, augmented),
        Pairs(files["val"], table, plain, ragged=True),
        Pairs(files["train"], table, plain, ragged=True),
        hold_out,
    )
    return Data(
        train, val, test, num_classes=_CLASSES, input_shape=(3, high, wide), name="cityscapes"
    )


def _table(*, direct: bool) -> torch.Tensor:
    """From the number in a file to the class."""
    table = torch.full((256,), -1, dtype=torch.int64)
    table[255] = IGNORED
    if direct:
        table[:_CLASSES] = torch.arange(_CLASSES)
        return table
    table[:34] = IGNORED
    table[list(_COUNTED)] = torch.arange(_CLASSES)
    return table


def _partners(root: str, part: str) -> list[tuple[Path, Path]]:
    folder, truth = under(root, "leftImg8bit", part), under(root, "gtFine", part)
    pairs = []
    for image in listed(folder, ("_leftimg8bit.png",)):
        name = image.name[: -len("_leftImg8bit.png")]
        place = truth / image.parent.relative_to(folder)
        found = [place / (name + ending) for ending in (_TRAIN_IDS, _IDS)]
        annotation = next((path for path in found if path.is_file()), None)
        if annotation is None:
            raise InputError(
                f"{image} has no annotation: {found[0]} and {found[1].name} are missing."
            )
        pairs.append((image, annotation))
    return pairs
