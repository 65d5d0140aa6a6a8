"""What is held out for dev, and what a limit draws."""

from __future__ import annotations

import pytest

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.finetune.prepared import drawn, held_out, prepare_task
from fastbert.finetune.settings import FinetuneSettings
from fastbert.tasks.examples import Examples, QuestionExample, TextExample
from fastbert.tasks.registry import task_for


def texts(count: int) -> Examples:
    return Examples("train.tsv", [TextExample(f"line {n}", f"text {n}", None, "x") for n in range(count)], {})


@pytest.mark.parametrize(("count", "fraction", "kept"), [(100, 0.1, 10), (3, 0.1, 1), (2, 0.9, 1), (10, 0.25, 2)])
def test_a_share_is_held_out(count, fraction, kept):
    train, dev = held_out(texts(count), fraction)
    assert len(dev) == kept and len(train) == count - kept
    assert {e.place for e in train}.isdisjoint(e.place for e in dev)
    assert held_out(texts(count), fraction) == (train, dev)


def test_questions_about_one_context_stay_together():
    items = [QuestionExample(f"question {n}", str(n), "who?", f"context {n // 5}") for n in range(50)]
    train, dev = held_out(Examples("train.json", items, {}), 0.1)
    assert len(dev) == 5
    assert {e.context for e in train}.isdisjoint(e.context for e in dev)


def test_too_few_to_hold_out():
    with pytest.raises(DataError, match="train.tsv: holds 1 examples, and none can be held out for dev; --dev names a file"):
        held_out(texts(1), 0.1)
    items = [QuestionExample(f"question {n}", str(n), "who?", "one context") for n in range(5)]
    with pytest.raises(DataError, match="holds 5 examples about one context"):
        held_out(Examples("train.json", items, {}), 0.1)


@pytest.mark.parametrize(("tags", "labelled"), [(("", ""), False), (("a", ""), True)])
def test_a_test_set_without_any_of_several_labels_is_not_labelled(tags, labelled, toy_model, tmp_path):
    for name, cells in (("train", ("a", "b")), ("dev", ("a", "b")), ("test", tags)):
        rows = "".join(f"good film\t{cell}\n" for cell in cells)
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + rows, encoding="utf-8")
    sources = {name: Source(tmp_path / f"{name}.tsv") for name in ("train", "dev", "test")}
    settings = FinetuneSettings(task="multi-label-classification", model=str(toy_model), data=str(tmp_path))
    task = task_for(settings.task)
    assert prepare_task(task, sources, settings, lambda line: None).splits["test"].labelled == labelled
    if not labelled:
        with pytest.raises(DataError, match="test.tsv, column 'label': names no label in 2 rows: there is nothing to score"):
            prepare_task(task, {**sources, "dev": sources["test"]}, settings, lambda line: None)


def test_a_limit_draws_and_keeps_the_order():
    some = drawn(texts(100), 10)
    places = [int(example.place.split()[1]) for example in some]
    assert len(places) == 10 and places == sorted(places) and places != list(range(10))
    assert drawn(texts(10), 10) == texts(10)
