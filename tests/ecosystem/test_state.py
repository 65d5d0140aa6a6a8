"""Weights that are copied, moved, replaced or trained between forward passes: a fast model is always that of its present weights.

Every first forward pass moves query, key and value into one buffer, so each test runs one before it changes anything.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import fastbert
from fastbert.model.adjacent import follow_each_other

from ..model.helpers import assert_same_gradients, inputs_for
from .helpers import DOORS, assert_same_on_real_tokens, assert_same_training_step, fast, fast_pair, plain

NAME = "BertForSequenceClassification"
QUERY = "bert.encoder.layer.1.attention.self.query"


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def other_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return plain(NAME).state_dict()


def with_loaded_weights(model: nn.Module) -> nn.Module:
    model.load_state_dict(other_weights())
    return model


def with_assigned_weights(model: nn.Module) -> nn.Module:
    model.load_state_dict(other_weights(), assign=True)
    return model


def with_swapped_data(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    return model


def with_one_swapped_data(model: nn.Module) -> nn.Module:
    weight = model.get_submodule(QUERY).weight
    weight.data = weight.data * 1.1
    return model


def with_edited_weights(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.get_submodule(QUERY).weight[3, 5] = 2.0
    return model


def with_a_new_parameter(model: nn.Module) -> nn.Module:
    query = model.get_submodule(QUERY)
    query.weight = nn.Parameter(query.weight.detach() * 1.1)
    return model


def with_a_new_linear(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    parent = model.get_submodule(QUERY.removesuffix(".query"))
    parent.query = nn.Linear(parent.query.in_features, parent.query.out_features)
    return model


def without_bias(model: nn.Module) -> nn.Module:
    model.get_submodule(QUERY).bias = None
    return model


def as_a_slice_of_one_vector(model: nn.Module) -> nn.Module:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 1.1, model.parameters())
    return model


def in_shared_memory(model: nn.Module) -> nn.Module:
    return model.share_memory()


CHANGES = [
    copy.deepcopy, saved_and_loaded, with_loaded_weights, with_assigned_weights, with_swapped_data, with_one_swapped_data,
    with_edited_weights, with_a_new_parameter, with_a_new_linear, without_bias, as_a_slice_of_one_vector, in_shared_memory,
]  # fmt: skip


@pytest.mark.parametrize("change", [lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float(), *CHANGES])
@pytest.mark.parametrize("door", DOORS)
def test_the_present_weights_count(door, change):
    theirs, ours = fast_pair(door, NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        ours(**batch)
    ours(**batch)
    theirs, ours = change(theirs), change(ours)
    assert fastbert.explain(ours).encoder == []
    for _ in range(2):  # a step of an optimizer between the two
        with torch.no_grad():
            torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=2e-5, rtol=2e-5)
        assert_same_training_step(ours, theirs, NAME)
        for model in (ours, theirs):
            torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("door", DOORS)
def test_a_copy_shares_nothing_with_its_original(door, copied):
    _, ours = fast_pair(door, NAME)
    batch = inputs_for(NAME)
    expected = ours(**batch).logits
    twin = copied(ours)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(ours(**batch).logits, expected)
    assert type(twin) is type(ours)


@pytest.mark.parametrize("door", DOORS)
def test_aliases_of_weights_stay_aliases(door):
    """Two models on the same memory, as for lock-free training: an edit of one is an edit of the other."""
    theirs, ours = fast_pair(door, NAME)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.data = other.data
    ours(**inputs_for(NAME))
    with_edited_weights(theirs)
    assert_same_training_step(ours, theirs, NAME)


OPTIMIZERS = {
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("door", DOORS)
def test_optimizers_train_the_weights_that_are_used(door, optimizer):
    """The optimizer is made before the first forward pass, which moves the parameters' memory."""
    losses = []
    for model in fast_pair(door, NAME):
        torch.manual_seed(3)
        steps = OPTIMIZERS[optimizer](model.parameters())
        losses.append([])
        for _ in range(6):
            loss = model(**inputs_for(NAME)).loss
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses[-1].append(loss.detach())
    theirs, ours = map(torch.stack, losses)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=2e-4)
    assert ours.std() > 0.01


@pytest.mark.parametrize("frozen", ["bert", "bert.embeddings", "bert.encoder.layer.0", QUERY, "bert.pooler"])
@pytest.mark.parametrize("door", DOORS)
def test_frozen_parts(door, frozen):
    theirs, ours = fast_pair(door, NAME)
    for trained in (False, True):
        for model in (theirs, ours):
            model.get_submodule(frozen).requires_grad_(trained)
            model.zero_grad()
        assert_same_training_step(ours, theirs, NAME)


@pytest.mark.parametrize("door", DOORS)
def test_nothing_is_differentiated_below_what_is_frozen(door):
    _, ours = fast_pair(door, NAME)
    batch = inputs_for(NAME)
    ours.bert.embeddings.requires_grad_(False)
    ours.bert.encoder.layer[0].requires_grad_(False)
    states = ours(**batch, output_hidden_states=True).hidden_states
    assert [state.requires_grad for state in states] == [False, False, True, True]
    ours.bert.requires_grad_(False)
    assert not ours.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state.requires_grad
    ours(**batch).loss.backward()
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_construction_on_the_meta_device(door, assign):
    theirs = plain(NAME).eval()
    with torch.device("meta"):
        ours = fast(type(theirs)(theirs.config).eval(), door)
    assert ours(**{k: v.to("meta") for k, v in inputs_for(NAME).items() if k != "attention_mask"}).loss.device.type == "meta"
    if not assign:
        ours.to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict(), assign=assign)
    assert_same_training_step(ours, theirs, NAME)
    assert fastbert.explain(ours).encoder == []


@pytest.mark.parametrize("door", DOORS)
def test_a_model_made_for_inference(door):
    """Inference tensors count no versions and cannot be changed outside of inference mode."""
    theirs = plain(NAME).eval()
    with torch.inference_mode():
        ours = fast(theirs, door)
        batch = inputs_for(NAME)
        for _ in range(2):
            torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=2e-5, rtol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("door", DOORS)
def test_weights_of_a_used_model_go_into_safetensors(door, tmp_path):
    """safetensors refuses tensors that share memory; query, key and value lie in one buffer, each with its own part of it."""
    _, ours = fast_pair(door, NAME)
    expected = ours(**inputs_for(NAME)).logits
    assert follow_each_other([getattr(ours.bert.encoder.layer[0].attention.self, n).weight for n in ("query", "key", "value")])
    save_file(ours.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in ours.state_dict().items())
    assert expected.shape == ours(**inputs_for(NAME)).logits.shape


@pytest.mark.parametrize("door", DOORS)
def test_a_trained_models_weights_share_no_storage(door, tmp_path):
    """Tensors of one storage are one weight to these tools: accelerate keeps one of them and leaves the others out."""
    _, ours = fast_pair(door, NAME)
    ours(**inputs_for(NAME)).logits.sum().backward()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(ours)
    accelerator.save_model(prepared, tmp_path / "model")
    accelerator.save_state(tmp_path / "state")
    save_model(ours, tmp_path / "whole.safetensors")
    torch.save(ours.state_dict()[f"{QUERY}.weight"], tmp_path / "one.pt")
    expected = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for path in ("model/model.safetensors", "state/model.safetensors", "whole.safetensors"):
        written = load_file(tmp_path / path)
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "one.pt").stat().st_size < 2 * expected[f"{QUERY}.weight"].nbytes + 4096
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in expected.items())


# --- the table of words and the matrix of the vocabulary --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "multiple"), [(150, None), (100, None), (None, 64), (131, 16)], ids=["larger", "smaller", "padded", "larger, padded"]
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("door", DOORS)
def test_resized_token_embeddings(door, tied, size, multiple):
    theirs, ours = fast_pair(door, "BertForMaskedLM", tie_word_embeddings=tied)
    ours(**inputs_for("BertForMaskedLM"))
    for model in (theirs, ours):
        torch.manual_seed(5)
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    rows = theirs.get_input_embeddings().weight.shape[0]
    assert ours.config.vocab_size == theirs.config.vocab_size == rows
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
    torch.manual_seed(9)
    batch = inputs_for("BertForMaskedLM")
    batch |= {name: batch[name].where(batch[name] < rows, 1) for name in ("input_ids", "labels")}
    outputs = [model(**batch) for model in (theirs, ours)]
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, atol=2e-5, rtol=2e-5)
    assert_same_on_real_tokens(outputs[1].logits, outputs[0].logits)
    for output in outputs:
        output.loss.backward()
    assert_same_gradients(ours, theirs, 1e-4)
    assert fastbert.explain(ours).head == []


@pytest.mark.parametrize("door", DOORS)
def test_tying_and_untying(door):
    theirs, ours = fast_pair(door, "BertForMaskedLM", tie_word_embeddings=False)
    assert_same_training_step(ours, theirs, "BertForMaskedLM")
    for model in (theirs, ours):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
    assert_same_training_step(ours, theirs, "BertForMaskedLM")
    for model in (theirs, ours):
        model.cls.predictions.decoder.weight = nn.Parameter(model.bert.embeddings.word_embeddings.weight.detach() * 1.5)
    assert_same_training_step(ours, theirs, "BertForMaskedLM")
