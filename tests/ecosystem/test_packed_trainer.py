"""What DataCollatorWithPacking has to get along with in transformers' Trainer; test_trainer.py trains and evaluates with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from fastbert import DataCollatorWithPacking

from ..model.helpers import NUM_LABELS
from .helpers import fast, small_tokenizer
from .test_trainer import assert_same_parameters, collator, examples, logged, small, train, trainer_for

NAME = "BertForSequenceClassification"


def trained_with(kind: str, folder, **changes) -> tuple[list[float], torch.nn.Module]:
    model = fast(small(NAME), "class")
    return train(model, folder, kind, **changes), model


@pytest.mark.parametrize(
    "changes",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 2},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 7},
        {"train_dataset": [{**feature, "text": "a ship", "idx": i} for i, feature in enumerate(examples(NAME, 24))]},
    ],
    ids=["group_by_length", "workers", "drop_last", "unused columns"],
)
def test_same_as_padded(changes, tmp_path):
    expected, padded_model = trained_with("padded", tmp_path, **changes)
    got, model = trained_with("packed", tmp_path, **changes)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_same_parameters(model, padded_model, 1e-5)


def test_columns_that_are_kept_are_named(tmp_path):
    features = [{**feature, "text": "a ship"} for feature in examples(NAME, 24)]
    with pytest.raises(ValueError, match="features have text, which nobody packs"):
        trained_with("packed", tmp_path, train_dataset=features, remove_unused_columns=False)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(examples(NAME, 32))


def test_an_iterable_dataset(tmp_path):
    whole = {"train_dataset": examples(NAME, 32), "train_sampling_strategy": "sequential"}
    expected, padded_model = trained_with("padded", tmp_path, **whole)
    streamed = {"train_dataset": Stream(), "accelerator_config": {"dispatch_batches": False}}
    got, model = trained_with("packed", tmp_path, **streamed)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_same_parameters(model, padded_model, 1e-5)


def test_dispatching_is_an_error(tmp_path):
    """The default for iterable data sets, which slices cu_seq_lens_q."""
    with pytest.raises(ValueError, match=r"cu_seq_lens_q has shape \(1,\).*accelerate's dispatch_batches=True would cut it"):
        trained_with("packed", tmp_path, train_dataset=Stream())


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_labels_of_sequences(problem, tmp_path):
    """Trained and evaluated; 12 evaluated examples in batches of 5."""
    changes = {"num_labels": 1} if problem == "regression" else {"problem_type": problem}
    draw = np.random.default_rng(3)
    shape = () if problem == "regression" else (NUM_LABELS,)
    features = [
        {**{k: v for k, v in feature.items() if k != "label"}, "labels": draw.integers(0, 2, shape).astype(float).tolist()}
        for feature in examples(NAME, 24)
    ]
    results, models = [], []
    for kind in ("padded", "packed"):
        models.append(fast(small(NAME, **changes), "class"))
        trainer = trainer_for(models[-1], tmp_path, kind, train_dataset=features, eval_dataset=features[:12])
        trainer.train()
        results.append((logged(trainer), trainer.predict(features[:12])))
    (expected_losses, expected), (losses, got) = results
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_same_parameters(models[1], models[0], 1e-5)
    assert got.predictions.shape == expected.predictions.shape == (12, 1 if problem == "regression" else NUM_LABELS)
    np.testing.assert_allclose(got.predictions, expected.predictions, atol=2e-5)
    np.testing.assert_array_equal(got.label_ids, expected.label_ids)


def test_a_masked_language_model_learns(tmp_path):
    name = "BertForMaskedLM"
    features = [{"input_ids": feature["input_ids"]} for feature in examples(name, 24)]
    model = fast(small(name), "class")
    masked = DataCollatorWithPacking(small_tokenizer(), mlm_probability=0.2)
    losses = train(
        model, tmp_path, data_collator=masked, train_dataset=features, max_steps=20, optim="adamw_torch", learning_rate=3e-3
    )  # fmt: skip
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:4])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_causal_language_model_with_transformers_collator(accumulation, tmp_path):
    """Trainer divides by the labels of all accumulated batches; the first token of each sequence is no target anywhere."""
    theirs = small("BertLMHeadModel", is_decoder=True)
    ours = fast(theirs, "class")
    features = [{"input_ids": x["input_ids"], "labels": [-100, *x["input_ids"][1:]]} for x in examples(NAME, 24)]
    pad = DataCollatorForSeq2Seq(small_tokenizer())
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    expected = train(theirs, tmp_path, train_dataset=features, data_collator=pad)
    got = train(ours, tmp_path, train_dataset=features, data_collator=DataCollatorWithFlattening(), **sizes)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_same_parameters(ours, theirs, 1e-5)


def test_the_batch_passes_through_accelerate_unchanged():
    accelerate = pytest.importorskip("accelerate")
    loader = torch.utils.data.DataLoader(examples(NAME, 8), batch_size=8, collate_fn=collator("packed", NAME))
    (expected,) = loader
    (got,) = accelerate.Accelerator(cpu=True).prepare(loader)
    assert got.keys() == expected.keys()
    assert type(got["max_length_q"]) is int
    assert all(torch.equal(torch.as_tensor(got[key]), torch.as_tensor(expected[key])) for key in expected)


def test_number_of_tokens_seen(tmp_path):
    """Of real tokens, without padding."""
    trainer = trainer_for(fast(small(NAME), "class"), tmp_path, "packed", max_steps=3, include_num_input_tokens_seen=True)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(len(feature["input_ids"]) for feature in examples(NAME, 24))
    assert isinstance(trainer, transformers.Trainer)
