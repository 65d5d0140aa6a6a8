"""What is fused, what is not, and that changed modules take part instead of being read past."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastbert
from fastbert.model.adjacent import follow_each_other
from fastbert.ops import backends

from .helpers import inputs_for, mask, pair, small_config


class Scaled(nn.Linear):
    """A Linear that does more than its weight says, as LoRA's do."""

    def forward(self, x):
        return 2 * super().forward(x)


def replace(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    new = Scaled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    setattr(model.get_submodule(parent), name, new)


@pytest.mark.parametrize(
    "path",
    [
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.attention.output.dense",
        "encoder.layer.1.intermediate.dense",
        "encoder.layer.1.output.dense",
    ],
)
def test_a_replaced_linear_is_called(path):
    theirs, ours = pair("BertModel")
    replace(theirs, path)
    replace(ours, path)
    batch = inputs_for("BertModel")
    real = mask().unsqueeze(-1)
    torch.testing.assert_close(ours(**batch).last_hidden_state, theirs(**batch).last_hidden_state * real, atol=2e-6, rtol=2e-5)
    assert any("test_layer.Scaled" in note for note in fastbert.explain(ours).layers[1])
    assert not fastbert.explain(ours).layers[0]


def test_a_chunked_layer_falls_back_alone():
    theirs, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    ours.encoder.layer[1].chunk_size_feed_forward = theirs.encoder.layer[1].chunk_size_feed_forward = 7
    real = mask().unsqueeze(-1)
    expected = theirs(**batch).last_hidden_state * real
    torch.testing.assert_close(ours(**batch).last_hidden_state, expected, atol=2e-6, rtol=2e-5)
    explanation = fastbert.explain(ours)
    assert "chunk_size_feed_forward is 7" in explanation.layers[1][0]
    assert not explanation.fast
    assert "chunk_size_feed_forward" in str(explanation)


def test_hooks_are_called():
    _, ours = pair("BertModel")
    seen = []
    handles = [
        ours.encoder.layer[0].attention.register_forward_hook(lambda *_: seen.append("attention")),
        ours.encoder.layer[1].output.dense.register_forward_hook(lambda *_: seen.append("dense")),
        ours.encoder.layer[2].register_forward_hook(lambda *_: seen.append("layer")),
        ours.encoder.layer[2].output.LayerNorm.register_forward_hook(lambda *_: seen.append("norm")),
    ]
    batch = inputs_for("BertModel")
    hooked = ours(**batch).last_hidden_state
    assert seen == ["attention", "dense", "norm", "layer"]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(hooked, ours(**batch).last_hidden_state, atol=2e-6, rtol=2e-5)


def qkv(model: nn.Module) -> list[nn.Parameter]:
    attention = model.encoder.layer[0].attention.self
    return [attention.query.weight, attention.key.weight, attention.value.weight]


def test_query_key_and_value_become_one_buffer():
    theirs, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    parameters = list(ours.parameters())
    ours(**batch)
    assert follow_each_other(qkv(ours))
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())
    assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))


@pytest.mark.parametrize("change", [lambda m: m.double().float(), copy.deepcopy, lambda m: m.requires_grad_(False)])
def test_moved_parameters_are_noticed(change):
    _, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    expected = ours(**batch).last_hidden_state
    changed = change(ours)
    torch.testing.assert_close(changed(**batch).last_hidden_state, expected, atol=2e-6, rtol=2e-5)
    with torch.no_grad():
        for parameter in qkv(changed):
            parameter.zero_()
    assert not torch.equal(changed(**batch).last_hidden_state, expected)


def test_loading_weights_after_a_forward_pass():
    theirs, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    ours(**batch)
    other, _ = pair("BertModel")
    ours.load_state_dict(other.state_dict())
    expected = other(**batch).last_hidden_state * mask().unsqueeze(-1)
    torch.testing.assert_close(ours(**batch).last_hidden_state, expected, atol=2e-6, rtol=2e-5)


def test_shared_parameters_stay_shared():
    """Two linears with one weight cannot lie side by side: they are concatenated instead of being torn apart."""
    ours = fastbert.BertModel(small_config()).eval()
    attention = ours.encoder.layer[0].attention.self
    attention.key.weight = attention.query.weight
    batch = inputs_for("BertModel")
    ours(**batch)
    assert attention.key.weight is attention.query.weight
    ours(**batch).last_hidden_state.sum().backward()
    assert attention.query.weight.grad is not None


def test_training_steps_follow_transformers():
    """Ten optimizer steps with dropout 0: weights that were moved into one buffer are trained like any others."""
    theirs, ours = pair("BertForTokenClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    losses = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(10):
            loss = model(**inputs_for("BertForTokenClassification")).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=0, rtol=2e-4)


def test_explain_of_a_fast_model_and_of_a_stranger():
    explanation = fastbert.explain(fastbert.BertForPreTraining(small_config()))
    assert explanation.encoder == []
    assert explanation.embeddings == []
    assert explanation.head == []
    assert set(explanation.ops) == set(backends.OPS)
    assert explanation.to_dict()["fast"] == explanation.fast
    with pytest.raises(TypeError, match="Linear contains no encoder that fastbert knows .BertModel"):
        fastbert.explain(nn.Linear(2, 2))
    theirs, _ = pair("BertModel")
    assert "see fastbert.accelerate" in str(fastbert.explain(theirs))


@pytest.mark.skipif(backends.unavailable_reason("native") is not None, reason="linear_gelu and linear keep a wide tensor each")
def test_what_a_layer_keeps_for_the_backward_pass():
    """In float32 on a CPU: qkv, the context and its lse; each half's sum and normalised rows with two statistics; the
    pre-activation. The layer's input is the last of these of the layer before."""

    def kept(num_layers: int) -> int:
        model = fastbert.BertModel(small_config(num_hidden_layers=num_layers)).train()
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            model(**inputs_for("BertModel"))
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}  # now: the forward pass moves some together
        distinct = {t.data_ptr(): t for t in tensors if t.untyped_storage().data_ptr() not in parameters}
        return sum(t.numel() for t in distinct.values() if t.is_floating_point())

    config = small_config()
    per_row = 8 * config.hidden_size + config.intermediate_size + config.num_attention_heads + 4
    assert kept(4) - kept(3) == int(mask().sum()) * per_row


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("attention_drops", [False, True])
def test_attention_drops_by_its_own_mode(attention_drops, gradients):
    """As in transformers, where the mode of its nn.Dropout does not count."""
    for model in pair("BertModel", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0):
        with torch.set_grad_enabled(gradients):
            model(**inputs_for("BertModel"))  # packed in its present mode
            for layer in model.encoder.layer:
                layer.attention.self.training, layer.attention.self.dropout.training = attention_drops, not attention_drops
            batch = inputs_for("BertModel")
            same = torch.equal(*(model(**batch).last_hidden_state for _ in range(2)))
        assert same != attention_drops


def test_a_copied_layer_has_dropout_of_its_own():
    model = fastbert.BertModel(small_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    first = model.encoder.layer[0]
    second = copy.deepcopy(first)
    second.output.dropout.p = 0.5
    model.encoder.layer = nn.ModuleList([first, second])
    batch = inputs_for("BertModel")
    assert not torch.equal(*(model.train()(**batch).last_hidden_state for _ in range(2)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_shared_layer_drops_anew_at_each_call(checkpointed):
    model = fastbert.BertModel(small_config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0))
    layer = model.encoder.layer[0]
    layer.attention.output.dropout.p = 0.0
    model.encoder.layer = nn.ModuleList([layer] * 3)
    with torch.no_grad():  # of what is dropped the LayerNorm makes a negative number
        layer.output.dense.weight.zero_()
        layer.output.dense.bias.fill_(100.0)
    if checkpointed:
        model.gradient_checkpointing_enable()
    states = model.train()(**inputs_for("BertModel"), output_hidden_states=True).hidden_states[1:]
    one, two, three = ((state > 0)[mask().bool()] for state in states)
    for same in (one == two, two == three, one == three):
        assert 0.4 < same.float().mean() < 0.6
    states[-1].sum().backward()
