"""scenes: what is in them, that they are the same again, that the parts share nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpd import data
from cpd.data import scenes
from cpd.data.scenes import _digits
from cpd.errors import InputError


def stacked(part: Any, count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*(part[i] for i in range(count)), strict=True)
    return torch.stack(images), torch.stack(labels)


def test_what_it_says() -> None:
    found = scenes()
    assert str(found) == "scenes: 1000 train, 200 val, 200 test; 11 classes, input 3x64x64"
    image, labels = found.train[0]  # type: ignore[index]
    assert (image.shape, image.dtype) == ((3, 64, 64), torch.float32)
    assert (labels.shape, labels.dtype) == ((64, 64), torch.int64)
    assert data.resolve({"scenes": {"size": 96}}).input_shape == (3, 96, 96)


def test_every_class_occurs_and_pixels_are_in_range() -> None:
    images, labels = stacked(scenes().train, 60)
    shares = torch.bincount(labels.flatten(), minlength=11) / labels.numel()
    assert len(shares) == 11
    assert 0.6 < shares[0] < 0.95
    assert shares[1:].min() > 0.003
    assert images.min() >= -2
    assert images.max() <= 2
    assert abs(images.mean()) < 0.3
    counts = {len(each.unique()) - 1 for each in labels}
    assert counts <= {1, 2, 3, 4}
    assert len(counts) > 2


def test_labels_lie_on_what_is_drawn() -> None:
    """Where a digit begins the image changes more than it does inside the background."""
    images, labels = stacked(scenes().val, 40)
    steps = (images[..., 1:] - images[..., :-1]).square().sum(1)
    edge = labels[..., 1:] != labels[..., :-1]
    flat = (labels[..., 1:] == 0) & (labels[..., :-1] == 0)
    assert steps[edge].mean() > 2 * steps[flat].mean()


def test_fewer_and_larger_digits() -> None:
    _, labels = stacked(scenes(most=1, sides=[0.8, 0.8]).train, 20)
    assert all(len(each.unique()) == 2 for each in labels)
    for each in labels:
        rows, columns = torch.nonzero(each, as_tuple=True)
        sides = [int(place.max() - place.min()) + 1 for place in (rows, columns)]
        assert 32 <= sides[0] <= 51, "the ink of a digit fills most of its 51 pixels of height"
        assert max(sides) <= 51
    both = (scenes(sides=sides) for sides in ((0.3, 0.4), (0.6, 0.8)))
    shares = [(stacked(each.val)[1] > 0).float().mean() for each in both]
    assert shares[1] > 2 * shares[0]


def test_the_same_again() -> None:
    first, second, other = scenes(), scenes(), scenes(seed=1)
    for part in ("train", "val", "test"):
        one, two, three = (stacked(getattr(d, part), 5) for d in (first, second, other))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert not torch.equal(one[1], three[1])
    assert not torch.equal(stacked(first.val, 5)[1], stacked(first.test, 5)[1])


def test_every_epoch_has_training_scenes_of_its_own() -> None:
    found, fixed = scenes(), scenes(fresh=False)
    start, kept = stacked(found.train, 3)[1], stacked(fixed.train, 3)[1]
    val = stacked(found.val, 3)[1]
    for each in (found, fixed):
        each.train.set_epoch(1)  # type: ignore[attr-defined]
        each.val.set_epoch(1)  # type: ignore[attr-defined]
    assert not torch.equal(start, stacked(found.train, 3)[1])
    assert torch.equal(kept, stacked(fixed.train, 3)[1])
    assert torch.equal(kept, start)
    assert torch.equal(val, stacked(found.val, 3)[1])
    found.train.set_epoch(0)  # type: ignore[attr-defined]
    assert torch.equal(start, stacked(found.train, 3)[1])


def test_the_parts_share_no_digit() -> None:
    images, labels, split = _digits()
    assert len(images) == len(labels) == sum(map(len, split.values())) == 1797
    assert len(set().union(*split.values())) == 1797


def test_changing_a_sample_does_not_change_the_data() -> None:
    found = scenes()
    image, labels = found.val[0]  # type: ignore[index]
    image.zero_()
    labels.zero_()
    again = found.val[0]  # type: ignore[index]
    assert again[0].any()
    assert again[1].any()


def test_it_ends() -> None:
    found = scenes(train=3, val=1, test=1)
    assert len(list(found.train)) == 3  # type: ignore[call-overload]


def test_the_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    stacked(scenes().train, 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 63}, "size of the scenes must be an integer from 64 to 128, got 63"),
        ({"size": 129}, "got 129"),
        ({"seed": -1}, "seed of the scenes"),
        ({"val": 0}, "val of the scenes must be an integer from 1"),
        ({"train": 1.5}, r"got 1\.5"),
        ({"most": 0}, "most of the scenes must be an integer from 1 to 10, got 0"),
        ({"sides": (0.7, 0.4)}, r"sides of the digits must be two shares .* got \(0\.7, 0\.4\)"),
        ({"sides": [0.5]}, r"got \[0\.5\]"),
        ({"sides": [0.5, 1.1]}, r"got \[0\.5, 1\.1\]"),
        ({"sides": ["0.5", 0.6]}, r"got \['0\.5', 0\.6\]"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        scenes(**options)
