"""Several sequences in one row: the same result and gradients as one by one, nothing leaks between neighbours."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fastbert
from fastbert.model.cache_name import CACHE
from fastbert.model.packing import Packing
from fastbert.ops import backends

from .helpers import BATCH, LENGTHS, NAMES, assert_same_gradients, inputs_for, mask, pair, small_config
from .test_accelerate import TASKS, batch_for, relative

TOTAL = sum(LENGTHS)
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# How a caller says where the sequences are: as transformers' DataCollatorWithFlattening does, with both, or with either.
LAYOUTS = ("both", "positions", "boundaries")


def packed(batch: dict[str, torch.Tensor], layout: str = "both") -> dict[str, torch.Tensor]:
    """The padded ``batch`` with all real tokens in one row."""
    real = mask().bool()
    rows = {key: value[real].unsqueeze(0) for key, value in batch.items() if value.shape[:2] == real.shape}
    rows.pop("attention_mask")
    others = {key: value for key, value in batch.items() if value.shape[:2] != real.shape}
    row = {
        **rows, **others, "cu_seq_lens_q": CU_SEQLENS, "cu_seq_lens_k": CU_SEQLENS, "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS), "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0),
    }  # fmt: skip
    left_out = {"both": (), "positions": BOUNDARIES, "boundaries": ("position_ids", "max_length_q", "max_length_k")}[layout]
    return {key: value for key, value in row.items() if key not in left_out}


def assert_row_is_the_batch(row, batch) -> None:
    """Every field of a packed call's output against the padded call's: a row (1, total, ...) holds the batch's real tokens."""
    assert list(row.keys()) == list(batch.keys())
    for key, value in row.items():
        expected = batch[key][mask().bool()].unsqueeze(0) if value.shape[:2] == (1, TOTAL) else batch[key]
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


def assert_same_as_padded(padded_model, model, name: str, layout: str, batch: dict[str, torch.Tensor] | None = None) -> None:
    batch = inputs_for(name) if batch is None else batch
    row = packed(batch, layout)
    if "position_ids" in row:
        row["position_ids"] += model.base_model.first_position
    expected, got = padded_model(**batch), model(**row)
    assert_row_is_the_batch(got, expected)
    loss_of = (lambda output: output.pooler_output.square().sum()) if name == "BertModel" else (lambda output: output.loss)
    loss_of(expected).backward()
    loss_of(got).backward()
    assert_same_gradients(model, padded_model, 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "BertForMultipleChoice"])
def test_every_class(name, layout):
    """The padded batch's results are those of transformers: test_parity.py."""
    _, ours = pair(name)
    assert_same_as_padded(copy.deepcopy(ours), ours, name, layout)


@pytest.mark.parametrize("layout", ["positions", "boundaries"])
@pytest.mark.parametrize("task", TASKS[:4])
@pytest.mark.parametrize("name", ["Roberta", "Electra"])
def test_relatives(name, task, layout):
    """RoBERTa's positions start after the padding token's id; of a padding token among others they know by its id alone."""
    _, ours = relative(name, task)
    batch = batch_for(task, ours.config)
    if layout == "positions":
        batch["input_ids"][0, 4] = 5
    assert_same_as_padded(copy.deepcopy(ours), ours, f"Bert{task}", layout, batch)


@pytest.mark.parametrize("layout", ["positions", "boundaries"])
@pytest.mark.parametrize("name", ["BertModel", "BertForQuestionAnswering", "BertLMHeadModel", "BertForSequenceClassification"])
def test_every_class_with_eager_attention(name, layout):
    _, ours = pair(name, attn_implementation="eager")
    assert_same_as_padded(copy.deepcopy(ours), ours, name, layout)


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request, monkeypatch):
    """The backend that "auto" picks for CPU tensors."""
    if reason := backends.unavailable_reason(request.param):
        pytest.skip(reason)
    monkeypatch.setitem(backends.AUTO_ORDER, "cpu", (request.param,))
    backends.select.cache_clear()
    yield request.param
    backends.select.cache_clear()


def test_every_backend(backend):
    """Against transformers with one sequence at a time."""
    theirs, ours = pair("BertModel", num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32)
    ids = [torch.randint(130, (1, n)) for n in (5, 1, 3)]
    alone = [theirs(x) for x in ids]
    expected = torch.cat([output.last_hidden_state[0] for output in alone])
    pooled = torch.cat([output.pooler_output for output in alone])
    got = ours(torch.cat(ids, dim=1), position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2]]))
    torch.testing.assert_close(got.last_hidden_state[0], expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got.pooler_output, pooled, atol=2e-5, rtol=2e-5)
    weights = torch.randn(9, 32)
    ((expected * weights).sum() + pooled.square().sum()).backward()
    ((got.last_hidden_state[0] * weights).sum() + got.pooler_output.square().sum()).backward()
    assert_same_gradients(ours, theirs, 1e-4)


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


def test_dropout_is_that_of_the_padded_batch():
    _, ours = pair("BertForSequenceClassification")
    ours.train()
    batch = inputs_for("BertForSequenceClassification")
    results = []
    for inputs in (batch, packed(batch), packed(batch, "positions")):
        torch.manual_seed(5)
        results.append(ours(**inputs).logits)
    assert not torch.equal(results[0], ours(**batch).logits), "dropout is on"
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    _, ours = pair("BertForQuestionAnswering")
    checkpointed = copy.deepcopy(ours).train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    row = packed(inputs_for("BertForQuestionAnswering"), "positions")
    for model in (ours.train(), checkpointed):
        torch.manual_seed(3)
        model(**row).loss.backward()
    assert_same_gradients(checkpointed, ours, 1e-6)


def test_a_layer_that_cannot_run_packed():
    """Its hook sees one sequence per row, in transformers' layout."""
    _, ours = pair("BertModel")
    row = packed(inputs_for("BertModel"), "positions")
    expected, shapes = ours(**row), []
    ours.encoder.layer[1].register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    got = ours(**row)
    assert shapes == [(BATCH, max(LENGTHS), 48)]
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output)


# --- what is packed, and what is not -------------------------------------------------------------------------------------


def test_the_row_of_transformers_collator():
    """DataCollatorWithFlattening makes position_ids alone, or with the boundaries, and no token types."""
    _, ours = pair("BertForMaskedLM")
    ids = [torch.randint(5, 130, (n,)).tolist() for n in LENGTHS]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in ids], batch_first=True)
    expected = ours(padded, attention_mask=mask()).logits[mask().bool()]
    for with_boundaries in (False, True):
        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=with_boundaries)
        row = collator([{"input_ids": x, "labels": x} for x in ids])
        assert ("cu_seq_lens_q" in row) == with_boundaries
        got = ours(**row)
        torch.testing.assert_close(got.logits[0], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "positions",
    [
        [0, 1, 2, 3, 4, 5],  # one sequence
        [3, 4, 0, 1, 2, 3],  # does not start at the first position
        [0, 1, 2, 1, 2, 3],  # starts again elsewhere
        [0, 1, 3, 0, 1, 2],  # leaves one out
        [0, 1, 1, 0, 1, 2],  # repeats one
        [5, 4, 3, 2, 1, 0],
        [0, 0, 0, 0, 0, 0],  # never rises
    ],
)
def test_positions_that_say_nothing_about_sequences(positions):
    theirs, ours = pair("BertModel")
    ids, position_ids = torch.randint(130, (1, 6)), torch.tensor([positions])
    assert Packing.from_positions(position_ids, (1, 6)) is None
    expected, got = (model(ids, position_ids=position_ids) for model in (theirs, ours))
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=2e-5, rtol=2e-5)
    assert got.pooler_output.shape == (1, 48)


@pytest.mark.parametrize("with_mask", [True, False])
def test_only_a_row_without_mask_is_packed(with_mask):
    theirs, ours = pair("BertModel")
    rows = 1 if with_mask else 2
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(rows, 6)
    batch = {"input_ids": torch.randint(130, (rows, 6)), "position_ids": position_ids}
    if with_mask:
        batch["attention_mask"] = torch.ones(rows, 6, dtype=torch.long)
    expected, got = theirs(**batch), ours(**batch)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=2e-5, rtol=2e-5)


def test_sequences_found_in_positions():
    for first in (0, 2):
        packing = Packing.from_positions(torch.tensor([[0, 1, 0, 0, 1, 2]]) + first, (1, 6))
        assert packing.cu_seqlens.tolist() == [0, 2, 3, 6] and packing.cu_seqlens.dtype == torch.int32
        assert packing.max_seqlen == 3


@pytest.mark.parametrize("layout", ["boundaries", "positions", "both"])
def test_positions_that_start_after_padding(layout):
    """RoBERTa counts from its padding token's id + 1, in every sequence."""
    config = transformers.RobertaConfig(
        vocab_size=130, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=40, pad_token_id=1, initializer_range=0.1,
    )  # fmt: skip
    theirs = transformers.RobertaModel(config).eval()
    ours = fastbert.accelerate(copy.deepcopy(theirs))
    ids = torch.randint(2, 130, mask().shape).masked_fill(mask() == 0, 1)
    expected = theirs(ids, attention_mask=mask())
    row = packed({"input_ids": ids, "attention_mask": mask()}, layout)
    if "position_ids" in row:
        with pytest.warns(UserWarning, match="position_ids start at 0, but RobertaModel counts from 2"):
            ours(**row)
        row["position_ids"] += 2
    got = ours(**row)
    torch.testing.assert_close(got.last_hidden_state[0], expected.last_hidden_state[mask().bool()], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_decoder_looks_back_within_its_sequence(attn_implementation):
    _, ours = pair("BertLMHeadModel", is_decoder=True, attn_implementation=attn_implementation)
    assert_same_as_padded(copy.deepcopy(ours), ours, "BertLMHeadModel", "positions")
    row = packed(inputs_for("BertLMHeadModel"))
    row.pop("labels")
    assert ours(**row, use_cache=True).get(CACHE) is None, "a cache of padded rows would fit no later token"


def test_the_first_token_of_a_sequence_follows_nobody():
    """Its label is no target for the token before it, which belongs to another sequence."""
    _, ours = pair("BertLMHeadModel")
    row = packed(inputs_for("BertLMHeadModel"))
    row["labels"] = torch.full((1, TOTAL), -100)
    row["labels"][0, 2] = 7
    expected = ours(**row).loss
    row["labels"][0, CU_SEQLENS[:-1].long()] = 9
    assert torch.equal(ours(**row).loss, expected)
    torch.testing.assert_close(ours(**row, ignore_index=-100).loss, expected)


def test_empty_sequences_are_like_rows_of_padding():
    _, ours = pair("BertForSequenceClassification")
    batch = {"input_ids": torch.randint(130, (4, 5)), "attention_mask": torch.zeros(4, 5, dtype=torch.long)}
    batch["attention_mask"][1, :5] = batch["attention_mask"][2, :2] = 1
    row = {
        "input_ids": batch["input_ids"][batch["attention_mask"] == 1].unsqueeze(0),
        "cu_seq_lens_q": torch.tensor([0, 0, 5, 7, 7]),
    }
    torch.testing.assert_close(ours(**row).logits, ours(**batch).logits)


@pytest.mark.parametrize(
    "change",
    [
        {"cu_seq_lens_q": CU_SEQLENS.long(), "cu_seq_lens_k": CU_SEQLENS.clone().long()},
        {"max_length_q": torch.tensor(max(LENGTHS))},
        {"max_length_q": 100},
    ],
    ids=["int64", "max_length as a tensor", "max_length as a bound"],
)
def test_boundaries_that_say_the_same(change):
    _, ours = pair("BertModel")
    row = packed(inputs_for("BertModel"), "both")
    torch.testing.assert_close(ours(**{**row, **change}).pooler_output, ours(**row).pooler_output)


# --- question answering --------------------------------------------------------------------------------------------------


def test_answers_are_counted_within_their_sequence():
    _, ours = pair("BertForQuestionAnswering")
    batch = inputs_for("BertForQuestionAnswering")
    got = ours(**packed(batch))
    losses = []
    for logits, positions in ((got.start_logits, batch["start_positions"]), (got.end_logits, batch["end_positions"])):
        parts = logits[0].split(LENGTHS)
        losses += [torch.nn.functional.cross_entropy(part, target) for part, target in zip(parts, positions, strict=True)]
    torch.testing.assert_close(got.loss, torch.stack(losses).mean())


@pytest.mark.parametrize("position", [3, 9, 1000])
def test_an_answer_outside_of_its_sequence_counts_for_nothing(position):
    """Sequence 1 has 3 tokens: 3 would be its padding or its neighbour's first token, 1000 is beyond everything."""
    _, ours = pair("BertForQuestionAnswering")
    batch = inputs_for("BertForQuestionAnswering")
    batch["end_positions"][1] = position
    starts = ours(**packed(batch)).start_logits[0].split(LENGTHS)
    ends = ours(**packed(batch)).end_logits[0].split(LENGTHS)
    start_losses = [torch.nn.functional.cross_entropy(x, y) for x, y in zip(starts, batch["start_positions"], strict=True)]
    end_losses = [torch.nn.functional.cross_entropy(ends[i], batch["end_positions"][i]) for i in range(BATCH) if i != 1]
    expected = (torch.stack(start_losses).mean() + torch.stack(end_losses).mean()) / 2
    torch.testing.assert_close(ours(**packed(batch)).loss, expected)
    torch.testing.assert_close(ours(**batch).loss, expected)


# --- torch.compile, and errors -------------------------------------------------------------------------------------------


def test_compiled_code_takes_boundaries_and_refuses_positions_alone():
    _, ours = pair("BertForQuestionAnswering", num_hidden_layers=1)
    batch = inputs_for("BertForQuestionAnswering")
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    row = packed(batch, "boundaries")
    torch.testing.assert_close(compiled(**row).loss, ours(**row).loss)
    row = packed(batch, "positions")
    with pytest.raises(RuntimeError, match="compiled code needs cu_seq_lens_q and max_length_q"):
        compiled(**{key: row[key] for key in ("input_ids", "token_type_ids", "position_ids")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(1, TOTAL)}, "attention_mask=None"),
        ({"cu_seq_lens_q": torch.tensor([TOTAL])}, r"cu_seq_lens_q has shape \(1,\), expected \(num_sequences \+ 1,\)"),
        ({"cu_seq_lens_q": CU_SEQLENS[None]}, r"cu_seq_lens_q has shape \(1, 7\)"),
        ({"cu_seq_lens_q": CU_SEQLENS.float()}, "cu_seq_lens_q is torch.float32, expected int32 or int64"),
        ({"cu_seq_lens_q": CU_SEQLENS.to("meta")}, "cu_seq_lens_q is on meta, expected cpu"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "cu_seq_lens_k differs from cu_seq_lens_q"),
        ({"cu_seq_lens_k": CU_SEQLENS + (CU_SEQLENS == 21)}, "cu_seq_lens_k differs from cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([1, 21, 24, 25, 34, 46, TOTAL])}, "starts at 1, expected 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 21, 24, 25, 34, 46, 65])}, "ends at 65, expected 66, the number of tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 21, 24, 23, 34, 46, TOTAL])}, "falls from 24 to 23 at index 3"),
        ({"max_length_q": 20}, "max_length_q is 20, but the longest sequence between cu_seq_lens_q has 21"),
        ({"cu_seq_lens_q": None}, "cu_seq_lens_k is given without cu_seq_lens_q"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 41, TOTAL]), "cu_seq_lens_k": None, "max_length_q": None, "position_ids": None},
            "the longest packed sequence has 41 tokens, the model has positions for 40",
        ),
    ],
)
def test_bad_packing_is_named(change, message):
    _, ours = pair("BertModel")
    with pytest.raises(ValueError, match=message):
        ours(**{**packed(inputs_for("BertModel")), **change})


def test_two_rows_are_not_packed():
    _, ours = pair("BertModel")
    with pytest.raises(ValueError, match="the batch size is 2; expected 1"):
        ours(torch.zeros(2, 5, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 2, 5]))


def test_data_parallel_replicas_refuse_packed_rows():
    """torch.nn.DataParallel hands each GPU a part of cu_seq_lens_q, which nobody reads there."""
    _, ours = pair("BertModel")
    with pytest.raises(ValueError, match=r"use one GPU \(CUDA_VISIBLE_DEVICES=0\), or DistributedDataParallel, .*\(torchrun\)"):
        ours._replicate_for_data_parallel()(**packed(inputs_for("BertModel")))


def test_labels_of_another_number_of_sequences():
    _, ours = pair("BertForQuestionAnswering")
    row = packed(inputs_for("BertForQuestionAnswering"))
    with pytest.raises(ValueError, match=r"end_positions has shape \(2,\), expected \(6,\)"):
        ours(**{**row, "end_positions": torch.tensor([0, 1])})


def test_multiple_choice_names_what_it_takes():
    _, ours = pair("BertForMultipleChoice")
    row = packed(inputs_for("BertModel"))
    with pytest.raises(ValueError, match=r"no packed inputs .* pass input_ids \(batch, num_choices, length\)"):
        ours(**row)


def test_cross_attention_has_no_packed_row():
    _, ours = pair("BertModel", is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="cannot be combined with cross-attention"):
        ours(**packed(inputs_for("BertModel")), encoder_hidden_states=torch.zeros(1, 4, 48))
