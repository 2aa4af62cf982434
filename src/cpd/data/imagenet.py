"""ImageNet-1k, or any classification in folders: train/CLASS/*, val/CLASS/*."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from cpd import _torchvision
from cpd.data._data import Data
from cpd.data._files import MEAN, STD, held_out, listed, photo, pixels, under
from cpd.errors import InputError

__all__ = ["Photos", "imagenet"]


class Photos(Dataset[tuple[torch.Tensor, int]]):
    """Images with one label each; read and transformed when asked for."""

    def __init__(self, files: Sequence[tuple[Path, int]], transform: Callable[[Any], Any]) -> None:
        """``transform`` takes an image of torchvision and draws from torch's global generator."""
        self.files, self.transform = list(files), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        _torchvision.ensure()
        from torchvision import tv_tensors

        path, label = self.files[index]
        x = self.transform(tv_tensors.Image(photo(path)))
        return x.as_subclass(torch.Tensor), label

    def check(self) -> None:
        """Read every file; InputError names the first that cannot be read."""
        for path, _ in self.files:
            photo(path)


def imagenet(root: str, size: int = 224, *, resize: int = 256, hold_out: int = 0) -> Data:
    """Return images as x float32 (3, size, size), normalised, and y, the class.

    root: holds train and val with one folder for each class, the same in both. Classes are numbered
        in the order of their names (WordNet ids for ImageNet: the usual numbers).
    size: side of the crops. resize: shorter side of a validation image before the central crop.
    hold_out: training images taken out for decisions; 0: the validation part decides.

    Training: a crop of 8 to 100 % of the area with sides of 3:4 to 4:3, flipped. Validation: the
    central crop.

    Raises InputError for sizes that are none, for folders that are missing or differ, and later for
    a file that cannot be read; ``check()`` of a part reads them all. Needs torchvision.

    Source: O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
    """
    pixels(size=size, resize=resize)
    if resize < size:
        text = f"resize must be at least size, or the central crop is padded: {resize} < {size}."
        raise InputError(text)
    _torchvision.ensure()
    from torchvision.transforms import v2

    classes = {part: _classes(root, part) for part in ("train", "val")}
    if classes["train"] != classes["val"]:
        odd = sorted(set(classes["train"]) ^ set(classes["val"]))
        raise InputError(f"train and val of {root} differ in the classes {odd[:8]}.")
    files = {
        part: [
            (path, number)
            for number, name in enumerate(classes[part])
            for path in listed(under(root, part, name))
        ]
        for part in classes
    }
    values = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *values])
    fixed = v2.Compose([v2.Resize(resize), v2.CenterCrop(size), *values])
    train, val, test = held_out(
        Photos(files["train"], random),
        Photos(files["val"], fixed),
        Photos(files["train"], fixed),
        hold_out,
    )
    return Data(
        train,
        val,
        test,
        num_classes=len(classes["train"]),
        input_shape=(3, size, size),
        name="imagenet",
    )


def _classes(root: str, part: str) -> list[str]:
    found = sorted(path.name for path in under(root, part).iterdir() if path.is_dir())
    if not found:
        raise InputError(f"{under(root, part)} holds no folder; one for each class is needed.")
    return found
