"""Masked LM whose caller names the labelled rows, filled up to a fixed number: the same results, and no shape depends on them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForMaskedLM

import fastbert
from fastbert.model.packing import Packing
from fastbert.model.row_selection import RowSelection

from .helpers import inputs_for, pair
from .test_packed_inputs import packed
from .test_row_selection import DROPOUT, NAMES, NO_DROPOUT, TOTAL, in_full, labelled, with_labels

KINDS = ("some", "one", "first tokens")


def named(batch: dict, cap: int) -> dict:
    """The packed batch with its labelled rows; the filler is spread over the rows that have none."""
    labels = batch["labels"].flatten()
    rows, others = ((labels == -100) == other for other in (False, True))
    rows, others = rows.nonzero().squeeze(1), others.nonzero().squeeze(1)
    filler = others[torch.arange(cap - len(rows)) * 3 % len(others)]
    return {**batch, "labelled_rows": torch.cat([rows, filler])}


def results(model: nn.Module, batch: dict):
    torch.manual_seed(5)
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [DROPOUT, NO_DROPOUT], ids=["dropout", "no dropout"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_a_call_that_finds_them(name, kind, dropout):
    """Masks of dropout among them: the filler is computed behind what is read."""
    _, ours = pair(name, **dropout)
    ours = ours.double().train()
    batch = packed(with_labels(name, kind))
    cap = labelled(batch) + 7
    expected, gradients = results(ours, batch)
    got, got_gradients = results(ours, named(batch, cap))
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-13, atol=0)
    assert (got.mlm_correct, got.mlm_count) == (expected.mlm_correct, expected.mlm_count)
    assert got_gradients.keys() == gradients.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(got_gradients[key], value, rtol=1e-11, atol=1e-15 + 1e-13 * float(value.abs().max()))


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_as_many_as_there_are_tokens(name, more):
    """All rows are computed then, but those that are named stand in an order of their own."""
    _, ours = pair(name, **NO_DROPOUT)
    ours = ours.double().train()
    batch = packed(with_labels(name, "some"))
    expected, gradients = results(ours, batch)
    got, got_gradients = results(ours, named(batch, TOTAL + more))
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-13, atol=0)
    for key, value in gradients.items():
        torch.testing.assert_close(got_gradients[key], value, rtol=1e-10, atol=1e-15 + 1e-13 * float(value.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_float32_differs_by_rounding_alone(name):
    _, ours = pair(name, **DROPOUT)
    batch = packed(with_labels(name, "some"))
    (expected, gradients), (got, got_gradients) = (results(ours.train(), b) for b in (batch, named(batch, labelled(batch) + 5)))
    torch.testing.assert_close(got.loss, expected.loss, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    for key, value in gradients.items():
        torch.testing.assert_close(got_gradients[key], value, rtol=1e-5, atol=1e-7 + 2e-6 * float(value.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_searched_for_and_every_shape_is_the_caps(name, monkeypatch):
    _, ours = pair(name, **NO_DROPOUT)
    given = [named(packed(with_labels(name, kind)), 40) for kind in ("one", "some")]
    shapes = []
    take = RowSelection.labelled_of
    monkeypatch.setattr(RowSelection, "labelled_of", lambda self, x: shapes.append((len(x), len(self.rows))) or take(self, x))
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda _: pytest.fail("rows are searched for"))
    for batch in given:
        ours.train()(**batch).loss.backward()
    assert len(set(shapes)) == 1 and len(shapes) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_all_tokens_can_still_be_read(name, kind):
    _, ours = pair(name, **DROPOUT)
    ours = ours.double().train()
    batch = packed(with_labels(name, kind))
    read = "prediction_logits" if name == "BertForPreTraining" else "logits"
    logits = []
    for given in (batch, named(batch, labelled(batch) + 9)):
        torch.manual_seed(5)
        output = ours(**given)
        logits.append((getattr(output, read), output.loss))
        loss = F.cross_entropy(logits[-1][0][0], batch["labels"][0])
        expected = output.mlm_loss if name == "BertForPreTraining" else output.loss
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-10, atol=0)
    rows = (batch["labels"][0] != -100).nonzero().squeeze(1)
    torch.testing.assert_close(logits[0][0][0, rows], logits[1][0][0, rows], rtol=1e-10, atol=1e-12)


def test_where_each_row_is_computed():
    packing = Packing(torch.tensor([0, 3, 7], dtype=torch.int32), 4, (1, 7))
    labels = torch.tensor([[-100, 4, -100, 5, -100, 6, -100]])
    selection = RowSelection(packing, 7, labels, first=True, labelled_rows=torch.tensor([1, 3, 5, 0, 0]))
    assert selection.rows.tolist() == [1, 3, 5, 0, 3, 0, 0]
    assert selection.labels.tolist() == [4, 5, 6, -100, -100]
    computed = torch.arange(7).unsqueeze(1)
    assert selection.labelled_of(computed).flatten().tolist() == [0, 1, 2, 5, 6]
    assert selection.first_positions(computed).flatten().tolist() == [3, 1]
    order, places = selection.all_rows()
    assert order.tolist() == [1, 3, 5, 0, 3, 0, 0, 2, 4, 6]
    assert places.tolist() == [3, 0, 7, 1, 8, 2, 9]


@pytest.mark.parametrize("name", NAMES)
def test_a_watched_encoder_and_a_compiled_model(name):
    """The rows are gathered where the last layer has computed all, too."""
    _, ours = pair(name, **NO_DROPOUT)
    batch = packed(with_labels(name, "some"))
    expected = in_full(ours, batch).loss
    given = named(batch, labelled(batch) + 4)
    torch.testing.assert_close(in_full(ours, given).loss, expected)
    hook = ours.bert.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(ours(**given).loss, expected)
    hook.remove()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given).loss, expected)
    torch._dynamo.reset()


def test_a_roberta_copies_nothing_from_the_host(monkeypatch):
    """A GPU would be waited for, and nothing can be copied while a CUDA graph is recorded."""
    torch.manual_seed(0)
    ours = fastbert.accelerate(
        RobertaForMaskedLM(RobertaConfig(vocab_size=130, hidden_size=48, num_hidden_layers=2, num_attention_heads=4))
    ).train()
    batch = packed(with_labels("BertForMaskedLM", "some"))
    for unwanted in ("token_type_ids", "position_ids"):
        batch.pop(unwanted, None)
    batch["input_ids"] = batch["input_ids"].clamp(min=2)
    given = named(batch, labelled(batch) + 4)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("a number is copied to the device"))
    ours(**given).loss.backward()
    gradient = ours.roberta.embeddings.position_embeddings.weight.grad
    assert not gradient[1].any() and gradient[2].any()


def test_another_head_than_transformers_gets_all_rows():
    _, ours = pair("BertForPreTraining", **NO_DROPOUT)
    batch = packed(with_labels("BertForPreTraining", "some"))
    expected = ours(**batch).loss
    other = copy.deepcopy(ours)
    other.cls.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(other(**named(batch, TOTAL)).loss, expected)


def test_padding_is_refused():
    _, ours = pair("BertForMaskedLM")
    batch = inputs_for("BertForMaskedLM")
    with pytest.raises(ValueError, match="labelled_rows is for packed inputs"):
        ours(**batch, labelled_rows=torch.tensor([1]))
    row = packed(batch)
    del row["labels"]
    with pytest.raises(ValueError, match="with labels"):
        ours(**row, labelled_rows=torch.tensor([1]))


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_not_the_labelled_ones_are_refused(name):
    _, ours = pair(name)
    batch = packed(with_labels(name, "first tokens"))
    rows = (batch["labels"][0] != -100).nonzero().squeeze(1)
    free = int((batch["labels"][0] == -100).nonzero()[0])
    wrong = {
        "one is missing": rows[:-1],
        "one is there twice": torch.cat([rows, rows[-1:]]),
        "one is another": torch.cat([rows[:-1], rows[:1]]),
        "another order": rows.flip(0),
        "filler in between": torch.cat([rows[:1], torch.tensor([free]), rows[1:]]),
    }
    for given in wrong.values():
        with pytest.raises(ValueError, match=f"labelled_rows does not name the {len(rows)} rows"):
            ours(**batch, labelled_rows=given)
    for given in (rows.int(), rows.unsqueeze(0), rows.to("meta")):
        with pytest.raises(ValueError, match=r"expected int64 \(cap,\)"):
            ours(**batch, labelled_rows=given)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_labels_in_a_row(name):
    """As transformers takes them."""
    theirs, ours = pair(name)
    batch = inputs_for(name)
    flat = {**batch, "labels": batch["labels"].flatten()}
    torch.testing.assert_close(ours(**flat).loss, theirs(**flat).loss, atol=2e-6, rtol=2e-5)
    with pytest.raises(ValueError, match="labels has shape"):
        ours(**{**flat, "labels": flat["labels"][1:]})
