"""Scenes: scikit-learn's digits on textured backgrounds, one label a pixel, no download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from cpd.data._data import Data
from cpd.errors import InputError

__all__ = ["Scenes", "scenes"]

_CLASSES = 11  # background, then the digits 0 … 9
_INK = 0.45  # how dark a pixel of a digit is to carry its label
_PARTS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Drawing:
    """How scenes look: up to ``most`` digits with sides of ``sides``, shares of the scene's."""

    most: int = 3
    sides: tuple[float, float] = (0.4, 0.7)


class Scenes(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Scenes made when asked for: a function of (seed, part, epoch, index) and nothing else.

    images: the part's digits, float32 (n, 8, 8) in [0, 1]. labels: their classes. count: scenes of
    an epoch. fresh: other scenes in every epoch; without, they are made once and kept.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: list[int],
        *,
        size: int,
        count: int,
        address: tuple[int, int],
        fresh: bool = False,
        drawing: Drawing | None = None,
    ) -> None:
        self.images, self.labels = images, labels
        self.size, self.count, self.address, self.fresh = size, count, address, fresh
        self.drawing = drawing or Drawing()
        self.made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Move on to the scenes of an epoch. Workers of a loader see it when they start."""
        self.epoch = epoch if self.fresh else 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        if self.fresh:
            return self._make(index)
        if index not in self.made:
            self.made[index] = self._make(index)
        image, labels = self.made[index]
        return image.clone(), labels.clone()

    def _make(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a scene: x float32 (3, size, size), y int64 (size, size)."""
        generator = np.random.default_rng([*self.address, self.epoch, index])
        image = _texture(generator, self.size)
        labels = torch.zeros(self.size, self.size, dtype=torch.int64)
        for _ in range(int(generator.integers(1, self.drawing.most + 1))):
            self._draw(generator, image, labels)
        image += 0.03 * _normal(generator, 3, self.size, self.size)
        return (image.clamp(0, 1) - 0.5) / 0.25, labels

    def _draw(
        self, generator: np.random.Generator, image: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Put one digit somewhere, over what is there."""
        chosen = int(generator.integers(len(self.labels)))
        high, wide = (int(self.size * generator.uniform(*self.drawing.sides)) for _ in range(2))
        top, left = (int(generator.integers(self.size - side + 1)) for side in (high, wide))
        small = self.images[chosen][None, None]
        ink = F.interpolate(small, size=(high, wide), mode="bilinear", align_corners=False)[0, 0]
        there = image[:, top : top + high, left : left + wide]
        colour = _colour(generator, there.mean((1, 2)))
        opaque = ((ink - _INK + 0.15) / 0.3).clamp(0, 1)
        there += opaque * (colour[:, None, None] - there)
        labels[top : top + high, left : left + wide][ink > _INK] = 1 + self.labels[chosen]


def _normal(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def _colour(generator: np.random.Generator, behind: torch.Tensor) -> torch.Tensor:
    """A colour at least 0.4 away from the one behind, (3,)."""
    while True:
        colour = torch.from_numpy(generator.random(3, dtype=np.float32))
        if torch.linalg.vector_norm(colour - behind) > 0.4:
            return colour


def _texture(generator: np.random.Generator, size: int) -> torch.Tensor:
    """Noise of two grains and a grating, tinted: float32 (3, size, size), about [0, 1]."""
    tint = torch.from_numpy(generator.random((3, 1, 1), dtype=np.float32))
    image = tint.expand(3, size, size).clone()
    for grain, strength in ((4, 0.12), (size // 4, 0.06)):
        noise = _normal(generator, 1, 3, grain, grain)
        image += strength * F.interpolate(noise, size=(size, size), mode="bicubic")[0]
    angle, waves, phase = generator.uniform([0, 2, 0], [np.pi, 12, 2 * np.pi])
    line = torch.linspace(0, 1, size)
    across = line[:, None] * float(np.sin(angle)) + line[None, :] * float(np.cos(angle))
    return image + 0.1 * torch.sin(2 * np.pi * waves * across + phase)


@lru_cache(maxsize=1)
def _digits() -> tuple[torch.Tensor, list[int], dict[str, list[int]]]:
    """Every digit, its class, and which part it belongs to. The split is the same for all seeds."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    rest, test = train_test_split(
        list(range(len(targets))), test_size=300, stratify=targets, random_state=0
    )
    train, val = train_test_split(rest, test_size=300, stratify=targets[rest], random_state=0)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 8, 8) / 16
    return images, targets.tolist(), {"train": train, "val": val, "test": test}


def scenes(
    size: int = 64,
    seed: int = 0,
    *,
    train: int = 1000,
    val: int = 200,
    test: int = 200,
    fresh: bool = True,
    most: int = 3,
    sides: Sequence[float] = (0.4, 0.7),
) -> Data:
    """Return scenes as x float32 (3, size, size) and y int64 (size, size) in 0 … 10.

    One to ``most`` digits, each in a colour of its own, lie over one another and over a tinted
    texture. Class 0 is the background, class d + 1 the digit d. No written digit of one part occurs
    in another.

    size: side of the scenes, 64 to 128. seed: of the scenes; the split of the digits is fixed.
    train, val, test: scenes of each part. fresh: other training scenes in every epoch.
    most: digits of a scene. sides: height and width of a digit lie between these two shares of the
    scene's side, each on its own. Fewer and larger digits are easier to learn.

    Pixels are (p − 0.5) / 0.25. The same arguments give the same data, bit for bit. Raises
    InputError for values out of range. Needs scikit-learn.
    """
    _check("size", size, 64, 128)
    _check("seed", seed, 0, 2**32 - 1)
    for name, count in (("train", train), ("val", val), ("test", test)):
        _check(name, count, 1, 10**7)
    _check("most", most, 1, 10)
    drawing = Drawing(most, _shares(sides))
    images, labels, split = _digits()
    counts = {"train": train, "val": val, "test": test}
    parts = {
        part: Scenes(
            images[split[part]],
            [labels[k] for k in split[part]],
            size=size,
            count=counts[part],
            address=(seed, number),
            fresh=fresh and part == "train",
            drawing=drawing,
        )
        for part, number in _PARTS.items()
    }
    return Data(**parts, num_classes=_CLASSES, input_shape=(3, size, size), name="scenes")


def _shares(sides: Sequence[Any]) -> tuple[float, float]:
    """Two shares of a scene's side, the smaller first; a digit keeps at least one pixel a pixel."""
    numbers = [side for side in sides if isinstance(side, int | float)]
    if len(sides) != 2 or len(numbers) != 2 or not 0.125 <= sides[0] <= sides[1] <= 1:
        raise InputError(
            "sides of the digits must be two shares of the scene's side, from 0.125 to 1, the "
            f"smaller first; got {sides!r}."
        )
    return float(sides[0]), float(sides[1])


def _check(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(
            f"{name} of the scenes must be an integer from {least} to {most}, got {value!r}."
        )
