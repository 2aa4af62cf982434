"""What a run ran on, for the report."""

from __future__ import annotations

import platform
from importlib import metadata

from cpd.costs import latency

__all__ = ["environment"]

_PACKAGES = ("cpd", "torch", "numpy", "safetensors", "onnx", "onnxruntime", "accelerate")


def environment() -> dict[str, str]:
    """Processor, system, Python and the versions of the packages that matter, where installed."""
    found = {"machine": latency.machine(), "python": platform.python_version()}
    return found | {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
