"""A layer as one node of autograd's graph gives the bits of the same layer op by op, and is taken only where all in it is plain."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbert
from fastbert.model import layer as layer_module
from fastbert.ops import backends

from ..ops.helpers import DEVICE
from .helpers import inputs_for, mask, small_config

pytestmark = pytest.mark.gpu
MODES = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each layer that was asked ran as one node."""
    answers, trained_layer = [], layer_module.trained_layer

    def asked(*arguments):
        done = trained_layer(*arguments)
        answers.append(done is not None)
        return done

    monkeypatch.setattr(layer_module, "trained_layer", asked)
    return answers


def op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "trained_layer", lambda *_: None)


def model_of(dropout: float = 0.1, name: str = "BertForTokenClassification", **options) -> nn.Module:
    torch.manual_seed(11)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return getattr(fastbert, name)(small_config(**rates, **options)).train().to(DEVICE)


def batch_of(name: str = "BertForTokenClassification") -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {key: value.to(DEVICE) for key, value in inputs_for(name).items()}


def results(model: nn.Module, autocast: bool = False, name: str = "BertForTokenClassification") -> dict[str, torch.Tensor]:
    """Loss, logits and all gradients of a step, with the same dropout masks in every call."""
    batch = batch_of(name)
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        output = model(**batch)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit on a CPU; a GPU's library may take another matmul for the same product."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if DEVICE == "cpu":
            assert torch.equal(value, expected[name]), name
        else:
            torch.testing.assert_close(value, expected[name], atol=1e-2 * float(expected[name].abs().max()), rtol=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_as_op_by_op(mode, dropout, counted, monkeypatch):
    dtype, autocast = MODES[mode]
    model = model_of(dropout).to(dtype)
    found = results(model, autocast)
    assert counted == [True] * 3
    op_by_op(monkeypatch)
    expected = results(model, autocast)
    if autocast and DEVICE == "cpu":  # the gradients of matmuls' parameters are not rounded on their way to float32
        found = {name: x if torch.equal(x, expected[name]) else x.bfloat16().float() for name, x in found.items()}
    assert_same(found, expected)


def test_only_one_of_the_dropouts(counted, monkeypatch):
    model = model_of(0.0)
    model.bert.encoder.layer[1].attention.output.dropout.p = 0.3
    found = results(model)
    assert counted == [True] * 3
    op_by_op(monkeypatch)
    assert_same(found, results(model))


def test_kernels_of_other_backends(counted, monkeypatch):
    """What is kept of the feed-forward network depends on whose kernels they are."""
    if DEVICE != "cpu":
        pytest.skip("a GPU has them anyway")
    monkeypatch.setitem(backends.AUTO_ORDER, "cpu", ("reference",))
    backends.select.cache_clear()
    try:
        model = model_of(0.1)
        found = results(model)
        assert counted == [True] * 3
        op_by_op(monkeypatch)
        assert_same(found, results(model))
    finally:
        backends.select.cache_clear()


def frozen(pattern: str) -> Callable[[nn.Module], None]:
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(pattern not in name)

    return freeze


@pytest.mark.parametrize(
    "change",
    [frozen(pattern) for pattern in ("weight", "bias", "embeddings", "layer.1", "query", "LayerNorm", "intermediate")],
    ids=["weights", "biases", "embeddings", "a layer", "queries", "norms", "intermediate"],
)  # fmt: skip
def test_frozen_parameters_get_no_gradient(change, counted, monkeypatch):
    model = model_of()
    change(model)
    found = results(model)
    assert any(counted)
    op_by_op(monkeypatch)
    assert_same(found, results(model))


def with_hook(layer: nn.Module) -> None:
    layer.output.dense.register_forward_hook(lambda *_: None)


def without_bias(layer: nn.Module) -> None:
    layer.attention.self.key.bias = None


def with_another_activation(layer: nn.Module) -> None:
    layer.intermediate.intermediate_act_fn = nn.ReLU()


def with_weights_of_another_dtype(layer: nn.Module) -> None:
    layer.output.LayerNorm.bias = nn.Parameter(layer.output.LayerNorm.bias.detach().double())


@pytest.mark.parametrize("change", [with_hook, without_bias, with_another_activation, with_weights_of_another_dtype])
def test_what_is_not_plain_goes_op_by_op(change, counted, monkeypatch):
    model = model_of()
    change(model.bert.encoder.layer[1])
    explanation = fastbert.explain(model)
    assert explanation.training[0] == explanation.training[2] == [] != explanation.training[1]
    assert f"training   1: op by op, {explanation.training[1][0]}" in str(explanation)
    found = results(model)
    assert counted == [True, False, True][: len(counted)] or counted == [True, True]  # a hook sends the layer to padded rows
    op_by_op(monkeypatch)
    assert_same(found, results(model))


def test_no_gradients_no_node(counted):
    model = model_of()
    with torch.no_grad():
        model(**batch_of())
    assert not any(counted)


def test_a_second_derivative_is_refused(counted):
    model = model_of()
    loss = model(**batch_of()).loss
    assert all(counted)
    (gradient,) = torch.autograd.grad(loss, [model.bert.encoder.layer[1].output.dense.weight], create_graph=True)
    with pytest.raises(
        RuntimeError, match="fastbert::trained_layer_backward has no derivative: fastbert's ops can be differentiated"
    ):
        gradient.square().sum().backward()


def test_weights_that_were_changed_since_are_noticed():
    model = model_of()
    loss = model(**batch_of()).loss
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_that_were_moved_apart_since(counted, monkeypatch):
    """Between forward and backward pass, as ``.to()`` does it: gradients are those of the values."""
    found = []
    for one_node in (True, False):
        if not one_node:
            op_by_op(monkeypatch)
        model = model_of(0.0)
        loss = model(**batch_of()).loss
        for layer in model.bert.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.value):
                linear.weight.data = linear.weight.data.clone()
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(counted)
    assert_same(*found)


def test_hidden_states_in_half_precision_go_from_layer_to_layer(counted):
    """Under autocast the kernels write both, for one reader; what somebody changes in between is converted anew."""
    model = model_of(0.0)
    seen = []
    for layer in model.bert.encoder.layer:

        def watched(rows, packing, original=layer.on_packed_rows):
            seen.append("_fastbert_half" in rows.__dict__)
            result = original(rows, packing)
            seen.append("_fastbert_half" in rows.__dict__)
            return result

        layer.on_packed_rows = watched
    results(model, autocast=True)
    assert seen == [False, False, True, False, True, False] and counted == [True] * 3


def test_what_is_known_in_half_precision():
    def rows() -> torch.Tensor:
        made = torch.randn(4, 8, device=DEVICE)
        return layer_module.with_half(made, made.bfloat16())

    with torch.autocast(DEVICE, torch.bfloat16):
        x = rows()
        assert layer_module.take_half(x).dtype == torch.bfloat16 and layer_module.take_half(x) is None
        assert layer_module.take_half(rows().add_(1.0)) is None
        assert layer_module.take_half(rows().requires_grad_() * 1.0) is None
        with torch.inference_mode():
            assert layer_module.take_half(rows()) is None
    with torch.autocast(DEVICE, torch.float16):
        assert layer_module.take_half(rows()) is None
    assert layer_module.take_half(rows()) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_some_layers_are_computed_again_under_autocast(reentrant, counted):
    """What reentrant checkpointing gives on comes out of no_grad and is put into the graph: its half precision is in none."""
    model = model_of(0.1)
    for layer in model.bert.encoder.layer:  # so large that gradients through queries, keys and values count
        layer.attention.self.query.weight.data *= 8
    expected = results(model, autocast=True)

    def again(layer: nn.Module) -> None:
        original = layer.on_packed_rows
        layer.on_packed_rows = lambda rows, packing: checkpoint(original, rows, packing, use_reentrant=reentrant)

    again(model.bert.encoder.layer[0])
    assert_same(results(model, autocast=True), expected)
    again(model.bert.encoder.layer[1])
    assert_same(results(model, autocast=True), expected)
    assert any(counted)


def test_a_module_of_somebody_elses_gets_float32_under_autocast(counted):
    """As from transformers, in every layer."""
    model, seen = model_of(0.0), []

    class Mine(nn.Linear):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x)

    for layer in model.bert.encoder.layer:
        for owner, name in ((layer.attention.self, "query"), (layer.intermediate, "dense")):
            theirs = getattr(owner, name)
            mine = Mine(theirs.in_features, theirs.out_features, device=DEVICE)
            mine.load_state_dict(theirs.state_dict())
            setattr(owner, name, mine)
    results(model, autocast=True)
    assert seen == [torch.float32] * 6 and not any(counted)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_inference_mode_under_autocast(name):
    """Its tensors have no version. Labels have the last layer go on with some rows, op by op; active dropout has all layers."""
    model, batch = model_of(0.1, name), batch_of(name)
    batch["labels"][:, 2:] = -100
    for train in (False, True):
        model.train(train)
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
            assert torch.isfinite(model(**batch).loss)


def test_bounds_of_sequences_anywhere_in_memory(counted):
    """Every second number of a tensor."""
    model = model_of(0.0)
    ids = torch.arange(12, device=DEVICE)[None] + 5
    bounds = torch.tensor([0, 99, 5, 99, 12, 99], dtype=torch.int32, device=DEVICE)[::2]
    logits = [model(input_ids=ids, cu_seq_lens_q=cu_seqlens, max_length_q=7).logits for cu_seqlens in (bounds, bounds.contiguous())]
    assert torch.equal(*logits) and all(counted)


def test_bounds_that_were_changed_since_are_noticed(counted):
    model = model_of(0.0)
    ids, bounds = torch.arange(12, device=DEVICE)[None] + 5, torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE)
    loss = model(input_ids=ids, cu_seq_lens_q=bounds, max_length_q=7).logits.sum()
    assert all(counted)
    bounds[1] = 6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_that_lie_apart_or_do_not_fit(counted, monkeypatch):
    model = model_of(0.0)
    norm = model.bert.encoder.layer[1].output.LayerNorm
    norm.weight.data = torch.stack([norm.weight.data, norm.weight.data + 6.0], 1)[:, 0]
    found = results(model)
    assert counted == [True, False, True]
    op_by_op(monkeypatch)
    assert_same(found, results(model))
    norm.bias = nn.Parameter(norm.bias.detach()[:16])
    with pytest.raises(ValueError, match=r"ln_bias has shape \(16,\), expected \(48,\)"):
        results(model)


def test_several_steps_of_an_optimizer(counted, monkeypatch):
    """Weights stay side by side, and the steps are those of op by op."""
    models = [model_of(0.1), copy.deepcopy(model_of(0.1))]
    losses = []
    for model, one_node in zip(models, (True, False), strict=True):
        if not one_node:
            op_by_op(monkeypatch)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            losses.append(results(model)["loss"])
            optimizer.step()
    assert counted == [True] * 9
    assert_same({"losses": torch.stack(losses[:3])}, {"losses": torch.stack(losses[3:])})


def test_padding_is_there():
    """Or none of the above would show that rows are packed."""
    assert not mask().all()
