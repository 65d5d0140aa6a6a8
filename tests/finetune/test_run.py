"""A fine-tuning from files to a folder that predicts: toy data, a model of one layer, every family end to end."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import fastbert
from fastbert.data.errors import CorpusError, DataError
from fastbert.data.tokenizer import load_tokenizer
from fastbert.features.run import embed
from fastbert.features.settings import EmbedSettings
from fastbert.finetune import run as module
from fastbert.finetune.run import finetune
from fastbert.finetune.settings import FinetuneSettings
from fastbert.finetune.trainer import FineTuning
from fastbert.glue.run import glue
from fastbert.glue.settings import GlueSettings
from fastbert.runs.errors import SettingsError, TrainingError
from fastbert.tasks.predictor import Predictor

from ..processes import ForkedModule

SILENT = {"say": lambda line: None}


def settings(checkpoint: Path, data: Path, output: Path, **changes) -> FinetuneSettings:
    values = {
        "task": "sentiment", "model": str(checkpoint), "data": str(data), "output": str(output), "epochs": 8, "batch_size": 16,
        "learning_rate": 1e-2, "device": "cpu",
    }  # fmt: skip
    return FinetuneSettings(**{**values, **changes})


def test_a_classifier_learns_and_its_folder_predicts(toy_model, sentiment_folder, tmp_path, drawn_pictures):
    said: list[str] = []
    result = finetune(settings(toy_model, sentiment_folder, tmp_path / "run", seeds=(0, 1)), said.append)
    accuracy = result.scores["dev"]["accuracy"]
    assert accuracy["mean"] > 0.9
    assert len(accuracy["values"]) == 2 and accuracy["std"] is not None
    assert "test" not in result.scores  # it has no labels
    folder = tmp_path / "run"
    lines = (folder / "predictions_test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["input"] for line in lines] == [f"line {number}" for number in range(2, 10)]
    assert not (folder / "checkpoints").exists()
    for picture in ("learning_curves.png", "confusion.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "![" in card and "accuracy" in card
    assert "| pos | " in card  # how often each label occurs
    assert "packed rows" in "\n".join(said)

    predict = Predictor.from_pretrained(folder, device="cpu")
    good, bad = predict(["the film is great", "the song was awful"])
    assert (good["label"], bad["label"]) == ("pos", "neg")
    theirs = transformers.pipeline("text-classification", str(folder), device="cpu")
    assert theirs("the film is great")[0]["score"] == pytest.approx(good["probability"], abs=1e-5)
    long = "the film " * 100  # the base checkpoint's tokenizer knows no limit, its model ends at 64 positions
    assert theirs(long, truncation=True)[0]["score"] == pytest.approx(predict([long])[0]["probability"], abs=1e-5)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["results"]["scores"]["dev"]["accuracy"]["values"] == accuracy["values"]
    assert run["settings"]["seeds"] == [0, 1]


def test_the_same_numbers_as_transformers_with_padding(toy_model, sentiment_folder, tmp_path):
    """Dropout off: the same batches, so the same losses and scores."""
    config = json.loads((toy_model / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    for path in toy_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (model / "config.json").write_text(json.dumps(config))
    given = settings(model, sentiment_folder, tmp_path / "run", epochs=2)
    prepared = module.prepare_task(module.task_of(given), module.sources_of(given), given, lambda line: None)
    device = module.pick_device("cpu")
    results = [module.train_seed(given, prepared, 0, device, lambda line: None, fast=fast) for fast in (True, False)]
    (ours, fast), (theirs, slow) = results
    assert fast.trained.packed and not slow.trained.packed
    losses = [[row["loss"] for row in result.log if "loss" in row] for result in (ours, theirs)]
    assert len(losses[0]) > 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert ours.scores == theirs.scores


def test_entities(toy_model, entity_folder, tmp_path, drawn_pictures):
    result = finetune(settings(toy_model, entity_folder, tmp_path / "run", task="ner", epochs=8), **SILENT)
    assert result.scores["dev"]["f1"]["mean"] > 0.9
    (prediction,) = Predictor.from_pretrained(tmp_path / "run", device="cpu")(["Bob liked the Oslo garden"])
    assert [(entity["type"], entity["text"]) for entity in prediction["entities"]] == [("PER", "Bob"), ("LOC", "Oslo garden")]


def test_regression_and_several_labels(toy_model, tmp_path, drawn_pictures):
    data = tmp_path / "train.csv"
    words = ("good", "fine", "bad", "poor")
    rows = [(f"the {word} {noun}", word in ("good", "fine"), noun == "film") for word in words for noun in ("film", "book") * 8]
    data.write_text("text,score\n" + "".join(f"{text},{3.5 if good else 1}\n" for text, good, _ in rows), encoding="utf-8")
    result = finetune(settings(toy_model, data, tmp_path / "a", task="regression", epochs=6), **SILENT)
    assert result.scores["dev"]["pearson"]["mean"] > 0.9
    data.write_text("text,good,film\n" + "".join(f"{t},{int(g)},{int(f)}\n" for t, g, f in rows), encoding="utf-8")
    given = settings(toy_model, data, tmp_path / "b", task="multi-label-classification", label_column=("good", "film"), epochs=6)
    result = finetune(given, **SILENT)
    assert result.scores["dev"]["f1_micro"]["mean"] > 0.9
    (prediction,) = Predictor.from_pretrained(tmp_path / "b", device="cpu")(["the good film"])
    assert prediction["labels"] == ["good", "film"]


def test_early_stopping_keeps_the_best(toy_model, sentiment_folder, tmp_path):
    given = settings(toy_model, sentiment_folder, tmp_path / "run", epochs=40, eval_steps=6, early_stopping=2)
    result = finetune(given, **SILENT)
    (seed,) = result.seeds
    assert seed["epochs"] < 40
    assert seed["best_step"] == seed["steps"] - 12
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    evaluated = {row["step"]: row["eval_accuracy"] for row in run["seeds"]["0"]["log"] if "eval_accuracy" in row}
    assert result.scores["dev"]["accuracy"]["mean"] == max(evaluated.values()) == evaluated[seed["best_step"]]


def test_nothing_is_written_for_bad_data(toy_model, sentiment_folder, tmp_path):
    with (sentiment_folder / "dev.tsv").open("a", encoding="utf-8") as file:
        file.write("the film is good\tmaybe\n")
    with pytest.raises(DataError, match=r"dev.tsv, line 34, column 'label': holds 'maybe'; the training data have 'neg', 'pos'"):
        finetune(settings(toy_model, sentiment_folder, tmp_path / "run"), **SILENT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_length": 65}, r"--max-seq-length is 65; --model .* takes 64 tokens at most"),
        ({"model": "no/such/folder/here"}, r"--model no/such/folder/here: no such folder"),
        ({"task": "weather"}, r"--task weather is unknown; known are text-classification, .*multiple-choice"),
        ({"metric": "beauty"}, r"--metric beauty is no score of sentiment; it has accuracy, f1"),
        ({"device": "cuda:9"}, r"--device cuda:9 cannot be used"),
        ({"mode": "top-k", "top_k_layers": 9}, r"--top-k-layers is 9; .* has \d layers"),
        ({"seeds": (0, 2**32)}, r"--seeds holds 4294967296; the largest seed is 4294967295"),
    ],
)
def test_settings_that_do_not_fit(changes, message, toy_model, sentiment_folder, tmp_path):
    with pytest.raises(SettingsError, match=message):
        finetune(settings(toy_model, sentiment_folder, tmp_path / "run", **changes), **SILENT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "beauty"}, "--metric beauty is no score of sentiment"),
        (
            {"task": "token-classification", "metric": "beauty"},
            "--metric beauty is no score of token-class.*; it has accuracy, f1_m",
        ),
        ({"mode": "top-k", "top_k_layers": 9}, r"--top-k-layers is 9; --model .* has \d layers"),
        ({"model": "int8"}, "int8 holds int8 weights, which cannot train"),
    ],
)
def test_what_the_settings_and_the_configuration_show_is_refused_before_anything_is_read(
    changes, message, toy_model, sentiment_folder, tmp_path
):
    (sentiment_folder / "train.tsv").write_bytes(b"text\tlabel\n\xff\t1\n")
    if "model" in changes:
        shutil.copytree(toy_model, tmp_path / "int8")
        path = tmp_path / "int8/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "fastbert_int8"}}))
        changes = {"model": str(tmp_path / "int8")}
    with pytest.raises(SettingsError, match=message):
        finetune(settings(toy_model, sentiment_folder, tmp_path / "run", **changes), **SILENT)


def test_a_score_of_entities_may_be_named_before_the_tags_are_read(toy_model, entity_folder, tmp_path):
    given = settings(toy_model, entity_folder, tmp_path / "run", task="token-classification", metric="precision", max_steps=1)
    assert finetune(given, **SILENT).main_metric == "precision"


def test_int8_weights_are_refused(toy_model, sentiment_folder, tmp_path):
    model = fastbert.quantize(fastbert.BertForSequenceClassification.from_pretrained(toy_model).eval())
    model.save_pretrained(tmp_path / "int8")
    load_tokenizer(str(toy_model)).save_pretrained(tmp_path / "int8")
    for mode in ("full", "head", "top-k", "lora"):
        with pytest.raises(SettingsError, match="int8 holds int8 weights, which cannot train"):
            finetune(settings(tmp_path / "int8", sentiment_folder, tmp_path / "run", mode=mode), **SILENT)
    assert not (tmp_path / "run").exists()


def test_an_encoder_of_other_sizes_than_its_configuration_says_is_refused(toy_model, sentiment_folder, tmp_path):
    """transformers calls such weights new ones, as it does a head for another number of labels."""
    shutil.copytree(toy_model, tmp_path / "other")
    path = tmp_path / "other/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 40}))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("A text.\n\nAnother.\n")
    for changes in ({}, {"mode": "head"}, {"adapt": (str(corpus),)}):
        with pytest.raises(SettingsError, match=r"layer.0.intermediate.dense.bias is \(\d+,\) in .* and \(40,"):
            finetune(settings(tmp_path / "other", sentiment_folder, tmp_path / "run", **changes), **SILENT)
        assert not (tmp_path / "run").exists()


def test_accelerate_is_missed_before_anything_is_read(toy_model, sentiment_folder, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(SettingsError, match=r"Trainer needs accelerate: pip install 'fastbert\[train\]'"):
        finetune(settings(toy_model, sentiment_folder, tmp_path / "run"), **SILENT)


@pytest.mark.parametrize(
    ("device", "gpus", "refused"), [("cuda", 2, True), ("cuda:1", 8, True), ("cuda", 1, False), ("cpu", 2, False)]
)
def test_several_gpus_in_one_process_are_refused_before_anything_is_read(device, gpus, refused, toy_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    problem = f"sees {gpus} GPUs, .* as in CUDA_VISIBLE_DEVICES=0 fastbert finetune" if refused else "nowhere"
    with pytest.raises(SettingsError if refused else DataError, match=problem):
        finetune(settings(toy_model, tmp_path / "nowhere", tmp_path / "run", device=device), **SILENT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_that_share_nothing_are_refused_before_anything_is_read(processes, toy_model, tmp_path, monkeypatch):
    started = {"RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    inputs = tmp_path / "nowhere"
    whole = GlueSettings(data=str(inputs), model=str(toy_model), output=str(tmp_path / "run"), max_seq_length=16)
    for command, run in (
        ("finetune", lambda: finetune(settings(toy_model, inputs, tmp_path / "run"), **SILENT)),
        ("glue", lambda: glue(whole, **SILENT)),
        ("embed", lambda: embed(EmbedSettings(model=str(toy_model), input=(str(inputs),), output=tmp_path / "run.npy"), **SILENT)),
    ):
        refused = f"fastbert {command} runs in one process, torchrun has started 2" if processes > 1 else "nowhere"
        with pytest.raises(SettingsError if processes > 1 else Exception, match=refused):
            run()
    assert not list(tmp_path.glob("run*"))


def test_a_run_is_not_overwritten_by_accident(toy_model, sentiment_folder, tmp_path):
    given = settings(toy_model, sentiment_folder, tmp_path / "run", max_steps=2)
    finetune(given, **SILENT)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(SettingsError, match="already holds a run: --resume continues it, --overwrite deletes it"):
        finetune(given, **SILENT)
    with pytest.raises(SettingsError, match=r"--max-steps was 2 and is now 3"):
        finetune(settings(toy_model, sentiment_folder, tmp_path / "run", max_steps=3, resume=True), **SILENT)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    (tmp_path / "run" / "notes.txt").write_text("about this run")
    with pytest.raises(SettingsError, match=r"--overwrite deletes the run in .*, but notes.txt there is none of its files"):
        finetune(settings(toy_model, sentiment_folder, tmp_path / "run", overwrite=True), **SILENT)
    (tmp_path / "run" / "notes.txt").unlink()
    for changes in ({"mode": "top-k", "top_k_layers": 9}, {"adapt": (str(tmp_path / "nowhere.txt"),)}):
        with pytest.raises((SettingsError, CorpusError), match="--top-k-layers is 9|nowhere.txt"):
            finetune(settings(toy_model, sentiment_folder, tmp_path / "run", overwrite=True, **changes), **SILENT)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    finetune(settings(toy_model, sentiment_folder, tmp_path / "run", max_steps=1, overwrite=True), **SILENT)
    stranger = tmp_path / "mine"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("all of it")
    for change in ({}, {"overwrite": True}):
        with pytest.raises(SettingsError, match="holds files but no run.json"):
            finetune(settings(toy_model, sentiment_folder, stranger, **change), **SILENT)
    assert (stranger / "thesis.txt").is_file()
    with pytest.raises(SettingsError, match="thesis.txt is a file, so there can be no folder below it"):
        finetune(settings(toy_model, tmp_path / "no data", stranger / "thesis.txt" / "run"), **SILENT)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".run.json.new").write_text("{")  # before its first run.json was whole
    finetune(settings(toy_model, sentiment_folder, killed, max_steps=1), **SILENT)


def test_resumed_after_a_kill(toy_model, sentiment_folder, tmp_path):
    """Killed in its second epoch or later; what resumes ends with the scores of a run that was not killed."""
    changes = {"epochs": 6, "seeds": (0, 1)}
    expected = finetune(settings(toy_model, sentiment_folder, tmp_path / "whole", **changes), **SILENT)
    given = settings(toy_model, sentiment_folder, tmp_path / "run", **changes)
    checkpoints = tmp_path / "run" / "checkpoints"
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "fastbert.cli", *given.command().split()[1:]]
        process = ForkedModule(command, stdout=log, stderr=log)
        while not list(checkpoints.glob("seed-*/checkpoint-*/trainer_state.json")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    said: list[str] = []
    result = finetune(settings(toy_model, sentiment_folder, tmp_path / "run", resume=True, **changes), said.append)
    assert result.scores == expected.scores


@pytest.fixture
def room():
    """``room(n)``: from now on no file becomes larger than n bytes, as on a disk that is full; ``room()``: there is room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=before[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (0.5, r"Error while serializing: .*\(os error 27\)"),
        (1.5, r"\[enforce fail at inline_container.*"),
    ],  # optimizer.pt has twice as much
)
def test_a_disk_that_is_full_at_a_checkpoint(weights, problem, toy_model, sentiment_folder, tmp_path, room):
    expected = finetune(settings(toy_model, sentiment_folder, tmp_path / "whole", epochs=3), **SILENT)
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    evaluated: list[str] = []

    def fill(line: str) -> None:
        if "dev accuracy" in line:
            evaluated.append(line)
            if len(evaluated) == 2:
                room(int(weights * size))

    message = rf"run/checkpoints/seed-0 cannot be written to: {problem} \([\d,.]+ MB are free there\); .* --resume goes on"
    with pytest.raises(TrainingError, match=message):
        finetune(settings(toy_model, sentiment_folder, tmp_path / "run", epochs=3), fill)
    room()
    result = finetune(settings(toy_model, sentiment_folder, tmp_path / "run", epochs=3, resume=True), **SILENT)
    assert result.scores == expected.scores


def test_a_disk_that_is_full_at_the_end(toy_model, sentiment_folder, tmp_path, room, monkeypatch):
    given = settings(toy_model, sentiment_folder, tmp_path / "run", epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_tokenizer", lambda *given: room(100))
        message = r"run cannot be written to: .*File too large.* \([\d,.]+ MB are free there\); .* --resume goes on"
        with pytest.raises(TrainingError, match=message):
            finetune(given, **SILENT)
    room()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    finetune(settings(toy_model, sentiment_folder, tmp_path / "run", epochs=2, resume=True), **SILENT)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_other_errors_at_a_checkpoint_are_what_they_were(toy_model, sentiment_folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("an unknown one")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="^an unknown one$"):
        finetune(settings(toy_model, sentiment_folder, tmp_path / "run", epochs=1), **SILENT)


def test_a_label_in_one_row_is_known_wherever_the_row_goes(toy_model, tmp_path):
    """Without dev data some rows are held out, and with a limit most are left out: their labels are in the training file."""
    data = tmp_path / "train.tsv"
    data.write_text("text\tlabel\n" + "".join(f"the film {n}\t{n}\n" for n in range(20)), encoding="utf-8")
    for changes in ({}, {"limit": 4}):
        given = settings(toy_model, data, tmp_path / "run", **changes)
        prepared = module.prepare_task(module.task_of(given), module.sources_of(given), given, lambda line: None)
        assert prepared.task.labels == tuple(map(str, range(20)))


def test_test_labels_are_there_or_not(toy_model, sentiment_folder, tmp_path):
    (sentiment_folder / "test.tsv").write_text("sentence\tlabel\na film\t\na book\t\n", encoding="utf-8")
    given = settings(toy_model, sentiment_folder, tmp_path / "run")
    prepared = module.prepare_task(module.task_of(given), module.sources_of(given), given, lambda line: None)
    assert not prepared.splits["test"].labelled
    (sentiment_folder / "test.tsv").write_text("sentence\tlabel\na film\t\na book\tpos\n", encoding="utf-8")
    with pytest.raises(DataError, match="test.tsv, line 2, column 'label': is empty"):
        module.prepare_task(module.task_of(given), module.sources_of(given), given, lambda line: None)


def test_the_separator_of_labels(toy_model, tmp_path):
    given = settings(toy_model, tmp_path, tmp_path / "run", task="multi-label-classification", label_separator=";")
    assert module.task_of(given).label_separator == ";"
    with pytest.raises(SettingsError, match="--label-separator is for --task multi-label-classification, not for --task sentiment"):
        module.task_of(settings(toy_model, tmp_path, tmp_path / "run", label_separator=";"))
    with pytest.raises(SettingsError, match="--label-separator is empty"):
        settings(toy_model, tmp_path, tmp_path / "run", label_separator="")


@pytest.mark.parametrize("changes", [{"data": ""}, {"output": ""}, {"model": ""}, {"dev": ""}, {"adapt": ("",)}])
def test_an_empty_path_is_refused_by_name(changes):
    (name,) = changes
    values = {"task": "sst2", "model": "a", "data": "b", **changes}
    with pytest.raises(SettingsError, match=f"--{name} is empty"):
        FinetuneSettings(**values)
    if name != "dev" and name != "adapt":
        with pytest.raises(SettingsError, match=f"--{name} is empty"):
            GlueSettings(**{key: value for key, value in values.items() if key != "task"})


@pytest.mark.parametrize("task", ["sentiment", "regression"])
def test_training_that_diverges_says_so(task, toy_model, tmp_path):
    data = tmp_path / "train.tsv"
    data.write_text("text\tlabel\n" + "".join(f"the film {n}\t{n % 2}\n" for n in range(20)), encoding="utf-8")
    given = settings(toy_model, data, tmp_path / "run", task=task, learning_rate=1e30, max_grad_norm=1e30, max_steps=6)
    with pytest.raises(TrainingError, match="(diverged; a lower --learning-rate helps)|(outputs hold NaN or infinity)"):
        finetune(given, **SILENT)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("changed", ["train", "dev"])
def test_other_examples_are_not_resumed_on(changed, toy_model, sentiment_folder, tmp_path):
    given = settings(toy_model, sentiment_folder, tmp_path / "run", max_steps=2)
    finetune(given, **SILENT)
    file = sentiment_folder / f"{changed}.tsv"
    before = file.read_text(encoding="utf-8")
    file.write_text(before.replace("film", "book"), encoding="utf-8")
    again = settings(toy_model, sentiment_folder, tmp_path / "run", max_steps=2, resume=True)
    with pytest.raises(SettingsError, match=f"the examples of {changed} are not those that the run began with; --overwrite"):
        finetune(again, **SILENT)
    file.write_text(before, encoding="utf-8")
    finetune(again, **SILENT)


def test_what_a_run_needs_is_not_overwritten(toy_model, sentiment_folder, tmp_path):
    """A run whose own output is its model, or holds its data."""
    finetune(settings(toy_model, sentiment_folder, tmp_path / "run", max_steps=1), **SILENT)
    with pytest.raises(SettingsError, match="--overwrite deletes .*run, and .*run, which the run needs, is in it"):
        finetune(settings(tmp_path / "run", sentiment_folder, tmp_path / "run", overwrite=True), **SILENT)
    data = sentiment_folder.rename(tmp_path / "run" / "data")
    with pytest.raises(SettingsError, match="--overwrite deletes the run in .*run, but data there is none of its files"):
        finetune(settings(toy_model, data, tmp_path / "run", overwrite=True), **SILENT)
    assert (tmp_path / "run" / "model.safetensors").is_file() and (tmp_path / "run" / "data" / "train.tsv").is_file()


def test_the_speed_of_a_resumed_run_is_its_own(toy_model, sentiment_folder, tmp_path):
    """Of what it has trained itself, in the time that it took; and its folder may have been moved."""

    def train(output: Path, **changes):
        given = settings(toy_model, sentiment_folder, output, epochs=8, seeds=(3,), learning_rate=0.1, **changes)
        prepared = module.prepare_task(module.task_of(given), module.sources_of(given), given, lambda line: None)
        return module.train_seed(given, prepared, 3, module.pick_device("cpu"), lambda line: None)[0]

    expected = train(tmp_path / "run")
    assert expected.best_step < expected.steps  # else the last one would do
    (tmp_path / "run").rename(tmp_path / "moved")
    result = train(tmp_path / "moved", resume=True)
    assert result.scores == expected.scores
    rest = 1 - expected.best_step / expected.steps  # the Trainer leaves the best checkpoint only, and training goes on from it
    tokens = expected.tokens_per_second * expected.train_seconds
    assert result.tokens_per_second * result.train_seconds == pytest.approx(tokens * rest)


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        ("sklearn.metrics", {}, r"scores need scikit-learn: pip install 'fastbert\[eval\]'"),
        ("peft", {"mode": "lora"}, r"--mode lora needs PEFT: pip install 'fastbert\[train\]'"),
    ],
)
def test_a_missing_package_is_missed_before_training(module, changes, message, toy_model, sentiment_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingsError, match=message):
        finetune(settings(toy_model, sentiment_folder, tmp_path / "run", **changes), **SILENT)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_stops_as_early_as_any_other(toy_model, sentiment_folder, tmp_path):
    """Interrupted in the last evaluation, whose checkpoint is half written: what came before counts."""

    def train(output: Path, say=lambda line: None, **changes):
        given = settings(toy_model, sentiment_folder, output, epochs=40, eval_steps=6, early_stopping=3, **changes)
        prepared = module.prepare_task(module.task_of(given), module.sources_of(given), given, lambda line: None)
        return module.train_seed(given, prepared, 0, module.pick_device("cpu"), say)[0]

    def interrupt(line: str) -> None:
        if f"step {expected.steps}:" in line:
            raise KeyboardInterrupt

    expected = train(tmp_path / "whole")
    assert expected.steps == expected.best_step + 18
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", interrupt)
    half = tmp_path / "run" / "checkpoints" / "seed-0" / f"checkpoint-{expected.steps}"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch": 1')
    result = train(tmp_path / "run", resume=True)
    assert (result.steps, result.best_step, result.scores) == (expected.steps, expected.best_step, expected.scores)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 7},  # in an epoch
        {"max_steps": 7, "mode": "lora"},
        {"max_steps": 7, "mode": "head"},
        {"max_steps": 14, "eval_steps": 4, "learning_rate": 0.1},
        {"epochs": 1.5},
        {"epochs": 40, "eval_steps": 6, "early_stopping": 2},
    ],
)
def test_a_run_that_was_killed_at_the_end_of_its_training(changes, toy_model, sentiment_folder, tmp_path, monkeypatch):
    """Behind its last checkpoint, in front of its model: nothing is left to train."""

    def run(name: str, **more):
        return finetune(settings(toy_model, sentiment_folder, tmp_path / name, **{**changes, **more}), **SILENT)

    def log(name: str) -> list[dict]:
        rows = json.loads((tmp_path / name / "run.json").read_text())["seeds"]["0"]["log"]
        return [row for row in rows if "train_runtime" not in row]  # the seconds of a process that trained

    expected = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "_load_best_model", lambda trainer: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("run")
    (tmp_path / "run").rename(tmp_path / "moved")
    result = run("moved", resume=True)
    assert result.scores == expected.scores and log("moved") == log("whole")
    for name in ("steps", "best_step", "epochs"):
        assert result.seeds[0][name] == expected.seeds[0][name]
    assert "tokens/s" in (tmp_path / "whole" / "README.md").read_text()
    assert "tokens/s" not in (tmp_path / "moved" / "README.md").read_text()
    for name in ("model.safetensors", "predictions_test.jsonl"):
        assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
