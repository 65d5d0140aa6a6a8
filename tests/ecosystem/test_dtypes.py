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


def errors(found: dict, exact: dict) -> dict[str, torch.Tensor]:
    """Relative root mean square errors of each output, and of all gradients together: of one small tensor it is luck.

    So is the error of a loss, which is one number. A key's bias has no gradient but rounding.
    """
    largest = max(value.abs().max() for value in exact.values())
    squares = {
        key: ((found[key] - truth).square().mean() / truth.square().mean())
        for key, truth in exact.items()
        if key != "loss" and truth.abs().max() > 1e-6 * largest
    }
    outputs = {key: value.sqrt() for key, value in squares.items() if "." not in key}
    return outputs | {"gradients": torch.stack([value for key, value in squares.items() if "." in key]).mean().sqrt()}


def assert_no_worse(ours: dict, theirs: dict, exact: dict) -> None:
    assert ours.keys() == theirs.keys() == exact.keys()
    allowed = errors(theirs, exact)
    for key, error in errors(ours, exact).items():
        assert error <= 2 * allowed[key], f"{key}: error {error:.2e}, transformers' {allowed[key]:.2e}"
    if "loss" in exact:
        logits_error = max(error for key, error in allowed.items() if "logits" in key)
        assert abs(ours["loss"] / exact["loss"] - 1) <= 2 * logits_error


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", DOORS)
def test_autocast(door, name, dtype):
    theirs, ours = fast_pair(door, name)
    exact = results(copy.deepcopy(theirs).double(), name)
    with torch.autocast("cpu", dtype):
        found = [results(model, name) for model in (theirs, ours)]
        dtypes = [{key: value.dtype for key, value in model(**inputs_for(name)).items()} for model in (theirs, ours)]
    assert_no_worse(found[1], found[0], exact)
    assert dtypes[0] == dtypes[1]
    assert fastbert.explain(ours).encoder == []


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
        assert any("it has no kernels for float16" in reason for reason in facts.ops["attention"]["passed_over"]["native"])


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


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
@pytest.mark.parametrize("door", DOORS)
def test_there_and_back(door, cast):
    theirs, ours = fast_pair(door, "BertForSequenceClassification")
    ours(**inputs_for("BertForSequenceClassification"))
    for model in (theirs, ours):
        getattr(model, cast)().float()
    assert_same_training_step(ours, theirs, "BertForSequenceClassification")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("door", DOORS)
def test_autocast_over_weights_in_half_precision(door, dtype):
    theirs, ours = fast_pair(door, "BertModel")
    exact = results(copy.deepcopy(theirs).double(), "BertModel")
    with torch.autocast("cpu", dtype):
        found = [results(model.to(dtype), "BertModel") for model in (theirs, ours)]
    assert_no_worse(found[1], found[0], exact)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["", "query"])
@pytest.mark.parametrize("door", DOORS)
def test_autocast_over_linears_in_half_precision(door, name, dtype):
    """LayerNorms and tables stay float32, as quantisers and some recipes leave them, or all but one kind of Linears."""
    theirs, ours = fast_pair(door, "BertModel")
    exact = results(copy.deepcopy(theirs).double(), "BertModel")
    for model in (theirs, ours):
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and path.endswith(name):
                module.to(torch.bfloat16)
    with torch.autocast("cpu", dtype):
        found = [results(model, "BertModel") for model in (theirs, ours)]
    assert_no_worse(found[1], found[0], exact)


@pytest.mark.parametrize("door", DOORS)
def test_autocast_switched_off_inside(door):
    theirs, ours = fast_pair(door, "BertModel")
    batch = inputs_for("BertModel")
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert_same_on_real_tokens(ours(**batch).last_hidden_state, theirs(**batch).last_hidden_state)


@pytest.mark.parametrize("door", DOORS)
def test_deferred_logits_keep_their_autocast(door):
    """Read outside of it, they are those of the forward pass, not float32 ones."""
    _, ours = fast_pair(door, "BertForMaskedLM")
    batch = inputs_for("BertForMaskedLM")
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(**batch)
        inside = ours(**{key: value for key, value in batch.items() if key != "labels"}).logits
    assert output.logits.dtype == inside.dtype == torch.bfloat16
    assert torch.equal(output.logits * mask().unsqueeze(-1), inside * mask().unsqueeze(-1))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", DOORS)
def test_autocast_leaves_float64_alone(door, name, grad):
    theirs, ours = fast_pair(door, name)
    batch = inputs_for(name)
    batch |= {key: batch[key].repeat(10, 1) for key in ("input_ids", "attention_mask", "token_type_ids")}
    batch = {key: value for key, value in batch.items() if "label" not in key}
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        expected, got = theirs.double()(**batch), ours.double()(**batch)
    for key in expected:
        assert got[key].dtype == torch.float64
        torch.testing.assert_close(on_real(got[key], batch), on_real(expected[key], batch), rtol=0, atol=1e-12)


def on_real(values: torch.Tensor, batch: dict) -> torch.Tensor:
    return values[batch["attention_mask"].bool()] if values.shape[:2] == batch["attention_mask"].shape else values
