"""Normalisation: what makes the scores of one group comparable with those of another.

Second-order and first-order scores are in units of the loss already and need none; magnitudes of
layers of different sizes do. Each takes the scores of one group, shape (size,), and returns as
many. Zero stays zero, but where scores are moved into [0, 1] (`minmax`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import UnknownName


def by_sum(scores: torch.Tensor) -> torch.Tensor:
    """s / sum |s|."""
    return _over(scores, scores.abs().sum())


def by_mean(scores: torch.Tensor) -> torch.Tensor:
    """s / mean |s|: what DepGraph does (Fang et al., CVPR 2023)."""
    return _over(scores, scores.abs().mean())


def by_max(scores: torch.Tensor) -> torch.Tensor:
    """s / max |s|."""
    return _over(scores, scores.abs().max())


def by_norm(scores: torch.Tensor) -> torch.Tensor:
    """s / ‖s‖₂: each layer by itself (Molchanov et al., ICLR 2017)."""
    return _over(scores, scores.norm())


def between(scores: torch.Tensor) -> torch.Tensor:
    """(s − min s) / (max s − min s): from 0 to 1."""
    return _over(scores - scores.min(), scores.max() - scores.min())


def _over(scores: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return scores / size if size > 0 else scores


NORMALISERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": by_sum,
    "mean": by_mean,
    "max": by_max,
    "norm": by_norm,
    "minmax": between,
}


def normaliser(name: object) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a normaliser by its name; "none" and None are none.

    Raises `UnknownName` for any other.
    """
    if name is None or name == "none":
        return None
    if not isinstance(name, str) or name not in NORMALISERS:
        raise UnknownName("normaliser", name, (*NORMALISERS, "none"))
    return NORMALISERS[name]
