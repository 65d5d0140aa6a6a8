"""Checkpoints as tasks load them, and the logits of many rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from fastbert.data.errors import DataError
from fastbert.model.int8 import Int8Linear
from fastbert.runs.errors import SettingsError, TrainingError
from fastbert.tasks.model import load_config, load_model, longest_sequence, quantized
from fastbert.tasks.outputs import model_outputs
from fastbert.tasks.predictor import Predictor
from fastbert.tasks.registry import load_task, save_task, task_for

from ..toys import sentiment_lines

TASKS = {
    "text": task_for("sentiment", labels=("neg", "pos", "so so")),
    "words": task_for("pos", labels=("A", "B", "C")),
    "questions": task_for("question-answering"),
    "choices": task_for("multiple-choice"),
}


def examples_of(family: str):
    texts = [text for text, _ in sentiment_lines(20, 3)]
    inputs = {
        "text": texts,
        "words": [text.split() for text in texts],
        "questions": [{"question": "who was good ?", "context": f"{text} and {texts[0]} " * 3} for text in texts],
        "choices": [{"context": text, "choices": texts[:2]} for text in texts],
    }
    return TASKS[family].examples_from(inputs[family])


@pytest.mark.parametrize("family", TASKS)
def test_logits_are_those_of_transformers_on_padded_batches(family, toy_model):
    task, examples = TASKS[family], examples_of(family)
    loaded = []
    for fast in (True, False):
        torch.manual_seed(0)
        loaded.append(load_model(str(toy_model), task, fast=fast))
    ours, theirs = loaded
    assert ours.packed == (family != "choices") and not theirs.packed
    features = task.features(examples, ours.tokenizer, 48, labelled=False)
    got = model_outputs(ours, features.rows, family=family, tokens_per_batch=100)
    expected = model_outputs(theirs, features.rows, family=family, tokens_per_batch=1000)
    assert len(got) == len(features.rows) >= 20
    for one, other, row in zip(got, expected, features.rows, strict=True):
        assert one.dtype == np.float32 and one.shape == other.shape
        if family in ("words", "questions"):
            assert len(one) == len(row["input_ids"])
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_outputs_leave_training_mode_alone_and_ignore_labels(toy_model):
    task, examples = TASKS["text"], examples_of("text")
    loaded = load_model(str(toy_model), task)
    loaded.model.train()
    rows = task.features(examples, loaded.tokenizer, 48, labelled=False).rows
    first = model_outputs(loaded, rows, family="text")
    second = model_outputs(loaded, [{**row, "labels": 1} for row in rows], family="text")
    assert loaded.model.training
    np.testing.assert_array_equal(np.stack(first), np.stack(second))  # no dropout either
    assert model_outputs(loaded, [], family="text") == []


def saved(model_class: str, config: transformers.PretrainedConfig, tokenizer, folder: Path) -> str:
    getattr(transformers, model_class)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_relative_packs_from_its_first_position(toy_tokenizer, tmp_path):
    config = transformers.RobertaConfig(
        vocab_size=len(toy_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, pad_token_id=0, type_vocab_size=2, initializer_range=0.2,
    )  # fmt: skip
    name = saved("RobertaModel", config, toy_tokenizer, tmp_path)
    task, examples = TASKS["text"], examples_of("text")
    torch.manual_seed(0)
    ours = load_model(name, task)
    torch.manual_seed(0)
    theirs = load_model(name, task, fast=False)
    assert ours.packed
    assert longest_sequence(load_config(name), ours.tokenizer) == 65
    rows = task.features(examples, ours.tokenizer, 48, labelled=False).rows
    got, expected = (model_outputs(loaded, rows, family="text") for loaded in (ours, theirs))
    np.testing.assert_allclose(np.stack(got), np.stack(expected), atol=2e-5)


def test_another_architecture_says_that_it_is_not_fast(toy_tokenizer, tmp_path):
    config = transformers.DistilBertConfig(vocab_size=len(toy_tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    name = saved("DistilBertModel", config, toy_tokenizer, tmp_path)
    loaded = load_model(name, TASKS["text"])
    assert not loaded.packed
    assert any("transformers' own code, on padded batches" in note for note in loaded.notes)
    rows = TASKS["text"].features(examples_of("text"), loaded.tokenizer, 48, labelled=False).rows
    assert np.stack(model_outputs(loaded, rows, family="text")).shape == (20, 3)


def test_a_head_of_another_size_is_a_new_one(toy_model, toy_tokenizer, tmp_path):
    loaded = load_model(str(toy_model), TASKS["text"])
    loaded.model.save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    two = load_model(str(tmp_path), task_for("sentiment", labels=("neg", "pos")))
    assert two.model.config.num_labels == 2
    assert two.notes == ("New weights, not in the checkpoint: classifier.bias, classifier.weight",)
    assert load_model(str(tmp_path), TASKS["text"]).notes == ()


def test_a_head_of_another_task_and_the_same_size_is_named(toy_model, toy_tokenizer, tmp_path):
    loaded = load_model(str(toy_model), task_for("sentiment", labels=("0", "1")))
    loaded.model.save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    other = load_model(str(tmp_path), task_for("sentiment", labels=("no", "yes")))
    note = "The head is the checkpoint's, of another task: {}. Training begins with its weights"
    assert other.notes == (note.format("labels 0, 1; the task's are no, yes"),)
    assert torch.equal(other.model.classifier.weight, loaded.model.classifier.weight)
    several = load_model(str(tmp_path), task_for("multi-label-classification", labels=("0", "1")))
    assert several.notes == (note.format("single_label_classification; the task is multi_label_classification"),)


@pytest.mark.parametrize("task", [*TASKS.values(), task_for("regression")], ids=lambda task: task.name)
def test_nothing_of_a_classifier_stays_in_the_configuration(task, toy_model, toy_tokenizer, tmp_path):
    """Neither the names of its labels nor what they are."""
    load_model(str(toy_model), task_for("multi-label-classification", labels=("no", "yes"))).model.save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    found, expected = (load_model(str(name), task).model.config for name in (tmp_path, toy_model))
    for name in ("id2label", "label2id", "problem_type"):
        assert getattr(found, name) == getattr(expected, name), name


def test_checkpoints_that_cannot_be_used(toy_model, toy_tokenizer, tmp_path):
    with pytest.raises(SettingsError, match="the folder holds no config.json"):
        load_model(str(tmp_path), TASKS["text"])
    small = transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    name = saved("BertModel", small, toy_tokenizer, tmp_path)
    with pytest.raises(SettingsError, match=r"has 50 entries in its vocabulary, its tokenizer \d+"):
        load_model(name, TASKS["text"])


@pytest.mark.parametrize("family", TASKS)
def test_a_task_goes_to_json_and_back(family, tmp_path):
    save_task(TASKS[family], 77, tmp_path)
    assert load_task(tmp_path) == (TASKS[family], 77)


@pytest.mark.parametrize("change", [{"labels": None}, {"labels": [1]}, {"max_seq_length": -1}, {"max_seq_length": None}])
def test_a_damaged_task_is_named(change, tmp_path):
    save_task(TASKS["text"], 77, tmp_path)
    path = tmp_path / "task.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="task.json: not a task of this version of fastbert"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{bad", r"cannot be loaded: It looks like the config file .* is not a valid JSON"),
        ("config.json", b"{}", r"cannot be loaded: Unrecognized model"),
        ("model.safetensors", b"short", r"cannot be loaded as AutoModelForSequenceClassification: .*header"),
    ],
)
def test_a_damaged_checkpoint(file, content, message, toy_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(toy_model, folder)
    (folder / file).write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        load_model(str(folder), TASKS["text"])


def test_inputs_and_settings_that_a_predictor_refuses(toy_model, tmp_path):
    loaded = load_model(str(toy_model), TASKS["text"])
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    save_task(TASKS["text"], 32, tmp_path)
    with pytest.raises(DataError, match="inputs, input 2: holds a lone surrogate"):
        Predictor.from_pretrained(tmp_path, device="cpu")(["good", "bad \ud800"])
    for alone in ("good", {"text": "good"}):
        with pytest.raises(TypeError, match=f"expected a list of inputs, not a single {type(alone).__name__}"):
            Predictor.from_pretrained(tmp_path, device="cpu")(alone)
    with pytest.raises(SettingsError, match="--max-seq-length is 0; it must be at least 8"):
        Predictor.from_pretrained(tmp_path, device="cpu", max_seq_length=0)
    with pytest.raises(SettingsError, match="--tokens-per-batch is 0; it must be at least 1"):
        Predictor.from_pretrained(tmp_path, device="cpu", tokens_per_batch=0)


def test_what_was_saved_in_int8_stays_so(toy_model, tmp_path):
    loaded = load_model(str(toy_model), TASKS["text"])
    quantized(loaded.model.eval())
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    save_task(TASKS["text"], 32, tmp_path)
    for dtype in (None, "int8"):
        predictor = Predictor.from_pretrained(tmp_path, device="cpu", dtype=dtype)
        assert any(isinstance(module, Int8Linear) for module in predictor.loaded.model.modules())
    with pytest.raises(SettingsError, match="--dtype bfloat16: .* was saved in int8, which does not become bfloat16 again"):
        Predictor.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")


def test_a_fine_tuned_folder_whose_weights_are_damaged(toy_model, tmp_path):
    loaded = load_model(str(toy_model), TASKS["text"])
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    save_task(TASKS["text"], 32, tmp_path)
    assert Predictor.from_pretrained(tmp_path, device="cpu")(["good"])
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    damaged = {**weights, "classifier.weight": weights["classifier.weight"] * float("nan")}
    safetensors.torch.save_file(damaged, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="the model's outputs hold NaN or infinity"):
        Predictor.from_pretrained(tmp_path, device="cpu")(["good"])
    del weights["classifier.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"the model lacks weights \(classifier.weight\), which training would have saved"):
        Predictor.from_pretrained(tmp_path, device="cpu")
