"""Bad input ends in an error that says what is wrong, where, and what would be right."""

from __future__ import annotations

import pytest
import torch
import transformers

import fastbert

from .helpers import BATCH, LENGTH, inputs_for, small_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_ids": torch.full((BATCH, LENGTH), 130)},
            r"input_ids holds 130, expected 0 to 129 \(config.vocab_size is 130\)",
        ),
        ({"input_ids": torch.full((BATCH, LENGTH), -1)}, "input_ids holds -1"),
        ({"token_type_ids": torch.full((BATCH, LENGTH), 2)}, "token_type_ids holds 2, expected 0 to 1"),
        ({"position_ids": torch.full((BATCH, LENGTH), 40)}, "position_ids holds 40, expected 0 to 39"),
        ({"attention_mask": torch.ones(BATCH, LENGTH + 1)}, r"attention_mask has shape \(6, 22\), expected \(6, 21\)"),
        ({"token_type_ids": torch.zeros(BATCH, 3, dtype=torch.long)}, r"token_type_ids has shape \(6, 3\)"),
        ({"labels": torch.zeros(BATCH, 3, dtype=torch.long)}, r"labels has shape \(6, 3\), expected \(6, 21\)"),
        ({"labels": torch.full((BATCH, LENGTH), 130)}, "labels hold 130, expected 0 to 129"),
        ({"labels": torch.ones(BATCH, LENGTH, dtype=torch.int32)}, "labels are torch.int32, expected torch.int64"),
        (
            {"next_sentence_label": torch.zeros(2, dtype=torch.long)},
            r"next_sentence_label has shape \(2,\), expected \(6,\)",
        ),
        ({"input_ids": None}, "exactly one of input_ids or inputs_embeds"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"expected \(batch, length\)|expected \(4,\)"),
    ],
)
def test_inputs(change, message):
    ours = fastbert.BertForPreTraining(small_config()).eval()
    batch = inputs_for("BertForPreTraining")
    if change.get("input_ids", 0) is None:
        batch.pop("labels")
    with pytest.raises(ValueError, match=message):
        ours(**{**batch, **change})


def test_sequences_longer_than_the_model():
    ours = fastbert.BertModel(small_config()).eval()
    with pytest.raises(ValueError, match="have 41 tokens, the model has positions for 40"):
        ours(torch.zeros(1, 41, dtype=torch.long))


def test_a_checkpoint_of_another_architecture(tmp_path):
    config = transformers.RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'roberta', BertModel loads 'bert'"):
        fastbert.BertModel.from_pretrained(tmp_path)


class OwnConfig(transformers.BertConfig):
    model_type = "own-bert"


class OwnModel(fastbert.BertForSequenceClassification):
    config_class = OwnConfig


def test_a_derived_class_with_a_configuration_of_its_own(tmp_path):
    """Loads what it has saved, what BERT has, and nothing else."""
    saved = OwnModel(OwnConfig(**small_config().to_diff_dict()))
    saved.save_pretrained(tmp_path / "own")
    loaded = OwnModel.from_pretrained(tmp_path / "own")
    assert type(loaded.config) is OwnConfig and torch.equal(loaded.classifier.weight, saved.classifier.weight)
    given = fastbert.BertForSequenceClassification.from_pretrained(
        tmp_path / "own", config=transformers.BertConfig.from_pretrained(tmp_path / "own")
    )
    assert torch.equal(given.classifier.weight, saved.classifier.weight)
    fastbert.BertForSequenceClassification(small_config()).save_pretrained(tmp_path / "bert")
    assert isinstance(OwnModel.from_pretrained(tmp_path / "bert"), OwnModel)
    with pytest.raises(ValueError, match="holds a model of type 'own-bert', BertModel loads 'bert'"):
        fastbert.BertModel.from_pretrained(tmp_path / "own")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        fastbert.BertModel.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_ids_on_the_meta_device(mode):
    ours = fastbert.BertModel(small_config()).eval()
    with mode(), pytest.raises(RuntimeError, match="input_ids is on the meta device, without data, and the model is on cpu"):
        ours(inputs_for("BertModel")["input_ids"].to("meta"))
