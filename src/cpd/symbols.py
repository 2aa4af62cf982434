"""Sizes of a forward under capture, which vary with the batch or the resolution.

PyTorch's own symbolic sizes are expressions, and their algebra takes seconds where images are
padded and cut into windows. Nothing here is solved: the graph under capture says how a size is
computed, and a size is a row of values. The first is the one at hand; the others are what it would
be for other inputs, drawn at random, and only tell whether it is the same for all of them.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.fx.experimental import recording, sym_node, symbolic_shapes
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.experimental.sym_node import METHOD_TO_OPERATOR, SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .calls import Uncapturable

_BELOW = tuple(str(Path(x).parent) + os.sep for x in (str(torch.__file__), __file__))
_ASKING = {x.__file__ for x in (torch, symbolic_shapes, sym_node, recording)} | {__file__}
_ORDERED = ("ge", "gt", "le", "lt")
_LOGIC = ("and", "or", "sym_not", "bitwise_and", "bitwise_or", "bitwise_xor")
# One; small ones and large ones in any order; and one that no threshold in a code exceeds.
_RANGES = ((1, 1), (2, 9), (2, 99), (2, 999), (50, 5000), (50, 5000), (10**9, 10**10))

Row = tuple[Any, ...]


class Sizes(ShapeEnv):
    """Answers every question about sizes by those at hand.

    What the module's own code asked becomes a check in the graph: for sizes with another answer it
    would have gone another way. Operators check their sizes themselves.
    """

    def __init__(self) -> None:
        super().__init__(duck_shape=False)
        self.refused = ""
        self.answers: dict[Any, Row] = {}  # PyTorch asks the same again and again
        self._draw = random.Random(0)
        self._rows: dict[Any, Row] = {}
        self._numbers: dict[Any, Count] = {}

    def size(self, value: int) -> torch.SymInt:
        """Return a size of an input that varies, of the value at hand."""
        row = (value, *(self._draw.randint(*limits) for limits in _RANGES))
        made = Count.of(self, row, same=False)
        made.grows = True
        return torch.SymInt(made)

    def again(self, size: Any) -> torch.SymInt | None:
        """Return the same size as that of another tensor; None where it does not vary."""
        node = size.node if isinstance(size, torch.SymInt) else None
        if not isinstance(node, Count) or node.constant is not None:
            return None
        made = Count.of(self, node.row, same=False)
        made.grows = node.grows
        return torch.SymInt(made)

    def number(self, value: Any) -> Count:
        """Return a number as a node."""
        key = (type(value), value)
        if key not in self._numbers:
            self._numbers[key] = Count.of(self, (value,) * (1 + len(_RANGES)))
        return self._numbers[key]

    def symbol(self, row: Row) -> Any:
        """Return a name for a row, for what of PyTorch asks for an expression."""
        found = sympy.Symbol(f"size_{len(self._rows)}", integer=True)
        self._rows[found] = row
        if isinstance(row[0], int):
            self.backed_var_to_val[found] = sympy.Integer(row[0])
        return found

    def evaluate_sym_node(
        self, sym_node: Any, size_oblivious: bool = False, fallback_value: bool | None = None
    ) -> Any:
        """Return the value at hand; remember what the module's code asked."""
        if type(sym_node) is not Count:
            return super().evaluate_sym_node(sym_node, size_oblivious, fallback_value)
        if sym_node.constant is None and self._asked_by_code():
            self._check(sym_node)
        return sym_node.row[0]

    def _maybe_evaluate_static(  # type: ignore[override]
        self, expr: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Return nothing: what is the same for all inputs is a number already."""
        if expr in self._rows:
            return None
        return super()._maybe_evaluate_static(expr, *args, **kwargs)

    def _asked_by_code(self) -> bool:
        if self._suppress_guards_tls():
            return False
        frame: Any = sys._getframe(2)
        while frame.f_code.co_filename in _ASKING:
            frame = frame.f_back
        return not frame.f_code.co_filename.startswith(_BELOW)

    def _check(self, node: Count) -> None:
        mode: Any = get_proxy_mode()
        if not isinstance(node.row[0], bool):
            self.refuse("its code fixes a size of its inputs, as len() does")
        slot: Any = mode and get_proxy_slot(torch.SymBool(node), mode.tracer, None)
        if slot is None:
            self.refuse("it branches on more than sizes of its inputs and its children's")
        holds = slot.force() if hasattr(slot, "force") else slot
        if not node.row[0]:
            holds = mode.tracer.create_proxy("call_function", torch.sym_not, (holds,), {})
        mode.tracer.create_proxy("call_function", torch._check, (holds,), {})

    def refuse(self, why: str) -> None:
        """Give up; also where code catches all errors."""
        self.refused = why
        raise Uncapturable(why)


class Count(SymNode):
    """A size, or a number or truth that is computed from sizes."""

    row: Row
    shape_env: Any
    constant: Any
    grows: bool
    _name: Any

    @classmethod
    def of(cls, env: Any, row: Row, *, same: bool = True) -> Count:
        """Return a node; a number where the row is the same throughout (and `same` may be)."""
        made = object.__new__(cls)
        made.row, made.shape_env, made.pytype = row, env, type(row[0])
        made._hint, made.fx_node, made._name, made.grows = row[0], None, None, False
        constant = same and row.count(row[0]) == len(row)
        made.constant = row[0] if constant else None
        return made

    @property
    def expr(self) -> Any:
        """A number, or a name that means nothing but this."""
        if self._name is None:
            number = self.constant is not None
            self._name = sympy.sympify(self.constant) if number else self.shape_env.symbol(self.row)
        return self._name

    _expr = expr

    def with_shape_env(self, shape_env: Any) -> SymNode:
        """Return the same in another environment."""
        return Count.of(shape_env, self.row, same=self.constant is not None)

    def maybe_as_int(self) -> int | None:
        """Return the number that it is, or None."""
        return self.constant if self.pytype is int else None

    def maybe_as_float(self) -> float | None:
        """Return the number that it is, or None."""
        return self.constant if self.pytype is float else None

    def maybe_as_bool(self) -> bool | None:
        """Return the truth that it is, or None."""
        return self.constant if self.pytype is bool else None

    def wrap_int(self, num: int) -> SymNode:
        """Return a number as a node."""
        return self.shape_env.number(num)

    def wrap_float(self, num: float) -> SymNode:
        """Return a number as a node."""
        return self.shape_env.number(num)

    def wrap_bool(self, num: bool) -> SymNode:
        """Return a truth as a node."""
        return self.shape_env.number(num)

    def sym_sum(self, args: list[Any]) -> SymNode:
        """Return the sum of sizes."""
        if get_proxy_mode():
            return super().sym_sum(args)
        return _computed(self.shape_env, _sum, args)


def _sum(*row: Any) -> Any:
    return sum(row)


def _chosen(holds: Any, then: Any, other: Any) -> Any:
    return then if holds else other


def _computed(env: Any, function: Callable[..., Any], nodes: Sequence[Any]) -> Count:
    rows = tuple(x.row if isinstance(x, Count) else env.number(x.hint).row for x in nodes)
    key = (function, *rows, *(type(row[0]) for row in rows))  # 1 and 1.0 are equal, not the same
    if key not in env.answers:
        env.answers[key] = _row(function, rows)
    return Count.of(env, env.answers[key])


def _row(function: Callable[..., Any], rows: tuple[Row, ...]) -> Row:
    first, *others = zip(*rows, strict=True)
    made = [function(*first)]
    for values in others:
        try:
            made.append(None if None in values else function(*values))
        except (ArithmeticError, ValueError):
            made.append(None)  # no such inputs
    return tuple(made)


def _method(attribute: str, name: str, operator: Callable[..., Any]) -> Any:
    original: Any = getattr(SymNode, attribute)

    def compute(self: Count, *others: Any) -> Any:
        if get_proxy_mode():
            return original(self, *others)
        found = _computed(self.shape_env, operator, (self, *others))
        if found.constant is not None and not _certain(name, found.constant, (self, *others)):
            return Count.of(self.shape_env, found.row, same=False)
        found.grows = name in ("add", "mul") and all(_grows(x) for x in (self, *others))
        return found

    return compute


def _certain(name: str, answer: Any, nodes: Sequence[Any]) -> bool:
    """Say whether an answer that all rows give holds for all inputs.

    What is equal in all rows is equal; but what differs in all of them may be equal for others
    (a width that is no multiple of seven in any). Which is more is told by the least input for what
    grows with it alone.
    """
    left = [x for x in nodes if x.constant is None]
    if name in ("eq", "ne"):
        return not left or answer is (name == "eq")
    if name in _ORDERED:
        return len(left) < 2 and all(_grows(x) for x in left)
    return not (left and name in _LOGIC)


def _grows(node: Any) -> bool:
    """Say whether a size is never less than for inputs of size one, and has no bound."""
    return node.grows if node.constant is None else node.pytype is int and node.constant > 0


_operators: dict[str, Any] = METHOD_TO_OPERATOR
for _name, _operator in _operators.items():
    _attribute = f"_{_name}_" if f"_{_name}_" in vars(SymNode) else f"_{_name}"
    if _attribute in vars(SymNode) and _name not in ("round", "sym_ite"):
        setattr(Count, _attribute, _method(_attribute, _name, _operator))


def _round(self: Count, ndigits: int | None = None) -> Any:
    if get_proxy_mode():
        return SymNode._round(self, ndigits)  # type: ignore[attr-defined]
    digits = () if ndigits is None else (self.shape_env.number(ndigits),)
    return _computed(self.shape_env, round, (self, *digits))


def _ite(self: Count, then: Any, other: Any) -> Any:
    if get_proxy_mode():
        return SymNode._sym_ite(self, then, other)  # type: ignore[attr-defined]
    found = _computed(self.shape_env, _chosen, (self, then, other))
    return found if self.constant is not None else Count.of(self.shape_env, found.row, same=False)


def _contiguous(order: Sequence[int]) -> Any:
    def found(sizes: list[int], strides: list[int]) -> bool:
        expected = 1
        for axis in order or reversed(range(len(sizes))):
            if sizes[axis] != 1 and strides[axis] != expected:
                return False
            expected *= sizes[axis]
        return True

    return lambda sizes, strides: (
        len(order) in (0, len(sizes)) and (0 in sizes or found(sizes, strides))
    )


def _channels_last(order: Sequence[int]) -> Any:
    def found(sizes: list[int], strides: list[int]) -> bool:
        if len(sizes) != len(order) or strides[1] == 0:
            return False
        least = 0
        for axis in order:
            first = axis == 0 and least == strides[1]
            if sizes[axis] == 0 or strides[axis] < least or first:
                return False
            least = strides[axis] * max(sizes[axis], 1)
        return True

    return found


def _dense(sizes: list[int], strides: list[int]) -> int:
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size != 1 and stride != expected:
            return 0
        expected *= size
    return 1


def _layout(attribute: str, function: Any) -> Any:
    original: Any = getattr(SymNode, attribute)

    def compute(self: Count, sizes: list[Any], strides: list[Any]) -> Any:
        if get_proxy_mode():
            return original(self, sizes, strides)
        answer = function([x.hint for x in sizes], [x.hint for x in strides])
        return Count.of(self.shape_env, (answer,) * (1 + len(_RANGES)), same=False)

    return compute


for _attribute, _function in (
    ("_is_contiguous", _contiguous(())),
    ("_is_channels_last_contiguous_2d", _contiguous((1, 3, 2, 0))),
    ("_is_channels_last_contiguous_3d", _contiguous((1, 4, 3, 2, 0))),
    ("_is_channels_last_strides_2d", _channels_last((1, 3, 2, 0))),
    ("_is_channels_last_strides_3d", _channels_last((1, 4, 3, 2, 0))),
    ("_is_non_overlapping_and_dense_indicator", _dense),
):
    setattr(Count, _attribute, _layout(_attribute, _function))
Count._round, Count._sym_ite = _round, _ite  # type: ignore[attr-defined]
