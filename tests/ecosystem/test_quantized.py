"""Quantised Linears are called, not read past: torchao puts tensor subclasses into them, torch.ao other modules in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastbert

from ..model.helpers import inputs_for, mask
from ..model.test_packed_inputs import packed
from .helpers import DOORS, assert_same_on_real_tokens, fast_pair, notes_of

NAME = "BertForSequenceClassification"


def is_feed_forward(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.endswith(("intermediate.dense", "output.dense")) and "attention" not in name


def is_one_query(module: nn.Module, name: str) -> bool:
    return name.endswith("layer.1.attention.self.query")


def torchao_changes() -> dict:
    """Those that need no kernels of a GPU."""
    quantization = pytest.importorskip("torchao.quantization")
    weights, both = quantization.Int8WeightOnlyConfig, quantization.Int8DynamicActivationInt8WeightConfig
    return {
        "int8 weights": lambda model: quantization.quantize_(model, weights()),
        "int8 weights and activations": lambda model: quantization.quantize_(model, both()),
        "int8 weights of the feed-forward parts": lambda model: quantization.quantize_(model, weights(), is_feed_forward),
        "int8 query alone": lambda model: quantization.quantize_(model, weights(), is_one_query),
    }


TORCHAO = ["int8 weights", "int8 weights and activations", "int8 weights of the feed-forward parts", "int8 query alone"]


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("change", TORCHAO)
@pytest.mark.parametrize("door", DOORS)
def test_torchao(door, change, used_before):
    theirs, ours = fast_pair(door, NAME)
    batch = inputs_for(NAME)
    unquantized = theirs(**batch).logits
    if used_before:
        ours(**batch)
    for model in (theirs, ours):
        torchao_changes()[change](model)
    with torch.no_grad():
        expected, got = theirs(**batch), ours(**batch)
    assert not torch.allclose(expected.logits, unquantized, atol=1e-4)
    if "activations" in change:
        # Rounded at each Linear, a last bit becomes a step of int8 (transformers' eager and sdpa differ as much).
        assert (got.logits - unquantized).square().mean() <= 4 * (expected.logits - unquantized).square().mean()
    else:
        torch.testing.assert_close(got.logits, expected.logits, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(got.loss, expected.loss, atol=2e-5, rtol=2e-5)
    assert any("has a weight of type torchao." in note for note in notes_of(ours))
    assert fastbert.explain(ours).encoder == []  # what is not quantised stays on packed rows
    if change == "int8 query alone":
        assert [bool(notes) for notes in fastbert.explain(ours).layers.values()] == [False, True, False]


def test_torchao_first_and_accelerate_then():
    theirs, _ = fast_pair("class", NAME)
    torchao_changes()["int8 weights"](theirs)
    ours = fastbert.accelerate(copy.deepcopy(theirs))
    batch = inputs_for(NAME)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=2e-5, rtol=2e-5)
    assert any("has a weight of type torchao." in note for note in notes_of(ours))


@pytest.mark.parametrize("door", DOORS)
def test_a_quantised_language_model_head(door):
    theirs, ours = fast_pair(door, "BertForMaskedLM")
    for model in (theirs, ours):
        torchao_changes()["int8 weights"](model)
    batch = inputs_for("BertForMaskedLM")
    with torch.no_grad():
        expected, got = theirs(**batch), ours(**batch)
    torch.testing.assert_close(got.loss, expected.loss, atol=2e-5, rtol=2e-5)
    assert_same_on_real_tokens(got.logits, expected.logits)
    assert fastbert.explain(ours).head


@pytest.mark.parametrize("door", DOORS)
def test_packed_rows_of_a_quantised_model(door):
    theirs, ours = fast_pair(door, "BertModel")
    for model in (theirs, ours):
        torchao_changes()["int8 weights"](model)
    batch = inputs_for("BertModel")
    with torch.no_grad():
        expected, got = theirs(**batch).last_hidden_state, ours(**packed(batch)).last_hidden_state
    torch.testing.assert_close(got[0], expected[mask().bool()], atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.* is deprecated", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("door", DOORS)
def test_dynamic_quantisation_of_torch(door):
    """``quantize_dynamic`` puts modules of its own in the places of Linears."""
    quantize = getattr(torch.ao.quantization, "quantize_dynamic", None) if hasattr(torch.ao, "quantization") else None
    if quantize is None or torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no torch.ao.quantization.quantize_dynamic, or no engine for it")
    theirs, ours = fast_pair(door, NAME)
    batch = inputs_for(NAME)
    unquantized = theirs(**batch).logits
    theirs, ours = (quantize(model, {nn.Linear}, dtype=torch.qint8) for model in (theirs, ours))
    with torch.no_grad():
        expected, got = theirs(**batch).logits, ours(**batch).logits
    assert not torch.allclose(expected, unquantized, atol=1e-4)
    # The whole tensor's largest value sets the steps of activations, and padding is a part of transformers' tensors.
    assert (got - unquantized).abs().mean() <= 2 * (expected - unquantized).abs().mean()
    assert any("quantized" in note for note in notes_of(ours))
