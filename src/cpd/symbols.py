"""Sizes of a forward under capture: symbols that the sizes at hand answer for."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.fx.experimental import recording, sym_node, symbolic_shapes
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.sym_node import METHOD_TO_OPERATOR, SymNode, magic_methods
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_ASKING = {x.__file__ for x in (torch, symbolic_shapes, sym_node, recording)} | {__file__}


class Sizes(ShapeEnv):
    """Answers every question about symbolic sizes by the sizes at hand, and notes what the module's
    own code asked; operators check their sizes themselves.

    PyTorch's own would first try to prove the answer for all sizes, which takes seconds where
    images are padded and cut into windows.
    """

    def __init__(self) -> None:
        super().__init__(duck_shape=False)
        self.asked: list[Any] = []
        self.numbers: dict[int, SymNode] = {}

    def create_symintnode(self, *args: Any, **kwargs: Any) -> Any:
        """Return a symbolic integer whose algebra is put off."""
        made = super().create_symintnode(*args, **kwargs)
        if not isinstance(made, torch.SymInt):
            return made
        node = made.node
        return torch.SymInt(Count(node._expr, self, int, node.hint))

    def evaluate_sym_node(self, sym_node: SymNode, *args: Any, **kwargs: Any) -> Any:
        """Return the value at hand."""
        node: Any = sym_node
        if type(node) is not Count or (node.pytype is int and node.expr.is_number):
            return super().evaluate_sym_node(node, *args, **kwargs)
        if self._asks():
            self._note(node.expr, node.hint)
        return node.hint

    def _evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        value = orig_expr.xreplace(self.backed_var_to_val)
        if value.free_symbols or orig_expr.is_number:
            return super()._evaluate_expr(orig_expr, *args, **kwargs)
        if self._asks():
            self._note(orig_expr, value)
        return value

    def _asks(self) -> bool:
        """Say whether it is the module's code that asks, not an operator."""
        if self._suppress_guards_tls():
            return False
        frame: Any = sys._getframe(2)
        while frame.f_code.co_filename in _ASKING:
            frame = frame.f_back
        return not frame.f_code.co_filename.startswith((_TORCH, _HERE))

    def _note(self, expr: Any, value: Any) -> None:
        """Remember the answer to a question of the module's code."""
        if not expr.free_symbols:
            return  # the same for all sizes
        if isinstance(value, bool) or value is sympy.true or value is sympy.false:
            self.asked.append(expr if value else sympy.Not(expr))
        else:
            self.asked.append(sympy.Eq(expr, value))


class Count(SymNode):
    """A symbolic integer or truth with its algebra put off, or done once.

    Operators ask the same of the same sizes time and again, and PyTorch would do the algebra of
    each question before it is answered by the sizes at hand.
    """

    _held: Any  # an expression, or what it is to be made of

    def __init__(self, expr: Any, env: Any, kind: type, hint: Any, **more: Any) -> None:
        super().__init__(expr, env, kind, hint, **more)

    @property
    def _expr(self) -> Any:
        if type(self._held) is tuple:
            self._held = _algebra(*self._held)
        return self._held

    @_expr.setter
    def _expr(self, value: Any) -> None:
        self._held = value

    def wrap_int(self, num: int) -> SymNode:
        """Return a number as a node."""
        env: Any = self.shape_env
        if num not in env.numbers:
            env.numbers[num] = Count(sympy.Integer(num), env, int, num, constant=num, fx_node=num)
        return env.numbers[num]

    def maybe_as_bool(self) -> bool | None:
        """Return a truth that holds for all sizes, where that is known already."""
        return None if type(self._held) is tuple else super().maybe_as_bool()


@lru_cache(maxsize=1 << 14)
def _algebra(method: str, one: Any, two: Any) -> Any:
    """Return the expression of a sum, product, comparison, ..., where it is needed."""
    one, two = (_algebra(*x) if type(x) is tuple else x for x in (one, two))
    if method == "int_floordiv":
        quotient = one / two
        if quotient.as_numer_denom()[1] == 1:  # PyTorch finds it too, and simplifies for seconds
            return quotient
    function: Any = magic_methods[method]
    return function(one, two)


def _attribute(method: str) -> str:
    return f"_{method}_" if method in ("and", "or") else f"_{method}"


def _light(method: str, kind: type) -> Any:
    """Return the method of a node that computes with the sizes at hand."""
    original: Any = getattr(SymNode, _attribute(method))
    operator: Any = METHOD_TO_OPERATOR[method]

    def compute(self: Count, other: SymNode) -> SymNode:
        env: Any = self.shape_env
        if type(other) is not Count or get_proxy_mode() or env._replacements_version_counter:
            return original(self, other)
        if kind is int and not self.pytype is other.pytype is int:
            return original(self, other)
        held: Any = (method, self._held, other._held)
        if kind is int:  # others ask whether it is a number
            held = _algebra(*held)
        return Count(held, env, kind, kind(operator(self.hint, other.hint)))

    return compute


def _kept(method: str) -> Any:
    """Return the method of a node as it is, with a result that computes so too."""
    original: Any = getattr(SymNode, _attribute(method))

    def compute(self: Count, *others: SymNode) -> SymNode:
        made = original(self, *others)
        if type(made) is not SymNode or type(made.hint) is not int:
            return made
        return Count(made._expr, self.shape_env, int, made.hint, constant=made.constant)

    return compute


for _method in ("add", "sub", "mul", "int_floordiv", "sym_max", "sym_min"):
    setattr(Count, _attribute(_method), _light(_method, int))
for _method in ("eq", "ne", "ge", "gt", "le", "lt", "and", "or"):
    setattr(Count, _attribute(_method), _light(_method, bool))
for _method in ("mod", "neg", "abs", "pos", "pow_by_natural"):
    setattr(Count, _attribute(_method), _kept(_method))
