"""scikit-learn's handwritten digits: 1797 grey images of 8x8, ten classes, no download."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from cpd.data._data import Data
from cpd.errors import InputError

__all__ = ["Images", "digits"]

_HELD_OUT = 300  # samples in each of val and test; the other 1197 are for training


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory, shifted at random where asked, the same way for the same seed and epoch.

    images: float32 (N, C, H, W). labels: int64 (N,).
    shift: each image moves by up to so many pixels along each axis, with ``fill`` coming in at the
        border. The shifts depend on (seed, epoch, index) alone: not on the order of reading, the
        number of workers, or torch's global generator.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        shift: int = 0,
        fill: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.size = tuple(images.shape[-2:])
        self.padded = F.pad(images, [shift] * 4, value=fill)
        self.labels = labels.tolist()
        self.shift = shift
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the shifts of an epoch. Workers of a loader see it when they start."""
        generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
        count = (len(self.labels), 2)
        self.corners = torch.randint(2 * self.shift + 1, count, generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        top, left = self.corners[index]
        height, width = self.size
        image = self.padded[index, :, top : top + height, left : left + width]
        return image.clone(), self.labels[index]


def digits(size: int = 32, seed: int = 0, *, shift: int = 0) -> Data:
    """Return the digits as x float32 (1, size, size) and y in 0 … 9: 1197 train, 300 val, 300 test.

    size: side of the images, 8 to 1024; they are resized bilinearly.
    seed: decides the split, which keeps the share of each class, and the shifts.
    shift: largest random shift of a training image in pixels along each axis; 0 for none.

    Pixels are normalised by mean and standard deviation of the training part. The same arguments
    give the same data, bit for bit. Raises InputError for values out of range. Needs scikit-learn.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998, as shipped by sklearn.datasets.load_digits.
    """
    _check("size", size, 8, 1024)
    _check("seed", seed, 0, 2**32 - 1)
    _check("shift", shift, 0, size)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    order = list(range(len(targets)))
    rest, test = train_test_split(order, test_size=_HELD_OUT, stratify=targets, random_state=seed)
    train, val = train_test_split(
        rest, test_size=_HELD_OUT, stratify=targets[rest], random_state=seed
    )
    small = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    labels = torch.tensor(targets, dtype=torch.int64)
    black = float(-mean / std)
    return Data(
        train=Images(images[train], labels[train], shift=shift, fill=black, seed=seed),
        val=Images(images[val], labels[val]),
        test=Images(images[test], labels[test]),
        num_classes=10,
        input_shape=(1, size, size),
        name="digits",
    )


def _check(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(
            f"{name} of the digits must be an integer from {least} to {most}, got {value!r}."
        )
