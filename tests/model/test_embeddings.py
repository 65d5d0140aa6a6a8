"""The fused embeddings: values and gradients of transformers' module, and what sends them back to it."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.model import embeddings as embeddings_module
from fastbert.ops import reference

from .helpers import BATCH, LENGTH, inputs_for, on_real_tokens, pair, small_config


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The keyword arguments of each call of the fused op."""
    seen = []

    def watched(*args, **kwargs):
        seen.append(kwargs)
        return embedding_layer_norm(*args, **kwargs)

    embedding_layer_norm = embeddings_module.embedding_layer_norm
    monkeypatch.setattr(embeddings_module, "embedding_layer_norm", watched)
    return seen


def embedded(model: nn.Module, batch: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    return model(**batch, output_hidden_states=True, **kwargs).hidden_states[0]


@pytest.mark.parametrize("without", [(), ("token_type_ids",), ("attention_mask",), ("token_type_ids", "attention_mask")])
def test_values_and_gradients_of_all_tables(without, calls):
    theirs, ours = pair("BertModel")
    batch = {key: value for key, value in inputs_for("BertModel").items() if key not in without}
    batch["input_ids"][:, 0] = 0  # the padding row of the word table, on real tokens
    expected, got = embedded(theirs, batch), embedded(ours, batch)
    if "attention_mask" in batch:
        expected, got = on_real_tokens(expected), on_real_tokens(got)
    assert len(calls) == 1
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-5)
    dy = torch.randn_like(got)
    expected.backward(dy)
    got.backward(dy)
    wanted = dict(theirs.embeddings.named_parameters())
    for name, parameter in ours.embeddings.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=2e-5, msg=name)
    assert (ours.embeddings.word_embeddings.weight.grad[0] == 0).all()


def test_dropout_is_the_counter_based_one_on_a_stream_of_its_own(calls):
    ours = fastbert.BertModel(small_config(hidden_dropout_prob=0.3)).train()
    batch = inputs_for("BertModel")
    got = ours.eval().embeddings(batch["input_ids"], batch["token_type_ids"]).flatten(0, 1)
    dropped = embedded(ours.train(), {**batch, "attention_mask": torch.ones(BATCH, LENGTH)}).flatten(0, 1)
    (call,) = calls
    assert call["stream"] == 3 * len(ours.encoder.layer)
    expected = reference.dropout(got, 0.3, call["seed"], call["stream"])
    torch.testing.assert_close(dropped, expected, atol=2e-6, rtol=2e-5)
    ours.encoder.layer.append(copy.deepcopy(ours.encoder.layer[0]))  # which the configuration does not know of
    embedded(ours, batch)
    assert calls[1]["stream"] == 3 * len(ours.encoder.layer)


def test_active_dropout_in_an_inactive_model():
    """Monte Carlo dropout: the model is in eval mode, its dropout modules are not."""
    ours = fastbert.BertModel(small_config()).eval()
    batch = inputs_for("BertModel")
    still = ours(**batch).last_hidden_state
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(ours(**batch).last_hidden_state, still)
    assert not torch.equal(ours(**batch).last_hidden_state, ours(**batch).last_hidden_state)


def test_a_frozen_word_table_gets_no_gradient(calls):
    ours = fastbert.BertModel(small_config()).eval()
    ours.embeddings.word_embeddings.weight.requires_grad_(False)
    embedded(ours, inputs_for("BertModel")).sum().backward()
    assert len(calls) == 1
    assert ours.embeddings.word_embeddings.weight.grad is None
    assert ours.embeddings.position_embeddings.weight.grad is not None


class OtherEmbeddings(hf.BertEmbeddings):
    pass


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda e: _hook(e), "they have hooks"),
        (lambda e: _hook(e.word_embeddings), "word_embeddings has hooks"),
        (lambda e: _hook(e.LayerNorm), "LayerNorm has hooks"),
        (lambda e: setattr(e, "dropout", nn.Identity()), "dropout is torch.nn.modules.linear.Identity"),
        (lambda e: setattr(e, "__class__", OtherEmbeddings), "they are .*OtherEmbeddings"),
        (lambda e: setattr(e.position_embeddings, "max_norm", 0.5), "position_embeddings has max_norm"),
        (lambda e: setattr(e.token_type_embeddings, "padding_idx", 0), "token_type_embeddings has a padding_idx"),
        (lambda e: setattr(e.LayerNorm, "bias", None), "not all parameters are there and plain"),
    ],
)
def test_what_is_not_plain_is_called_and_named(change, note, calls):
    theirs, ours = pair("BertModel")
    for model in (theirs, ours):
        change(model.embeddings)
    batch = inputs_for("BertModel")
    expected, got = embedded(theirs, batch), embedded(ours, batch)
    torch.testing.assert_close(on_real_tokens(got), on_real_tokens(expected), atol=2e-6, rtol=2e-5)
    explanation = fastbert.explain(ours)
    assert not calls
    assert re.search(f"called as transformers' module: {note}", str(explanation))
    assert not explanation.fast


def test_a_hook_sees_the_embeddings_as_transformers_lays_them_out():
    ours = fastbert.BertModel(small_config()).eval()
    seen = []
    handle = ours.embeddings.register_forward_hook(lambda _, __, output: seen.append(output))
    batch = inputs_for("BertModel")
    hooked = ours(**batch).last_hidden_state
    assert seen[0].shape == (BATCH, LENGTH, ours.config.hidden_size)
    handle.remove()
    torch.testing.assert_close(ours(**batch).last_hidden_state, hooked, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_keeps_the_embeddings_fused(frozen, calls):
    """transformers hooks the word table then, so that the layers' input requires grad even where all tables are frozen."""
    ours = fastbert.BertModel(small_config()).train()
    ours.embeddings.requires_grad_(not frozen)
    ours.gradient_checkpointing_enable()
    assert not fastbert.explain(ours).embeddings
    states = ours(**inputs_for("BertModel"), output_hidden_states=True).hidden_states
    assert calls
    assert states[0].requires_grad
    states[3].sum().backward()
    assert all((p.grad is None) == frozen for p in ours.embeddings.parameters())
    assert ours.encoder.layer[0].output.dense.weight.grad is not None
    with torch.no_grad():
        assert not embedded(ours, inputs_for("BertModel")).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_under_autocast_is_that_of_transformers(dtype):
    theirs, ours = (copy.deepcopy(model).to(dtype) for model in pair("BertModel"))
    batch = inputs_for("BertModel")
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = theirs.embeddings(batch["input_ids"]), embedded(ours, batch)
        notes = fastbert.explain(ours).embeddings
    assert got.dtype == expected.dtype
    assert bool(notes) == (dtype != torch.float32)


def test_compiles_whole_with_gradients():
    _, ours = pair("BertModel")
    ids = torch.randint(100, (2, 9))
    ours(ids).last_hidden_state.sum().backward()
    expected = {name: p.grad.clone() for name, p in ours.embeddings.named_parameters()}
    ours.zero_grad()
    torch.compile(ours, fullgraph=True, backend="aot_eager")(ids).last_hidden_state.sum().backward()
    for name, parameter in ours.embeddings.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
