"""Symbolic sizes: the same algebra as PyTorch's, and its answers without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from cpd.symbols import Sizes

FORMULAS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b + 2 * a - 1,
    "padded": lambda a, b: a + (7 - a % 7) % 7,
    "windows": lambda a, b: (49 * 96 * a * ((b + 6) // 7)) // (49 * ((b + 6) // 7)),
    "uneven": lambda a, b: (a * b) // (b + 3),
    "most": lambda a, b: torch.sym_max(a, b) * torch.sym_min(a, 5),
    "compared": lambda a, b: a * b > b + 3,
    "equal": lambda a, b: 2 * a == b,
}


def _symbols(env: ShapeEnv) -> list[Any]:
    from torch._dynamo.source import ConstantSource

    made = []
    for name, value in (("a", 12), ("b", 30)):
        source = ConstantSource(name)
        symbol = env.create_symbol(value, source, DimDynamic.DYNAMIC)
        made.append(env.create_symintnode(symbol, hint=value, source=source))
    return made


@pytest.mark.parametrize("name", FORMULAS)
def test_the_algebra_is_pytorchs(name: str) -> None:
    """Expressions put off come out as those made at once, and so do their values."""
    late = FORMULAS[name](*_symbols(Sizes()))
    plain = FORMULAS[name](*_symbols(ShapeEnv(duck_shape=False)))
    assert late.node.hint == plain.node.hint == FORMULAS[name](12, 30)
    assert str(late.node.expr) == str(plain.node.expr)


def test_division_by_zero_is_refused() -> None:
    """As in PyTorch."""
    a, _ = _symbols(Sizes())
    with pytest.raises(ZeroDivisionError):
        a // (a - a)


def test_a_question_of_code_is_noted_once_it_depends_on_sizes() -> None:
    """Operators' questions and those with one answer for all sizes are not."""
    env = Sizes()
    a, b = _symbols(env)
    assert a < b
    assert a * 0 == 0
    assert [str(x.rel_op) for x in env.asked] == ["<"]
