"""The shelf of data: functions that return a ``Data``, five data sets and what is in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from cpd import _shelf
from cpd.data._data import Data
from cpd.data.ade20k import ade20k
from cpd.data.cityscapes import cityscapes
from cpd.data.digits import digits
from cpd.data.imagenet import imagenet
from cpd.data.scenes import scenes
from cpd.errors import InputError

__all__ = ["SHELF", "Data", "ade20k", "cityscapes", "digits", "imagenet", "resolve", "scenes"]

SHELF: dict[str, Callable[..., Data]] = {
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "digits": digits,
    "imagenet": imagenet,
    "scenes": scenes,
}


@runtime_checkable
class DataLike(Protocol):
    """What training needs of data; ``Data`` is the ready-made one."""

    @property
    def train(self) -> Any:
        """Map-style samples (x, y) to learn from."""

    @property
    def val(self) -> Any:
        """Samples for decisions during a run."""

    @property
    def test(self) -> Any:
        """Samples looked at once, at the end."""

    @property
    def num_classes(self) -> int:
        """Labels are 0 … num_classes − 1."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one x, without the batch axis."""


def resolve(spec: object, **options: Any) -> DataLike:
    """Return the data that a spec means.

    spec: a name of the shelf (``"digits"``), a mapping of one name to its options
        (``{"digits": {"size": 16}}``), or an object with the members of ``Data``.
    options: further options of a name; they win over those of the mapping.

    Raises UnknownName for a name or an option that is not there, InputError for any other fault.
    """
    if spec is None or isinstance(spec, str | dict):
        name, given = _shelf.one("data set", spec)
        return _shelf.build("data set", SHELF, name, given | options)
    wanted = ("train", "val", "test", "num_classes", "input_shape")
    missing = [name for name in wanted if not hasattr(spec, name)]
    if missing:
        raise InputError(f"{spec!r} is not data: it has no {', '.join(missing)}.")
    if options:
        raise InputError(f"options {sorted(options)} need the name of a data set, got {spec!r}.")
    assert isinstance(spec, DataLike)
    return spec
