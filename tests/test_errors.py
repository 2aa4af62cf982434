"""The exception tree: its texts, its attributes, its shape."""

from __future__ import annotations

import pickle

import pytest

from cpd import errors
from cpd.errors import CPDError, InputError, UnknownName, UnreachableTarget


@pytest.mark.parametrize("name", errors.__all__)
def test_everything_derives_from_the_root_and_stands_in_the_drawing(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, CPDError)
    assert name in (errors.__doc__ or "")
    assert error.__doc__


def test_bad_input_is_also_a_value_error() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(UnknownName, InputError)


def test_unknown_name_lists_the_valid_ones_and_offers_the_nearest() -> None:
    error = UnknownName("loss", "dits", ["kd", "dist"])
    assert str(error) == "unknown loss 'dits'; did you mean 'dist'? Valid names: dist, kd."
    assert (error.kind, error.name, error.valid) == ("loss", "dits", ("dist", "kd"))


def test_unknown_name_with_nothing_near() -> None:
    assert str(UnknownName("task", "zzz", ["a"])) == "unknown task 'zzz'. Valid names: a."
    assert str(UnknownName("task", 7, [])) == "unknown task 7. Valid names: none."


def test_unreachable_target_carries_what_is_reachable() -> None:
    error = UnreachableTarget("no", closest={"macs": 0.6}, blockers=("stem",))
    assert (str(error), error.closest, error.blockers) == ("no", {"macs": 0.6}, ("stem",))
    assert (UnreachableTarget("no").closest, UnreachableTarget("no").blockers) == (None, ())


@pytest.mark.parametrize(
    "error",
    [
        UnknownName("loss", "x", ["kd"]),
        UnreachableTarget("no", closest={"macs": 0.6}, blockers=("stem",)),
        errors.PlanMismatch("other model"),
    ],
)
def test_errors_cross_a_process_border(error: CPDError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - as multiprocessing does
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
