"""The nine classes against transformers': outputs, losses, gradients, state dicts, signatures."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import fastbert

from .helpers import (
    BATCH,
    LENGTH,
    LENGTHS,
    NAMES,
    assert_same_gradients,
    inputs_for,
    mask,
    on_real_tokens,
    pair,
    rows_of_layers,
    small_config,
)


def assert_same_outputs(ours, theirs, tolerance: float = 2e-6) -> None:
    assert list(ours.keys()) == list(theirs.keys())
    for key in theirs:
        a, b = ours[key], theirs[key]
        tensors = zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]
        for x, y in tensors:
            assert x.shape == y.shape, key
            torch.testing.assert_close(on_real_tokens(x), on_real_tokens(y), atol=tolerance, rtol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name):
    theirs, ours = pair(name)
    batch = inputs_for(name)
    if name == "BertForQuestionAnswering":
        batch.pop("attention_mask")  # padding takes part in transformers' softmax, not in ours: the test below
    expected, got = theirs(**batch), ours(**batch)
    assert_same_outputs(got, expected)
    if "loss" in expected:
        expected.loss.backward()
        got.loss.backward()
        assert_same_gradients(ours, theirs, 2e-5)


def test_padding_is_no_answer():
    """The loss on a padded batch is the mean of the losses of its sequences alone, where nothing is padded."""
    theirs, ours = pair("BertForQuestionAnswering")
    batch = inputs_for("BertForQuestionAnswering")
    batch["end_positions"][0] = LENGTH + 5  # a truncated answer
    got = ours(**batch)
    start_losses, end_losses = [], []
    for i, length in enumerate(LENGTHS):
        alone = theirs(batch["input_ids"][i : i + 1, :length], token_type_ids=batch["token_type_ids"][i : i + 1, :length])
        torch.testing.assert_close(got.start_logits[i, :length], alone.start_logits[0], atol=2e-6, rtol=2e-5)
        assert (got.end_logits[i, length:] == torch.finfo(torch.float32).min).all()
        start_losses.append(torch.nn.functional.cross_entropy(alone.start_logits[0], batch["start_positions"][i]))
        if i > 0:
            end_losses.append(torch.nn.functional.cross_entropy(alone.end_logits[0], batch["end_positions"][i]))
    expected = (torch.stack(start_losses).mean() + torch.stack(end_losses).mean()) / 2
    torch.testing.assert_close(got.loss, expected)


@pytest.mark.parametrize("name", NAMES)
def test_without_labels_and_mask(name):
    theirs, ours = pair(name)
    keys = ("input_ids", "token_type_ids")
    batch = {key: value for key, value in inputs_for(name).items() if key in keys}
    expected, got = theirs(**batch), ours(**batch)
    assert list(got.keys()) == list(expected.keys())
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_same_signature_and_state_dict(name):
    theirs, ours = getattr(transformers, name), getattr(fastbert, name)
    assert issubclass(ours, theirs)
    assert ours.__name__ == name
    assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
    a, b = theirs(small_config()).state_dict(), ours(small_config()).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}


@pytest.mark.parametrize("wanted", [True, 1, [0, -1], False])
def test_hidden_states(wanted):
    theirs, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    expected, got = theirs(**batch, output_hidden_states=wanted), ours(**batch, output_hidden_states=wanted)
    if wanted is False:
        assert got.hidden_states is None
        return
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(on_real_tokens(a), on_real_tokens(b), atol=2e-6, rtol=2e-5)
    assert got.hidden_states[-1] is None or got.hidden_states[-1] is got.last_hidden_state


def test_attention_weights_come_from_eager_attention():
    theirs, ours = pair("BertModel", attn_implementation="eager")
    batch = inputs_for("BertModel")
    expected, got = theirs(**batch, output_attentions=True), ours(**batch, output_attentions=True)
    assert len(got.attentions) == 3
    torch.testing.assert_close(got.attentions, expected.attentions)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"])
def test_tuples(name):
    theirs, ours = pair(name)
    batch = inputs_for(name)
    expected, got = theirs(**batch, return_dict=False), ours(**batch, return_dict=False)
    assert type(got) is tuple
    assert [t.shape for t in got] == [t.shape for t in expected]


@pytest.mark.parametrize("name", NAMES)
def test_sequences_that_begin_with_padding(name):
    """transformers pools the first column all the same, which there has looked at the tokens."""
    theirs, ours = pair(name)
    batch = inputs_for(name)
    batch["attention_mask"] = batch["attention_mask"].flip(-1)
    assert fastbert.explain(ours, **inputs_for(name)).encoder == []
    (reason,) = fastbert.explain(ours, **batch).encoder
    assert reason == "a sequence begins with padding, which transformers pools as its first token"
    real = 1
    if name == "BertForQuestionAnswering":  # whose head gives padding no probability
        batch, real = {key: value for key, value in batch.items() if "positions" not in key}, batch["attention_mask"]
    for model in (theirs, ours):
        with torch.no_grad():
            model(**inputs_for(name))  # a call that the next one could be answered like
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            outputs = [model(**batch) for model in (theirs, ours)]
        for expected, got in zip(*(output.to_tuple() for output in outputs), strict=True):
            torch.testing.assert_close(got * real, expected * real, atol=2e-5, rtol=2e-5)


def test_any_mask_with_holes():
    theirs, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    batch["attention_mask"] = (torch.rand(BATCH, LENGTH) < 0.5).long()
    batch["attention_mask"][:, 0] = 1
    assert fastbert.explain(ours, **batch).encoder == []
    real = batch["attention_mask"].unsqueeze(-1)
    expected, got = theirs(**batch).last_hidden_state, ours(**batch).last_hidden_state
    torch.testing.assert_close(got * real, expected * real, atol=2e-6, rtol=2e-5)
    assert (got * (1 - real) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_mask_dtypes(dtype):
    _, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    expected = ours(**batch).last_hidden_state
    assert torch.equal(ours(**{**batch, "attention_mask": mask().to(dtype)}).last_hidden_state, expected)


def test_a_row_that_is_all_padding_is_zero():
    _, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    batch["attention_mask"][2] = 0
    output = ours(**batch)
    assert (output.last_hidden_state[2] == 0).all()
    assert torch.isfinite(output.pooler_output).all()
    batch["attention_mask"][:] = 0
    assert (ours(**batch).last_hidden_state == 0).all()


def test_inputs_embeds_and_position_ids():
    theirs, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    embeds = theirs.embeddings.word_embeddings(batch.pop("input_ids")).detach()
    positions = torch.arange(LENGTH).flip(0).expand(BATCH, LENGTH)
    expected = theirs(inputs_embeds=embeds, position_ids=positions, **batch).last_hidden_state
    got = ours(inputs_embeds=embeds, position_ids=positions, **batch).last_hidden_state
    torch.testing.assert_close(on_real_tokens(got), on_real_tokens(expected), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
def test_activations(activation):
    theirs, ours = pair("BertForMaskedLM", hidden_act=activation)
    batch = inputs_for("BertForMaskedLM")
    assert_same_outputs(ours(**batch), theirs(**batch))


def test_decoder_with_cache_runs_as_transformers_does():
    theirs, ours = pair("BertLMHeadModel", is_decoder=True)
    batch = inputs_for("BertLMHeadModel")
    expected, got = theirs(**batch), ours(**batch)
    torch.testing.assert_close(got.loss, expected.loss)
    ids = batch["input_ids"][:, :5]
    assert torch.equal(
        ours.generate(ids, max_new_tokens=4, do_sample=False), theirs.generate(ids, max_new_tokens=4, do_sample=False)
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, monkeypatch):
    """Dropout is on: recomputed layers must draw the masks of the first pass."""
    torch.manual_seed(3)
    ours = fastbert.BertForTokenClassification(small_config()).train()
    batch = inputs_for("BertForTokenClassification")
    torch.manual_seed(5)
    ours(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = rows_of_layers(monkeypatch)
    torch.manual_seed(5)
    ours(**batch).loss.backward()
    assert len(calls) == 2 * ours.config.num_hidden_layers
    for name, parameter in ours.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


def test_dropout_repeats_with_the_seed_and_has_the_right_mean():
    torch.manual_seed(1)
    config = small_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    ours = fastbert.BertModel(config).train()
    batch = inputs_for("BertModel")
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        runs.append(ours(**batch).last_hidden_state)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    ours.eval()
    assert torch.equal(ours(**batch).last_hidden_state, ours(**batch).last_hidden_state)


def test_trainer_does_not_scale_the_loss_twice():
    """transformers#47688: with 4 accumulation steps transformers' classes give 4 times the loss and the gradients.

    A class takes Trainer's num_items_in_batch and divides by it, or says that it does not.
    """
    dividing = {"BertLMHeadModel", "BertForMaskedLM", "BertForTokenClassification"}
    assert {name for name in NAMES if getattr(fastbert, name).accepts_loss_kwargs} == dividing
    for name in dividing:
        theirs, ours = pair(name)
        batch = inputs_for(name)
        labels = batch["labels"] if name != "BertLMHeadModel" else batch["labels"][:, 1:]
        count = torch.tensor(11)
        expected = theirs(**batch).loss * (labels != -100).sum() / count
        torch.testing.assert_close(ours(**batch, num_items_in_batch=count).loss, expected)


def test_bfloat16_is_as_close_to_float32_as_transformers():
    theirs, ours = pair("BertModel")
    batch = inputs_for("BertModel")
    truth = on_real_tokens(theirs(**batch).last_hidden_state)
    with torch.no_grad():
        their_error = (on_real_tokens(theirs.bfloat16()(**batch).last_hidden_state).float() - truth).abs().mean()
        our_error = (on_real_tokens(ours.bfloat16()(**batch).last_hidden_state).float() - truth).abs().mean()
    assert our_error <= 2 * their_error


def test_autocast():
    theirs, ours = pair("BertForMaskedLM")
    batch = inputs_for("BertForMaskedLM")
    truth = theirs(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(**batch).loss
    loss.backward()
    assert abs(loss - truth) < 0.05
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters() if p.grad is not None)


def test_compiles_without_a_mask():
    _, ours = pair("BertModel")
    ids = torch.randint(100, (2, 9))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).last_hidden_state, ours(ids).last_hidden_state)


def test_token_types_of_all_sequences_at_once():
    theirs, ours = pair("BertModel")
    batch = {**inputs_for("BertModel"), "token_type_ids": torch.ones(1, LENGTH, dtype=torch.int64)}
    for gradients in (torch.enable_grad, torch.no_grad):
        with gradients():
            torch.testing.assert_close(
                *(on_real_tokens(model(**batch).last_hidden_state) for model in (ours, theirs)), atol=2e-5, rtol=2e-5
            )


def test_attention_of_somebody_else_is_called():
    def uniform(module, query, key, value, mask, **arguments):
        return sdpa_attention_forward(module, 0 * query, key, value, mask, **arguments)

    AttentionInterface.register("uniform", uniform)
    AttentionMaskInterface.register("uniform", sdpa_mask)
    try:
        theirs, ours = pair("BertModel", attn_implementation="uniform")
        batch = inputs_for("BertModel")
        torch.testing.assert_close(
            *(on_real_tokens(model(**batch).last_hidden_state) for model in (ours, theirs)), atol=2e-5, rtol=2e-5
        )
        assert "attn_implementation is 'uniform'" in str(fastbert.explain(ours))
    finally:
        del AttentionInterface._global_mapping["uniform"], AttentionMaskInterface._global_mapping["uniform"]


def test_causal_attention_runs_as_transformers_does():
    theirs, ours = pair("BertModel")
    ids = inputs_for("BertModel")["input_ids"]
    expected, got = (model(ids, is_causal=True).last_hidden_state for model in (theirs, ours))
    assert (expected - theirs(ids).last_hidden_state).abs().max() > 0.01
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert "is_causal" in str(fastbert.explain(ours, input_ids=ids, is_causal=True))


@pytest.mark.parametrize("where", ["configuration", "modules"])
@pytest.mark.parametrize("grad", [False, True])
def test_causal_attention_that_is_set_runs_as_transformers_does(where, grad):
    """It holds for calls without a mask; also where it is set after others."""
    theirs, ours = pair("BertModel")
    ids = inputs_for("BertModel")["input_ids"]
    with torch.set_grad_enabled(grad):
        before = [model(ids).last_hidden_state for _ in range(3) for model in (theirs, ours)]
        for model in (theirs, ours):
            if where == "configuration":
                model.config.is_causal = True
            else:
                for layer in model.encoder.layer:
                    layer.attention.self.is_causal = True
        expected, got = (model(ids).last_hidden_state for model in (theirs, ours))
    assert (expected - before[0]).abs().max() > 0.01
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert "is_causal" in str(fastbert.explain(ours))
    with pytest.raises(ValueError, match="packed inputs .* cannot be combined with is_causal"):
        ours(ids[:1], cu_seq_lens_q=torch.tensor([0, 4, ids.shape[1]]))
