"""Decay groups, and optimizer state that goes to tensors and back."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForPreTraining

from fastbert.train.optimizer import build_lamb, build_optimizer, decay_groups, load_optimizer_tensors, optimizer_tensors


@pytest.fixture
def model() -> BertForPreTraining:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForPreTraining(BertConfig(vocab_size=50, max_position_embeddings=16, **size))


def test_biases_and_layer_norms_do_not_decay(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = decay_groups(model, 0.01)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert all("LayerNorm" in names[p] or names[p].endswith("bias") for p in others["params"])
    assert not any("LayerNorm" in names[p] or names[p].endswith("bias") for p in decayed["params"])
    assert sorted(names[p] for group in (decayed, others) for p in group["params"]) == sorted(names.values())


def test_frozen_parameters_are_in_no_group(model):
    model.bert.embeddings.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert not any("embeddings" in names[p] for group in decay_groups(model, 0.01) for p in group["params"])


@pytest.mark.parametrize("build", [build_optimizer, build_lamb])
def test_state_goes_to_tensors_and_back(model, build):
    optimizer = build(model, 1e-3, 0.01)
    assert optimizer_tensors(model, optimizer) == {}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    other = build(model, 1e-3, 0.01)
    load_optimizer_tensors(model, other, tensors)
    loaded = optimizer_tensors(model, other)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="stranger"):
        load_optimizer_tensors(model, other, {**tensors, "stranger.exp_avg": torch.zeros(1)})


def test_a_state_with_parts_missing_is_refused(model):
    optimizer = build_optimizer(model, 1e-3, 0.01)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = optimizer_tensors(model, optimizer)
    name = next(iter(dict(model.named_parameters())))
    with pytest.raises(ValueError, match=f"state of {name} lacks exp_avg_sq"):
        load_optimizer_tensors(model, optimizer, {key: t for key, t in tensors.items() if key != f"{name}.exp_avg_sq"})
    with pytest.raises(ValueError, match="has no tensors"):
        load_optimizer_tensors(model, optimizer, {})
