"""Artefacts on the hub: the library itself, with a folder in place of the network."""

from __future__ import annotations

import shutil
import socket
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import cpd
from cpd import errors
from cpd.exporters import hub

huggingface_hub = pytest.importorskip("huggingface_hub")

FILES = {"manifest.json", "model.safetensors", "plan.json"}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def artefact(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    small, plan = cpd.prune(network(), torch.zeros(2, 6), target="params=0.5")
    folder = cpd.save(small, plan, tmp_path / "mine")
    (folder / "log.jsonl").write_text("not for others")
    return small, folder


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What crosses the network, as files of a folder."""
    store = tmp_path / "remote"

    def create_repo(api: Any, repository: str, **options: Any) -> None:
        assert options["exist_ok"]
        (store / repository).mkdir(parents=True, exist_ok=True)

    def upload_folder(api: Any, *, repo_id: str, folder_path: str, **options: Any) -> Any:
        for path in Path(folder_path).iterdir():
            if any(fnmatch(path.name, each) for each in options["allow_patterns"]):
                shutil.copy(path, store / repo_id)
        return SimpleNamespace(commit_url=f"commit of {repo_id}")

    def snapshot_download(repository: str, **options: Any) -> str:
        assert set(options["allow_patterns"]) == FILES
        if not (store / repository).is_dir():
            raise OSError(f"404: no {repository}")
        return str(store / repository)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return store


def test_what_is_pushed_is_pulled_bit_for_bit(
    artefact: tuple[nn.Module, Path], remote: Path
) -> None:
    small, folder = artefact
    assert hub.push(folder, "someone/small", private=True) == "commit of someone/small"
    assert {path.name for path in (remote / "someone/small").iterdir()} == FILES
    x = torch.randn(3, 6)
    again = cpd.load(hub.pull("someone/small"), network())
    assert torch.equal(again(x), small(x))


def test_what_is_forged_or_missing_is_refused(
    artefact: tuple[nn.Module, Path], remote: Path, tmp_path: Path
) -> None:
    _, folder = artefact
    hub.push(folder, "someone/small")
    tensors = remote / "someone/small" / "model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(errors.ArtefactError, match="another sha256"):
        cpd.load(hub.pull("someone/small"), network())
    with pytest.raises(errors.ArtefactError, match=r"nobody/none cannot be read: .*404"):
        hub.pull("nobody/none")
    (folder / "plan.json").unlink()
    with pytest.raises(errors.ArtefactError, match=r"has no plan\.json"):
        hub.push(folder, "someone/small")


def test_what_the_hub_refuses_and_a_missing_package(
    artefact: tuple[nn.Module, Path], remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise OSError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refused)
    with pytest.raises(errors.OutputError, match=r"cannot be written to: .*403"):
        hub.push(artefact[1], "someone/small")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(errors.ExportError, match="needs the package huggingface_hub"):
        hub.pull("someone/small")


def test_without_a_network_the_error_says_what_to_look_at(
    artefact: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the library below raises, for which huggingface_hub has no class of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
    with pytest.raises(errors.OutputError, match=r"cannot be written to: .*Check the network"):
        hub.push(artefact[1], "someone/small", token="hf_x")
    with pytest.raises(errors.ArtefactError, match=r"cannot be read: .*Check the network"):
        hub.pull("someone/small", cache_dir=tmp_path / "cache")


def test_options_are_those_of_the_library() -> None:
    """The real functions take what is given here."""
    import inspect

    api = huggingface_hub.HfApi
    assert {"repo_id", "folder_path", "allow_patterns"} <= set(
        inspect.signature(api.upload_folder).parameters
    )
    assert {"private", "exist_ok", "token"} <= set(inspect.signature(api.create_repo).parameters)
    known = set(inspect.signature(huggingface_hub.snapshot_download).parameters)
    assert {"revision", "allow_patterns"} <= known
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    assert issubclass(HfHubHTTPError, OSError)
    assert issubclass(RepositoryNotFoundError, OSError)
