"""losses.resolve: what a person may write, and what it then computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpd import losses
from cpd.errors import InputError, UnknownName


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 5), torch.randn(4, 5)


def test_the_shelf_is_sorted_and_public() -> None:
    assert list(losses.SHELF) == sorted(losses.SHELF)
    assert set(losses.SHELF) <= set(losses.__all__)


@pytest.mark.parametrize("name", losses.SHELF)
def test_a_name(name: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    terms = losses.resolve(name)(*pair)
    assert list(terms) == [name]
    torch.testing.assert_close(terms[name], losses.SHELF[name](*pair))


def test_options_and_weights(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    spec = {"kd": {"weight": 3.0, "temperature": 4.0}, "dist": None}
    terms = losses.resolve(spec)(*pair)
    assert list(terms) == ["kd", "dist"]
    torch.testing.assert_close(terms["kd"], 3 * losses.kd(*pair, temperature=4.0))
    torch.testing.assert_close(terms["dist"], losses.dist(*pair))


def test_the_spec_is_not_changed() -> None:
    spec: dict[str, dict[str, float]] = {"kd": {"weight": 3.0, "temperature": 4.0}}
    losses.resolve(spec)
    assert spec == {"kd": {"weight": 3.0, "temperature": 4.0}}


def test_it_prints_itself() -> None:
    spec = {"kd": {"weight": 3.0, "temperature": 4.0}, "dist": {}}
    text = "3 * kd(student, teacher, temperature=4.0) + 1 * dist(student, teacher)"
    assert str(losses.resolve(spec)) == text
    assert str(losses.resolve(None)) == "no losses"


@pytest.mark.parametrize("spec", [None, {}])
def test_no_losses(spec: object, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert losses.resolve(spec)(*pair) == {}


def test_a_callable(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    def gap(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (student - teacher).square().mean()

    terms = losses.resolve(gap)(*pair)
    assert list(terms) == ["gap"]
    torch.testing.assert_close(terms["gap"], gap(*pair))


def test_a_callable_with_several_terms_on_any_outputs() -> None:
    def two(student: dict[str, torch.Tensor], teacher: Any) -> dict[str, torch.Tensor]:
        return {"a": student["x"].sum(), "b": torch.tensor(2.0)}

    terms = losses.resolve(two)({"x": torch.ones(3)}, None)
    assert {name: term.item() for name, term in terms.items()} == {"a": 3.0, "b": 2.0}


def test_what_was_resolved_stays() -> None:
    resolved = losses.resolve("kd")
    assert losses.resolve(resolved) is resolved


@pytest.mark.parametrize("value", [torch.zeros(2), 3.0, None])
def test_a_loss_must_return_a_scalar(value: object) -> None:
    with pytest.raises(InputError, match=r"must return a scalar tensor, got (\(2,\)|float|None)"):
        losses.resolve(lambda student, teacher: value)(1, 2)


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("dits", UnknownName, "unknown loss 'dits'; did you mean 'dist'.* Valid names: dist, kd"),
        ({"kd": {"tau": 1.0}}, UnknownName, "of loss 'kd' 'tau'.* names: temperature, weight"),
        ({"kd": {"student": 1.0}}, UnknownName, "option of loss 'kd' 'student'"),
        ({"kd": {"temperature": 0}}, InputError, "temperature must be a finite number > 0"),
        ({"kd": {"weight": -1}}, InputError, "weight of loss 'kd' must be a finite number >= 0"),
        ({"kd": 3.0}, InputError, "options of loss 'kd' must be a mapping"),
        (["kd"], InputError, "a loss is given by a name, a mapping"),
    ],
)
def test_faults_are_met_at_once(spec: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        losses.resolve(spec)
