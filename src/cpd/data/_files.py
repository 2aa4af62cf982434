"""Images and their labels in folders: listed when opened, checked when read, named when wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from cpd import _torchvision
from cpd.errors import InputError

__all__ = ["MEAN", "STD", "Pairs", "held_out", "listed", "photo", "pixels", "under"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in [0, 1]
PHOTOS = (".jpg", ".jpeg", ".png")


def pixels(**sides: Any) -> None:
    """InputError, which names the option, for a side that is no whole number of at least 1."""
    for name, side in sides.items():
        if not isinstance(side, int) or isinstance(side, bool) or side < 1:
            text = f"{name} must be a whole number of pixels, at least 1; got {side!r}."
            raise InputError(text)


def under(root: str | Path, *parts: str) -> Path:
    """The folder of a layout; InputError says which one is missing."""
    folder = Path(root).expanduser().joinpath(*parts)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: is {root} the folder of the data set?")
    return folder


def listed(folder: Path, endings: Sequence[str] = PHOTOS) -> list[Path]:
    """Files with these endings below a folder, sorted; InputError where there is none."""
    found = sorted(p for p in folder.rglob("*") if p.name.lower().endswith(tuple(endings)))
    if not found:
        raise InputError(f"{folder} holds no file that ends with {', '.join(endings)}.")
    return found


def photo(path: Path) -> torch.Tensor:
    """An image as RGB uint8 (3, H, W); InputError names a file that cannot be read."""
    return torch.from_numpy(_read(path, "RGB")).permute(2, 0, 1).contiguous()


def _read(path: Path, mode: str | None) -> np.ndarray[Any, Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return np.array(file if mode is None else file.convert(mode))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise InputError(f"cannot read the image {path}: {error}") from error


class Pairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images and a label for each of their pixels.

    files: (image, annotation) of each sample. table: int64 (256,), from the number in the file to
        the class, −1 where no such number may stand. transform: takes (image, labels) as tensors of
        torchvision and returns them changed; it draws from torch's global generator, which the
        training loop seeds for each sample. ragged: whether samples differ in size.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, Path]],
        table: torch.Tensor,
        transform: Callable[[Any, Any], tuple[Any, Any]],
        *,
        ragged: bool = False,
    ) -> None:
        self.files, self.table, self.transform, self.ragged = list(files), table, transform, ragged

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        _torchvision.ensure()
        from torchvision import tv_tensors

        image, labels = self.read(index)
        x, y = self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels.to(torch.uint8)))
        return x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor).to(torch.int64)

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image uint8 (3, H, W) and classes int64 (H, W) as they are in the files.

        Raises InputError that names the file: unreadable, of another size than its image, in
        colour, or with a number that is no class.
        """
        path, annotation = self.files[index]
        image = photo(path)
        numbers = _read(annotation, None)
        if numbers.ndim != 2 or numbers.dtype != np.uint8:
            raise InputError(
                f"{annotation} must hold one number of 8 bits a pixel, got {numbers.dtype} of "
                f"shape {numbers.shape}."
            )
        if numbers.shape != tuple(image.shape[1:]):
            high, wide = numbers.shape
            raise InputError(
                f"{annotation} is {wide} x {high} pixels, but its image {path} is "
                f"{image.shape[2]} x {image.shape[1]}."
            )
        classes = self.table[torch.from_numpy(numbers.astype(np.int64))]
        if (classes < 0).any():
            wrong = np.unique(numbers[classes.numpy() < 0]).tolist()
            raise InputError(f"{annotation} holds labels that are no class: {wrong[:8]}.")
        return image, classes

    def check(self) -> None:
        """Read every file; InputError names the first that is wrong."""
        for index in range(len(self)):
            self.read(index)


class Part(Subset[Any]):
    """Some samples of a data set, which can be checked as it can."""

    def __init__(self, samples: Any, numbers: Sequence[int]) -> None:
        super().__init__(samples, numbers)
        self.ragged = getattr(samples, "ragged", False)

    def check(self) -> None:
        """Read every file of the whole data set; InputError names the first that is wrong."""
        self.dataset.check()  # type: ignore[attr-defined]


def held_out(
    train: Dataset[Any], official: Dataset[Any], plain: Dataset[Any], count: int
) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    """Return (train, val, test): test is the official validation part.

    count: training samples, spread evenly, that are taken out for decisions; 0: the official
    validation part decides too, as is usual where the test labels are not public. ``plain`` are the
    training samples without augmentation.
    """
    total = len(train)  # type: ignore[arg-type]
    given: object = count
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < total:
        raise InputError(f"hold_out must be from 0 to {total - 1} training samples, got {count!r}.")
    if count == 0:
        return train, official, official
    out = {k * total // count for k in range(count)}
    return (
        Part(train, [k for k in range(total) if k not in out]),
        Part(plain, sorted(out)),
        official,
    )
