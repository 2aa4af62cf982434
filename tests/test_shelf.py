"""Names and options from outside: found, checked, or refused with what is there."""

from __future__ import annotations

import pytest

from cpd import _shelf
from cpd.errors import InputError, UnknownName


def make(size: int, *, depth: int = 1) -> tuple[int, int]:
    return size, depth


SHELF = {"make": make}


def test_parse() -> None:
    assert _shelf.parse("thing", "a") == {"a": {}}
    assert _shelf.parse("thing", {"a": None, "b": {"x": 1}}) == {"a": {}, "b": {"x": 1}}


def test_parse_copies() -> None:
    options = {"x": 1}
    _shelf.parse("thing", {"a": options})["a"]["y"] = 2
    assert options == {"x": 1}


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (3, "a thing is given by a name, a mapping of names to options, .* got int: 3"),
        ({"a": 3}, "options of thing 'a' must be a mapping .* got int: 3"),
    ],
)
def test_parse_refuses(spec: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        _shelf.parse("thing", spec)


@pytest.mark.parametrize("spec", [{}, {"a": {}, "b": {}}])
def test_one_is_one(spec: object) -> None:
    assert _shelf.one("thing", {"a": {"x": 1}}) == ("a", {"x": 1})
    with pytest.raises(InputError, match=r"exactly one thing is wanted, got [02]"):
        _shelf.one("thing", spec)


def test_build() -> None:
    assert _shelf.build("thing", SHELF, "make", {"size": 2, "depth": 3}) == (2, 3)


def test_build_names_what_is_there() -> None:
    with pytest.raises(UnknownName, match="unknown thing 'mkae'; did you mean 'make'"):
        _shelf.build("thing", SHELF, "mkae", {})
    with pytest.raises(UnknownName, match=r"option of thing 'make' 'dept'; .* names: depth, size"):
        _shelf.build("thing", SHELF, "make", {"dept": 1})


def test_build_names_an_option_that_is_missing() -> None:
    with pytest.raises(InputError, match="thing 'make' needs the option 'size'"):
        _shelf.build("thing", SHELF, "make", {})
