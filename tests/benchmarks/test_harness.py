"""Contenders take turns in orders that favour nobody; results are kept while they are measured."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from benchmarks import harness
from benchmarks.harness import interleaved, order_of_round, unfinished_results, write_results


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
    assert interleaved({"a": lambda: 1.5, "b": lambda: 2.5}, rounds=2, own_clock=True) == {"a": [1.5, 1.5], "b": [2.5, 2.5]}


def test_results_of_an_unfinished_run_lie_beside_those_of_the_last_one(monkeypatch, tmp_path, capsys):
    """As ``python -m benchmarks.X --save`` keeps them; without --save there is no place for them."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    complete, partial = tmp_path / "mine" / "pretrain.json", tmp_path / "mine" / "pretrain.partial.json"
    for finished in (True, False, True):
        before = complete.read_text() if complete.exists() else None
        try:
            with unfinished_results("pretrain", "mine") as keep:
                for results in ([1], [1, 2]):
                    keep({"results": results})
                    document = json.loads(partial.read_text())
                    assert document.pop("command").startswith("python -m benchmarks.pretrain")
                    assert document == {"benchmark": "pretrain", "results": results, "unfinished": True}
                if not finished:
                    raise KeyboardInterrupt
                write_results("pretrain", {"results": [1, 2, 3]}, "mine")
        except KeyboardInterrupt:
            assert f"what was measured until then: {partial}" in capsys.readouterr().err and not finished
        assert partial.exists() != finished
        assert finished or complete.read_text() == before
    assert json.loads(complete.read_text())["results"] == [1, 2, 3] and "until then" not in capsys.readouterr().err
    files = list(tmp_path.rglob("*"))
    with unfinished_results("finetune", None) as keep:
        keep({"results": [1]})
    assert list(tmp_path.rglob("*")) == files
