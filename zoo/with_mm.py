"""MMPretrain and MMSegmentation: the networks of the paper, from the libraries' own files."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .network import Built, Network

PRETRAIN = {
    "resnet50": "resnet/resnet50_8xb32_in1k.py",
    "resnext50": "resnext/resnext50-32x4d_8xb32_in1k.py",
    "mobilenet_v2": "mobilenet_v2/mobilenet-v2_8xb32_in1k.py",
    "deit_small": "deit/deit-small_4xb256_in1k.py",
    "swin_tiny": "swin_transformer/swin-tiny_16xb64_in1k.py",
}
SEGMENTATION = {
    "upernet_deit_small": "vit/vit_deit-s16_upernet_8xb2-160k_ade20k-512x512.py",
    "segformer_b0": "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
    "bisenet_v2": "bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py",
}


class _Absent(ModuleType):
    """Stands for the compiled operators, which mmcv-lite leaves out and these networks never call:
    some files name them at import.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"mmcv-lite has no compiled operator {name}")

        return refuse


def build(library: str, file: str, size: int) -> Built:
    """Return a network of a library's configuration and two images."""
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import DefaultScope

    absent = _Absent("mmcv._ext")
    absent.__spec__ = ModuleSpec("mmcv._ext", None)
    sys.modules.setdefault("mmcv._ext", absent)
    module = importlib.import_module(library)
    importlib.import_module(f"{library}.models")
    folder = Path(module.__file__ or "").parent / ".mim" / "configs"
    config: Any = Config.fromfile(folder / file).model
    config.pretrained = None
    config.pop("init_cfg", None)
    config.pop("pretrained")
    config.backbone.pop("init_cfg", None)
    if library == "mmpretrain":
        config.pop("train_cfg", None)
    with DefaultScope.overwrite_default_scope(library):
        registry = importlib.import_module(f"{library}.registry").MODELS
        model = revert_sync_batchnorm(registry.build(config))
    return model, torch.randn(2, 3, size, size)


def _entries(prefix: str, library: str, files: dict[str, str], size: int) -> list[Network]:
    return [
        Network(f"{prefix}:{name}", partial(build, library, file, size), note=file)
        for name, file in files.items()
    ]


NETWORKS = (
    *_entries("mmpretrain", "mmpretrain", PRETRAIN, 224),
    *_entries("mmsegmentation", "mmseg", SEGMENTATION, 128),
)
