"""What must be done before a library of metrics is imported: it imports torchvision by itself."""

from __future__ import annotations

from cpd import _torchvision

__all__ = ["before_metrics"]


def before_metrics() -> None:
    """Make the import work where torchvision is installed but its operators are missing."""
    _torchvision.ensure()
