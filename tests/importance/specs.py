"""Every importance of the shelf, with the options that change what is summed."""

from __future__ import annotations

from typing import Any

from cpd.importance import SHELF

VARIANTS: list[Any] = [
    *SHELF,
    {"hessian": {"mended": True}},
    {"taylor": {"multivariable": False, "members": "all"}},
    {"magnitude": {"p": 1, "aggregate": "max"}},
    {"fpgm": {"members": "all"}},
    {"variance": {"weighted": True}},
    {"activation": {"statistic": "rms"}},
    {"activation": {"statistic": "active"}},
    {"activation": {"aggregate": "sum"}},
    {"variance": {"aggregate": "max"}},
    {"hutchinson": {"kind": "diagonal", "members": "all"}},
    {"kfac": {"members": "out", "normalise": "max"}},
]
