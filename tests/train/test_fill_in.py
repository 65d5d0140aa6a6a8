"""Words are hidden that were there, and the same ones every time."""

from __future__ import annotations

import pytest

from fastbert.train.fill_in import fill_in_examples
from fastbert.train.inputs import build_model, prepare_data

from .conftest import WORDS


@pytest.fixture
def prepared(toy_settings):
    settings = toy_settings(vocab_size=400)
    data = prepare_data(settings, lambda text: None, None)
    return data, build_model(settings, data.tokenizer, None)


def test_whole_words_behind_the_mask(prepared):
    data, model = prepared
    model.train()
    examples = fill_in_examples(model, data.held_out[0], data.tokenizer, count=3)
    assert len(examples) == 3 and model.training
    assert all(example.truth in WORDS and example.text.count("[MASK]") == 1 for example in examples)
    assert all(len(example.predictions) == 3 for example in examples)
    probabilities = [probability for _, probability in examples[0].predictions]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) < 1
    assert fill_in_examples(model, data.held_out[0], data.tokenizer, count=3) == examples
    assert examples[0].truth in examples[0].line()


def test_no_words_no_examples(prepared, monkeypatch):
    data, model = prepared
    monkeypatch.setattr("fastbert.train.fill_in.SHORTEST_WORD", 100)
    assert fill_in_examples(model, data.held_out[0], data.tokenizer) == []
