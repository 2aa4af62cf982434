"""Formats beside ONNX: PT2 without pickle, OpenVINO, int8; each run by a reader of its own."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import cpd
from cpd import exporters
from cpd.data import digits
from cpd.errors import ArtefactError, ExportError, InputError, OutputError
from test_exporters import Attention, FixedBatch, convnet

IMAGES = torch.randn(2, 3, 8, 8)
KEYWORDS: dict[str, Any] = {
    "weight": torch.rand(2, 6),
    "tokens": torch.arange(12).reshape(2, 6) % 11,
}


def run_pt2(path: Path, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
    return torch.export.load(path).module()(*args, **kwargs)


def run_openvino(path: Path, *args: torch.Tensor) -> torch.Tensor:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return torch.from_numpy(compiled([x.numpy() for x in args])[0])


FORMATS: dict[str, tuple[Any, str, Any]] = {
    "pt2": (exporters.pt2, "model.pt2", run_pt2),
    "openvino": (exporters.openvino, "model.xml", run_openvino),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1, 2])
def test_any_batch_size_of_a_cut_network(name: str, size: int, tmp_path: Path) -> None:
    export, file, run = FORMATS[name]
    small, _ = cpd.prune(convnet(), IMAGES, target="macs=0.6")
    small.train()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    path = export(small, torch.randn(size, 3, 8, 8), tmp_path / "new" / file)
    assert small.training
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    small.eval()
    for count in (1, 3, 5):
        images = torch.randn(count, 3, 8, 8)
        torch.testing.assert_close(run(path, images), small(images), rtol=1e-4, atol=1e-5)
    files = {"pt2": {"model.pt2"}, "openvino": {"model.xml", "model.bin"}}
    assert {each.name for each in path.parent.iterdir()} == files[name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_network_that_fixes_its_batch(name: str, tmp_path: Path) -> None:
    export, file, run = FORMATS[name]
    inputs = torch.randn(2, 6)
    with pytest.raises(ExportError, match="dynamic_batch=False"):
        export(FixedBatch(), inputs, tmp_path / file)
    path = export(FixedBatch(), inputs, tmp_path / file, dynamic_batch=False)
    torch.testing.assert_close(run(path, inputs), FixedBatch()(inputs))


@pytest.mark.parametrize("name", FORMATS)
def test_keywords_and_several_outputs(name: str, tmp_path: Path) -> None:
    export, file, _ = FORMATS[name]
    model = Attention().eval()
    path = export(model, KEYWORDS, tmp_path / file)
    if name == "pt2":
        found, wanted = run_pt2(path, **KEYWORDS), model(**KEYWORDS)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_a_difference_is_an_error_and_the_file_before_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, file, _ = FORMATS[name]
    (tmp_path / file).write_text("old")
    monkeypatch.setattr("cpd.exporters._call.TOLERANCE_ELSE", -1.0)
    with pytest.raises(ExportError, match=r"batch size 2: .* differs from the model by \d"):
        export(convnet(), IMAGES, tmp_path / file)
    assert [each.name for each in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "old"
    export(convnet(), IMAGES, tmp_path / file, check=False)
    assert (tmp_path / file).stat().st_size > 100


@pytest.mark.parametrize("name", FORMATS)
def test_names_and_places_that_cannot_be(name: str, tmp_path: Path) -> None:
    export, file, _ = FORMATS[name]
    with pytest.raises(ExportError, match="must end with"):
        export(convnet(), IMAGES, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="example_inputs"):
        export(convnet(), (), tmp_path / file)
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        export(convnet(), IMAGES, tmp_path / "taken" / file)


def test_pt2_holds_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*args: Any, **options: Any) -> Any:
        raise AssertionError("a pickle was read or written")

    exporters.pt2(convnet(), IMAGES, tmp_path / "first.pt2")  # libraries pickle while imported
    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, blocked)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, blocked)
    path = exporters.pt2(convnet(), IMAGES, tmp_path / "model.pt2")
    with zipfile.ZipFile(path) as archive:
        sizes = {each.filename: each.file_size for each in archive.infolist()}
        texts = [archive.read(name) for name in sizes if name.endswith("_config.json")]
    assert [size for name, size in sizes.items() if "sample_inputs" in name] == [0]
    assert texts
    assert all(b'"use_pickle": true' not in text for text in texts)


def test_openvino_says_that_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ExportError, match="needs the package openvino"):
        exporters.openvino(convnet(), IMAGES, tmp_path / "model.xml")


# --- int8


def trained() -> tuple[nn.Module, Any]:
    """A small network that has learned the digits."""
    torch.manual_seed(0)
    data = digits(size=8)
    layers = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    images = torch.stack([data.train[k][0] for k in range(len(data.train))])  # type: ignore[arg-type]
    labels = torch.tensor([data.train[k][1] for k in range(len(data.train))])  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval(), (data, images)


def accuracy(model: nn.Module, data: Any) -> float:
    images = torch.stack([data.test[k][0] for k in range(len(data.test))])
    labels = torch.tensor([data.test[k][1] for k in range(len(data.test))])
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def test_int8_computes_in_int8_and_keeps_the_accuracy(tmp_path: Path) -> None:
    model, (data, images) = trained()
    source = exporters.onnx(model, images[:2], tmp_path / "model.onnx")
    path = exporters.int8(source, tmp_path / "small" / "int8.onnx", images[:256].split(64))
    assert [each.name for each in path.parent.iterdir()] == ["int8.onnx"]
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") >= 3
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    stored = [w for w in weights.values() if w.dtype == np.int8 and w.ndim == 4]
    assert [w.shape for w in stored] == [(16, 1, 3, 3), (16, 16, 3, 3)]
    assert all(int(np.abs(w).max()) <= 64 for w in stored)  # 7 bits
    before, after = accuracy(model, data), accuracy(exporters.Running(path), data)
    assert accuracy(exporters.Running(source), data) == before > 0.9
    assert after > before - 0.02
    assert not torch.equal(exporters.Running(path)(images[:8]), model(images[:8]))


def test_int8_refuses(tmp_path: Path) -> None:
    path = exporters.onnx(convnet(), IMAGES, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="at least one batch"):
        exporters.int8(path, tmp_path / "int8.onnx", [])
    with pytest.raises(InputError, match="must be tensors"):
        exporters.int8(path, tmp_path / "int8.onnx", [{"x": IMAGES}])
    with pytest.raises(ArtefactError, match="does not exist"):
        exporters.int8(tmp_path / "no.onnx", tmp_path / "int8.onnx", [IMAGES])
    with pytest.raises(ExportError, match="cannot be quantized"):
        exporters.int8(path, tmp_path / "int8.onnx", [IMAGES[:, :2]])
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    (tmp_path / "bad.onnx").write_text("no")
    with pytest.raises(ArtefactError, match="not a valid ONNX file"):
        exporters.Running(tmp_path / "bad.onnx")


def test_the_example_of_prune_then_quantize(tmp_path: Path) -> None:
    from examples import quantize

    rows = quantize.main(tmp_path, runs=20)
    assert [name for name, *_ in rows] == list(quantize.NAMES)
    sizes = [size for _, _, size, _ in rows[:3]]
    assert sizes == sorted(sizes, reverse=True)
    shares = [share for _, share, _, _ in rows]
    assert shares[0] > 0.6  # a short run; processors round in ways of their own
    assert shares[2] > shares[1] - 0.03
    assert abs(shares[3] - shares[1]) < 0.01  # the same network in another runtime
