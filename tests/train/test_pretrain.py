"""A run from text to a model that transformers loads; stopped and continued it is the same run, bit for bit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForPreTraining

from fastbert.data.errors import CorpusError, TokenizerError
from fastbert.runs.errors import SettingsError, TrainingError, TrainingInterrupted
from fastbert.runs.model import pick_device
from fastbert.train.checkpoint import checkpoint_folders
from fastbert.train.metrics import read_metrics
from fastbert.train.pretrain import pretrain
from fastbert.train.run_folder import OWN_FILES

from .runs import quiet, rows_without_speed, same_weights, stop_at


def test_from_text_to_a_model_that_transformers_loads(toy_settings, drawn_pictures):
    lines: list[str] = []
    settings = toy_settings(steps=60, compare=True, compare_steps=5)
    result = pretrain(settings, lines.append)
    output = Path(settings.output)
    assert result.held_out["mlm_loss"] < result.held_out_start["mlm_loss"] - 0.5
    assert {entry.name for entry in output.iterdir() if entry.is_file()} <= set(OWN_FILES)
    assert [folder.name for folder in checkpoint_folders(output)] == ["checkpoint-60", "checkpoint-57"]

    model, info = BertForPreTraining.from_pretrained(output, output_loading_info=True)
    assert type(model) is transformers.BertForPreTraining
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) == model.config.vocab_size == result.data["vocab_size"]
    logits = model(**tokenizer("Time [MASK] light.", return_tensors="pt")).prediction_logits
    assert logits.isfinite().all()
    assert tokenizer("time " * 600, truncation=True, return_tensors="pt").input_ids.shape == (1, 512)

    rows = read_metrics(output / "metrics.jsonl")
    assert [row["step"] for row in rows if "held_out" not in row] == list(range(3, 61, 3))
    assert [row["step"] for row in rows if "held_out" in row] == [0, 60]
    assert sum(row.get("tokens", 0) for row in rows) == result.tokens
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert run["results"]["held_out"] == result.held_out and run["settings"] == settings.to_dict()

    comparison = json.loads((output / "compare.json").read_text(encoding="utf-8"))
    assert comparison["agree"] and len(comparison["steps"]) == 5
    assert comparison["largest_relative_difference"] < 1e-4
    ours, theirs = (comparison["held_out"][name]["mlm_loss"] for name in ("fastbert", "transformers"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    text = "\n".join(lines)
    assert "agree" in text and "tokens/s (median, real)" in text and "[MASK]" in text

    card = (output / "README.md").read_text(encoding="utf-8")
    assert settings.command() in card and f"{result.held_out['mlm_loss']:.4f}" in card
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_and_continued_run_is_the_same_run(toy_settings, tmp_path, monkeypatch):
    """With dropout, in the middle of an average; after Ctrl-C, and after the newest checkpoint has broken."""
    torch.set_num_threads(2)
    straight = toy_settings(output=str(tmp_path / "straight"))
    pretrain(straight, quiet)
    stopped = toy_settings(output=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(TrainingInterrupted) as stop:
            pretrain(stopped, quiet)
    assert (stop.value.step, stop.value.checkpoint) == (5, Path(stopped.output) / "checkpoint-5")
    assert not (Path(stopped.output) / "model.safetensors").exists()

    pretrain(toy_settings(output=stopped.output, resume=True), quiet)
    assert same_weights(straight.output, stopped.output)
    assert rows_without_speed(straight.output) == rows_without_speed(stopped.output)

    newest, older = checkpoint_folders(Path(stopped.output))
    assert (newest.name, older.name) == ("checkpoint-8", "checkpoint-6")
    os.truncate(newest / "optimizer.safetensors", 50)
    lines: list[str] = []
    pretrain(toy_settings(output=stopped.output, resume=True, save_steps=100, log_steps=3), lines.append)
    assert any("checkpoint-8 is broken" in line and "optimizer.safetensors has 50 bytes" in line for line in lines)
    assert same_weights(straight.output, stopped.output)
    assert rows_without_speed(straight.output) == rows_without_speed(stopped.output)


def test_damaged_metrics_of_a_run_to_be_continued_are_named_before_its_text_is_read(toy_settings, tmp_path, toy_corpus):
    settings = toy_settings()
    pretrain(settings, quiet)
    metrics = Path(settings.output) / "metrics.jsonl"
    metrics.write_text("{\n" + metrics.read_text())
    said = []
    with pytest.raises(TrainingError, match="metrics.jsonl, line 1: no row of metrics"):
        pretrain(replace(settings, resume=True), said.append)
    assert not said


def test_a_comparison_is_continued_too(toy_settings, tmp_path, monkeypatch):
    straight = toy_settings(output=str(tmp_path / "straight"), compare=True, compare_steps=6)
    pretrain(straight, quiet)
    stopped = toy_settings(output=str(tmp_path / "stopped"), compare=True, compare_steps=6)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(TrainingInterrupted):
            pretrain(stopped, quiet)
    result = pretrain(toy_settings(output=stopped.output, compare=True, compare_steps=6, resume=True), quiet)
    assert result.comparison["compared_steps"] == 6
    losses = [
        [(step["loss"], step["transformers_loss"]) for step in json.loads((Path(folder) / "compare.json").read_text())["steps"]]
        for folder in (straight.output, stopped.output)
    ]
    assert losses[0] == losses[1]
    assert same_weights(straight.output, stopped.output)


def test_resuming_another_run_is_refused(toy_settings, tmp_path, toy_corpus, monkeypatch):
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(toy_corpus.read_bytes())
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(TrainingInterrupted):
            pretrain(toy_settings(corpus=(str(corpus),)), quiet)
    with pytest.raises(SettingsError, match=r"--steps was 8 and is now 9; --seed was 0 and is now 3"):
        pretrain(toy_settings(corpus=(str(corpus),), steps=9, seed=3, resume=True), quiet)
    text = corpus.read_text(encoding="utf-8")
    corpus.write_text(text.replace(" water ", " light "), encoding="utf-8")
    with pytest.raises(SettingsError, match="it now has as many, but other ones or held out otherwise"):
        pretrain(toy_settings(corpus=(str(corpus),), resume=True), quiet)
    corpus.write_text(f"{text}\nWater time.\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="another text: the corpus had 60 documents"):
        pretrain(toy_settings(corpus=(str(corpus),), resume=True), quiet)


def test_a_learning_rate_that_explodes_ends_the_run_with_sound_checkpoints(toy_settings):
    settings = toy_settings(learning_rate=1e38, warmup_steps=3, save_steps=1, max_skipped_steps=2)
    with pytest.raises(TrainingError, match=r"left out: 3, .* step \d \(epoch 0, block 0, from batch \d on\): the .*is (nan|inf)"):
        pretrain(settings, quiet)
    newest = checkpoint_folders(Path(settings.output))[0]
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


def test_a_full_disk_is_an_error_that_names_the_folder(toy_settings, monkeypatch):
    def full(tensors, filename, metadata=None):
        if "checkpoint-6" in str(filename):
            raise SafetensorError("I/O error: No space left on device")
        save_file(tensors, filename, metadata)

    monkeypatch.setattr("fastbert.train.learner.save_file", full)
    settings = toy_settings()
    named = r"checkpoint-6 could not be written: .*/optimizer\.safetensors: I/O error: No space left.* MB are free"
    with pytest.raises(TrainingError, match=named):
        pretrain(settings, quiet)
    assert [folder.name for folder in checkpoint_folders(Path(settings.output))] == ["checkpoint-3"]
    monkeypatch.undo()
    assert pretrain(toy_settings(resume=True), quiet).steps == 8


def test_overwriting_deletes_the_run_and_only_when_its_text_is_good(toy_settings, tmp_path):
    settings = toy_settings(steps=2)
    output = Path(settings.output)
    pretrain(settings, quiet)
    with pytest.raises(SettingsError, match="already holds a run"):
        pretrain(settings, quiet)
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    before = (output / "model.safetensors").read_bytes()

    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"Fine.\n\xff\n")
    with pytest.raises(CorpusError, match=r"bad\.txt, line 2"):
        pretrain(toy_settings(corpus=(str(bad),), overwrite=True), quiet)
    assert (output / "model.safetensors").read_bytes() == before

    pretrain(toy_settings(steps=1, overwrite=True), quiet)
    assert [folder.name for folder in checkpoint_folders(output)] == ["checkpoint-1"]
    assert (output / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_training_on_from_a_checkpoint(toy_settings, tmp_path):
    first = toy_settings(steps=2)
    pretrain(first, quiet)
    sizes = {"num_hidden_layers": None, "hidden_size": None, "num_attention_heads": None, "vocab_size": None}
    further = toy_settings(output=str(tmp_path / "further"), model=first.output, steps=1, **sizes)
    result = pretrain(further, quiet)
    first_scores = read_metrics(Path(first.output) / "metrics.jsonl")[-1]["held_out"]
    assert result.held_out_start == pytest.approx(first_scores)

    with pytest.raises(SettingsError, match="512"):
        pretrain(toy_settings(output=str(tmp_path / "long"), model=first.output, max_seq_length=600,
                              tokens_per_batch=600, **sizes), quiet)  # fmt: skip
    config = json.loads((Path(first.output) / "config.json").read_text(encoding="utf-8"))
    other = tmp_path / "other"
    other.mkdir()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((Path(first.output) / name).read_bytes())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}), encoding="utf-8")
    with pytest.raises(SettingsError, match="roberta"):
        pretrain(toy_settings(output=str(tmp_path / "never"), model=str(other), **sizes), quiet)
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}), encoding="utf-8")
    with pytest.raises(SettingsError, match=r"layer.0.intermediate.dense.bias is \(\d+,\) in the checkpoint and \(40,"):
        pretrain(toy_settings(output=str(tmp_path / "never"), model=str(other), **sizes), quiet)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"nothing: no such folder, and loading it"),
        ({"max_position_embeddings": 16}, "sequences have up to 32 tokens, --model .* has positions for 16"),
        ({"type_vocab_size": 1}, "knows no second segment .*--objective mlm"),
        ({"quantization_config": {"quant_method": "fastbert_int8"}}, "quantized weights .fastbert_int8., which cannot train"),
    ],
)
def test_a_model_that_cannot_train_is_refused_before_any_text_is_read(toy_settings, tmp_path, config, message):
    if config is not None:
        BertConfig(**config).save_pretrained(tmp_path / "nothing")
    sizes = {"num_hidden_layers": None, "hidden_size": None, "num_attention_heads": None, "vocab_size": None}
    settings = toy_settings(model=str(tmp_path / "nothing"), tokenizer=str(tmp_path), corpus=("no-such.txt",), **sizes)
    with pytest.raises(SettingsError, match=message):
        pretrain(settings, quiet)


def test_a_tokenizer_that_is_not_there_is_named_before_any_text_is_read(toy_settings, tmp_path):
    with pytest.raises(TokenizerError, match="nothing: no such folder"):
        pretrain(toy_settings(tokenizer=str(tmp_path / "nothing"), corpus=("no-such.txt",), vocab_size=None), quiet)


def test_one_document_is_enough_for_masked_words_alone(toy_settings, tmp_path):
    (tmp_path / "book.txt").write_text(
        "Time walks little. Light sleeps early. The river sings to a stone.\n" * 40, encoding="utf-8"
    )
    settings = toy_settings(corpus=(str(tmp_path / "book.txt"),), objective="mlm", mlm_probability=0.125, steps=2)
    result = pretrain(settings, quiet)
    assert "12.5% of the tokens" in (Path(settings.output) / "README.md").read_text(encoding="utf-8")
    assert result.data["documents"] == result.data["train_documents"] == result.data["held_out_documents"] == 1
    with pytest.raises(CorpusError, match="only one document .*: next sentence prediction needs at least two"):
        pretrain(toy_settings(corpus=(str(tmp_path / "book.txt"),), overwrite=True), quiet)


def test_held_out_text_without_a_pair_is_named(toy_settings, tmp_path):
    words = "time\n\nlight\n\nriver\n\nstone\n\n" * 8
    story = "Time walks little. Light sleeps early. The river sings to a stone. " * 200
    (tmp_path / "words.txt").write_text(f"{words}{story}\n\n{story}", encoding="utf-8")
    settings = toy_settings(corpus=(str(tmp_path / "words.txt"),), held_out_fraction=5e-4)
    with pytest.raises(CorpusError, match="no sentence pair can be made of the held-out text .*--held-out-fraction"):
        pretrain(settings, quiet)


def test_spoilt_weights_are_named_before_the_first_step(toy_settings, tmp_path):
    first = toy_settings(steps=1)
    pretrain(first, quiet)
    path = Path(first.output) / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.pooler.dense.bias"] = torch.full_like(tensors["bert.pooler.dense.bias"], float("nan"))
    save_file(tensors, path, {"format": "pt"})
    sizes = {"num_hidden_layers": None, "hidden_size": None, "num_attention_heads": None, "vocab_size": None}
    with pytest.raises(TrainingError, match="the loss on the held-out text is nan: the weights"):
        pretrain(toy_settings(output=str(tmp_path / "further"), model=first.output, **sizes), quiet)


def test_a_device_that_is_not_there(toy_settings):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SettingsError, match="--device cuda"):
        pretrain(toy_settings(device="cuda"), quiet)


def test_a_device_whose_tensors_hold_nothing_is_refused():
    with pytest.raises(SettingsError, match="--device meta cannot be used"):
        pick_device("meta")
