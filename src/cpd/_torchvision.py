"""A guard for one packaging fault: torchvision's CUDA wheel beside the CPU build of torch.

torchvision's compiled library then does not load, its operators stay undeclared, and the import
ends with "operator torchvision::nms does not exist", although networks that never call these
operators would run. The guard declares the two missing schemas, nothing more: calling one of them
still fails.
"""

from __future__ import annotations

import importlib
import sys

import torch

__all__ = ["ensure"]

_MISSING = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def ensure() -> None:
    """Make ``import torchvision`` work where only its operators are missing.

    Where torchvision is absent or healthy, and on every further call, this does nothing. Any other
    failure of the import is passed on as it is.
    """
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
        _declare()
        importlib.import_module("torchvision")


def _declare() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind: half of a package
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _library.append(library)
