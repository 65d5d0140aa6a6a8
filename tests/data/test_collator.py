"""DataCollatorWithPacking: what stands in the row, and that a model makes of it what it makes of the padded batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

import fastbert
from fastbert import DataCollatorWithPacking

from ..model.helpers import assert_same_gradients, small_config

FEATURES = [
    {"input_ids": [2, 7, 8, 3], "token_type_ids": [0, 0, 1, 1]},
    {"input_ids": [2, 3], "token_type_ids": [0, 0]},
    {"input_ids": [2, 9, 3], "token_type_ids": [0, 1, 1]},
]
TEXTS = ["the old captain", "a tall ship watched the quiet sea before dawn", "gull", "seven lanterns in the winter of 1912"]


def with_(**columns) -> list[dict]:
    return [{**feature, **{key: values[i] for key, values in columns.items()}} for i, feature in enumerate(FEATURES)]


def test_the_row():
    row = DataCollatorWithPacking()(FEATURES)
    assert list(row) == [
        "input_ids", "token_type_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    ]  # fmt: skip
    for name, expected in (
        ("input_ids", [2, 7, 8, 3, 2, 3, 2, 9, 3]),
        ("token_type_ids", [0, 0, 1, 1, 0, 0, 0, 1, 1]),
        ("position_ids", [0, 1, 2, 3, 0, 1, 0, 1, 2]),
    ):
        assert row[name].tolist() == [expected] and row[name].dtype == torch.int64
    assert row["cu_seq_lens_q"].tolist() == row["cu_seq_lens_k"].tolist() == [0, 4, 6, 9]
    assert row["cu_seq_lens_q"].dtype == torch.int32
    assert row["max_length_q"] == row["max_length_k"] == 4 and type(row["max_length_q"]) is int


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_arrays_and_tensors(kind):
    features = [{key: kind(value) for key, value in feature.items()} for feature in FEATURES]
    for feature, label in zip(features, (1, 0, 2), strict=True):
        feature["label"] = label if kind is tuple else kind(label)
    got, expected = DataCollatorWithPacking()(features), DataCollatorWithPacking()(with_(label=[1, 0, 2]))
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("key", ["labels", "label", "label_ids"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 0, 2], torch.tensor([1, 0, 2])),
        ([True, False, True], torch.tensor([1, 0, 1])),
        ([0.5, 2.0, 1.0], torch.tensor([0.5, 2.0, 1.0])),
        ([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])),
        ([[-100, 5, 6, -100], [-100, -100], [-100, 7, -100]], torch.tensor([[-100, 5, 6, -100, -100, -100, -100, 7, -100]])),
    ],
    ids=["class", "bool", "regression", "multi-label", "token"],
)
def test_labels(key, values, expected):
    got = DataCollatorWithPacking()(with_(**{key: values}))["labels"]
    assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_a_vector_of_floats_as_long_as_the_sequence_is_multi_label():
    features = [{"input_ids": [2, 3], "labels": [1.0, 0.0]}, {"input_ids": [2, 3], "labels": [0.0, 1.0]}]
    assert DataCollatorWithPacking()(features)["labels"].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_padding_is_left_out():
    """Of features that were padded to the right or to the left; positions are counted anew."""
    features = [
        {"input_ids": [2, 7, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "start_positions": 1, "end_positions": 2},
        {"input_ids": [0, 0, 2, 8, 3], "attention_mask": [0, 0, 1, 1, 1], "start_positions": 3, "end_positions": 1},
        {"input_ids": [2, 9, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "start_positions": 5, "end_positions": 3},
    ]
    for feature in features:
        feature["labels"] = [x if mask else -100 for x, mask in zip(feature["input_ids"], feature["attention_mask"], strict=True)]
    row = DataCollatorWithPacking()(features)
    assert row["input_ids"].tolist() == row["labels"].tolist() == [[2, 7, 3, 2, 8, 3, 2, 9, 3]]
    assert row["cu_seq_lens_q"].tolist() == [0, 3, 6, 9]
    assert "attention_mask" not in row
    assert row["start_positions"].tolist() == [1, 1, 5]
    ends = row["end_positions"].tolist()
    assert ends[0] == 2 and ends[1] >= 3 and ends[2] >= 3, "an answer on padding is outside of its sequence"


def test_next_sentence_label_and_missing_values():
    row = DataCollatorWithPacking()(with_(next_sentence_label=[0, 1, 1], labels=[None, None, None]))
    assert row["next_sentence_label"].tolist() == [0, 1, 1]
    assert "labels" not in row


def test_positions_of_roberta():
    assert DataCollatorWithPacking(position_ids_start=2)(FEATURES)["position_ids"].tolist() == [[2, 3, 4, 5, 2, 3, 2, 3, 4]]


def test_masked_language_model(tokenizer: PreTrainedTokenizerFast):
    collator = DataCollatorWithPacking(tokenizer, mlm_probability=0.3)
    features = [dict(tokenizer(text)) for text in TEXTS * 20]
    plain = DataCollatorWithPacking()(features)["input_ids"]
    torch.manual_seed(1)
    row = collator(features)
    labelled = row["labels"] != -100
    assert torch.equal(torch.where(labelled, row["labels"], row["input_ids"]), plain)
    special = torch.isin(plain, torch.tensor(tokenizer.all_special_ids))
    assert not (labelled & special).any()
    assert abs(labelled.sum() / (~special).sum() - 0.3) < 0.05
    masked = row["input_ids"] == tokenizer.mask_token_id
    assert abs(masked[labelled].float().mean() - 0.8) < 0.1 and not masked[~labelled].any()
    for start, end in zip(row["cu_seq_lens_q"][:-1], row["cu_seq_lens_q"][1:], strict=True):
        assert labelled[0, start:end].any(), "every sequence has something to predict"
    torch.manual_seed(1)
    assert torch.equal(collator(features)["labels"], row["labels"])
    assert not torch.equal(collator(features)["labels"], row["labels"]), "masks are drawn anew"


def test_special_tokens_mask_says_what_stays(tokenizer: PreTrainedTokenizerFast):
    features = [{"input_ids": [2, 50, 51, 52, 3], "special_tokens_mask": [1, 0, 1, 1, 1]} for _ in range(10)]
    row = DataCollatorWithPacking(tokenizer, mlm_probability=0.9)(features)
    assert (row["labels"] != -100).tolist() == [[False, True, False, False, False] * 10]
    assert "special_tokens_mask" not in row


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_a_model_makes_of_it_what_it_makes_of_the_padded_batch(name, tokenizer: PreTrainedTokenizerFast):
    num_labels = 2 if name == "BertForQuestionAnswering" else 3
    models = [getattr(fastbert, name)(small_config(vocab_size=len(tokenizer), num_labels=num_labels)).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    features = [dict(tokenizer(text, "near the pier")) for text in TEXTS]
    for index, feature in enumerate(features):
        if name == "BertForTokenClassification":
            feature["labels"] = [-100, *(x % 3 for x in feature["input_ids"][1:-1]), -100]
        elif name == "BertForQuestionAnswering":
            feature |= {"start_positions": index % 2, "end_positions": index % 3}
        else:
            feature["label"] = index % 3
    per_token = name == "BertForTokenClassification"
    padded = (DataCollatorForTokenClassification if per_token else DataCollatorWithPadding)(tokenizer)(features)
    row = DataCollatorWithPacking()(features)
    expected, got = models[0](**padded), models[1](**row)
    torch.testing.assert_close(got.loss, expected.loss)
    if name == "BertForSequenceClassification":
        torch.testing.assert_close(got.logits, expected.logits)
    expected.loss.backward()
    got.loss.backward()
    assert_same_gradients(models[1], models[0], 1e-4)


def test_roberta(tokenizer: PreTrainedTokenizerFast):
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=0, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    theirs = transformers.RobertaModel(config).eval()
    features = [dict(tokenizer(text, return_token_type_ids=False)) for text in TEXTS]
    expected = theirs(**DataCollatorWithPadding(tokenizer)(features)).pooler_output
    ours = fastbert.accelerate(theirs)
    torch.testing.assert_close(ours(**DataCollatorWithPacking(position_ids_start=1)(features)).pooler_output, expected)
    with pytest.warns(UserWarning, match="collators take position_ids_start=1"):
        ours(**DataCollatorWithPacking()(features))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "there are no features to pack"),
        ([{"token_type_ids": [0]}], "features need input_ids; they have token_type_ids"),
        (with_(text=["a", "b", "c"]), "features have text, which nobody packs; known are input_ids, "),
        ([*FEATURES, {"input_ids": [2, 3]}], "feature 3 has input_ids; feature 0 has input_ids, token_type_ids"),
        (with_(label=[0, 1, 1], labels=[0, 1, 1]), "features have labels and label, expected one of them"),
        ([{"input_ids": [[2, 3]]}], r"input_ids of feature 0 has shape \(1, 2\), expected \(length,\)"),
        (with_(token_type_ids=[[0] * 4, [0] * 3, [0] * 3]), "token_type_ids of feature 1 has 3 values for 2 tokens"),
        (with_(labels=[[1] * 4, [1] * 2, [1] * 5]), "labels of feature 2 has 5 values for 3 tokens; .* must be float"),
        (with_(labels=[[1.0], [1.0, 0.0], [1.0]]), r"labels of feature 1 has shape \(2,\), expected \(1,\)"),
        (with_(labels=[1, 1, [1, 1, 1]]), r"labels of feature 2 has shape \(3,\), expected \(\)"),
        (with_(label=["yes", "no", "no"]), "label of feature 0 holds 'yes', expected numbers"),
        (with_(start_positions=[1, [1], 1]), r"start_positions of feature 1 has shape \(1,\), expected \(\)"),
    ],
)
def test_features_that_do_not_fit_are_named(features, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorWithPacking()(features)


def test_what_masking_needs(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ValueError, match="needs a tokenizer that has a mask token"):
        DataCollatorWithPacking(mlm_probability=0.15)
    with pytest.raises(ValueError, match="mlm_probability must be above 0 and at most 1, not 15"):
        DataCollatorWithPacking(tokenizer, mlm_probability=15)
    with pytest.raises(ValueError, match="features have label, but mlm_probability asks for labels"):
        DataCollatorWithPacking(tokenizer, mlm_probability=0.15)(with_(label=[0, 1, 1]))
