"""Units: the smallest sets of channels that can go together."""

from __future__ import annotations

import numpy as np

from cpd.channels import Channels
from cpd.solver import solve
from cpd.units import Family


def kinds(families: list[Family]) -> list[tuple[str, int, int]]:
    return [(f.kind, len(f.clusters), f.width) for f in families]


def test_rows_balance_and_vanish() -> None:
    """Heads x dims: one dim of each head, or a whole head."""
    channels = Channels()
    ids = channels.new(3, 4)
    channels.op = "view"
    heads = channels.rows(ids)
    units = solve(channels)
    assert kinds(units.families) == [("head dims", 3, 4), ("heads", 1, 3)]
    block = units.label[heads[1]]
    assert set(units.closure([block])) == {block, *units.label[ids[1]]}


def test_a_frozen_channel_keeps_its_row() -> None:
    channels = Channels()
    ids = channels.new(3, 4)
    heads = channels.rows(ids)
    channels.freeze(ids[1, 2], "why")
    units = solve(channels)
    assert units.reason(units.label[heads[1]]) == "why"
    assert units.reason(units.label[heads[0]]) is None
    dims, rows = units.families
    assert dims.size == 3
    assert dims.width == 4
    assert len(rows.clusters[0]) == 2


def test_a_tied_fold_loses_whole_columns() -> None:
    channels = Channels()
    ids = channels.new(2, 3)
    channels.rows(ids)
    channels.tie(ids)
    units = solve(channels)
    (columns, rows) = units.families
    assert len(columns.clusters) == 1
    gone = units.closure([columns.clusters[0][1]])
    assert set(units.label[ids[:, 1]]) <= set(gone)
    assert rows.width == 2


def test_entries_of_united_tied_columns_are_one() -> None:
    """Heads x dims whose dims turn as quarters of one width, and are split in halves on the way."""
    channels = Channels()
    ids = channels.new(3, 8)
    channels.rows(ids)
    columns = channels.columns(ids)
    channels.unite(columns.reshape(4, 2), columns[:2])
    channels.nest(ids.reshape(3, 2, 4))
    units = solve(channels)
    assert kinds(units.families) == [("head dims", 1, 2), ("heads", 1, 3)]
    assert (units.label[ids[:, :2]] == units.label[ids[:, 6:]]).all()
    assert len(np.unique(units.label[ids])) == 6


def test_entries_of_united_tied_rows_are_one() -> None:
    channels = Channels()
    ids = channels.new(4, 2)
    rows, columns = channels.rows(ids), channels.columns(ids)
    channels.unite(rows[:2], rows[2:])
    units = solve(channels)
    assert (units.label[ids[:2]] == units.label[ids[2:]]).all()
    assert units.label[columns[0]] != units.label[columns[1]]
    assert kinds(units.families) == [("head dims", 1, 2), ("heads", 1, 2)]


def test_tied_rows_of_one_channel_go_whole_but_for_one() -> None:
    """A norm shared by heads whose dims stay: heads go, and one of them stays with the norm."""
    channels = Channels()
    ids = channels.new(3, 4)
    heads, norm = channels.rows(ids), channels.new(4)
    channels.unite(channels.columns(ids), norm)
    channels.freeze_inner(ids, "why")
    units = solve(channels)
    assert kinds(units.families) == [("heads", 1, 3)]
    assert not np.isin(units.label[norm], units.closure([units.label[heads[1]]])).any()
    assert any(set(units.label[heads]) == set(some) for some in units.nonempty)


def test_united_rows_have_one_block() -> None:
    channels = Channels()
    a, b = channels.new(2, 3), channels.new(2, 3)
    rows_a, rows_b = channels.rows(a), channels.rows(b)
    channels.unite(a, b)
    units = solve(channels)
    assert (units.label[rows_a] == units.label[rows_b]).all()


def test_overlapping_partitions_are_frozen() -> None:
    """4 x 6 read as 3 x 8: rows that share channels with several rows cannot go."""
    channels = Channels()
    ids = channels.new(24)
    channels.rows(ids.reshape(4, 6))
    channels.rows(ids.reshape(3, 8))
    units = solve(channels)
    assert units.reason(units.label[ids[0]]) == "rows of different partitions overlap"
    assert all(not len(f.clusters[0]) or f.width < 2 for f in units.families) or not units.families


def test_nested_rows() -> None:
    """2 x 3 x 4: the rows of the outer fold are made of the inner one's."""
    channels = Channels()
    ids = channels.new(24)
    channels.nest(ids.reshape(2, 3, 4))
    channels.nest(ids.reshape(2, 12))
    units = solve(channels)
    assert not (units.frozen >= 0).any()
    assert ("head dims", 6, 4) in kinds(units.families)


def test_rows_of_one_channel_are_channels() -> None:
    """Sub-pixels: every row is one channel in several places."""
    channels = Channels()
    ids = channels.new(3, 4)
    channels.unite(ids, ids[:, :1])
    channels.rows(ids)
    units = solve(channels)
    assert kinds(units.families) == [("channels", 1, 3)]


def test_a_row_of_one_channel_holds_others_to_its_number() -> None:
    """A row that goes whole or not at all: no dim of the rows beside it may go alone."""
    channels = Channels()
    ids = channels.new(2, 3)
    channels.unite(ids[0], ids[0, :1])
    channels.rows(ids)
    units = solve(channels)
    assert all(f.kind == "heads" for f in units.families)


def test_unequal_multiplicities_are_frozen() -> None:
    channels = Channels()
    ids = channels.new(2, 3)
    channels.unite(ids[0, :2], ids[0, :1])
    channels.rows(ids)
    units = solve(channels)
    assert (units.frozen[units.label[ids[0]]] >= 0).all()


def test_nothing() -> None:
    units = solve(Channels())
    assert units.count == 0
    assert not units.families
    assert np.array_equal(units.closure([]), np.empty(0, np.int64))
