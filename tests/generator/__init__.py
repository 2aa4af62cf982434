"""Random networks, composed of every idiom that people build networks of."""

from __future__ import annotations

from . import attention, convs, gates, joins, moves, norms, recurrent, tokens  # noqa: F401 - they register
from .base import IDIOMS, built
from .network import Spec, build, inputs, names, random, specs

__all__ = ["IDIOMS", "Spec", "build", "built", "inputs", "names", "random", "specs"]
