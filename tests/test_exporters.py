"""Exporters: ONNX computes what PyTorch does; an artefact comes back bit for bit or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cpd import exporters, files
from cpd.choose import choose
from cpd.comb import comb
from cpd.cut import cut
from cpd.errors import (
    ArtefactError,
    ExportError,
    InputError,
    OutputError,
    PlanMismatch,
)
from cpd.exporters import _call
from cpd.plan import Plan

TENSORS, PLAN, MANIFEST = "model.safetensors", "plan.json", "manifest.json"


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


class Attention(nn.Module):
    """Tokens with a position buffer outside the state dict, one attention, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)
        self.register_buffer("place", torch.randn(6, 16), persistent=False)

    def forward(self, tokens: Tensor, weight: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.embed(tokens) + self.place
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = (x * weight[..., None]).mean(1) * scale
        return {"logits": self.head(x), "features": x}


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1).softmax(0)


class Tied(nn.Module):
    """A shared parameter, a buffer that lies across memory, one parameter in channels-last."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 6, bias=False)
        self.decode = nn.Linear(6, 6, bias=False)
        self.conv = nn.Conv2d(6, 6, 1)
        if tied:
            self.decode.weight = self.encode.weight
        self.register_buffer("across", torch.randn(6, 6).T)
        self.register_buffer("hidden", torch.randn(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.decode(self.encode(x)) @ self.across + self.hidden
        return self.conv(x[..., None, None])


def narrowed(model: nn.Module, x: Any, keep: float = 0.6) -> Plan:
    """A plan that keeps about the share ``keep`` of the parameters; 1.0 keeps everything."""
    groups = comb(model, x)
    scores = {group.name: torch.arange(group.size, dtype=torch.float64) for group in groups}
    return choose(groups, scores, target=f"params={keep}")


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return list(session.run(None, feed))


# onnx --------------------------------------------------------------------------------------------


def test_onnx_runs_at_any_batch_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = convnet()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    path = exporters.onnx(model, torch.randn(1, 3, 9, 9), tmp_path / "new" / "model.onnx")
    assert path == tmp_path / "new" / "model.onnx"
    assert [module.training for module in model.modules()] == flags
    assert list(path.parent.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")
    x = torch.randn(5, 3, 9, 9)
    (found,) = run(path, x)
    assert np.allclose(found, model.eval()(x).detach().numpy(), atol=1e-5)
    content = onnx.load(path)
    assert not any(node.metadata_props for node in content.graph.node)
    assert str(tmp_path) not in str(content)


def test_onnx_leaves_random_state_and_parameters_alone(tmp_path: Path) -> None:
    model = convnet()
    x = torch.randn(2, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    exporters.onnx(model, x, tmp_path / "model.onnx")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_onnx_takes_tuples_and_dicts(tmp_path: Path) -> None:
    model = Attention()
    tokens, weight = torch.randint(0, 11, (3, 6)), torch.rand(3, 6)
    one = exporters.onnx(model, (tokens, weight), tmp_path / "tuple.onnx")
    two = exporters.onnx(
        model, {"scale": 2.0, "weight": weight, "tokens": tokens}, tmp_path / "dict.onnx"
    )
    logits, features = run(one, tokens[:1], weight[:1])
    doubled = run(two, tokens[:1], weight[:1])[1]
    expected = model.eval()(tokens[:1], weight[:1])
    assert np.allclose(logits, expected["logits"].detach().numpy(), atol=1e-5)
    assert np.allclose(doubled, 2 * features, atol=1e-5)


def test_onnx_of_a_fixed_batch_size_must_be_asked_for(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    with pytest.raises(ExportError, match=r"open batch.*dynamic_batch=False"):
        exporters.onnx(FixedBatch(), x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    path = exporters.onnx(FixedBatch(), x, tmp_path / "model.onnx", dynamic_batch=False)
    assert np.allclose(run(path, x)[0], FixedBatch()(x).numpy(), atol=1e-6)


def test_onnx_takes_an_opset(tmp_path: Path) -> None:
    path = exporters.onnx(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "model.onnx", opset=18)
    assert onnx.load(path).opset_import[0].version == 18


def test_onnx_reports_the_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpd.exporters._call.TOLERANCE_ELSE", -1.0)
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(ExportError, match=r"batch size 2: .* differs from the model by \d"):
        exporters.onnx(convnet(), torch.randn(2, 3, 8, 8), target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    exporters.onnx(convnet(), torch.randn(2, 3, 8, 8), target, check=False)
    onnx.checker.check_model(str(target))


@pytest.mark.parametrize(("size", "compared"), [(1, [1, 2]), (2, [2, 3]), (4, [4, 5])])
def test_onnx_is_compared_at_two_batch_sizes(
    size: int, compared: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr("cpd.exporters._call.compared", lambda *given: sizes.append(given[-1]))
    model = nn.Sequential(nn.Linear(4, 3))
    exporters.onnx(model, torch.randn(size, 4), tmp_path / "open.onnx")
    assert sizes == compared
    exporters.onnx(model, torch.randn(size, 4), tmp_path / "fixed.onnx", dynamic_batch=False)
    assert sizes == [*compared, size]
    assert (
        onnx.load(tmp_path / "fixed.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value
        == size
    )


@pytest.mark.parametrize(
    ("want", "have", "difference"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([float("inf"), 2.0], [float("inf"), 2.0], 0.0),
        ([float("nan"), 2.0], [float("nan"), 1.0], 0.5),
        ([], [], 0.0),
    ],
)
def test_the_difference(want: list[float], have: list[float], difference: float) -> None:
    measure = _call.difference
    assert measure(torch.tensor(want), torch.tensor(have)) == difference


def test_onnx_refuses_a_nan_the_model_does_not_have() -> None:
    compare = _call.compared
    with pytest.raises(ExportError, match="'y' at batch size 1"):
        compare("y", torch.ones(1), torch.full((1,), float("nan")), 1)


@pytest.mark.parametrize("inputs", [[torch.randn(1, 3)], "x", (), (1.0,), torch.randn(0, 3, 8, 8)])
def test_onnx_refuses_other_inputs(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="example_inputs"):
        exporters.onnx(convnet(), inputs, tmp_path / "model.onnx")


def test_onnx_says_what_the_model_raised(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Sequential could not be traced"):
        exporters.onnx(convnet(), torch.randn(2, 5, 8, 8), tmp_path / "model.onnx")


def test_onnx_refuses_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        exporters.onnx(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "file" / "model.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(OutputError, match=r"folder\.onnx"):
        exporters.onnx(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "folder.onnx")


# save and load -----------------------------------------------------------------------------------


def saved(folder: Path) -> tuple[nn.Module, nn.Module]:
    """An artefact in ``folder``: the unpruned network and the small one in it."""
    model = convnet()
    plan = narrowed(model, torch.randn(2, 3, 8, 8))
    small = cut(model, plan)
    exporters.save(small, plan, folder)
    return model, small


def same(one: nn.Module, two: nn.Module, x: Tensor) -> bool:
    return torch.equal(one.eval()(x), two.eval()(x))


def test_saved_and_loaded_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model, small = saved(tmp_path / "out")
    other = convnet()  # any weights
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    loaded = exporters.load(tmp_path / "out", other)
    assert same(loaded, small, torch.randn(3, 3, 8, 8))
    assert loaded is not other
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())  # where all kernels agree
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, small, loaded)]
    assert sizes[0] > sizes[1] == sizes[2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST, TENSORS, PLAN]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_cut_attention_comes_back_and_exports(tmp_path: Path) -> None:
    call = {"tokens": torch.randint(0, 11, (3, 6)), "weight": torch.rand(3, 6)}
    small = cut(model := Attention(), plan := narrowed(model, call), verify=False)
    assert any(width.after < width.before for width in plan.widths)
    exporters.save(small, plan, tmp_path / "out")
    loaded = exporters.load(tmp_path / "out", Attention()).eval()
    expected = small.eval()(**call)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded(**call).items())
    path = exporters.onnx(loaded, call, tmp_path / "model.onnx")
    found = run(path, call["tokens"], call["weight"])[0]
    assert np.allclose(found, expected["logits"].detach().numpy(), atol=1e-5)


def empty(model: nn.Module, x: Tensor) -> Plan:
    return narrowed(model, x, keep=1.0)


def test_ties_strides_and_hidden_buffers_come_back(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    model = Tied()
    model.conv = model.conv.to(memory_format=torch.channels_last)
    plan = empty(model, x)
    exporters.save(model, plan, tmp_path / "out")
    assert "decode.weight" not in load_file(tmp_path / "out" / TENSORS)
    for other in (Tied(), Tied(tied=False)):
        loaded = exporters.load(tmp_path / "out", other)
        assert isinstance(loaded, Tied)
        assert loaded.decode.weight is loaded.encode.weight
        assert loaded.across.stride() == model.across.stride()
        assert loaded.conv.weight.stride() == model.conv.weight.stride()
        assert same(loaded, model, x)


def test_a_tie_the_saved_model_did_not_have_is_refused(tmp_path: Path) -> None:
    model = Tied(tied=False)
    exporters.save(model, empty(model, torch.randn(4, 6)), tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"shares 'encode\.weight' and 'decode\.weight'"):
        exporters.load(tmp_path / "out", Tied())


def test_dtypes_come_back(tmp_path: Path) -> None:
    model = convnet().double()
    plan = empty(model, torch.randn(2, 3, 8, 8).double())
    model[6].to(torch.bfloat16)
    exporters.save(model, plan, tmp_path / "out")
    loaded = exporters.load(tmp_path / "out", convnet())
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_plan_is_written_as_it_is_and_extra_is_kept(tmp_path: Path) -> None:
    model = convnet()
    plan = empty(model, torch.randn(2, 3, 8, 8))
    exporters.save(model, plan, tmp_path / "out", extra={"model": "package.module:build"})
    assert (tmp_path / "out" / PLAN).read_text() == plan.to_json()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["extra"] == {"model": "package.module:build"}
    assert set(manifest["files"]) == {TENSORS, PLAN}


def test_save_refuses_what_is_there_unless_told(tmp_path: Path) -> None:
    model, small = saved(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    plan = narrowed(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(OutputError, match="overwrite=True"):
        exporters.save(small, plan, tmp_path)
    nn.init.ones_(small[6].bias)
    exporters.save(small, plan, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, TENSORS, "notes.txt", PLAN]
    assert same(exporters.load(tmp_path, model), small, torch.randn(2, 3, 8, 8))


def test_save_refuses_a_folder_it_cannot_write(tmp_path: Path) -> None:
    model = convnet()
    plan = empty(model, torch.randn(2, 3, 8, 8))
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        exporters.save(model, plan, file)
    with pytest.raises(OutputError, match=r"cannot write|is a file"):
        exporters.save(model, plan, file / "below")
    assert file.read_text() == "mine"


def test_a_crash_while_saving_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, small = saved(tmp_path / "old")
    plan = narrowed(model, torch.randn(2, 3, 8, 8))

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cpd.exporters.artefact._manifest", full)
    with pytest.raises(OutputError, match="No space left"):
        exporters.save(small, plan, tmp_path / "new")
    with pytest.raises(OutputError, match="No space left"):
        exporters.save(small, plan, tmp_path / "old", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
    assert len(list((tmp_path / "old").iterdir())) == 3
    assert same(exporters.load(tmp_path / "old", model), small, torch.randn(2, 3, 8, 8))


def test_save_refuses_a_model_the_plan_did_not_make(tmp_path: Path) -> None:
    model = convnet()
    plan = narrowed(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(InputError, match="not cut by this plan"):
        exporters.save(model, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_refuses_a_plan_that_load_would_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convnet()
    plan = narrowed(model, torch.randn(2, 3, 8, 8))
    monkeypatch.setattr("cpd.reading.LONGEST", 100)
    with pytest.raises(ExportError, match="limited=False"):
        exporters.save(cut(model, plan), plan, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    assert Plan.from_json(plan.to_json(), limited=False).to_json() == plan.to_json()
    with pytest.raises(ArtefactError, match="letters"):
        Plan.from_json(plan.to_json())


@pytest.mark.parametrize("extra", [{"x": object()}, {"x": float("nan")}, {"x": "y" * (1 << 20)}])
def test_save_refuses_an_extra_that_does_not_fit(extra: dict[str, Any], tmp_path: Path) -> None:
    model = convnet()
    with pytest.raises(InputError, match="extra"):
        exporters.save(model, empty(model, torch.randn(2, 3, 8, 8)), tmp_path / "out", extra=extra)
    assert not (tmp_path / "out").exists()


def test_save_refuses_what_tensors_cannot_hold(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> object:
            return {"calls": 3}

        def set_extra_state(self, state: object) -> None:
            assert state

    plan = empty(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(ExportError, match="extra state"):
        exporters.save(nn.Sequential(Stateful(4, 4)), plan, tmp_path / "out")
    with pytest.raises(ExportError, match="meta tensor"):
        exporters.save(nn.Sequential(nn.Linear(4, 4, device="meta")), plan, tmp_path / "out")


# damaged and foreign artefacts -------------------------------------------------------------------


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def sign(folder: Path) -> None:
    """Make the manifest agree with the files again, as a forger would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in (TENSORS, PLAN):
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][name] = {"bytes": len(data), "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [TENSORS, PLAN, MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "folder"])
def test_damaged_files_are_named(name: str, damage: str, tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    file = tmp_path / name
    if damage in ("missing", "folder"):
        file.unlink()
    if damage == "folder":
        file.mkdir()
    cuts = {"empty": lambda _: b"", "truncated": lambda data: data[: len(data) // 2]}
    if damage in cuts:
        edit(file, cuts[damage])
    if damage == "flipped":
        edit(file, lambda data: data[:-9] + bytes([data[-9] ^ 0x7F]) + data[-8:])
    with pytest.raises(ArtefactError, match=name.replace(".", r"\.")):
        exporters.load(tmp_path, model)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x04N.", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "no JSON object"),
        (b"{}", "format None"),
        (b'{"format": 2, "cpd": "9.0"}', "format 2.*'9.0'"),
        (b'{"format": 1}', "no entry for model.safetensors"),
        (b'{"format": 1, "files": {"model.safetensors": 3}}', "no entry"),
        (b" " * ((1 << 20) + 1), "larger than"),
    ],
)
def test_foreign_manifests(content: bytes, said: str, tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtefactError, match=said):
        exporters.load(tmp_path, model)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"version": 1}', b"null", b"\xff\xfe"])
def test_foreign_plans(content: bytes, tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    (tmp_path / PLAN).write_bytes(content)
    sign(tmp_path)
    with pytest.raises(ArtefactError, match=r"plan\.json"):
        exporters.load(tmp_path, model)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"0": {"forward": 3}}, r"0\.forward, which is no number"),
        ({"0": {"stride": "abc"}}, r"0\.stride, which is no number"),
        ({"0": {"nowhere": 3}}, "does not have"),
        ({"nowhere": {"stride": 3}}, "does not have"),
        ({"0": 3}, "does not have"),
        ([], "does not have"),
    ],
)
def test_a_forged_plan_sets_numbers_only(attributes: Any, said: str, tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    content = json.loads((tmp_path / PLAN).read_text())
    (tmp_path / PLAN).write_text(json.dumps(content | {"attributes": attributes}))
    sign(tmp_path)
    with pytest.raises(ArtefactError, match=said):
        exporters.load(tmp_path, model)


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", b"\xff" * 64, (1 << 60).to_bytes(8, "little") + b"{}", b"PK\x03\x04" * 20],
)
def test_foreign_tensor_files(content: bytes, tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    (tmp_path / TENSORS).write_bytes(content)
    sign(tmp_path)
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        exporters.load(tmp_path, model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"0.weight": None}, "'0.weight' is missing"),
        ({"7.weight": torch.ones(3)}, "'7.weight' is not in the model"),
        ({"0.weight": torch.ones(1 << 16)}, r"'0.weight' has shape \(65536,\)"),
        ({"6.bias": torch.ones(4, dtype=torch.int64)}, "'6.bias' is torch.int64"),
    ],
)
def test_tensors_must_fit(change: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    tensors = load_file(tmp_path / TENSORS) | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / TENSORS, metadata={"aliases": "{}", "orders": "{}"})
    sign(tmp_path)
    with pytest.raises(ArtefactError, match=said):
        exporters.load(tmp_path, model)


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        (None, "no table"),
        ({"aliases": "[]", "orders": "{}"}, "no table"),
        ({"aliases": '{"a": 1}', "orders": "{}"}, "no table"),
        ({"aliases": "{}", "orders": '{"6.bias": [1]}'}, "no table"),
        ({"aliases": "{}", "orders": '{"6.bias": [1, 0]}'}, "order of axes"),
        ({"aliases": "{}", "orders": '{"nowhere": [0]}'}, "order of axes"),
        ({"aliases": '{"0.bias": "nowhere"}', "orders": "{}"}, "'nowhere', which is missing"),
    ],
)
def test_foreign_notes(notes: dict[str, str] | None, said: str, tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, metadata=notes)
    sign(tmp_path)
    with pytest.raises(ArtefactError, match=said):
        exporters.load(tmp_path, model)


def test_load_refuses_what_is_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is not a folder"):
        exporters.load(tmp_path / "nowhere", convnet())
    with pytest.raises(ArtefactError, match=r"manifest\.json cannot be read"):
        exporters.load(tmp_path, convnet())


def test_load_refuses_another_model(tmp_path: Path) -> None:
    saved(tmp_path)
    other = convnet()
    other[0] = nn.Conv2d(3, 12, 3)
    with pytest.raises(PlanMismatch):
        exporters.load(tmp_path, other)


def test_nothing_is_pickled() -> None:
    source = Path(exporters.__file__).parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in source.glob("*.py"))
    assert "torch.load" not in text
    assert "torch.save" not in text
    assert "import pickle" not in text


def test_write_text_replaces_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    files.write_text(target, "1")
    files.write_text(target, "2 é")
    assert target.read_text(encoding="utf-8") == "2 é"
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(OutputError, match="cannot write"):
        files.write_text(target / "c", "3")
