"""Contenders take turns in orders that favour nobody."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.harness import interleaved, order_of_round


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_round_has_all_contenders_and_nobody_always_the_same_predecessor(count):
    names = [str(i) for i in range(count)]
    for first_round in (0, 1):
        rounds = [order_of_round(names, i) for i in range(first_round, first_round + 4)]
        assert all(sorted(order) == names for order in rounds)
        if count > 1:
            assert len({order[0] for order in rounds}) > 1
            predecessors = {name: set() for name in names}
            for before, after in pairwise(name for order in rounds for name in order):
                predecessors[after].add(before)
            assert count == 2 or all(len(found) > 1 for found in predecessors.values())
    assert [order_of_round(["a", "b"], i)[0] for i in range(4)] == ["a", "b", "b", "a"]


def test_seconds_belong_to_their_contender():
    turns = []
    seconds = interleaved({name: lambda name=name: turns.append(name) for name in "ab"}, rounds=4)
    assert turns == list("abbabaabab") and {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4}
