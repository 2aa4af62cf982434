"""Runs on the meta device, where only shapes are computed.

Code may ask for another device, or hold a tensor that it computed once; both are taken to the meta
device. PyTorch finds many shapes by Python code of its own, so what an operator puts out for
arguments of one form is computed once for all runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_META = torch.device("meta")
_ITEM = torch.ops.aten._local_scalar_dense.default
_PLAIN = frozenset({
    int, float, bool, complex, str, type(None),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
})  # fmt: skip


class OnMeta(TorchDispatchMode):
    """Compute on the meta device whatever device is asked for; may be entered again and again."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Any] = {}
        self._aliasing: dict[
            Any, bool
        ] = {}  # operators -> whether they put out what they were given

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator, or make again what it is known to put out."""
        del types
        kwargs = kwargs or {}
        try:
            form = _form((args, kwargs))
        except _Elsewhere:
            if self._reads(func) and not args[0].is_meta:
                return func(*args, **kwargs)
            args, kwargs = pytree.tree_map_only(torch.Tensor, _moved, (args, kwargs))
            form = _form((args, kwargs))
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        if form is None or self._aliases(func):
            return func(*args, **kwargs)  # views, and what is written into
        key = (func, form)
        known = self._known.get(key)
        if known is None:
            out = _RULES.get(func, func)(*args, **kwargs)
            self._known[key] = _remembered(out)
            return out
        return _made(known)

    def _reads(self, func: Any) -> bool:
        """Whether an operator only shows a part of a tensor, or its value: a constant has one."""
        return func is _ITEM or (self._aliases(func) and not func._schema.is_mutable)

    def _aliases(self, func: Any) -> bool:
        found = self._aliasing.get(func)
        if found is None:
            found = any(x.alias_info is not None for x in func._schema.returns)
            self._aliasing[func] = found
        return found


class _Elsewhere(Exception):
    """A tensor is not on the meta device."""


def _form(value: Any) -> Any:
    """Return what the form of a result depends on; None where that is not known."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise _Elsewhere
        return (value.shape, value.stride(), value.dtype) if _is_plain(value) else None
    if kind in (list, tuple, dict):
        parts = value.items() if kind is dict else value
        found = (kind, *[_form(part) for part in parts])
        return None if None in found else found
    return (kind, value) if kind in _PLAIN else None


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg())


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta else tensor.to(_META)


def _remembered(out: Any) -> Any:
    """Return the shapes of what an operator puts out; None where it is not only tensors."""
    if isinstance(out, torch.Tensor):
        return (tuple(out.shape), out.stride(), out.dtype) if _is_plain(out) else None
    if type(out) in (list, tuple):
        parts = [_remembered(part) for part in out]
        return None if None in parts else (type(out), parts)
    return None


def _made(known: Any) -> Any:
    """Return new tensors of remembered shapes."""
    if len(known) == 2:
        return known[0](_made(part) for part in known[1])
    shape, stride, dtype = known
    return torch.empty_strided(shape, stride, dtype=dtype, device=_META)


def _sampled(tensor: torch.Tensor, grid: torch.Tensor, *options: Any) -> torch.Tensor:
    """Return what `grid_sampler_2d` puts out: (N, C, H, W) and (N, K, L, 2) -> (N, C, K, L)."""
    if (grid.shape[0], grid.shape[-1], grid.dtype) != (tensor.shape[0], 2, tensor.dtype):
        return torch.ops.aten.grid_sampler_2d.default(tensor, grid, *options)  # raises, says why
    return tensor.new_empty((*tensor.shape[:2], *grid.shape[1:-1]))


def _product(
    bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **scales: Any
) -> torch.Tensor:
    """Return what `addmm` puts out: (M,), (N, K), (K, M) -> (N, M)."""
    kinds = {bias.dtype, left.dtype, right.dtype}
    fits = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
    if not fits or bias.shape != right.shape[1:] or len(kinds) > 1:
        return torch.ops.aten.addmm.default(bias, left, right, **scales)
    return left.new_empty((left.shape[0], right.shape[1]))


# PyTorch finds these shapes in milliseconds, by computing corners of points and sums in Python.
_RULES = {
    torch.ops.aten.grid_sampler_2d.default: _sampled,
    torch.ops.aten.addmm.default: _product,
}
