"""Pictures of a run: what the data says, and what teacher and student make of it."""

from __future__ import annotations

import io
from base64 import b64decode
from typing import Any

import numpy as np
import torch
from matplotlib.image import imread
from torch import nn

from cpd import data
from cpd.compress import compress
from cpd.report.pictures import colours


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 11, 1)
    )


def pixels(png: str) -> np.ndarray[Any, Any]:
    return (imread(io.BytesIO(b64decode(png)))[..., :3] * 255).round().astype(int)


def run(**changes: Any) -> Any:
    stage = {"batch_size": 4, "optimizer": {"name": "SGD", "lr": 0.05}}
    given = {
        "data": data.scenes(train=8, val=4, test=7),
        "task": "segmentation",
        "losses": "cwd",
        "target": "macs=0.8",
        "interval": 1,
        "events": 1,
        "prune": stage,
        "recover": {**stage, "epochs": 1},
        "onnx": False,
    }
    return compress(network(), **{**given, **changes})


def test_test_samples_as_both_networks_see_them() -> None:
    result = run()
    shown = result.report.pictures
    assert [each.title for each in shown] == [f"test sample {number}" for number in range(6)]
    assert all(list(each.panels) == ["image", "label", "teacher", "student"] for each in shown)
    test = data.scenes(train=8, val=4, test=7).test
    for number in (0, 5):
        image, labels = test[number]
        panels = {name: pixels(png) for name, png in shown[number].panels.items()}
        assert (panels["label"] == colours(labels.numpy())).all()
        low, high = image.min(), image.max()
        stretched = ((image - low) / (high - low) * 255).permute(1, 2, 0)
        assert np.abs(panels["image"] - stretched.numpy()).max() <= 0.51
        result.model.eval()
        with torch.no_grad():
            logits = result.model(image[None])
        called = nn.functional.interpolate(logits, size=(64, 64), mode="bilinear").argmax(1)
        assert (panels["student"] == colours(called[0].numpy())).all()


def test_without_a_teacher_the_unpruned_network_is_shown() -> None:
    shown = run(teacher=None).report.pictures
    assert [list(each.panels)[2:] for each in shown] == [["unpruned", "student"]] * 6


def test_no_more_than_there_are() -> None:
    assert len(run(data=data.scenes(train=8, val=4, test=2)).report.pictures) == 2
