"""What autograd offers beside ``loss.backward()``: right where it works, a clear error where it does not, never a silent zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastbert

from ..model.helpers import assert_same_gradients, inputs_for, mask
from .helpers import DOORS, assert_same_on_real_tokens, assert_same_training_step, fast_pair, notes_of

NAME = "BertForSequenceClassification"


def first_gradients(model: nn.Module, names: str) -> list[torch.Tensor]:
    """Differentiable gradients of the loss with respect to the parameters whose names contain ``names``."""
    parameters = [p for name, p in model.named_parameters() if names in name]
    return torch.autograd.grad(model(**inputs_for(NAME)).loss, parameters, create_graph=True)


@pytest.mark.parametrize(
    "names", ["word_embeddings", "layer.0.attention.self.query", "layer.1.output.dense", "layer.2.output.LayerNorm", "intermediate"]
)
@pytest.mark.parametrize("door", DOORS)
def test_second_derivatives_through_the_encoder_are_a_clear_error(door, names):
    _, ours = fast_pair(door, NAME)
    penalty = sum(gradient.square().sum() for gradient in first_gradients(ours, names))
    with pytest.raises(RuntimeError, match=r"fastbert::.*_backward has no derivative: .* use fastbert\.restore\(model\)"):
        penalty.backward()


@pytest.mark.parametrize("door", DOORS)
def test_the_advice_of_that_error_works(door):
    theirs, ours = fast_pair(door, NAME, attn_implementation="eager")
    ours = fastbert.restore(ours)
    grads = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        sum(gradient.square().sum() for gradient in first_gradients(model, "query")).backward()
        grads.append(model.bert.embeddings.word_embeddings.weight.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("door", DOORS)
def test_second_derivatives_of_the_head_are_right(door):
    """The first derivative for the classifier alone runs no backward pass of an op of ours."""
    theirs, ours = fast_pair(door, NAME)
    for model in (theirs, ours):
        torch.manual_seed(3)
        sum(gradient.square().sum() for gradient in first_gradients(model, "classifier")).backward()
    assert_same_gradients(ours, theirs, 1e-4)


@pytest.mark.parametrize("door", DOORS)
def test_gradcheck(door):
    """Against finite differences, in float64, for the inputs and every kind of parameter."""
    _, ours = fast_pair(door, "BertModel", num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=12)
    ours.double()
    layer = ours.encoder.layer[0]
    parameters = [
        layer.attention.self.query.weight, layer.attention.self.value.bias, layer.attention.output.LayerNorm.weight,
        layer.intermediate.dense.weight, layer.output.dense.bias, ours.embeddings.token_type_embeddings.weight,
    ]  # fmt: skip
    embeds = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    def outputs(embeds, *_):
        output = ours(inputs_embeds=embeds, attention_mask=padding)
        return output.last_hidden_state, output.pooler_output

    assert torch.autograd.gradcheck(outputs, (embeds, *parameters), fast_mode=True)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
@pytest.mark.parametrize("door", DOORS)
def test_anomaly_mode(door):
    theirs, ours = fast_pair(door, NAME)
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same_training_step(ours, theirs, NAME)
        with torch.no_grad():
            ours.bert.encoder.layer[1].output.LayerNorm.bias[0] = float("inf")
        with pytest.raises(RuntimeError, match="returned nan values"):
            ours(**inputs_for(NAME)).loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("door", DOORS)
def test_modes_without_gradients(door, mode):
    theirs, ours = fast_pair(door, "BertForMaskedLM")
    batch = inputs_for("BertForMaskedLM")
    with mode():
        expected, got = theirs(**batch), ours(**batch)
        torch.testing.assert_close(got.loss, expected.loss, atol=2e-5, rtol=2e-5)
    logits = got.logits  # computed now, in the mode of the forward pass
    assert not logits.requires_grad
    assert_same_on_real_tokens(logits, expected.logits)
    assert_same_training_step(ours, theirs, "BertForMaskedLM")


@pytest.mark.parametrize("door", DOORS)
def test_backward_twice(door):
    theirs, ours = fast_pair(door, NAME)
    batch = inputs_for(NAME)
    for model in (theirs, ours):
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters()]
        loss.backward()
        for parameter, gradient in zip(model.parameters(), once, strict=True):
            torch.testing.assert_close(parameter.grad, 2 * gradient)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@pytest.mark.parametrize("door", DOORS)
def test_a_weight_changed_between_forward_and_backward_is_noticed(door):
    """autograd's check of saved tensors also works for query, key and value, which are read through their common buffer."""
    for name in ("query", "key", "value"):
        theirs, ours = fast_pair(door, NAME)
        for model in (theirs, ours):
            loss = model(**inputs_for(NAME)).loss
            with torch.no_grad():
                getattr(model.bert.encoder.layer[1].attention.self, name).weight.add_(1.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.parametrize("door", DOORS)
def test_gradients_of_the_inputs(door):
    grads = []
    embeds = torch.randn(6, 21, 48)
    for model in fast_pair(door, "BertModel"):
        leaf = embeds.clone().requires_grad_()
        output = model(inputs_embeds=leaf, attention_mask=mask())
        (output.last_hidden_state.square() * mask().unsqueeze(-1)).sum().backward()
        grads.append(leaf.grad)
    assert_same_on_real_tokens(grads[1], grads[0])


# --- torch.func --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_functional_call(door):
    """The given parameters are used, not the module's, and both keep their values and memory."""
    theirs, ours = fast_pair(door, NAME)
    batch = inputs_for(NAME)
    for dtype in (torch.float32, torch.float64):
        given = {name: (1.5 * p.detach()).to(dtype).requires_grad_() for name, p in theirs.named_parameters()}
        values = {name: p.detach().clone() for name, p in given.items()}
        pointers = {name: p.data_ptr() for name, p in given.items()}
        losses, grads = [], []
        for model in (theirs, ours):
            loss = torch.func.functional_call(model, given, (), batch).loss
            losses.append(loss)
            grads.append(torch.autograd.grad(loss, list(given.values())))
        torch.testing.assert_close(losses[1], losses[0], atol=2e-5, rtol=2e-5)
        largest = max(g.abs().max().item() for g in grads[0])
        for got, expected in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(got, expected, atol=2e-6 * largest, rtol=1e-4)
        assert all(torch.equal(given[name].detach(), value) for name, value in values.items())
        assert {name: p.data_ptr() for name, p in given.items()} == pointers
    assert_same_training_step(ours, theirs, NAME)


@pytest.mark.parametrize("name", [NAME, "BertForMaskedLM"])
@pytest.mark.parametrize("door", DOORS)
def test_func_grad(door, name):
    """torch transforms its own operators only, so the model runs transformers' forward, the head's ops included."""
    theirs, ours = fast_pair(door, name)
    batch = inputs_for(name)
    grads, seen = [], []
    for model in (theirs, ours):

        def loss(parameters, model=model):
            if model is ours:
                seen.extend(notes_of(model))
            return torch.func.functional_call(model, parameters, (), batch).loss

        grads.append(torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()}))
    largest = max(g.abs().max().item() for g in grads[0].values())
    for key, expected in grads[0].items():
        torch.testing.assert_close(grads[1][key], expected, atol=2e-6 * largest, rtol=1e-4)
    assert any("torch.func" in note for note in seen)
    assert fastbert.explain(ours).encoder == []


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("door", DOORS)
def test_vmap_over_batches(door):
    theirs, ours = fast_pair(door, "BertModel")
    embeds = torch.randn(3, 2, 7, 48)
    got = torch.func.vmap(lambda e: ours(inputs_embeds=e).pooler_output)(embeds)
    expected = torch.stack([theirs(inputs_embeds=e).pooler_output for e in embeds])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("door", DOORS)
def test_forward_mode_derivatives(door):
    """Right with transformers' eager attention; its sdpa has none and says so."""
    embeds, tangent = torch.randn(6, 21, 48), torch.randn(6, 21, 48)
    theirs, ours = fast_pair(door, "BertModel", attn_implementation="eager")
    ours.set_attn_implementation("sdpa")
    assert fastbert.explain(ours).encoder == []
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda e: ours(inputs_embeds=e).pooler_output, (embeds,), (tangent,))
    ours.set_attn_implementation("eager")
    expected = torch.func.jvp(lambda e: theirs(inputs_embeds=e).pooler_output, (embeds,), (tangent,))[1]
    assert expected.abs().max() > 0
    torch.testing.assert_close(
        torch.func.jvp(lambda e: ours(inputs_embeds=e).pooler_output, (embeds,), (tangent,))[1], expected, atol=2e-5, rtol=2e-4
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embeds, tangent)
        assert any("forward-mode" in note for note in notes_of(ours))
        got = forward_ad.unpack_dual(ours(inputs_embeds=dual).pooler_output).tangent
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("door", DOORS)
def test_a_batch_of_gradients_is_a_clear_error(door):
    _, ours = fast_pair(door, NAME)
    embeds = torch.randn(1, 5, 48, requires_grad=True)
    logits = ours(inputs_embeds=embeds).logits[0]
    with pytest.raises(RuntimeError, match="take one gradient at a time"):
        torch.autograd.grad(logits, embeds, torch.eye(len(logits)), is_grads_batched=True)  # also vectorize=True of jacobian
