"""digits: the split, the pixels, the shifts; and data.resolve."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from cpd import data
from cpd.data import Data, digits
from cpd.errors import InputError, UnknownName


def stacked(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*(part[i] for i in range(len(part))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def test_what_it_says() -> None:
    found = digits()
    assert str(found) == "digits: 1197 train, 300 val, 300 test; 10 classes, input 1x32x32"
    assert (found.num_classes, found.input_shape) == (10, (1, 32, 32))
    image, label = found.train[0]
    assert (image.shape, image.dtype) == ((1, 32, 32), torch.float32)
    assert isinstance(label, int)


def test_each_part_has_the_share_of_each_class() -> None:
    found = digits(size=8)
    whole = Counter(label for part in (found.train, found.val, found.test) for _, label in part)
    for part in (found.val, found.test):
        counts = Counter(label for _, label in part)
        assert all(abs(counts[c] - whole[c] * 300 / 1797) < 1 for c in range(10))


def test_the_parts_are_the_whole_and_share_nothing() -> None:
    from sklearn.datasets import load_digits

    found = digits(size=8)
    images = torch.cat([stacked(part)[0] for part in (found.train, found.val, found.test)])
    labels = torch.cat([stacked(part)[1] for part in (found.train, found.val, found.test)])
    pixels, targets = load_digits(return_X_y=True)
    low, high = images.min(), images.max()
    counts = ((images - low) / (high - low) * 16).round().int().flatten(1)
    ours = Counter((*row, y) for row, y in zip(counts.tolist(), labels.tolist(), strict=True))
    whole = Counter(
        (*row, y) for row, y in zip(pixels.astype(int).tolist(), targets.tolist(), strict=True)
    )
    assert ours == whole


def test_normalised_by_the_training_part() -> None:
    images, _ = stacked(digits(size=16).train)
    assert images.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert images.std().item() == pytest.approx(1.0, abs=1e-5)


def test_resized_bilinearly() -> None:
    small, large = stacked(digits(size=8).val)[0], stacked(digits(size=16).val)[0]
    expected = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    ratio = (large - large.mean()) / (expected - expected.mean())
    assert ratio.nanmedian().item() == pytest.approx(1.0, abs=0.2)
    torch.testing.assert_close(
        (large - large.mean()) / large.std(), (expected - expected.mean()) / expected.std()
    )


def test_same_arguments_same_data() -> None:
    first, second, other = digits(size=8), digits(size=8), digits(size=8, seed=1)
    for part in ("train", "val", "test"):
        assert torch.equal(stacked(getattr(first, part))[0], stacked(getattr(second, part))[0])
    assert not torch.equal(stacked(first.test)[0], stacked(other.test)[0])


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    digits(size=8, shift=1).train.set_epoch(3)  # type: ignore[attr-defined]
    assert torch.equal(before, torch.get_rng_state())


def test_changing_a_sample_does_not_change_the_data() -> None:
    found = digits(size=8)
    found.train[0][0].zero_()
    assert found.train[0][0].any()


def test_shifts_follow_seed_and_epoch_alone() -> None:
    first, second = digits(size=8, shift=2), digits(size=8, shift=2)
    start = stacked(first.train)[0]
    torch.rand(5)
    assert torch.equal(start, stacked(second.train)[0])
    first.train.set_epoch(1)  # type: ignore[attr-defined]
    assert not torch.equal(start, stacked(first.train)[0])
    first.train.set_epoch(0)  # type: ignore[attr-defined]
    assert torch.equal(start, stacked(first.train)[0])


def test_a_shift_moves_the_image_and_fills_with_black() -> None:
    plain, moved = digits(size=8).train, digits(size=8, shift=1).train
    corners = moved.corners  # type: ignore[attr-defined]
    assert {tuple(corner) for corner in corners} == {(y, x) for y in range(3) for x in range(3)}
    index = next(i for i, corner in enumerate(corners) if corner == [2, 1])  # one row up
    assert torch.equal(moved[index][0][:, :-1], plain[index][0][:, 1:])
    assert torch.equal(moved[index][0][0, -1], stacked(plain)[0].min().expand(8))


def test_only_training_is_shifted() -> None:
    plain, moved = digits(size=8), digits(size=8, shift=2)
    for part in ("val", "test"):
        assert torch.equal(stacked(getattr(plain, part))[0], stacked(getattr(moved, part))[0])


def test_it_loads_in_batches() -> None:
    images, labels = next(iter(DataLoader(digits(size=8).train, batch_size=5)))
    assert (images.shape, labels.shape, labels.dtype) == ((5, 1, 8, 8), (5,), torch.int64)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 7}, "size of the digits must be an integer from 8 to 1024, got 7"),
        ({"size": 8.0}, r"got 8\.0"),
        ({"seed": -1}, "seed of the digits must be an integer from 0"),
        ({"shift": 33}, "shift of the digits must be an integer from 0 to 32, got 33"),
        ({"shift": True}, "got True"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        digits(**options)


# Data and resolve --------------------------------------------------------------------------------


def test_an_empty_part_is_refused() -> None:
    part = digits(size=8).test
    with pytest.raises(InputError, match="data set 'mine': its val part is empty"):
        Data(part, Subset(part, []), part, num_classes=10, input_shape=(1, 8, 8), name="mine")


def test_resolve() -> None:
    assert data.resolve("digits").input_shape == (1, 32, 32)
    assert data.resolve("digits", size=8).input_shape == (1, 8, 8)
    assert data.resolve({"digits": {"size": 16}}).input_shape == (1, 16, 16)
    assert data.resolve({"digits": {"size": 16}}, size=8).input_shape == (1, 8, 8)


def test_resolve_takes_an_object_of_its_own() -> None:
    own = SimpleNamespace(train=[1], val=[1], test=[1], num_classes=2, input_shape=(3,))
    assert data.resolve(own) is own
    with pytest.raises(InputError, match=r"options \['size'\] need the name of a data set"):
        data.resolve(own, size=8)


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("digit", UnknownName, "unknown data set 'digit'; did you mean 'digits'"),
        ({"digits": {"sise": 8}}, UnknownName, "names: seed, shift, size"),
        (SimpleNamespace(train=1, val=2), InputError, "has no test, num_classes, input_shape"),
        (None, InputError, "a data set is given by a name"),
    ],
)
def test_resolve_refuses(spec: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        data.resolve(spec)
