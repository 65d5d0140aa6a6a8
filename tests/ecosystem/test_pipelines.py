"""transformers' pipelines over fast models: one by one and in padded batches, the outputs are those of transformers' models.

transformers 5 has no pipeline for question answering.
"""

from __future__ import annotations

import pytest
import torch
import transformers

import fastbert

from .helpers import DOORS, TEXTS, fast, notes_of, plain, small_tokenizer

TASKS = {
    "feature-extraction": "BertModel",
    "fill-mask": "BertForMaskedLM",
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "zero-shot-classification": "BertForSequenceClassification",
}
LABELS = {
    "text-classification": ("entailment", "neutral", "contradiction"),
    "zero-shot-classification": ("entailment", "neutral", "contradiction"),
    "token-classification": ("O", "B-PER", "I-PER"),
}


@pytest.fixture(params=DOORS)
def door(request) -> str:
    return request.param


def pipes(task: str, door: str, **options) -> tuple[transformers.Pipeline, transformers.Pipeline]:
    """(transformers' pipeline, the fast one) for ``task``."""
    labels = dict(enumerate(LABELS.get(task, ())))
    changes = {"id2label": labels, "label2id": {label: index for index, label in labels.items()}} if labels else {}
    tokenizer = small_tokenizer()
    model = plain(TASKS[task], vocab_size=len(tokenizer), max_position_embeddings=64, **changes).eval()
    arguments = {"tokenizer": tokenizer, "device": "cpu", **options}
    theirs = transformers.pipeline(task, model=model, **arguments)
    if door == "accelerate":
        pipe = transformers.pipeline(task, model=fast(model, "accelerate"), **arguments)
        ours = fastbert.accelerate(fastbert.restore(pipe))
        assert ours is pipe
    else:
        ours = transformers.pipeline(task, model=fast(model, door), **arguments)
    assert isinstance(ours.model, getattr(fastbert, TASKS[task])) and notes_of(ours.model) == []
    return theirs, ours


def assert_same(got, expected) -> None:
    """The same structure, labels, words and places; scores and features within rounding."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, abs=2e-5)
    elif hasattr(expected, "dtype"):
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), rtol=0, atol=2e-5)
    else:
        assert got == expected


BATCH_SIZES = (1, 3, 8)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_feature_extraction(door, batch_size):
    theirs, ours = pipes("feature-extraction", door)
    got, expected = (pipe(list(TEXTS), batch_size=batch_size, return_tensors=True) for pipe in (ours, theirs))
    for text, features, expected_features in zip(TEXTS, got, expected, strict=True):
        assert features.shape == expected_features.shape  # in a batch with the rows of its padding
        length = len(small_tokenizer()(text)["input_ids"])
        torch.testing.assert_close(features[:, :length], expected_features[:, :length], rtol=0, atol=2e-5)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("options", ({}, {"top_k": 12}, {"targets": ["sea", "captain"]}), ids=str)
def test_fill_mask(door, options, batch_size):
    theirs, ours = pipes("fill-mask", door)
    texts = ["the [MASK] captain", "every [MASK] watched the quiet [MASK] before dawn, and nobody answered", "[MASK]"]
    got, expected = (pipe(texts, batch_size=batch_size, **options) for pipe in (ours, theirs))
    assert_same(got, expected)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("options", ({}, {"top_k": None}, {"function_to_apply": "none"}), ids=str)
def test_text_classification(door, options, batch_size):
    theirs, ours = pipes("text-classification", door)
    got, expected = (pipe(list(TEXTS), batch_size=batch_size, **options) for pipe in (ours, theirs))
    assert_same(got, expected)
    pair = {"text": TEXTS[0], "text_pair": TEXTS[3]}
    assert_same(ours(pair, **options), theirs(pair, **options))


def test_text_classification_streams_and_truncates(door):
    theirs, ours = pipes("text-classification", door)
    too_long = " ".join(TEXTS) * 3
    got, expected = (
        list(pipe((text for text in (*TEXTS, too_long)), batch_size=3, truncation=True, max_length=60)) for pipe in (ours, theirs)
    )
    assert len(got) == len(TEXTS) + 1
    assert_same(got, expected)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("strategy", ("none", "simple", "first", "average", "max"))
def test_token_classification(door, strategy, batch_size):
    theirs, ours = pipes("token-classification", door)
    got, expected = (pipe(list(TEXTS), batch_size=batch_size, aggregation_strategy=strategy) for pipe in (ours, theirs))
    assert any(expected)
    assert_same(got, expected)


def test_token_classification_in_windows(door):
    theirs, ours = pipes("token-classification", door)
    text = " ".join(TEXTS)
    got, expected = (pipe(text, stride=8, aggregation_strategy="first", batch_size=2) for pipe in (ours, theirs))
    assert expected
    assert_same(got, expected)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_zero_shot_classification(door, batch_size):
    theirs, ours = pipes("zero-shot-classification", door)
    labels = ["the sea", "a letter from home", "wind"]
    for options in ({}, {"multi_label": True}):
        got, expected = (pipe(list(TEXTS), labels, batch_size=batch_size, **options) for pipe in (ours, theirs))
        assert_same(got, expected)


@pytest.mark.parametrize("task", TASKS)
def test_from_a_folder(door, task, tmp_path):
    """A folder that fastbert wrote makes a plain pipeline, and ``accelerate`` a fast one of it."""
    _, ours = pipes(task, door)
    ours.save_pretrained(tmp_path)
    pipe = transformers.pipeline(task, model=str(tmp_path), device="cpu")
    assert type(pipe.model) is getattr(transformers, TASKS[task])
    batch = small_tokenizer()(list(TEXTS), padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = pipe.model(**batch)[0]
        assert fastbert.accelerate(pipe) is pipe
        got = pipe.model(**batch)[0]
    assert type(pipe.model) is getattr(fastbert, TASKS[task])
    if got.shape[:2] == real.shape:
        got, expected = got[real], expected[real]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert type(fastbert.restore(pipe).model) is getattr(transformers, TASKS[task])
