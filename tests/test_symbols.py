"""Sizes under capture: the arithmetic of numbers, and what is the same for all inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.sym_node import SymNode

from cpd.calls import Uncapturable
from cpd.capture import capture
from cpd.forward import Forward, bound
from cpd.symbols import Count, Sizes

FORMULAS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b + 2 * a - 1,
    "padded": lambda a, b: a + (7 - a % 7) % 7,
    "windows": lambda a, b: (49 * 96 * a * ((b + 6) // 7)) // (49 * ((b + 6) // 7)),
    "uneven": lambda a, b: (a * b) // (b + 3),
    "most": lambda a, b: torch.sym_max(a, b) * torch.sym_min(a, 5),
    "compared": lambda a, b: a * b > b + 3,
    "equal": lambda a, b: 2 * a == b,
    "real": lambda a, b: torch.sym_float(a) / 2 + b**2,
    "rounded": lambda a, b: round(torch.sym_float(a) / b),
    "negative": lambda a, b: abs(-a) - torch.sym_int(torch.sym_float(b) * 0.5),
}


def _value(x: Any) -> Any:
    return x.node.hint if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool) else x


@pytest.mark.parametrize("name", FORMULAS)
@given(a=st.integers(1, 300), b=st.integers(1, 300))
def test_a_computed_size_is_what_numbers_give(name: str, a: int, b: int) -> None:
    """For the sizes at hand."""
    env = Sizes()
    found = _value(FORMULAS[name](env.size(a), env.size(b)))
    wanted = FORMULAS[name](a, b)
    assert found == wanted
    assert type(found) is type(wanted)


def test_a_size_that_cancels_out_is_a_number() -> None:
    """What is the same for all inputs is known to be; what is by chance is not."""
    env = Sizes()
    a, b = env.size(14), env.size(28)
    for number in (a - a, (a * b * 96) // (a * b), (2 * a) // a, a * 0, a // a):
        assert type(number) is int
    for size in (a % 7, b - 2 * a, b // a, torch.sym_min(a, 7), (7 - a % 7) % 7, 10**8 // a):
        assert isinstance(size, torch.SymInt)
    assert (a + b == b + a) is True
    for question in (a == 14, a > 3, a < 10**8, b > a, a % 7 == 0, b == 2 * a):
        assert isinstance(question, torch.SymBool)
    for never in (a % 100003 == 100002, a % 100003 > 100001, a == 10**6 + 3, a + 1 == b + 12345):
        assert isinstance(never, torch.SymBool)  # no row has it, other inputs may
        assert isinstance(torch.sym_not(never), torch.SymBool)
    assert (a * b + 3 > 0) is True
    assert (a >= 1) is True


def test_what_is_equal_need_not_be_the_same() -> None:
    """One arithmetic on whole numbers, real ones and truths, in any order."""
    for turned in (False, True):
        env = Sizes()
        whole = env.size(4)
        kinds: list[Any] = [whole, torch.sym_float(whole)]
        for x in kinds[::-1] if turned else kinds:
            for found in (x * 2, x + 1, x - 1, abs(x)):
                assert type(found) is type(x)
                assert type(_value(found)) is (int if x is whole else float)


def test_a_division_by_zero_is_one() -> None:
    """As with numbers."""
    env = Sizes()
    a, b = env.size(14), env.size(28)
    with pytest.raises(ZeroDivisionError):
        a // (b - 2 * a)


@given(sizes=st.lists(st.integers(1, 4), min_size=4, max_size=4), order=st.permutations(range(4)))
def test_the_layout_of_a_tensor_is_that_of_real_ones(sizes: list[int], order: list[int]) -> None:
    """Contiguity and channels last, for any order of the axes."""
    real = torch.empty(sizes).permute(order)
    env = Sizes()
    made = [[env.size(n).node for n in part] for part in (real.shape, real.stride())]

    def asked(method: str) -> Any:
        return getattr(made[0][0], method)(*made).hint

    assert asked("is_contiguous") == real.is_contiguous()
    last = real.is_contiguous(memory_format=torch.channels_last)
    assert asked("is_channels_last_contiguous_2d") == last
    assert bool(asked("is_non_overlapping_and_dense_indicator"))


def test_every_operator_of_pytorch_is_computed() -> None:
    """None is left to the algebra of expressions."""
    left = {
        name
        for name, method in vars(SymNode).items()
        if name.startswith("_") and not name.startswith("__") and callable(method)
    }
    ours = {name for name in vars(Count) if name.startswith("_")}
    assert left - ours == {"_value_eq", "_value_hash", "_graph_repr"}


class _Padded(nn.Module):
    """Windows of seven, padded where they must be."""

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.least = least

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width, channels = x.shape
        if width > self.least:
            x = nn.functional.pad(x, (0, 0, 0, (7 - width % 7) % 7))
        parts = x.view(batch, x.shape[1] // 7, 7, channels).mean(2)
        return parts.reshape(batch, -1)


def _captured(module: nn.Module, *shapes: tuple[int, ...]) -> Forward:
    return capture(module, [bound(module, (torch.zeros(shape),), {}) for shape in shapes], [])


@pytest.mark.parametrize("width", [7, 12, 14, 15])
def test_a_padding_that_was_none_is_kept(width: int) -> None:
    """Both widths are filled by whole windows; others are not, and come out the same."""
    from cpd.forward import adopt

    forward = _captured(_Padded(), (2, 14, 3), (3, 28, 3))
    x = torch.randn(4, width, 3)
    module = _Padded()
    adopt(module, forward)
    assert torch.equal(module(x), _Padded()(x))


def test_what_the_code_asks_is_checked() -> None:
    """For sizes with another answer the code would have gone another way."""
    from cpd.forward import adopt

    module = _Padded(least=10)
    adopt(module, _captured(module, (2, 14, 3), (3, 28, 3)))
    assert torch.equal(module(torch.ones(1, 21, 3)), torch.ones(1, 9))
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 7, 3))


class _Rare(nn.Module):
    """Another way for lengths that hardly any input has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x if x.shape[1] % 1009 == 1 else x


def test_a_way_that_no_row_goes_is_refused() -> None:
    """It is no proof that none of the inputs drawn goes it."""
    from cpd.forward import adopt

    module = _Rare()
    adopt(module, _captured(module, (2, 14), (3, 28)))
    assert torch.equal(module(torch.ones(1, 5)), torch.ones(1, 5))
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 1010))


class _Counted(nn.Module):
    """Its code runs as often as an input is long."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, k] * k for k in range(x.shape[1])], 1)


class _Silent(nn.Module):
    """Its code catches whatever goes wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return x * range(x.shape[1])[-1]
        except Exception:  # noqa: BLE001
            return x


@pytest.mark.parametrize("kind", [_Counted, _Silent])
def test_a_size_that_the_code_counts_with_is_refused(kind: type[nn.Module]) -> None:
    """A forward as data cannot hold it."""
    with pytest.raises(Uncapturable, match="fixes a size"):
        _captured(kind(), (2, 14), (3, 28))


def test_operators_ask_nothing() -> None:
    """No check stands in the graph of code that asks nothing."""

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.flatten(1).unsqueeze(1) @ x.flatten(1).unsqueeze(2)).expand(-1, 3, -1)

    graphs = _captured(Plain(), (2, 4, 5), (3, 8, 5)).graphs
    assert not [call for call in graphs["eval"] if "check" in call["op"]]
