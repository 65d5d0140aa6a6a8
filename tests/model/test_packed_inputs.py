"""Several sequences in one row (cu_seq_lens_q): the same result as one by one, nothing leaks between neighbours."""

from __future__ import annotations

import pytest
import torch

import fastbert

from .helpers import LENGTHS, inputs_for, mask, pair, small_config


def packed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The padded ``batch`` with all real tokens in one row."""
    real = mask().bool()
    rows = {key: value[real].unsqueeze(0) for key, value in batch.items() if value.shape[:2] == real.shape}
    rows.pop("attention_mask")
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    others = {key: value for key, value in batch.items() if value.shape[:2] != real.shape}
    lengths = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }
    return {**rows, **others, **lengths, "position_ids": positions}


@pytest.mark.parametrize("with_positions", [True, False])
def test_encoder(with_positions):
    _, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    expected = ours(**batch)
    row = packed(batch)
    if not with_positions:
        row.pop("position_ids")
        row.pop("max_length_q")
    got = ours(**row)
    torch.testing.assert_close(got.last_hidden_state[0], expected.last_hidden_state[mask().bool()])
    torch.testing.assert_close(got.pooler_output, expected.pooler_output)


def test_pretraining_loss_and_telemetry():
    theirs, ours = pair("BertForPreTraining")
    batch = inputs_for("BertForPreTraining")
    expected = theirs(**batch)
    got = ours(**packed(batch))
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.mlm_loss + got.next_sentence_loss, got.loss.detach())
    labelled = batch["labels"] != -100
    predictions = expected.prediction_logits.argmax(-1)
    assert got.mlm_count == labelled.sum()
    assert got.mlm_correct == (predictions == batch["labels"])[labelled].sum()
    assert got.seq_relationship_logits.shape == expected.seq_relationship_logits.shape


def test_a_sequence_does_not_see_its_neighbours():
    ours = fastbert.BertModel(small_config()).eval()
    row = packed(inputs_for("BertModel"))
    first = ours(**row).last_hidden_state
    row["input_ids"][:, LENGTHS[0] :] = 7
    changed = ours(**row).last_hidden_state
    assert torch.equal(first[:, : LENGTHS[0]], changed[:, : LENGTHS[0]])
    assert not torch.equal(first[:, LENGTHS[0] :], changed[:, LENGTHS[0] :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(1, sum(LENGTHS))}, "attention_mask=None"),
        ({"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32)}, "to total = 66|differs from"),
        ({"max_length_q": 100}, "positions for 40"),
    ],
)
def test_bad_packing_is_named(change, message):
    _, ours = pair("BertModel")
    with pytest.raises(ValueError, match=message):
        ours(**{**packed(inputs_for("BertModel")), **change})


@pytest.mark.parametrize("with_positions", [True, False])
def test_eager_attention_takes_packed_rows_too(with_positions):
    theirs, ours = pair("BertModel", attn_implementation="eager")
    batch = inputs_for("BertModel")
    expected = theirs(**batch, output_hidden_states=True, output_attentions=True)
    row = packed(batch)
    if not with_positions:
        row.pop("position_ids")
    got = ours(**row, output_hidden_states=True, output_attentions=True)
    real = mask().bool()
    torch.testing.assert_close(got.last_hidden_state[0], expected.last_hidden_state[real])
    torch.testing.assert_close(got.pooler_output, expected.pooler_output)
    for state, wanted in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state[0], wanted[real])
    torch.testing.assert_close(got.attentions[1].movedim(2, 1)[real], expected.attentions[1].movedim(2, 1)[real])
