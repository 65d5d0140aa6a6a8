"""Gradient checkpointing (reentrant and not) and the outputs that a caller asks for: hidden states, attention weights, tuples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.utils import output_capturing

import fastbert
from fastbert.model import layer as layer_module

from ..model.helpers import LENGTHS, assert_same_gradients, inputs_for, mask, on_real_tokens
from ..model.test_packed_inputs import packed
from .helpers import DOORS, assert_same_on_real_tokens, fast, fast_pair, notes_of, plain

NAME = "BertForSequenceClassification"
LAYERS = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture
def layer_forwards(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers in whose name the fused forward runs, one entry per run."""
    runs, fused = [], layer_module.FusedLayer._fused

    def counted(self, *args):
        runs.append(self)
        return fused(self, *args)

    monkeypatch.setattr(layer_module.FusedLayer, "_fused", counted)
    return runs


def checkpointed(door: str, theirs: nn.Module, reentrant: bool, first: str) -> nn.Module:
    """A fast model with checkpointing set before or after it became one ("checkpointing" or "fast": what came ``first``)."""
    arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if door == "accelerate" and first == "checkpointing":
        ours = copy.deepcopy(theirs)
        ours.gradient_checkpointing_enable(**arguments)
        return fastbert.accelerate(ours)
    ours = fast(theirs, door)
    ours.gradient_checkpointing_enable(**arguments)
    return ours


WAYS = [("class", "fast"), ("accelerate", "fast"), ("accelerate", "checkpointing")]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("door", "first"), WAYS)
def test_layers_run_twice_in_training_only(layer_forwards, door, first, reentrant):
    theirs = plain(NAME)
    ours = checkpointed(door, theirs, reentrant, first)
    assert ours.is_gradient_checkpointing
    batch = inputs_for(NAME)
    losses = [model(**batch).loss for model in (theirs, ours)]
    assert len(layer_forwards) == LAYERS
    for loss in losses:
        loss.backward()
    assert len(layer_forwards) == 2 * LAYERS
    torch.testing.assert_close(*losses, atol=2e-5, rtol=2e-5)
    assert_same_gradients(ours, theirs, 1e-4)
    layer_forwards.clear()
    ours.eval()(**batch).loss.backward()
    assert len(layer_forwards) == LAYERS
    ours.train().gradient_checkpointing_disable()
    ours(**batch).loss.backward()
    assert len(layer_forwards) == 2 * LAYERS


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("door", "first"), WAYS)
def test_recomputed_layers_draw_the_same_dropout(door, first, reentrant):
    theirs = plain("BertForPreTraining", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    stored, recomputed = fast(theirs, door), checkpointed(door, theirs, reentrant, first)
    batch, losses = inputs_for("BertForPreTraining"), []
    for model in (stored, recomputed):
        torch.manual_seed(11)
        losses.append(model(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
    assert_same_gradients(recomputed, stored, 1e-5)
    assert abs(losses[0] - stored.eval()(**batch).loss) > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("door", "first"), WAYS)
def test_frozen_embeddings(layer_forwards, door, first, reentrant):
    """The layers' input requires no gradient then, with which reentrant checkpointing would leave out all layers' gradients."""
    theirs = plain(NAME)
    theirs.bert.embeddings.requires_grad_(False)
    ours = checkpointed(door, theirs, reentrant, first)
    ours.bert.embeddings.requires_grad_(False)
    batch = inputs_for(NAME)
    for model in (theirs, ours):
        model(**batch).loss.backward()
    assert len(layer_forwards) == 2 * LAYERS
    assert_same_gradients(ours, theirs, 1e-4)
    assert ours.bert.encoder.layer[0].attention.self.query.weight.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("door", DOORS)
def test_packed_rows(layer_forwards, door, reentrant):
    theirs = plain("BertForPreTraining")
    ours = checkpointed(door, theirs, reentrant, "fast")
    batch = inputs_for("BertForPreTraining")
    losses = [theirs(**batch).loss, ours(**packed(batch)).loss]
    for loss in losses:
        loss.backward()
    assert len(layer_forwards) == 2 * LAYERS
    torch.testing.assert_close(*losses, atol=2e-5, rtol=2e-5)
    assert_same_gradients(ours, theirs, 1e-4)


@pytest.mark.parametrize("door", DOORS)
def test_a_layer_that_falls_back_is_recomputed_too(door):
    """A hook inside of layer 1 makes it run transformers' forward; the hook sees both of its runs."""
    theirs = plain(NAME)
    ours = checkpointed(door, theirs, False, "fast")
    theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = {"theirs": 0, "ours": 0}
    for name, model in (("theirs", theirs), ("ours", ours)):

        def count(*_, name=name):
            calls[name] += 1

        model.bert.encoder.layer[1].output.dense.register_forward_hook(count)
    batch = inputs_for(NAME)
    for model in (theirs, ours):
        model(**batch).loss.backward()
    assert calls == {"theirs": 2, "ours": 2}
    assert_same_gradients(ours, theirs, 1e-4)


# --- hidden states, attention weights, tuples --------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [True, False, None, 0, 1, -1, [0, 2], [-1, 1], [], (1,), 7])
@pytest.mark.parametrize("through", ["argument", "config"])
@pytest.mark.parametrize("door", DOORS)
def test_hidden_states(door, through, wanted):
    """A flag, an index or indices, negative ones too; what is false in Python, 0 and [] too, asks for none."""
    packed = hasattr(output_capturing, "selected_hidden_states") or wanted is None or isinstance(wanted, bool)
    if through == "config" and not packed:
        pytest.skip("in this version of transformers a configuration takes flags only")
    theirs, ours = fast_pair(door, NAME)
    batch = inputs_for(NAME)
    arguments = {"output_hidden_states": wanted} if through == "argument" else {}
    if through == "config":
        theirs.config.output_hidden_states = ours.config.output_hidden_states = wanted
    expected, got = theirs(**batch, **arguments), ours(**batch, **arguments)
    assert list(got.keys()) == list(expected.keys())
    if expected.hidden_states is None:
        assert got.hidden_states is None
        return
    assert [state is None for state in got.hidden_states] == [state is None for state in expected.hidden_states]
    for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        if other is not None:
            assert_same_on_real_tokens(mine, other)
    assert bool(fastbert.explain(ours, **arguments).encoder) == (not packed)


@pytest.mark.parametrize("door", DOORS)
def test_gradients_through_hidden_states(door):
    """Their sum is what layer-wise losses and ELMo-like mixtures are made of."""
    theirs, ours = fast_pair(door, "BertModel", hidden_dropout_prob=0.0)
    batch = inputs_for("BertModel")
    for model in (theirs, ours):
        output = model(**batch, output_hidden_states=True)
        states = sum(weight * state for weight, state in enumerate(output.hidden_states, 1))
        (on_real_tokens(states).square().sum() + output.pooler_output.sum()).backward()
    assert_same_gradients(ours, theirs, 1e-4)


@pytest.mark.parametrize("index", [0, 1, -1])
@pytest.mark.parametrize("door", DOORS)
def test_gradients_of_hidden_states(door, index):
    """What saliency maps are made of: the loss depends on the states that the caller gets."""
    theirs, ours = fast_pair(door, NAME, hidden_dropout_prob=0.0)
    batch, gradients = inputs_for(NAME), []
    for model in (ours, theirs):
        output = model(**batch, output_hidden_states=True)
        gradients += torch.autograd.grad(output.loss, output.hidden_states[index])
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*map(on_real_tokens, gradients), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("door", DOORS)
def test_hidden_states_of_a_checkpointed_model(door, reentrant):
    theirs = plain(NAME)
    ours = checkpointed(door, theirs, reentrant, "fast")
    batch = inputs_for(NAME)
    for mine, other in zip(
        ours(**batch, output_hidden_states=True).hidden_states,
        theirs(**batch, output_hidden_states=True).hidden_states,
        strict=True,
    ):
        assert_same_on_real_tokens(mine, other)


@pytest.mark.parametrize("door", DOORS)
def test_hidden_states_of_packed_rows(door):
    theirs, ours = fast_pair(door, "BertModel")
    batch = inputs_for("BertModel")
    expected = theirs(**batch, output_hidden_states=True).hidden_states
    got = ours(**packed(batch), output_hidden_states=True).hidden_states
    assert len(got) == LAYERS + 1
    for mine, other in zip(got, expected, strict=True):
        assert mine.shape == (1, sum(LENGTHS), 48)
        torch.testing.assert_close(mine[0], other[mask().bool()], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("door", DOORS)
def test_attention_weights_need_eager_attention(door):
    """transformers refuses them under sdpa when they are in the configuration, and gives none when they are an argument."""
    theirs, ours = fast_pair(door, "BertModel")
    batch = inputs_for("BertModel")
    outputs = [model(**batch, output_attentions=True) for model in (theirs, ours)]
    assert len({str(output.attentions) for output in outputs}) == 1
    assert_same_on_real_tokens(outputs[1].last_hidden_state, outputs[0].last_hidden_state)
    assert any("output_attentions" in note for note in fastbert.explain(ours, output_attentions=True).encoder)
    for model in (theirs, ours):
        with pytest.raises(ValueError, match="attn_implementation"):
            model.config.output_attentions = True

    theirs, ours = fast_pair(door, "BertModel", attn_implementation="eager")
    expected, got = (model(**batch, output_attentions=True) for model in (theirs, ours))
    assert len(got.attentions) == len(expected.attentions) == LAYERS
    for mine, other in zip(got.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
    assert any("eager" in note for note in notes_of(ours))


@pytest.mark.parametrize("through", ["argument", "config"])
@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining", NAME])
@pytest.mark.parametrize("door", DOORS)
def test_tuples(door, name, through):
    theirs, ours = fast_pair(door, name)
    batch, arguments = inputs_for(name), {"output_hidden_states": True}
    if through == "argument":
        arguments["return_dict"] = False
    else:
        theirs.config.return_dict = ours.config.return_dict = False
    expected, got = theirs(**batch, **arguments), ours(**batch, **arguments)
    assert type(got) is tuple
    assert len(got) == len(expected)
    for mine, other in zip(got, expected, strict=True):
        assert type(mine) is type(other)
        for part, wanted in zip(*((x if isinstance(x, tuple) else (x,)) for x in (mine, other)), strict=True):
            assert_same_on_real_tokens(part, wanted)
