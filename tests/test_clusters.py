"""Clusters that shrink in step: how many channels of each a unit takes."""

from __future__ import annotations

import numpy as np
import pytest

from cpd.channels import Channels
from cpd.clusters import columns_of, in_step
from cpd.solver import solve


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_a_row_of_pairs_beside_a_row_of_single_channels() -> None:
    parts = in_step({b"p": ids(0, 1, 2), b"s": ids(3, 4, 5, 6, 7, 8)}, [{b"p": 2, b"s": 1}])
    assert parts is not None
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_shares_follow_from_relation_to_relation() -> None:
    clusters = {b"a": ids(*range(6)), b"b": ids(*range(10, 14)), b"c": ids(20, 21)}
    parts = in_step(clusters, [{b"a": 2, b"b": 3}, {b"b": 1, b"c": 2}])
    assert parts is not None
    assert [len(part) for part in parts] == [2] * 6
    assert sorted(np.concatenate(parts).tolist()) == [*range(6), *range(10, 14), 20, 21]


@pytest.mark.parametrize(
    ("clusters", "relations"),
    [
        ({b"a": ids(0, 1), b"b": ids(2, 3)}, [{b"a": 1, b"b": 1}, {b"a": 1, b"b": 2}]),
        ({b"a": ids(0, 1, 2), b"b": ids(3, 4, 5)}, [{b"a": 2, b"b": 1}]),
        ({b"a": ids(0, 1, 2), b"b": ids(3, 4, 5)}, [{b"a": 2, b"b": 3}]),
    ],
    ids=["contradict", "other widths", "no whole number"],
)
def test_what_cannot_keep_step(
    clusters: dict[bytes, np.ndarray], relations: list[dict[bytes, int]]
) -> None:
    assert in_step(clusters, relations) is None


def test_a_column_that_is_an_item_leads_on() -> None:
    inner = (ids(0, 1, 2, 3).reshape(2, 2), ids(8, 9))
    outer = (ids(4, 5, 6, 7).reshape(2, 2), ids(0, 1))
    columns, known = columns_of([outer, inner]).of(ids(*range(9)))
    assert columns.tolist() == [8, 9, 8, 9, 8, 9, 8, 9, 8]
    assert known.tolist() == [True] * 8 + [False]
    twice, _ = columns_of([(ids(0, 1, 2, 0).reshape(2, 2), ids(8, 9))]).of(ids(0, 1, 2))
    assert twice.tolist() == [9, 9, 8]  # the last counts
    nothing, known = columns_of([]).of(ids(3, 1))
    assert nothing.tolist() == [3, 1]
    assert not known.any()


def test_halves_that_turn_together_and_plain_rows_lose_as_many() -> None:
    """Two heads of six entries whose halves are one channel each, beside two heads of six."""
    channels = Channels()
    turning, plain = channels.new(2, 3), channels.new(2, 6)
    twice = np.concatenate([turning, turning], axis=1)
    for part in (twice, twice[:, :3], plain):
        channels.nest(part)
    channels.nest(np.concatenate([twice, plain]))
    (family,) = (f for f in solve(channels).families if f.kind == "head dims")
    assert family.width == 3
    assert [len(cluster) for cluster in family.clusters] == [3] * 6


def test_rows_of_the_same_channels_die_together_however_often_they_hold_them() -> None:
    channels = Channels()
    once = channels.new(2, 3)
    twice = np.concatenate([once, once], axis=1)
    rows, others = channels.rows(once), channels.rows(twice)
    units = solve(channels)
    assert (units.label[rows] == units.label[others]).all()
