"""Channel ids: union, folds, blocks."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cpd.channels import Channels, Place, components

EDGES = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40),
    )
)


def brute(count: int, edges: list[tuple[int, int]]) -> list[int]:
    label = list(range(count))
    for _ in range(count):
        for a, b in edges:
            label[a] = label[b] = min(label[a], label[b])
    return label


@given(EDGES)
def test_components_are_the_smallest_members(case: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = case
    pairs = np.array(edges, np.int64).reshape(-1, 2)
    assert components(count, pairs[:, 0], pairs[:, 1]).tolist() == brute(count, edges)


def test_new_ids_are_fresh() -> None:
    channels = Channels()
    a, b = channels.new(2, 3), channels.new(4)
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert b.tolist() == [6, 7, 8, 9]
    assert channels.count == 10


def test_unite_broadcasts() -> None:
    channels = Channels()
    a, b = channels.new(2, 3), channels.new(2, 1)
    channels.unite(a, b)
    assert channels.labels().tolist() == [0, 0, 0, 3, 3, 3, 0, 3]


def test_rows_have_one_block_however_often_they_are_asked_for() -> None:
    channels = Channels()
    ids = channels.new(2, 3)
    first = channels.rows(ids)
    assert (channels.rows(ids) == first).all()
    assert first.shape == (2,)
    assert len(channels.folds) == 1
    assert not channels.folds[0].tied


def test_rows_of_one_are_the_channel_itself() -> None:
    channels = Channels()
    ids = channels.new(4, 1)
    assert (channels.rows(ids) == ids[:, 0]).all()
    assert not channels.folds


def test_columns_tie() -> None:
    channels = Channels()
    ids = channels.new(2, 3)
    assert channels.columns(ids).shape == (3,)
    assert channels.folds[0].tied


def test_a_tied_fold_may_be_transposed() -> None:
    channels = Channels()
    ids = channels.new(2, 3)
    rows = channels.rows(ids)
    channels.tie(ids)
    assert (channels.columns(ids.T) == rows).all()
    assert len(channels.folds) == 1


def test_a_product_lives_where_both_factors_do() -> None:
    channels = Channels()
    rows, columns = channels.new(2), channels.new(3)
    ids = channels.product(rows, columns)
    assert ids.shape == (2, 3)
    label = channels.labels()
    fold = channels.folds[0]
    assert (label[fold.rows] == label[rows]).all()
    assert (label[fold.columns] == label[columns]).all()


def test_freezing_the_inner_axis_leaves_rows_free() -> None:
    channels = Channels()
    ids, flat = channels.new(2, 3), channels.new(4)
    channels.freeze_inner(ids, "why")
    channels.freeze_inner(flat, "why")
    assert channels.labels()[ids].tolist() == [[0, 0, 0], [3, 3, 3]]
    ((frozen, why),) = channels.frozen
    assert (frozen.tolist(), why.text, why.place) == (flat.tolist(), "why", Place())


def test_shapes_that_do_not_fit_are_a_bug() -> None:
    channels = Channels()
    with pytest.raises(ValueError, match="broadcast"):
        channels.unite(channels.new(2), channels.new(3))
