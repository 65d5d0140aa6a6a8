from __future__ import annotations

import numpy as np
import pytest

from fastbert.data.packing import BUFFER, pack


def lengths_like_text(count: int, longest: int, seed: int = 0) -> np.ndarray:
    """Most sequences as long as allowed, the others of any length."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(count) < 0.85, longest, rng.integers(5, longest + 1, count))


def filled(lengths: np.ndarray, order: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The tokens of each batch."""
    return np.diff(np.concatenate([[0], np.cumsum(lengths[order])])[bounds])


@pytest.mark.parametrize(("longest", "budget"), [(128, 4096), (512, 4096), (512, 8192), (128, 16384), (100, 100), (97, 1000)])
def test_each_sequence_is_in_one_batch_under_the_budget_near_its_place(longest: int, budget: int) -> None:
    lengths = lengths_like_text(8000, longest)
    order, bounds = pack(lengths, budget)
    assert order.dtype == bounds.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(8000))
    assert bounds[0] == 0 and bounds[-1] == 8000 and (np.diff(bounds) > 0).all()
    tokens = filled(lengths, order, bounds)
    assert tokens.max() <= budget
    for first, last in zip(bounds[:-1], bounds[1:]):
        assert order[first:].min() in order[first:last], "whose turn it is comes first"
        assert last == 8000 or order[first:last].max() < order[last:].min() + BUFFER
    if budget >= 4096:
        assert tokens[:-1].mean() / budget > 0.99


def test_a_batch_is_closed_when_nothing_within_reach_fits() -> None:
    lengths = lengths_like_text(3000, 64, seed=1)
    order, bounds = pack(lengths, 500, buffer=20)
    tokens = filled(lengths, order, bounds)
    for batch, (room, last) in enumerate(zip(500 - tokens[:-1], bounds[1:-1])):
        reachable = np.sort(order[last:])
        head = reachable[0]
        assert all(lengths[number] > room for number in reachable if number < head + 20 - (last - bounds[batch]))


def test_the_longest_that_fits_is_taken() -> None:
    order, bounds = pack(np.array([6, 6, 1, 3, 4, 2, 6]), 10)
    assert [order[first:last].tolist() for first, last in zip(bounds, bounds[1:])] == [[0, 4], [1, 2, 3], [5, 6]]


def test_no_batch_has_more_sequences_than_it_may() -> None:
    order, bounds = pack(np.full(1000, 3), 100, max_sequences=7)
    assert (np.diff(bounds)[:-1] == 7).all() and np.array_equal(order, np.arange(1000))


def test_nothing_to_pack() -> None:
    order, bounds = pack(np.empty(0, np.int64), 100)
    assert len(order) == 0 and bounds.tolist() == [0]
