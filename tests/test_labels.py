"""Labels: what is alive moves with the values, through any reshape and permutation."""

from __future__ import annotations

from math import prod

import hypothesis.strategies as st
import numpy as np
from hypothesis import assume, given, settings

from cpd.channels import Channels
from cpd.labels import (
    Labels,
    Layer,
    alive_mask,
    axis_size,
    factor_groups,
    new_shape,
    permute,
    reshape,
)
from cpd.solver import solve
from cpd.units import Units

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of one size: factors joined in two ways."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5))

    def joined() -> tuple[int, ...]:
        shape, left = [], list(factors)
        while left:
            take = draw(st.integers(1, len(left)))
            shape.append(prod(left[:take]))
            left = left[take:]
        return tuple(shape)

    return joined(), joined()


def fresh(channels: Channels, shape: tuple[int, ...], free: list[bool]) -> Labels:
    layers = [
        Layer((k,), channels.new(size))
        for k, (size, ids) in enumerate(zip(shape, free, strict=False))
        if size > 1 and ids
    ]
    return Labels(shape, tuple(layers))


def survivors(units: Units, seed: int) -> np.ndarray:
    """Remove random units, at least one of each family left."""
    generator = np.random.default_rng(seed)
    alive = np.ones(units.count, bool)
    for family in units.families:
        if family.width > 1:
            gone = int(generator.integers(0, min(family.size, family.width - 1) + 1))
            for cluster in family.clusters:
                picked = generator.permutation(cluster)[:gone]
                alive[units.closure(picked.tolist())] = False
    single = np.flatnonzero((units.fold_of < 0) & (units.frozen < 0))
    alive[single[generator.random(len(single)) < 0.3]] = False
    return alive


def is_box(labels: Labels, of_ids: np.ndarray) -> bool:
    """What is left fills its new shape, axis by axis, with no row longer than another."""
    mask = np.broadcast_to(alive_mask(labels, of_ids), labels.shape)
    return int(mask.sum()) == prod(new_shape(labels, of_ids))


def left(values: np.ndarray, labels: Labels, of_ids: np.ndarray) -> np.ndarray:
    mask = np.broadcast_to(alive_mask(labels, of_ids), labels.shape)
    return values[mask].reshape(new_shape(labels, of_ids))


FREE = st.lists(st.booleans(), min_size=5, max_size=5)


@settings(max_examples=400)
@given(reshapes(), FREE, st.integers(0, 99))
def test_reshape_keeps_what_is_alive(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], free: list[bool], seed: int
) -> None:
    channels = Channels()
    old = fresh(channels, shapes[0], free)
    new = reshape(old, shapes[1], channels)
    units = solve(channels)
    of_ids = survivors(units, seed)[units.label]
    values = np.arange(prod(shapes[0])).reshape(shapes[0])
    assume(alive_mask(old, of_ids).any())
    assert is_box(old, of_ids)
    assert is_box(new, of_ids)
    got, wanted = left(values.reshape(shapes[1]), new, of_ids), left(values, old, of_ids)
    assert (got.ravel() == wanted.ravel()).all()


@settings(max_examples=400)
@given(reshapes(), FREE, st.integers(0, 99), st.randoms(use_true_random=False))
def test_reshape_and_permute_keep_what_is_alive(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], free: list[bool], seed: int, random: object
) -> None:
    """View, permute, flatten: what shuffles and attention do."""
    channels = Channels()
    old = fresh(channels, shapes[0], free)
    folded = reshape(old, shapes[1], channels)
    order = list(range(len(shapes[1])))
    random.shuffle(order)  # type: ignore[attr-defined]
    turned = permute(folded, order, channels)
    flat = reshape(turned, (prod(shapes[0]),), channels)
    units = solve(channels)
    of_ids = survivors(units, seed)[units.label]
    assume(alive_mask(old, of_ids).any())
    values = np.arange(prod(shapes[0])).reshape(shapes[0])
    for labels in (old, folded, turned, flat):
        assert is_box(labels, of_ids)
    a = left(values.reshape(shapes[1]), folded, of_ids).transpose(order)
    b = left(values.reshape(shapes[1]).transpose(order), turned, of_ids)
    assert a.shape == b.shape
    assert (a == b).all()
    c = left(values.reshape(shapes[1]).transpose(order).ravel(), flat, of_ids)
    assert (a.ravel() == c).all()


@given(reshapes())
def test_factor_groups_have_equal_products(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    old, new = shapes
    groups = factor_groups(old, new)
    for a, b in groups:
        assert prod(old[k] for k in a) == prod(new[k] for k in b)
    assert [k for a, _ in groups for k in a] == list(range(len(old)))
    assert [k for _, b in groups for k in b] == list(range(len(new)))


def test_sizes_are_counted_from_the_outside_in() -> None:
    """Rows may keep different columns: counting along one column would be wrong."""
    channels = Channels()
    ids = channels.new(3, 4)
    labels = Labels((3, 4), (Layer((0, 1), ids),))
    alive = np.ones(channels.count, bool)
    alive[ids[0, :2]] = alive[ids[1, 2:]] = alive[ids[2]] = False
    assert new_shape(labels, alive) == (2, 2)
    assert axis_size(labels, 0, alive) == 2
    assert left(np.arange(12).reshape(3, 4), labels, alive).tolist() == [[2, 3], [4, 5]]


def test_two_axes_coupled_to_a_third_are_kept_when_they_merge() -> None:
    """Heads with dims and with offsets of their own, read as one axis: (2, 3, 4) -> (2, 12)."""
    channels = Channels()
    dims, offsets = Layer((0, 1), channels.new(2, 3)), Layer((0, 2), channels.new(2, 4))
    out = reshape(Labels((2, 3, 4), (dims, offsets)), (2, 12), channels)
    (layer,) = out.layers
    assert (layer.axes, layer.ids.shape) == ((0, 1), (2, 12))
    units = solve(channels)
    for ids in (dims.ids, offsets.ids, layer.ids):
        for c in units.label[ids].ravel().tolist():
            assert units.reason(c) == "two axes coupled to a third are merged"
