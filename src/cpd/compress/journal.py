"""Where a run writes: its folder, its log, its checkpoints. Without a folder nothing is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cpd.compress.config import CompressConfig
from cpd.distill import Loop, exists, newest, write
from cpd.distill.resume import FREE
from cpd.errors import ArtefactError, InputError, OutputError
from cpd.files import TEMPORARY, publish, refusal, save_file, staging, swept, write_text

__all__ = ["Journal", "load_weights"]

# All that a run leaves in its folder, and all that ``overwrite`` takes away.
FILES = (
    "base.onnx",
    "base.onnx.data",
    "config.yaml",
    "log.jsonl",
    "manifest.json",
    "model.onnx",
    "model.onnx.data",
    "model.safetensors",
    "plan.json",
    "report.html",
    "report.json",
)
FOLDERS = ("checkpoints",)

STAGES = ("base", "prune", "recover")


class Journal:
    """One run's folder. Only the main process writes; every process reads."""

    def __init__(self, config: CompressConfig, digest: str, *, main: bool) -> None:
        """Open the folder; ``digest`` tells the network given from others.

        Raises:
            OutputError: the folder holds something already, or cannot be written.
            InputError, ArtefactError: the checkpoint to go on from is of another run, or damaged.
        """
        self.config, self.main = config, main
        self.identity = {"config": config.fingerprint(), "network": digest}
        self.folder = None if config.output is None else Path(config.output)
        self.resumed: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.weights: dict[str, str] = {}
        if self.folder is None:
            return
        if main:
            swept(self.folder)
            swept(self.folder / "checkpoints")
        if config.resume and exists(self.checkpoint):
            self.resumed = self._resume()
            self.history = list(self.resumed["history"])
            self.weights = dict(self.resumed.get("weights", {}))
        elif main:
            self._begin(self.folder)

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        assert self.folder is not None
        return self.folder / "checkpoints" / "last.safetensors"

    def _begin(self, folder: Path) -> None:
        """An empty folder with the configuration in it."""
        try:
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder} is a file; choose a folder for output")
            if folder.is_dir() and any(folder.iterdir()):
                self._clear(folder)
        except OSError as error:
            raise refusal(folder, error) from error
        write_text(folder / "config.yaml", _yaml(self.config.to_dict()))
        write_text(folder / "log.jsonl", "")

    def _clear(self, folder: Path) -> None:
        names = {path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY)}
        ours = names <= {*FILES, *FOLDERS} and "manifest.json" not in names
        if not self.config.overwrite and not (self.config.resume and ours):
            raise OutputError(
                f"{folder} is not empty. Choose another output, go on from its checkpoint with "
                "resume, or replace the run in it with overwrite"
            )
        for name in FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)

    def _resume(self) -> dict[str, Any]:
        """The checkpoint, and the log cut back to its moment."""
        saved: Any = newest(self.checkpoint)
        if not isinstance(saved, dict) or "identity" not in saved:
            raise ArtefactError(f"{self.checkpoint} is not a checkpoint of cpd.compress")
        _agree(saved["identity"], self.identity, self.checkpoint)
        if self.main and self.log_path.exists():
            os.truncate(self.log_path, min(saved["log"], self.log_path.stat().st_size))
        return saved

    @property
    def log_path(self) -> Path:
        """The log: one JSON object a line."""
        assert self.folder is not None
        return self.folder / "log.jsonl"

    def record(self, **entry: Any) -> None:
        """Note something for the history of the report, and for the log."""
        self.history.append(entry)
        self.log(**entry)

    def log(self, **entry: Any) -> None:
        """Append a line to the log."""
        if self.folder is None or not self.main:
            return
        try:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise refusal(self.log_path, error) from error

    def save(self, stage: str, loop: Loop, **values: Any) -> None:
        """Write the checkpoint: enough to go on from here exactly.

        Raises:
            NonFiniteLoss: the weights are not finite; the checkpoint before stays.
        """
        state = loop.state_dict()
        if self.folder is None or not self.main:
            return
        saved = {"identity": self.identity, "stage": stage, "history": self.history, "loop": state}
        length = self.log_path.stat().st_size if self.log_path.exists() else 0
        values |= {"log": length, "weights": self.weights}
        write(self.checkpoint, {**saved, **values}, generations=True)

    def save_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Write weights next to the checkpoint, for later runs (``weights=``) and for resuming."""
        if self.folder is None or not self.main:
            return
        path = self.folder / "checkpoints" / name
        with staging(path.parent) as temporary:
            save_file({n: t.contiguous() for n, t in weights.items()}, temporary / name)
            self.weights[name] = _hash(temporary / name)
            publish(temporary / name, path)

    def load_weights(self, model: nn.Module, name: str) -> None:
        """Load what ``save_weights`` wrote.

        Raises:
            ArtefactError: it is gone or damaged.
        """
        assert self.folder is not None
        path = self.folder / "checkpoints" / name
        if name in self.weights and path.exists() and _hash(path) != self.weights[name]:
            raise ArtefactError(
                f"cannot read the weights {path}: its checksum is another than the checkpoint "
                "notes. Take away the folder checkpoints, and the run begins anew"
            )
        load_weights(model, path)


def _hash(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file into a network.

    Raises:
        ArtefactError: no such file, or a damaged one. InputError: its tensors do not fit.
    """
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"cannot read the weights {path}: {error}") from error
    except RuntimeError as error:
        raise InputError(f"the weights in {path} do not fit: {error}") from error


def _agree(saved: Mapping[str, str], mine: Mapping[str, str], path: Path) -> None:
    """Refuse a checkpoint of another configuration or network."""
    was, now = json.loads(saved["config"]), json.loads(mine["config"])
    changed = [
        f"{k} was {was.get(k)!r}, is {v!r}" for k, v in now.items() if _differs(k, was.get(k), v)
    ]
    if changed:
        raise InputError(f"{path} is of another run: {'; '.join(changed)}. Resume it as it was")
    if saved["network"] != mine["network"]:
        raise InputError(f"{path} is of a run on another network, or on other weights of this one")


def _differs(name: str, was: Any, now: Any) -> bool:
    """Whether a key decides otherwise; stages may differ in what needs less memory, and older runs
    say nothing of options that came later.
    """
    if name not in STAGES or not isinstance(was, dict) or not isinstance(now, dict):
        return bool(was != now)
    return any(was.get(key, value) != value for key, value in now.items() if key not in FREE)


def _yaml(values: Mapping[str, Any]) -> str:
    """YAML where its library is installed, else JSON, which is YAML too."""
    try:
        import yaml
    except ModuleNotFoundError:
        return json.dumps(values, indent=2) + "\n"
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return text
