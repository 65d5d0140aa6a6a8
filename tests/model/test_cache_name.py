"""A decoder's key-value cache goes by transformers' name for it, which is another one from 5.24 on."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn
from transformers import BertLMHeadModel

import fastbert
from fastbert.model import attention_interface
from fastbert.model.cache_name import CACHE
from fastbert.model.outputs import PlainEncoderOutput

from .helpers import inputs_for, pair

KNOWN = [name for name in ("cache", "past_key_values") if name == "past_key_values" or name == CACHE]


def decoders() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    theirs, ours = pair("BertLMHeadModel", is_decoder=True)
    return theirs.eval(), ours.eval(), inputs_for("BertLMHeadModel")["input_ids"]


def test_it_is_the_argument_of_transformers():
    assert CACHE in inspect.signature(BertLMHeadModel.forward).parameters


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("of_encoder", [False, True])
@torch.no_grad()
def test_a_decoder_goes_on_from_its_cache(name, of_encoder):
    theirs, ours, ids = decoders()
    seen = []
    for model in (theirs, ours):
        part = model.bert if of_encoder else model
        cache = part(ids[:, :4], use_cache=True)[CACHE]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = part(ids[:, 4:], **{name: cache}, use_cache=True)
        assert output[CACHE].get_seq_length() == ids.shape[1]
        seen.append((output[0], [str(warning.message) for warning in caught if warning.category is FutureWarning]))
    (expected, their_warnings), (got, our_warnings) = seen
    torch.testing.assert_close(got, expected)
    assert our_warnings == their_warnings, "one of the old name, where that is an old name"
    assert bool(our_warnings) == (name != CACHE)


@torch.no_grad()
def test_a_loss_with_a_cache():
    theirs, ours, ids = decoders()
    losses = [
        model(ids[:, 4:], labels=ids[:, 4:], **{CACHE: model(ids[:, :4], use_cache=True)[CACHE]}).loss for model in (theirs, ours)
    ]
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("name", KNOWN)
def test_explain_takes_it(name):
    _, ours = pair("BertModel")
    assert "the model runs as a decoder" in str(fastbert.explain(ours, **{name: object()}))


def test_an_attention_that_takes_a_cache_may_be_fused():
    def self_attention(self, hidden_states, attention_mask=None, cache=None, **kwargs): ...

    def cross_attention(self, hidden_states, encoder_hidden_states=None, cache=None, **kwargs): ...

    fused = [
        attention_interface._takes_one_sequence(type("Attention", (nn.Module,), {"forward": forward}))
        for forward in (self_attention, cross_attention)
    ]
    assert fused == [True, False]


def test_old_names_of_a_field_are_read_as_transformers_reads_them():
    output = PlainEncoderOutput()
    output.past_key_values = torch.ones(1)
    assert output["past_key_values"] is output[CACHE] is output.get("past_key_values")
    with pytest.raises(KeyError):
        output["logits"]
