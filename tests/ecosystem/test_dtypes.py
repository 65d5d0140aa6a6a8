"""Autocast and models in other dtypes: at most twice transformers' own error in that dtype, both against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastbert

from ..model.helpers import inputs_for, mask, on_real_tokens
from .helpers import DOORS, assert_same_on_real_tokens, assert_same_training_step, fast_pair

HALVES = [torch.bfloat16, torch.float16]
NAMES = ["BertModel", "BertForSequenceClassification", "BertForPreTraining"]


def results(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a padded batch, padding left out."""
    torch.manual_seed(3)
    output = model(**inputs_for(name))
    found = {key: on_real_tokens(value) for key, value in output.items() if value.is_floating_point()}
    (output.loss if "loss" in found else (found["last_hidden_state"].square().sum() + found["pooler_output"].sum())).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {key: value.detach().double() for key, value in (found | gradients).items()}


def assert_no_worse(ours: dict, theirs: dict, exact: dict) -> None:
    assert ours.keys() == theirs.keys() == exact.keys()
    largest = max(value.abs().max() for value in exact.values())
    for key, truth in exact.items():
        if truth.abs().max() > 1e-6 * largest:  # a key's bias has no gradient but rounding
            error, their_error = (((found[key] - truth).square().mean().sqrt()) for found in (ours, theirs))
            assert error <= 2 * their_error + 1e-6 * truth.abs().max(), f"{key}: error {error:.2e}, transformers' {their_error:.2e}"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", DOORS)
def test_autocast(door, name, dtype):
    theirs, ours = fast_pair(door, name)
    exact = results(copy.deepcopy(theirs).double(), name)
    with torch.autocast("cpu", dtype):
        found = [results(model, name) for model in (theirs, ours)]
        assert [model(**inputs_for(name))[0].dtype for model in (theirs, ours)] == [torch.float32] * 2
    assert_no_worse(found[1], found[0], exact)
    assert fastbert.explain(ours).encoder == []
    assert_same_training_step(ours, theirs, name) if name != "BertModel" else None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", DOORS)
def test_models_in_half_precision(door, name, dtype):
    theirs, ours = fast_pair(door, name)
    exact = results(copy.deepcopy(theirs).double(), name)
    ours(**inputs_for(name))  # query, key and value lie in one buffer before they are cast
    found = [results(model.to(dtype), name) for model in (theirs, ours)]
    assert_no_worse(found[1], found[0], exact)
    assert ours(**inputs_for(name))[-1].dtype == dtype
    facts = fastbert.explain(ours)
    assert facts.encoder == facts.embeddings == []
    assert facts.dtype == str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        reasons = facts.ops["attention"]["passed_over"]["native"]
        assert any("no kernels for float16" in reason or "not built" in reason for reason in reasons)


@pytest.mark.parametrize("cast", [lambda model: model.double(), lambda model: model.to(torch.float64)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", DOORS)
def test_models_in_float64(door, name, cast):
    theirs, ours = fast_pair(door, name)
    ours(**inputs_for(name))
    exact, found = (results(cast(model), name) for model in (theirs, ours))
    largest = max(value.abs().max().item() for value in exact.values())
    for key, truth in exact.items():
        torch.testing.assert_close(found[key], truth, atol=1e-11 * largest, rtol=1e-10)
    assert all(facts["backend"] == "reference" for facts in fastbert.explain(ours).ops.values())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("door", DOORS)
def test_autocast_over_weights_in_half_precision(door, dtype):
    """Both at once, as Trainer does with ``bf16_full_eval`` and an autocast around it."""
    theirs, ours = fast_pair(door, "BertModel")
    exact = results(copy.deepcopy(theirs).double(), "BertModel")
    with torch.autocast("cpu", dtype):
        found = [results(model.to(dtype), "BertModel") for model in (theirs, ours)]
    assert_no_worse(found[1], found[0], exact)


@pytest.mark.parametrize("door", DOORS)
def test_parts_in_another_dtype(door):
    """LayerNorms in float32 in a bfloat16 model, a common recipe: where transformers raises, so may we, but not guess."""
    theirs, ours = fast_pair(door, "BertModel")
    exact = theirs(**inputs_for("BertModel")).last_hidden_state
    for model in (theirs, ours):
        for module in model.encoder.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    torch.manual_seed(20181011)
    batch = inputs_for("BertModel")
    exact = fast_pair(door, "BertModel")[0](**batch) and exact
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (model(**batch).last_hidden_state for model in (theirs, ours))
    assert got.dtype == expected.dtype


@pytest.mark.parametrize("door", DOORS)
def test_autocast_switched_off_inside(door):
    theirs, ours = fast_pair(door, "BertModel")
    batch = inputs_for("BertModel")
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert_same_on_real_tokens(ours(**batch).last_hidden_state, theirs(**batch).last_hidden_state)


@pytest.mark.parametrize("door", DOORS)
def test_deferred_logits_keep_their_autocast(door):
    """Read outside of it, they are those of the forward pass, not float32 ones."""
    theirs, ours = fast_pair(door, "BertForMaskedLM")
    batch = inputs_for("BertForMaskedLM")
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(**batch)
        inside = ours(**{key: value for key, value in batch.items() if key != "labels"}).logits
    assert output.logits.dtype == inside.dtype == torch.bfloat16
    assert torch.equal(output.logits * mask().unsqueeze(-1), inside * mask().unsqueeze(-1))
