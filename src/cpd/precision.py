"""Precision: a run in float64 stays in float64.

Many networks compute a norm or a softmax in float32, whatever they are given. A proof in float64
would end at float32's rounding there, so such casts are widened while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Widened(TorchDispatchMode):
    """Every operator that is told to make float32 makes float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        wide = [torch.float64 if x is torch.float32 else x for x in args]
        named = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return func(*wide, **named)


@contextmanager
def widened(dtype: torch.dtype | None) -> Iterator[None]:
    """Run in float64 throughout, where `dtype` is that."""
    if dtype is not torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(before)
