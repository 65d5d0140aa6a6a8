"""Batches under a token budget: everything once, longest first, never above the budget but for one sequence alone."""

from __future__ import annotations

import numpy as np
import pytest

from fastbert.data.budget import token_budget_batches

LENGTHS = np.random.default_rng(0).integers(1, 130, 300).tolist()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [1, 64, 129, 500, 10**6])
def test_batches_are_within_the_budget_and_full(budget, padded):
    batches = token_budget_batches(LENGTHS, budget, padded=padded)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(LENGTHS)))
    assert [LENGTHS[index] for index in order] == sorted(LENGTHS, reverse=True)

    def tokens(batch: list[int]) -> int:
        lengths = [LENGTHS[index] for index in batch]
        return max(lengths) * len(lengths) if padded else sum(lengths)

    assert all(tokens(batch) <= budget or len(batch) == 1 for batch in batches)
    assert all(tokens([*batch, following[0]]) > budget for batch, following in zip(batches, batches[1:], strict=False))


def test_equal_lengths_keep_their_order():
    assert token_budget_batches([3, 5, 3, 5, 3], 8) == [[1], [3, 0], [2, 4]]
    assert token_budget_batches([3, 5, 3, 5, 3], 10, padded=True) == [[1, 3], [0, 2, 4]]


def test_few_and_odd_lengths():
    assert token_budget_batches([], 4) == []
    assert token_budget_batches(np.array([9, 0, 2]), 4) == [[0], [2, 1]]
    assert token_budget_batches([4, 4, 4], 4) == [[0], [1], [2]]


@pytest.mark.parametrize(("lengths", "budget", "message"), [([1], 0, "not 0"), ([3, -2], 4, "-2")])
def test_refusals(lengths, budget, message):
    with pytest.raises(ValueError, match=message):
        token_budget_batches(lengths, budget)
