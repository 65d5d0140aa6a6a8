"""Masked LM: the encoder's last layer goes on with the rows that somebody reads, and nobody can tell from the numbers."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import fastbert
from fastbert.model import encoder as encoder_module
from fastbert.model import lm_head, packed_layer, row_selection
from fastbert.model.packing import Packing
from fastbert.model.row_selection import RowSelection

from .helpers import BATCH, LENGTHS, assert_same_gradients, inputs_for, mask, on_real_tokens, pair, rows_of_layers, small_config
from .test_layer import replace
from .test_packed_inputs import packed

NAMES = ("BertForPreTraining", "BertForMaskedLM")
TOTAL, LAYERS = sum(LENGTHS), 3
DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
NO_DROPOUT = dict.fromkeys(DROPOUT, 0.0)


@pytest.fixture
def rows_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return rows_of_layers(monkeypatch)


@pytest.fixture(autouse=True)
def even_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches here are small."""
    monkeypatch.setattr(row_selection, "_FEWEST_LEFT_OUT", 0)


def in_full(model: nn.Module, batch: dict[str, torch.Tensor]):
    """The output of a call whose last layer computes all rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "all_rows_reasons", lambda *_: ["not now"])
        return model(**batch)


def labelled(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"] != -100).sum())


def read_by(name: str, batch: dict[str, torch.Tensor]) -> int:
    """The labelled rows and, where there is a pooler, the first of every sequence."""
    return labelled(batch) + (BATCH if name == "BertForPreTraining" else 0)


def with_labels(name: str, kind: str) -> dict[str, torch.Tensor]:
    batch = inputs_for(name)
    ids, labels = batch["input_ids"], torch.full_like(batch["labels"], -100)
    if kind == "one":
        labels[3, 4] = 7
    elif kind == "first tokens":
        labels[:3, 0], labels[0, 5] = ids[:3, 0], 9
    elif kind == "all":
        labels = torch.where(mask() == 1, ids, -100)
    elif kind == "some":
        labels = batch["labels"]
    return {**batch, "labels": labels}


LABELS = ("some", "one", "first tokens", "all")


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_all_rows(name, kind, layout, rows_computed):
    """In float64, where nothing but a mistake makes a difference."""
    theirs, ours = (model.double().train() for model in pair(name, **NO_DROPOUT))
    batch = with_labels(name, kind)
    expected, got = theirs(**batch), ours(**(packed(batch) if layout == "packed" else batch))
    assert rows_computed == [TOTAL, TOTAL, TOTAL if kind == "all" else read_by(name, batch)]
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-10, atol=0)
    expected.loss.backward()
    got.loss.backward()
    assert_same_gradients(ours, theirs, 1e-9)
    assert int(got.mlm_count) == labelled(batch)


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "ElectraForMaskedLM"])
def test_relatives(name, rows_computed):
    theirs_class = getattr(transformers, name)
    settings = small_config(**NO_DROPOUT, pad_token_id=1, max_position_embeddings=60, embedding_size=32).to_diff_dict()
    theirs = theirs_class(theirs_class.config_class(**{k: v for k, v in settings.items() if k != "model_type"})).double().train()
    ours = fastbert.accelerate(copy.deepcopy(theirs))
    batch = inputs_for("BertForMaskedLM")
    batch["token_type_ids"].zero_()
    batch["input_ids"].clamp_(min=2)
    losses = [model(**batch).loss for model in (ours, theirs)]
    assert rows_computed == [TOTAL, TOTAL, labelled(batch)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    for loss in losses:
        loss.backward()
    assert_same_gradients(ours, theirs, 1e-9)
    fastbert.restore(ours)
    torch.testing.assert_close(ours(**batch).loss, losses[1], rtol=1e-10, atol=0)
    assert len(rows_computed) == LAYERS


def test_float32_is_as_close_to_float64_as_transformers():
    theirs, ours = pair("BertForPreTraining", **NO_DROPOUT)
    truth, batch = copy.deepcopy(theirs).double(), inputs_for("BertForPreTraining")
    for model in (theirs, ours, truth):
        model.train()(**batch).loss.backward()

    def error(model: nn.Module) -> float:
        squares = [(p.grad - q.grad).square().sum() for p, q in zip(model.parameters(), truth.parameters(), strict=True)]
        return float(torch.stack(squares).sum().sqrt())

    assert error(ours) <= 2 * error(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_no_labelled_row(name):
    """The loss is the mean of nothing, NaN as in transformers; the sum, which Trainer asks for, 0."""
    _, ours = pair(name, **NO_DROPOUT)
    ours.train()
    batch = with_labels(name, "none")
    assert torch.isnan(ours(**batch).loss)
    if name == "BertForMaskedLM":
        loss = ours(**batch, num_items_in_batch=torch.tensor(5)).loss
        assert loss == 0
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in ours.parameters())
    else:
        output = ours(**batch)
        output.next_sentence_loss.item()
        expected = in_full(ours, batch)
        torch.testing.assert_close(output.seq_relationship_logits, expected.seq_relationship_logits, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_with_dropout(name, layout):
    """The backward pass knows the masks of the forward pass: along the gradient the loss rises as its norm says."""
    torch.manual_seed(0)
    ours = getattr(fastbert, name)(small_config(**DROPOUT)).double().train()
    batch = inputs_for(name)
    batch = packed(batch) if layout == "packed" else batch

    def loss() -> torch.Tensor:
        torch.manual_seed(7)
        return ours(**batch).loss

    loss().backward()
    gradients = [p.grad for p in ours.parameters()]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    values, step = [], 1e-5
    with torch.no_grad():  # attention, dropout and all else as in training
        for sign in (1, -2):
            for p, g in zip(ours.parameters(), gradients, strict=True):
                p += sign * step * g / norm
            values.append(loss())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_all_rows(name, layout, mode, rows_computed):
    _, ours = pair(name)
    batch = with_labels(name, "first tokens")
    batch = packed(batch) if layout == "packed" else batch
    with mode():
        output, expected = ours(**batch), in_full(ours, batch)
    assert read_by(name, batch) in rows_computed
    assert list(output.keys()) == list(expected.keys())
    for key in expected:
        torch.testing.assert_close(output[key], expected[key], rtol=2e-5, atol=2e-6)
        assert output[key].requires_grad == expected[key].requires_grad
    if mode is torch.enable_grad:
        parameters = tuple(ours.parameters())
        wanted = [torch.autograd.grad(o[1].square().mean(), parameters, allow_unused=True) for o in (output, expected)]
        for mine, other in zip(*wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("changed", [None, nn.Module.eval])
@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_masks_of_the_loss(name, changed):
    """Even where the model is in another mode when they are read."""
    ours = getattr(fastbert, name)(small_config(**DROPOUT)).double().train()
    batch = inputs_for(name)
    output = ours(**batch)
    if changed is not None:
        changed(ours)
    logits = output[1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    got = output.loss if name == "BertForMaskedLM" else output.mlm_loss
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-12, atol=0)


def test_logits_after_a_step_of_the_last_layer_are_refused():
    ours = fastbert.BertForMaskedLM(small_config()).train()
    output = ours(**inputs_for("BertForMaskedLM"))
    with torch.no_grad():
        ours.bert.encoder.layer[-1].output.dense.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="read outputs.logits before the optimizer step"):
        _ = output.logits


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name, reentrant, rows_computed):
    """With dropout: what is computed again has the masks of the first time."""
    ours = getattr(fastbert, name)(small_config(**DROPOUT)).train()
    batch, gradients = inputs_for(name), []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        rows_computed.clear()
        ours.zero_grad()
        torch.manual_seed(5)
        ours(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    few = read_by(name, batch)
    assert rows_computed == [TOTAL, TOTAL, few, few, TOTAL, TOTAL]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def hook(path: str):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda module, args, output: output)


WATCHED = {
    "the layer": (hook("bert.encoder.layer.2"), "has hooks"),
    "a part of it": (hook("bert.encoder.layer.2.output.dense"), "output.dense has hooks"),
    "its query": (hook("bert.encoder.layer.2.attention.self.query"), "query has hooks"),
    "another Linear": (lambda model: replace(model, "bert.encoder.layer.2.attention.output.dense"), "Scaled"),
    "the pooler": (hook("bert.pooler"), "pooler"),
    "the encoder": (hook("bert.encoder"), "transformers' forward pass"),
    "the model": (hook("bert"), "the encoder has hooks"),
    "the head": (hook("cls.predictions"), "BertLMPredictionHead has hooks"),
}


@pytest.mark.parametrize("what", WATCHED)
def test_who_watches_sees_all_rows(what, rows_computed):
    change, reason = WATCHED[what]
    theirs, ours = pair("BertForPreTraining")
    batch = inputs_for("BertForPreTraining")
    assert fastbert.explain(ours).last_layer == []
    assert "last layer with labels, labelled rows and first tokens only" in str(fastbert.explain(ours))
    for model in (theirs, ours):
        change(model)
    expected, got = theirs(**batch), ours(**batch)
    assert read_by("BertForPreTraining", batch) not in rows_computed
    torch.testing.assert_close(got.loss, expected.loss, rtol=2e-5, atol=2e-6)
    explanation = fastbert.explain(ours)
    assert any(reason in note for note in explanation.last_layer)
    assert f"last layer all rows, read or not: {explanation.last_layer[0]}" in str(explanation)


def test_a_changed_layer_below_matters_not(rows_computed):
    theirs, ours = pair("BertForPreTraining")
    batch = inputs_for("BertForPreTraining")
    for model in (theirs, ours):
        replace(model, "bert.encoder.layer.1.attention.self.query")
    torch.testing.assert_close(ours(**batch).loss, theirs(**batch).loss, rtol=2e-5, atol=2e-6)
    assert rows_computed[-1] == read_by("BertForPreTraining", batch)
    assert fastbert.explain(ours).last_layer == []


@pytest.mark.parametrize("wanted", [{"output_hidden_states": True}, {"labels": None}, {"next_sentence_label": None}])
def test_calls_that_read_all_rows(wanted, rows_computed):
    _, ours = pair("BertForPreTraining")
    batch = {**inputs_for("BertForPreTraining"), **wanted}
    got, expected = ours(**batch), in_full(ours, batch)
    assert set(rows_computed) == {TOTAL}
    torch.testing.assert_close(got.prediction_logits, expected.prediction_logits)
    if "output_hidden_states" in wanted:
        assert fastbert.explain(ours, **wanted).last_layer == ["output_hidden_states asks for them"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_encoder_or_layer_computes_all_rows(whole, rows_computed):
    theirs, ours = pair("BertForPreTraining")
    batch = inputs_for("BertForPreTraining")
    batch.pop("attention_mask")
    part = ours.bert if whole else ours.bert.encoder.layer[-1]
    part.compile(backend="eager", fullgraph=whole)
    torch.testing.assert_close(ours(**batch).loss, theirs(**batch).loss, rtol=2e-5, atol=2e-6)
    assert whole or "compiled" in fastbert.explain(ours).last_layer[0]
    torch._dynamo.reset()


def test_a_first_row_with_a_label_is_one_row():
    """The pooler and the head read the same of its two copies, and so do the logits."""
    packing = Packing(torch.tensor([0, 3, 7], dtype=torch.int32), 4, (1, 7))
    labels = torch.tensor([[-100, 4, -100, 4, -100, 4, -100]])
    selection = RowSelection(packing, labels.numel(), labels, first=True)
    assert selection.rows.tolist() == [1, 3, 5, 0, 3]
    assert selection.labels.tolist() == [4, 4, 4]
    assert selection.first_positions(torch.arange(5).unsqueeze(1)).tolist() == [[3], [1]]
    order, places = selection.all_rows()
    assert order.tolist() == [1, 3, 5, 0, 3, 2, 4, 6]
    assert places.tolist() == [3, 0, 5, 1, 6, 2, 7]


@pytest.mark.parametrize("labels", [None, torch.tensor([[-100, 4, -100, -100]])])
def test_an_empty_sequence_takes_no_row_from_its_neighbour(labels):
    """A last sequence of one token, and an empty one behind it: what the pooler reads is what all rows have."""
    packing = Packing(torch.tensor([0, 3, 4, 4], dtype=torch.int32), 3, (1, 4))
    selection = RowSelection(packing, 4, labels, first=True)
    order, places = selection.all_rows()
    assert order[places].tolist() == [0, 1, 2, 3]
    read = selection.first_positions(1 + torch.arange(selection.rows.numel()).unsqueeze(1)).flatten()
    assert read.tolist() == [*(1 + places[[0, 3]]).tolist(), 0]


FIRST_ROW_HEADS = ("BertForSequenceClassification", "BertForNextSentencePrediction", "BertForMultipleChoice")


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", FIRST_ROW_HEADS)
def test_heads_of_the_pooler_read_first_rows(name, layout, rows_computed):
    if layout == "packed" and name == "BertForMultipleChoice":
        pytest.skip("takes no packed inputs")
    theirs, ours = (model.double().train() for model in pair(name, **NO_DROPOUT))
    batch = inputs_for(name)
    first = batch["input_ids"].flatten(0, -2).shape[0]
    expected, got = theirs(**batch), ours(**(packed(batch) if layout == "packed" else batch))
    assert rows_computed[:-1] == [rows_computed[0]] * (LAYERS - 1) and rows_computed[-1] == first < rows_computed[0]
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-9, atol=1e-10)
    expected.loss.backward()
    got.loss.backward()
    assert_same_gradients(ours, theirs, 1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**batch).logits, theirs.eval()(**batch).logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("what", ["hook of the pooler", "hook of the encoder", "hidden states", "compiled", "int8"])
def test_heads_of_the_pooler_that_get_all_rows(what, rows_computed):
    theirs, ours = (model.eval() for model in pair("BertForSequenceClassification"))
    batch, wanted = inputs_for("BertForSequenceClassification"), {}
    assert fastbert.explain(ours).last_layer == [] and "last layer first tokens only" in str(fastbert.explain(ours))
    if what == "hidden states":
        wanted = {"output_hidden_states": True}
    elif what == "int8":
        fastbert.quantize(ours)
    elif what == "compiled":
        ours.bert.encoder.layer[-1].compile(backend="eager")
    else:
        part = ours.bert.pooler if what == "hook of the pooler" else ours.bert.encoder.layer[-1]
        part.register_forward_hook(lambda *_: None)
    assert fastbert.explain(ours, **wanted).last_layer != []
    got = ours(**batch, **wanted)
    assert BATCH not in rows_computed
    tolerance = 0.3 if what == "int8" else 2e-5
    torch.testing.assert_close(got.logits, theirs(**batch, **wanted).logits, rtol=tolerance, atol=tolerance)
    torch._dynamo.reset()


def test_few_rows_left_out_without_gradients(monkeypatch, rows_computed):
    """Then the layer in one call is faster."""
    monkeypatch.setattr(row_selection, "_FEWEST_LEFT_OUT", TOTAL)
    _, ours = pair("BertForSequenceClassification")
    batch = inputs_for("BertForSequenceClassification")
    ours(**batch)
    assert rows_computed[-1] == BATCH
    rows_computed.clear()
    with torch.no_grad():
        ours(**batch)
    assert BATCH not in rows_computed
    monkeypatch.setattr(encoder_module, "all_rows_reasons", lambda *_: pytest.fail("what is not worth it is looked into"))
    with torch.no_grad():
        ours(**batch)


def test_sequences_without_a_first_token():
    """An empty packed sequence leaves the pooler a row of zeros."""
    _, ours = pair("BertForPreTraining")
    row = packed(inputs_for("BertForPreTraining"))
    bounds = row["cu_seq_lens_q"]
    row["cu_seq_lens_q"] = row["cu_seq_lens_k"] = torch.cat([bounds[:1], bounds, bounds[-1:]])
    row["next_sentence_label"] = torch.ones(BATCH + 2, dtype=torch.long)
    got, expected = ours(**row), in_full(ours, row)
    torch.testing.assert_close(got.loss, expected.loss, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(got.prediction_logits, expected.prediction_logits, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])
def test_half_precision(kind, gradients):
    _, ours = pair("BertForPreTraining", **NO_DROPOUT)
    ours = ours if kind == "autocast" else ours.to(getattr(torch, kind))
    batch, results = inputs_for("BertForPreTraining"), []
    for call in (lambda: ours(**batch), lambda: in_full(ours, batch)):
        ours.zero_grad()
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, kind == "autocast"):
            output = call()
        if gradients:
            output.loss.backward()
        results.append((output, [p.grad for p in ours.parameters()]))
    (got, mine), (expected, theirs) = results
    for key in expected:
        assert got[key].dtype == expected[key].dtype
        torch.testing.assert_close(got[key], expected[key], rtol=2e-2, atol=2e-2)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-3)


def test_gradients_of_inputs_embeds():
    theirs, ours = (model.double() for model in pair("BertForPreTraining"))
    batch, gradients = inputs_for("BertForPreTraining"), []
    embeds = theirs.bert.embeddings.word_embeddings(batch.pop("input_ids")).detach()
    for model in (theirs, ours):
        given = embeds.clone().requires_grad_()
        model(inputs_embeds=given, **batch).loss.backward()
        gradients.append(given.grad * mask().unsqueeze(-1))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-14)


def test_an_output_goes_when_nobody_holds_it(monkeypatch):
    """Its graph holds a step's activations: they must not wait for the garbage collector."""
    alive = []

    class Watched(encoder_module.SelectedRows):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(encoder_module, "SelectedRows", Watched)
    ours = fastbert.BertForPreTraining(small_config())
    gc.disable()
    try:
        output = ours(**inputs_for("BertForPreTraining"))
        assert alive[0]() is not None
        del output
        assert alive[0]() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not packed_layer.native.AVAILABLE, reason="layers are packed by the native backend")
def test_training_drops_packed_weights():
    ours = fastbert.BertForPreTraining(small_config(**NO_DROPOUT)).eval()
    batch = inputs_for("BertForPreTraining")
    with torch.no_grad():
        ours(**{**batch, "labels": None})
    last = ours.bert.encoder.layer[-1]
    assert last in packed_layer._entries
    ours(**batch).loss.backward()
    assert last not in packed_layer._entries


@pytest.mark.parametrize("kind", ["plain", "hooked"])
def test_logits_of_all_tokens_come_from_the_calibrated_matmul(kind, monkeypatch):
    """Where the vocabulary's matrix is called as a module instead, torch's own multiplies, and what it adds takes part."""
    theirs, ours = pair("BertForMaskedLM")
    shapes = []
    real = lm_head.linear
    monkeypatch.setattr(lm_head, "linear", lambda x, weight, bias: shapes.append(tuple(weight.shape)) or real(x, weight, bias))
    if kind == "hooked":
        for model in (theirs, ours):
            decoder = model.cls.predictions.decoder
            decoder.forward = lambda x, forward=decoder.forward: 2 * forward(x)
    batch = inputs_for("BertForMaskedLM")
    del batch["labels"]
    with torch.no_grad():
        got, expected = ours(**batch).logits, theirs(**batch).logits
    torch.testing.assert_close(on_real_tokens(got), on_real_tokens(expected), atol=2e-5, rtol=0)
    vocabulary = ours.cls.predictions.decoder.weight.shape
    assert (tuple(vocabulary) in shapes) == (kind == "plain")
    for model in (ours, theirs):
        logits = on_real_tokens(model(**batch).logits)
        (logits * logits).sum().backward()
    assert_same_gradients(ours, theirs, 1e-4)
