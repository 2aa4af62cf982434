"""ade20k, cityscapes, imagenet: tiny folders of the exact layout, and what is wrong in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cpd import _torchvision, data
from cpd.data import ade20k, cityscapes, imagenet
from cpd.data._augment import distortion
from cpd.data._files import MEAN, STD
from cpd.distill import Batches, examples
from cpd.errors import InputError

NOISE = np.random.default_rng(0)


def save(path: Path, pixels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def noise(high: int, wide: int) -> Any:
    return NOISE.integers(0, 256, (high, wide, 3))


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    sizes = {"training": [(40, 60), (50, 30), (32, 32)], "validation": [(40, 50), (64, 20)]}
    for part, shapes in sizes.items():
        for number, (high, wide) in enumerate(shapes):
            name = f"ADE_{part}_{number:08}"
            save(tmp_path / "images" / part / f"{name}.jpg", noise(high, wide))
            labels = NOISE.integers(0, 151, (high, wide))
            save(tmp_path / "annotations" / part / f"{name}.png", labels)
    return tmp_path


@pytest.fixture
def city(tmp_path: Path) -> Path:
    for part, number in (("train", 0), ("train", 1), ("val", 0)):
        place = tmp_path / "leftImg8bit" / part / "ulm"
        save(place / f"ulm_00000{number}_000019_leftImg8bit.png", noise(32, 64))
        truth = tmp_path / "gtFine" / part / "ulm"
        ids = NOISE.integers(0, 34, (32, 64))
        save(truth / f"ulm_00000{number}_000019_gtFine_labelIds.png", ids)
        save(truth / f"ulm_00000{number}_000019_gtFine_color.png", noise(32, 64))
    return tmp_path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("val", 1)):
        for name in ("n01440764", "n01443537"):
            for number in range(count):
                file = tmp_path / part / name / f"{name}_{number}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise(40, 50).astype(np.uint8)).save(file, format="JPEG")
    return tmp_path


# ade20k ------------------------------------------------------------------------------------------


def test_ade20k(ade: Path) -> None:
    found = ade20k(str(ade), 32, scale=128)
    assert str(found) == "ade20k: 3 train, 2 val, 2 test; 150 classes, input 3x32x32"
    for index in range(3):
        image, labels = found.train[index]  # type: ignore[index]
        assert (image.shape, image.dtype) == ((3, 32, 32), torch.float32)
        assert (labels.shape, labels.dtype) == ((32, 32), torch.int64)
        assert type(image) is type(labels) is torch.Tensor
        assert set(labels.unique().tolist()) <= {*range(150), 255}


def test_ade20k_validation_is_whole(ade: Path) -> None:
    found = ade20k(str(ade), 32, scale=128)
    (image, labels), (tall, _) = found.val[0], found.val[1]  # type: ignore[index]
    assert image.shape == (3, 32, 40)  # shorter side 32
    assert labels.shape == (40, 50)  # labels at their own size
    assert tall.shape == (3, 102, 32)
    numbers = np.array(Image.open(ade / "annotations/validation/ADE_validation_00000000.png"))
    expected = np.where(numbers == 0, 255, numbers.astype(int) - 1)
    assert np.array_equal(labels.numpy(), expected)


def test_pixels_are_normalised(ade: Path) -> None:
    for part in ("training", "validation"):
        for file in (ade / "images" / part).iterdir():
            with Image.open(file) as old:
                size = old.size[::-1]
            save(file, np.full((*size, 3), 128))
    image, _ = ade20k(str(ade), 40).val[0]  # type: ignore[index]
    expected = (128 / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(image.mean((1, 2)), expected, atol=0.02, rtol=0)


def test_what_a_crop_lacks_is_mean_colour_and_no_class(ade: Path) -> None:
    found = ade20k(str(ade), 200, scale=60)
    torch.manual_seed(0)
    image, labels = found.train[0]  # type: ignore[index]
    outside = labels == 255
    border = outside.all(0)
    assert border.any()
    assert image[:, :, border].abs().max() < 0.7  # colours are distorted after padding


def test_a_crop_without_any_label_is_drawn_again(ade: Path) -> None:
    """Nothing could be learned from it."""
    for path in (ade / "annotations" / "training").glob("*.png"):
        labels = np.array(Image.open(path))
        labels[:, : 2 * labels.shape[1] // 3] = 0
        save(path, labels)
    found = ade20k(str(ade), 24, scale=60)
    torch.manual_seed(0)
    crops = [found.train[number][1] for number in (0, 1, 2) * 20]  # type: ignore[index]
    assert sum(bool((labels == 255).all()) for labels in crops) <= 3


def test_colours_are_distorted_not_exchanged() -> None:
    _torchvision.ensure()
    from torchvision import tv_tensors

    distort = distortion()
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    torch.manual_seed(0)
    changed = 0
    for _ in range(60):
        grey = distort(tv_tensors.Image(ramp)).float()
        assert (grey - grey.mean(0)).abs().max() <= 2, "grey has no colour that could change"
        changed += int(not torch.equal(grey, ramp.float()))
        found = distort(tv_tensors.Image(red)).float().mean((1, 2))
        assert found.argmax() == 0
    assert changed > 30


def test_a_flip_moves_image_and_labels_together(tmp_path: Path) -> None:
    left = np.zeros((40, 40), dtype=np.uint8)
    left[:, :20] = 1
    for part in ("training", "validation"):
        save(tmp_path / "images" / part / "a.png", left[..., None].repeat(3, 2) * 255)
        save(tmp_path / "annotations" / part / "a.png", left + 1)
    part: Any = ade20k(str(tmp_path), 16, scale=40).train
    torch.manual_seed(0)
    found = set()
    for _ in range(40):
        image, labels = part[0]
        bright = image.mean(0)
        first, last = labels[:, 0].unique().tolist(), labels[:, -1].unique().tolist()
        known = [column for column in (first, last) if column != [255]]
        found.add(tuple(map(tuple, known)))
        if {1, 0} <= set(labels.unique().tolist()):
            assert bright[labels == 1].median() > bright[labels == 0].median() + 1
    assert {((0,), (1,)), ((1,), (0,))} <= found


def test_the_loop_seeds_augmentation(ade: Path) -> None:
    found = ade20k(str(ade), 32, scale=128)

    def epoch(number: int) -> list[torch.Tensor]:
        batches = Batches(found.train, 3, seed=5, train=False).epoch(number)
        return [x for x, _ in batches]

    assert torch.equal(epoch(0)[0], epoch(0)[0])
    assert not torch.equal(epoch(0)[0], epoch(1)[0])


def test_samples_of_different_size_come_one_by_one(ade: Path) -> None:
    found = ade20k(str(ade), 32, scale=128, hold_out=2)
    assert found.sizes == {"train": 1, "val": 2, "test": 2}
    for part in (found.val, found.test):
        shapes = [tuple(x.shape) for x, _ in Batches(part, 8, seed=0, train=False).epoch(0)]
        assert len(shapes) == 2
        assert all(shape[0] == 1 for shape in shapes)
    assert examples(found.train).shape == (1, 3, 32, 32)


def test_held_out_images_are_not_trained_on(ade: Path) -> None:
    found = ade20k(str(ade), 32, hold_out=1)
    train, val = (
        {part.dataset.files[k] for k in part.indices} for part in (found.train, found.val)
    )  # type: ignore[attr-defined]
    assert not train & val
    assert len(train | val) == 3
    found.train.check()
    found.val.check()
    next(iter(val))[0].write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot read"):
        found.train.check()
    with pytest.raises(InputError, match="hold_out must be from 0 to 2 training samples, got 3"):
        ade20k(str(ade), 32, hold_out=3)


def test_missing_folders_and_partners(ade: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*nowhere/images/training: is"):
        ade20k(str(tmp_path / "nowhere"))
    gone = ade / "annotations/training/ADE_training_00000001.png"
    gone.unlink()
    with pytest.raises(InputError, match=r"ADE_training_00000001.jpg has no annotation: .*png is"):
        ade20k(str(ade))
    for file in (ade / "images/validation").iterdir():
        file.unlink()
    save(gone, np.zeros((50, 30)))
    with pytest.raises(InputError, match=r"images/validation holds no file that ends with \.jpg"):
        ade20k(str(ade))


@pytest.mark.parametrize(
    ("pixels", "text"),
    [
        (np.zeros((40, 61)), r"_00000000\.png is 61 x 40 pixels, but its image .*jpg is 60 x 40"),
        (np.full((40, 60), 151), r"_00000000\.png holds labels that are no class: \[151\]"),
        (np.zeros((40, 60, 3)), r"_00000000\.png must hold one number of 8 bits a pixel"),
    ],
)
def test_a_wrong_annotation_is_named(ade: Path, pixels: Any, text: str) -> None:
    save(ade / "annotations/training/ADE_training_00000000.png", pixels)
    found = ade20k(str(ade), 32)
    with pytest.raises(InputError, match=text):
        found.train[0]  # type: ignore[index]
    with pytest.raises(InputError, match=text):
        found.train.check()  # type: ignore[attr-defined]


def test_a_broken_image_is_named(ade: Path) -> None:
    found = ade20k(str(ade), 32)
    found.train.check()  # type: ignore[attr-defined]
    (ade / "images/training/ADE_training_00000002.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot read the image .*ADE_training_00000002\.jpg"):
        found.train.check()  # type: ignore[attr-defined]


# cityscapes --------------------------------------------------------------------------------------


def test_cityscapes(city: Path) -> None:
    found = cityscapes(str(city), (16, 32), scale=64)
    assert str(found) == "cityscapes: 2 train, 1 val, 1 test; 19 classes, input 3x16x32"
    image, labels = found.train[0]  # type: ignore[index]
    assert image.shape == (3, 16, 32)
    assert set(labels.unique().tolist()) <= {*range(19), 255}
    image, labels = found.val[0]  # type: ignore[index]
    assert image.shape == (3, 32, 64)
    path = city / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png"
    ids = np.array(Image.open(path))
    for number, label in ((7, 0), (8, 1), (13, 4), (24, 11), (33, 18), (0, 255), (14, 255)):
        assert (labels.numpy()[ids == number] == label).all()


def test_cityscapes_with_train_ids(city: Path) -> None:
    for part, number in (("train", 0), ("train", 1), ("val", 0)):
        ids = np.full((32, 64), 255)
        ids[0, :19] = range(19)
        name = f"ulm_00000{number}_000019_gtFine_labelTrainIds.png"
        if (part, number) == ("val", 0):
            with pytest.raises(InputError, match=r"gtFine_labelTrainIds\.png for some images only"):
                cityscapes(str(city))
        save(city / "gtFine" / part / "ulm" / name, ids)
    _, labels = cityscapes(str(city), scale=64).val[0]  # type: ignore[index]
    assert labels[0, :20].tolist() == [*range(19), 255]
    save(
        city / "gtFine/val/ulm" / "ulm_000000_000019_gtFine_labelTrainIds.png",
        np.full((32, 64), 19),
    )
    with pytest.raises(
        InputError, match=r"labelTrainIds\.png holds labels that are no class: \[19\]"
    ):
        cityscapes(str(city)).val.check()  # type: ignore[attr-defined]


def test_cityscapes_partners(city: Path) -> None:
    (city / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(InputError, match=r"leftImg8bit.png has no annotation: .*labelIds.png are"):
        cityscapes(str(city))


# imagenet ----------------------------------------------------------------------------------------


def test_imagenet(net: Path) -> None:
    found = imagenet(str(net), 24, resize=32)
    assert str(found) == "imagenet: 6 train, 2 val, 2 test; 2 classes, input 3x24x24"
    assert [label for _, label in found.val] == [0, 1]  # type: ignore[misc]
    torch.manual_seed(0)
    first, second = found.train[0][0], found.train[0][0]  # type: ignore[index]
    assert first.shape == (3, 24, 24)
    assert type(first) is torch.Tensor
    assert not torch.equal(first, second)
    assert torch.equal(found.val[0][0], found.val[0][0])  # type: ignore[index]
    found.train.check()  # type: ignore[attr-defined]
    images, labels = next(iter(Batches(found.val, 2, seed=0, train=False).epoch(0)))
    assert (images.shape, labels.tolist()) == ((2, 3, 24, 24), [0, 1])


def test_imagenet_validation_is_the_middle(net: Path) -> None:
    file = next((net / "val/n01440764").iterdir())
    pixels = np.zeros((32, 64, 3))
    pixels[:, 24:40] = 255
    save(file, pixels)
    file.rename(file.with_suffix(".JPEG"))
    image, _ = imagenet(str(net), 16, resize=32).val[0]  # type: ignore[index]
    assert image.min() > 1.5  # all white: the central 16 columns


def test_imagenet_faults(net: Path) -> None:
    extra = net / "val/n09999999"
    extra.mkdir()
    with pytest.raises(InputError, match=r"differ in the classes \['n09999999'\]"):
        imagenet(str(net))
    extra.rmdir()
    (net / "train/n01440764/n01440764_1.JPEG").write_bytes(b"")
    found = imagenet(str(net))
    with pytest.raises(InputError, match=r"cannot read the image .*n01440764_1\.JPEG"):
        found.train.check()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="needs the option 'root'"):
        data.resolve("imagenet")


# sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (ade20k, {"size": (512, 512)}, r"^size must be a whole number of pixels, .*\(512, 512\)"),
        (ade20k, {"size": 0}, "^size must be .* at least 1; got 0"),
        (ade20k, {"scale": 20.5}, "^scale must be"),
        (cityscapes, {"size": 512}, r"^size must be \(height, width\) of the .* got 512"),
        (cityscapes, {"size": (512, "a")}, "^width must be"),
        (cityscapes, {"size": (1, 2, 3)}, "^size must be"),
        (imagenet, {"size": "224"}, "^size must be"),
        (imagenet, {"resize": -1}, "^resize must be"),
        (imagenet, {"size": 384}, "^resize must be at least size.*256 < 384"),
    ],
)
def test_sizes_that_are_none(make: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make("nowhere", **options)
