"""What trains in each mode, and what is left in the folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import fastbert
from fastbert.data.collator import DataCollatorWithPacking
from fastbert.finetune.modes import prepare_mode, trained_parameters
from fastbert.finetune.run import finetune
from fastbert.finetune.settings import FinetuneSettings
from fastbert.finetune.trainer import FineTuning
from fastbert.model.packed_layer import _entries
from fastbert.runs.errors import SettingsError
from fastbert.tasks.model import TaskModel
from fastbert.tasks.predictor import Predictor

from ..model.helpers import small_config
from .head_helpers import FAMILIES, RELATIVES, model_of, rows_of


def settings(mode: str, **changes) -> FinetuneSettings:
    return FinetuneSettings(**{"task": "sentiment", "model": "x", "data": "x", "mode": mode, "device": "cpu", **changes})


def loaded(model: torch.nn.Module) -> TaskModel:
    start = getattr(model.base_model, "first_position", 0)
    return TaskModel(model, None, True, DataCollatorWithPacking(position_ids_start=start), ())


def prepared(model, mode: str, family: str = "text", **changes):
    return prepare_mode(loaded(model), {}, settings(mode, **changes), family=family, say=lambda line: None)


def trains(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_leaves_the_model_alone():
    model = model_of("bert", "text")
    names = set(dict(model.named_parameters()))
    tuning = prepared(model, "full")
    assert tuning.trained is tuning.whole and tuning.whole.model is model
    assert trains(model) == names
    assert model.bert.encoder.layer[0].output.dropout.p > 0


@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_top_k_trains_the_upper_layers_and_what_stands_above(kind, family):
    model = model_of(kind, family)
    encoder, prefix = model.base_model, model.base_model_prefix
    prepared(model, "top-k", family, top_k_layers=2)
    frozen = {name for name, _ in model.named_parameters()} - trains(model)
    below = (f"{prefix}.embeddings", f"{prefix}.encoder.layer.0.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(below)}
    model.train()
    rates = [module.p for module in encoder.encoder.layer[0].modules() if isinstance(module, torch.nn.Dropout)]
    assert rates and not any(rates)
    assert encoder.encoder.layer[1].output.dropout.p > 0
    assert model.config.hidden_dropout_prob > 0  # what is saved drops as before


def test_frozen_layers_of_a_training_model_run_on_packed_weights_and_keep_nothing():
    model = fastbert.BertForSequenceClassification(small_config())
    prepared(model, "top-k", top_k_layers=1)
    model.train()
    batch = loaded(model).collate(rows_of("text", 4))
    seen = []
    layers = model.bert.encoder.layer
    for layer in layers:
        _entries.pop(layer, None)
    model.bert.encoder.layer[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    model(**batch).loss.backward()
    assert seen == [False]  # no graph below
    packed = [_entries.get(layer) for layer in layers]
    assert packed[2] is None and all(entry is not None and entry.packed is not None for entry in packed[:2])
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_the_gradients_of_the_upper_layers_are_those_of_training_all_of_them():
    torch.manual_seed(1)
    config = small_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    everything = fastbert.BertForSequenceClassification(config).train()
    upper = fastbert.BertForSequenceClassification(config).train()
    upper.load_state_dict(everything.state_dict())
    prepared(upper, "top-k", top_k_layers=1)
    batch = loaded(upper).collate(rows_of("text", 5))
    for model in (everything, upper):
        model(**batch).loss.backward()
    for name, parameter in upper.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, dict(everything.named_parameters())[name].grad, rtol=1e-4, atol=1e-6)


def test_more_layers_than_there_are():
    with pytest.raises(SettingsError, match="--top-k-layers is 4; --model .* has 3 layers"):
        prepared(model_of("bert", "text"), "top-k", top_k_layers=4)
    prepared(model_of("bert", "text"), "top-k", top_k_layers=3)


@pytest.mark.parametrize("mode", ["top-k", "head"])
def test_an_encoder_of_another_build(mode):
    config = transformers.DistilBertConfig(dim=16, n_heads=2, hidden_dim=32, n_layers=2, vocab_size=50)
    with pytest.raises(SettingsError, match=f"--mode {mode} .*DistilBertForSequenceClassification"):
        prepared(transformers.DistilBertForSequenceClassification(config), mode)


# --- LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_adapters_and_what_stands_above(kind, family):
    pytest.importorskip("peft")
    model = model_of(kind, family)
    whole = trained_parameters(model)[1]
    pooled = getattr(model.base_model, "pooler", None) is not None
    tuning = prepared(model, "lora", family, lora_r=4)
    names = trains(tuning.trained.model)
    adapters = {name for name in names if ".lora_" in name}
    assert len(adapters) == 3 * 2 * 2  # layers, query and value, A and B
    assert all("attention.self.query" in name or "attention.self.value" in name for name in adapters)
    assert all("modules_to_save" in name for name in names - adapters)
    assert any("pooler" in name for name in names) == pooled
    above = [name for name, part in model.named_children() if part is not model.base_model and list(part.parameters())]
    assert all(any(f".{name}." in trained for trained in names) for name in above)
    assert trained_parameters(tuning.trained.model)[0] < whole / 2


def test_lora_of_an_encoder_without_query_and_value():
    pytest.importorskip("peft")
    config = transformers.DistilBertConfig(dim=16, n_heads=2, hidden_dim=32, n_layers=1, vocab_size=50)
    with pytest.raises(SettingsError, match="--mode lora: DistilBertForSequenceClassification has no modules query and value"):
        prepared(transformers.DistilBertForSequenceClassification(config), "lora")


def test_lora_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match=r"pip install 'fastbert\[train\]'"):
        prepared(model_of("bert", "text"), "lora")


def test_explain_of_a_model_with_lora_and_of_the_merged_one(tmp_path):
    pytest.importorskip("peft")
    tuning = prepared(model_of("bert", "text"), "lora")
    notes = fastbert.explain(tuning.trained.model).layers[0]
    assert any("query, key and value are called one by one: query is peft" in note for note in notes)
    final = tuning.finish(tmp_path)
    assert fastbert.explain(final.model).layers[0] == []
    assert type(final.model) is fastbert.BertForSequenceClassification


# --- from files to a folder ----------------------------------------------------------------------------------------------


def run(checkpoint: Path, data: Path, output: Path, **changes):
    said: list[str] = []
    values = {
        "task": "sentiment", "model": str(checkpoint), "data": str(data), "output": str(output), "epochs": 8, "batch_size": 16,
        "learning_rate": 1e-2, "device": "cpu",
    }  # fmt: skip
    return finetune(FinetuneSettings(**{**values, **changes}), said.append), said


def test_lora_from_files_to_a_folder(toy_model, sentiment_folder, tmp_path):
    peft = pytest.importorskip("peft")
    _, said = run(toy_model, sentiment_folder, tmp_path / "run", mode="lora", lora_r=2, epochs=2)
    assert any("lora: " in line and " parameters train" in line for line in said)
    predict = Predictor.from_pretrained(tmp_path / "run", device="cpu")
    texts = ["the film is great", "the song was awful", "a garden"]
    merged = [prediction["probabilities"]["pos"] for prediction in predict(texts)]

    base = transformers.BertForSequenceClassification.from_pretrained(toy_model, num_labels=2)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert adapted.peft_config["default"].r == 2
    assert all(parameter.any() for name, parameter in adapted.named_parameters() if "lora_B" in name)  # it has learned something
    batch = predict.loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        probabilities = adapted(**batch).logits.softmax(-1)[:, 1]
    assert merged == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_top_k_from_files_to_a_folder(toy_model, sentiment_folder, tmp_path):
    result, _ = run(toy_model, sentiment_folder, tmp_path / "run", mode="top-k", top_k_layers=1, epochs=24)
    assert result.scores["dev"]["accuracy"]["mean"] > 0.9
    before = fastbert.BertModel.from_pretrained(toy_model)
    after = fastbert.BertModel.from_pretrained(tmp_path / "run")
    assert torch.equal(before.embeddings.word_embeddings.weight, after.embeddings.word_embeddings.weight)
    assert not torch.equal(before.encoder.layer[0].output.dense.weight, after.encoder.layer[0].output.dense.weight)
    assert after.config.hidden_dropout_prob == before.config.hidden_dropout_prob == 0.1


@pytest.mark.parametrize("mode", ["head", "lora", "top-k"])
def test_an_interrupted_run_is_resumed(toy_model, sentiment_folder, tmp_path, monkeypatch, mode):
    """Stopped after two checkpoints; what resumes ends with the losses and scores of a run that was not stopped."""
    if mode == "lora":
        pytest.importorskip("peft")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes = {"mode": mode, "epochs": 4, **({"top_k_layers": 1} if mode == "top-k" else {})}
    expected, _ = run(toy_model, sentiment_folder, tmp_path / "whole", **changes)
    saved: list[str] = []
    save = FineTuning._save_checkpoint

    def save_twice(self, *arguments, **options):
        save(self, *arguments, **options)
        saved.append("checkpoint")
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FineTuning, "_save_checkpoint", save_twice)
        run(toy_model, sentiment_folder, tmp_path / "run", **changes)
    result, _ = run(toy_model, sentiment_folder, tmp_path / "run", resume=True, **changes)
    assert result.scores == expected.scores
    logs = [json.loads((tmp_path / name / "run.json").read_text())["seeds"]["0"]["log"] for name in ("run", "whole")]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert len(losses[0]) > 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)
