"""Live models of transformers become fast in place, and are themselves again afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import CamembertConfig, ElectraConfig, RobertaConfig, XLMRobertaConfig

import fastbert
from fastbert.model import embeddings as embeddings_module
from fastbert.model import lm_head as lm_head_module

from .helpers import (
    LENGTHS,
    NAMES,
    VOCABULARY,
    assert_same_gradients,
    config_for,
    inputs_for,
    mask,
    on_real_tokens,
    small_config,
)

RELATIVES = {"Roberta": RobertaConfig, "XLMRoberta": XLMRobertaConfig, "Camembert": CamembertConfig, "Electra": ElectraConfig}
TASKS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


def relative(name: str, task: str) -> tuple[nn.Module, nn.Module]:
    """(transformers' model, the same one accelerated), dropout off."""
    arguments = config_for(f"Bert{task}").to_diff_dict()
    arguments.pop("model_type", None)
    arguments.pop("pad_token_id", None)
    arguments["max_position_embeddings"] = 44
    if name == "Electra":
        arguments["embedding_size"] = 32
    model = getattr(transformers, name + task)(RELATIVES[name](**arguments)).eval()
    return model, fastbert.accelerate(copy.deepcopy(model))


def batch_for(task: str, config) -> dict[str, torch.Tensor]:
    """Padding tokens in the padding, as a tokenizer makes it, and one among the real tokens; token types that the family has."""
    batch = inputs_for(f"Bert{task}")
    shape = batch["input_ids"].shape
    real = mask().bool().view(shape)
    batch["input_ids"] = torch.where(real, batch["input_ids"].clamp(min=5), config.pad_token_id)
    batch["input_ids"].view(len(LENGTHS), -1)[0, 4] = config.pad_token_id
    batch["token_type_ids"] = batch["token_type_ids"] % config.type_vocab_size
    return batch


@pytest.mark.parametrize("name", NAMES)
def test_every_class_and_back(name):
    theirs = getattr(transformers, name)(config_for(name)).eval()
    model = copy.deepcopy(theirs)
    parameters = list(model.parameters())
    assert fastbert.accelerate(model) is model
    assert type(model) is getattr(fastbert, name)
    assert isinstance(model, type(theirs))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert fastbert.explain(model).fast
    batch = inputs_for(name)
    first = next(key for key in theirs(**batch) if key != "loss")
    torch.testing.assert_close(on_real_tokens(model(**batch)[first]), on_real_tokens(theirs(**batch)[first]), atol=5e-6, rtol=2e-5)
    assert fastbert.accelerate(model) is model
    assert fastbert.restore(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in theirs.modules()]
    assert torch.equal(model(**batch)[first], theirs(**batch)[first])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_give_the_same_numbers(name, task):
    theirs, ours = relative(name, task)
    if task == "ForMultipleChoice" and getattr(theirs.base_model, "pooler", theirs) is None:
        pytest.skip(f"transformers {transformers.__version__} builds {type(theirs).__name__} without the pooler that it reads")
    batch = batch_for(task, theirs.config)
    expected, got = theirs(**batch), ours(**batch)
    assert fastbert.explain(ours).fast
    if task != "ForQuestionAnswering":  # whose losses differ on padded batches, on purpose
        torch.testing.assert_close(got.loss, expected.loss)
        got.loss.backward()
        expected.loss.backward()
        assert_same_gradients(ours, theirs, 1e-4)
    first = "start_logits" if task == "ForQuestionAnswering" else "logits"
    torch.testing.assert_close(on_real_tokens(getattr(got, first)), on_real_tokens(getattr(expected, first)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_run_fused(name, monkeypatch):
    """The numbers above would be right as well if everything fell back."""
    calls = []

    def watch(module, function):
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, **k: calls.append(function) or original(*a, **k))

    watch(embeddings_module, "embedding_layer_norm")
    watch(lm_head_module, "mlm_loss")
    watch(lm_head_module, "gelu_layer_norm")
    _, ours = relative(name, "ForMaskedLM")
    ours(**batch_for("ForMaskedLM", ours.config))
    assert calls == ["embedding_layer_norm", "gelu_layer_norm", "mlm_loss"]


@pytest.mark.parametrize("name", RELATIVES)
def test_packed_rows_of_relatives(name):
    _, ours = relative(name, "ForSequenceClassification")
    batch = batch_for("ForSequenceClassification", ours.config)
    expected = ours(**batch)
    real = mask().bool()
    row = {key: batch[key][real].unsqueeze(0) for key in ("input_ids", "token_type_ids")}
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    got = ours(**row, cu_seq_lens_q=cu_seqlens, max_length_q=max(LENGTHS), labels=batch["labels"])
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(got.loss, expected.loss)
    ours.set_attn_implementation("eager")
    got = ours(**row, cu_seq_lens_q=cu_seqlens, max_length_q=max(LENGTHS), labels=batch["labels"])
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-6, rtol=2e-5)


def test_positions_embedded_directly_start_after_the_padding_token():
    theirs, ours = relative("Roberta", "ForTokenClassification")
    embeds = torch.randn(len(LENGTHS), 21, 48)
    expected = theirs(inputs_embeds=embeds, attention_mask=mask()).logits
    got = ours(inputs_embeds=embeds, attention_mask=mask()).logits
    torch.testing.assert_close(on_real_tokens(got), on_real_tokens(expected), atol=2e-6, rtol=2e-5)


class TwoTowers(nn.Module):
    """A model of somebody's own."""

    def __init__(self):
        super().__init__()
        self.question = transformers.BertModel(small_config())
        self.answer = transformers.BertModel(small_config(attn_implementation="eager"))

    def forward(self, **batch):
        return self.question(**batch).pooler_output @ self.answer(**batch).pooler_output.t()


def test_a_model_with_encoders_in_it():
    theirs = TwoTowers().eval()
    ours = fastbert.accelerate(copy.deepcopy(theirs))
    batch = inputs_for("BertModel")
    torch.testing.assert_close(ours(**batch), theirs(**batch), atol=1e-5, rtol=1e-5)
    explanation = fastbert.explain(ours)
    assert explanation.name == "question"
    assert not explanation.encoder
    assert [other.name for other in explanation.others] == ["answer"]
    assert "eager" in explanation.others[0].encoder[0]
    assert not explanation.fast
    assert explanation.to_dict()["others"][0]["fast"] is False
    assert "answer" in str(explanation)


def test_state_that_the_class_change_keeps():
    model = transformers.BertForSequenceClassification(small_config()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = []
    model.bert.encoder.layer[1].register_forward_hook(lambda _, __, output: seen.append(output.shape))
    model.bert.embeddings.requires_grad_(False)
    fastbert.accelerate(model)
    assert model.training
    assert model.is_gradient_checkpointing
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    batch = inputs_for("BertForSequenceClassification")
    model(**batch).loss.backward()
    assert seen == [(6, 21, 48)]


@pytest.mark.parametrize("wanted", [{"output_attentions": True}, {"output_hidden_states": True, "output_attentions": True}])
def test_outputs_recorded_by_transformers(wanted):
    """What transformers records with hooks, it finds by the class of the model; one that changed its class must be known too."""
    theirs = transformers.BertModel(small_config(attn_implementation="eager")).eval()
    ours = fastbert.accelerate(copy.deepcopy(theirs))
    batch = inputs_for("BertModel")
    expected, got = theirs(**batch, **wanted), ours(**batch, **wanted)
    for field in ("attentions", "hidden_states"):
        if wanted.get(f"output_{field}"):
            for a, b in zip(getattr(got, field), getattr(expected, field), strict=True):
                torch.testing.assert_close(a, b)


class Derived(transformers.BertModel):
    """A class of somebody's own: what its forward does is not known."""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear contains nothing that fastbert can accelerate: .* BertModel, RobertaModel"),
        ("bert-base-uncased", "expected a torch.nn.Module or a transformers pipeline, got builtins.str"),
    ],
)
def test_what_cannot_be_accelerated(model, message):
    with pytest.raises(TypeError, match=message):
        fastbert.accelerate(model)


def test_a_derived_class_is_left_alone_and_its_layers_are_fast():
    model = fastbert.accelerate(Derived(small_config()))
    assert type(model) is Derived
    assert "knows transformers' own classes; derive yours from fastbert's" in fastbert.explain(model).encoder[0]


def test_explain_of_a_call():
    model = fastbert.accelerate(transformers.BertModel(small_config()))
    assert fastbert.explain(model).fast
    four = fastbert.explain(model, attention_mask=torch.ones(2, 1, 5, 5), input_ids=torch.ones(2, 5))
    assert "attention_mask has 4 dimensions" in four.encoder[0]
    assert "attention weights" in fastbert.explain(model, output_attentions=True).encoder[0]
    assert not fastbert.explain(model, encoder_hidden_states=torch.ones(2, 5, 48)).fast


def test_labelled_rows_only(monkeypatch):
    """transformers would make logits of all tokens."""
    rows = []
    original = lm_head_module.mlm_loss
    monkeypatch.setattr(lm_head_module, "mlm_loss", lambda hidden, *a, **k: rows.append(len(hidden)) or original(hidden, *a, **k))
    model = fastbert.accelerate(transformers.RobertaForMaskedLM(RobertaConfig(vocab_size=VOCABULARY, hidden_size=48,
        num_hidden_layers=1, num_attention_heads=4, intermediate_size=96)))  # fmt: skip
    batch = batch_for("ForMaskedLM", model.config)
    model(**batch)
    assert rows == [int((batch["labels"] != -100).sum())]
