"""Latency: real runs of ONNX Runtime on small files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cpd.costs import latency
from cpd.errors import ArtefactError, InputError

KINDS = {"float": TensorProto.FLOAT, "int64": TensorProto.INT64, "string": TensorProto.STRING}


def file(path: Path, *shape: int | str, kind: str = "float", width: int = 8) -> Path:
    """An ONNX file: a matrix product for floats, rows of a table for the rest."""
    x = helper.make_tensor_value_info("x", KINDS[kind], shape)
    y = helper.make_tensor_value_info("y", KINDS["string" if kind == "string" else "float"], None)
    weight = np.ones((width, width), dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weights = [numpy_helper.from_array(weight, "w")]
    if kind != "float":
        node = helper.make_node("Gather" if kind == "int64" else "Identity", ["w", "x"], ["y"])
        del node.input[: kind != "int64"]
    graph = helper.make_graph([node], "g", [x], [y], weights)
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def test_one_file(tmp_path: Path) -> None:
    found = latency.onnx(file(tmp_path / "a.onnx", "batch", 8), runs=40, warmup=3, threads=1)
    assert 0 < found.median_ms <= found.p90_ms <= found.p99_ms
    assert found.mean_ms > 0
    assert (found.runs, found.warmup, found.batch, found.threads) == (40, 3, 1, 1)
    assert found.provider == "CPUExecutionProvider"
    text = str(found)
    assert "p99" in text
    assert "40 runs after 3 warm-ups" in text
    assert "1 thread)" in text


def test_summary_is_in_milliseconds() -> None:
    found = latency.summary([n * 1_000_000 for n in range(1, 102)], 5, 2, 1)
    assert found == latency.Latency(51.0, 51.0, 91.0, 100.0, 101, 5, 2, found.provider, 1)


def test_the_larger_network_takes_longer_and_both_take_turns(tmp_path: Path) -> None:
    small = file(tmp_path / "small.onnx", "batch", 8)
    large = file(tmp_path / "large.onnx", "batch", 512, width=512)
    seen: list[tuple[int, int]] = []
    runs = latency.BLOCK + 5
    one, two = latency.compare(
        [large, small],
        runs=runs,
        warmup=2,
        batch=16,
        threads=1,
        progress=lambda done, all_runs: seen.append((done, all_runs)),
    )
    assert one.median_ms > two.median_ms
    assert one.runs == two.runs == runs
    blocks = (latency.BLOCK, 2 * latency.BLOCK, 2 * latency.BLOCK + 5, 2 * runs)
    assert seen == [(done, 2 * runs) for done in blocks]


def test_threads_default_to_the_cores_at_hand(tmp_path: Path) -> None:
    path = file(tmp_path / "a.onnx", "batch", 8)
    assert latency.onnx(path, runs=1, warmup=0).threads == latency._cores() >= 1


def test_integers_stay_small_and_seeds_repeat(tmp_path: Path) -> None:
    path = file(tmp_path / "a.onnx", "batch", 50, kind="int64")
    feeds = [latency.Session(path, 3, 1, seed).feed["x"] for seed in (0, 0, 1)]
    assert feeds[0].shape == (3, 50)
    assert set(np.unique(feeds[0])) == {0, 1}
    assert np.array_equal(feeds[0], feeds[1])
    assert not np.array_equal(feeds[0], feeds[2])


@pytest.mark.parametrize(
    "options", [{"runs": 0}, {"warmup": -1}, {"batch": 0}, {"threads": -1}, {"runs": 1.5}]
)
def test_numbers_out_of_range(options: dict[str, int], tmp_path: Path) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"{name}: expected a whole number"):
        latency.onnx(file(tmp_path / "a.onnx", "batch", 8), **options)


@pytest.mark.parametrize(
    ("shape", "kind", "said"),
    [
        ((4, 8), "float", "fixed batch size 4, not 1.*batch=4"),
        (("batch", "length"), "float", "only its first axis may be open"),
        (("batch", 8), "string", "is a tensor.string."),
    ],
)
def test_inputs_nobody_can_guess(
    shape: tuple[int | str, ...], kind: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        latency.onnx(file(tmp_path / "a.onnx", *shape, kind=kind), runs=1)


def test_a_fixed_batch_is_measured_at_its_size(tmp_path: Path) -> None:
    assert latency.onnx(file(tmp_path / "a.onnx", 4, 8), runs=1, warmup=0, batch=4).batch == 4


def test_files_that_are_missing_foreign_or_do_not_run(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not exist"):
        latency.onnx(tmp_path / "nowhere.onnx")
    (tmp_path / "foreign.onnx").write_bytes(b"GIF89a")
    with pytest.raises(ArtefactError, match="not a valid ONNX file"):
        latency.onnx(tmp_path / "foreign.onnx")
    whole = file(tmp_path / "whole.onnx", "batch", 8)
    whole.write_bytes(whole.read_bytes()[:60])
    with pytest.raises(ArtefactError, match="not a valid ONNX file"):
        latency.onnx(whole)
    table = file(tmp_path / "table.onnx", "batch", 9, kind="int64", width=1)  # no row 1
    with pytest.raises(ArtefactError, match=r"fails to run with inputs of shapes .*\(1, 9\)"):
        latency.onnx(table, runs=1)


def test_device_names_the_machine() -> None:
    text = latency.device()
    assert "cores" in text
    assert "ONNX Runtime" in text


def test_latency_is_a_value() -> None:
    found = latency.summary([1_000_000], 0, 1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.runs = 3
    assert "2 threads" in str(found)
