"""Checkpoints go back and forth; the outputs on a real one are transformers'."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fastbert

from .helpers import NAMES, assert_same_gradients, config_for, inputs_for, small_config


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_plain_transformers(name, tmp_path):
    ours = getattr(fastbert, name)(config_for(name)).eval()
    batch = inputs_for(name)
    expected = ours(**batch)
    ours.save_pretrained(tmp_path)
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    assert type(theirs).__module__.startswith("transformers")
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    theirs.save_pretrained(tmp_path / "back")
    again = getattr(fastbert, name).from_pretrained(tmp_path / "back")
    # Weights that lie in a mapped file start anywhere, and matmul libraries round differently there than on aligned memory.
    got = copy.deepcopy(again)(**batch)
    for key in expected:
        assert torch.equal(got[key], expected[key]), key


def test_encoder_of_a_checkpoint_with_heads(tmp_path):
    fastbert.BertForPreTraining(small_config()).save_pretrained(tmp_path)
    encoder, loading = fastbert.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert type(encoder.encoder.layer[0]) is type(fastbert.BertModel(small_config()).encoder.layer[0])


@pytest.fixture(scope="module")
def real_batches(minilm, data_folder) -> list[dict[str, torch.Tensor]]:
    """200 sentences of SST-2's training set, in padded batches of 25."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    lines = (data_folder / "glue/SST-2/train.tsv").read_text(encoding="utf-8").split("\n")[1:201]
    sentences = [line.split("\t")[0] for line in lines]
    return [dict(tokenizer(sentences[i : i + 25], padding=True, return_tensors="pt")) for i in range(0, len(sentences), 25)]


def test_outputs_on_a_real_checkpoint(minilm, real_batches):
    theirs = transformers.BertModel.from_pretrained(minilm, dtype=torch.float32).eval()
    ours = fastbert.BertModel.from_pretrained(minilm, dtype=torch.float32).eval()
    worst = 0.0
    with torch.no_grad():
        for batch in real_batches:
            real = batch["attention_mask"].unsqueeze(-1)
            difference = ours(**batch).last_hidden_state - theirs(**batch).last_hidden_state * real
            worst = max(worst, difference.abs().max().item())
    assert worst <= 2e-5


def test_gradients_on_a_real_checkpoint(minilm, real_batches):
    torch.manual_seed(0)
    theirs = transformers.BertForTokenClassification.from_pretrained(minilm, dtype=torch.float32, num_labels=5).eval()
    ours = fastbert.BertForTokenClassification.from_pretrained(minilm, dtype=torch.float32, num_labels=5).eval()
    ours.load_state_dict(theirs.state_dict())
    for batch in real_batches[:2]:
        labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 5, -100)
        ours(**batch, labels=labels).loss.backward()
        theirs(**batch, labels=labels).loss.backward()
    assert_same_gradients(ours, theirs, 1e-4)
