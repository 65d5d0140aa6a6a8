"""Training the head on encoder outputs that were computed once: the numbers of training it with the frozen encoder in the model."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastbert
from fastbert.data.collator import DataCollatorWithPacking
from fastbert.finetune import head_features
from fastbert.finetune.head_features import cache_folder, encoder_states
from fastbert.finetune.head_model import head_model, rows_of_states
from fastbert.finetune.modes import freeze_below
from fastbert.finetune.run import finetune
from fastbert.finetune.settings import FinetuneSettings
from fastbert.tasks.model import TaskModel
from fastbert.tasks.outputs import model_outputs
from fastbert.tasks.predictor import Predictor
from fastbert.train.optimizer import build_optimizer

from .head_helpers import CHOICES, FAMILIES, RELATIVES, model_of, padded, rows_of

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def silent(line: str) -> None:
    pass


def states_of(model, rows, *, per_token=False, say=silent, **options):
    return encoder_states(model, rows, per_token=per_token, title="train", say=say, **options)


def loaded(model: nn.Module, family: str) -> TaskModel:
    packed = family != "choices"
    start = getattr(model.base_model, "first_position", 0)
    collate = DataCollatorWithPacking(position_ids_start=start) if packed else lambda rows: choices_batch(model, rows)
    return TaskModel(model, None, packed, collate, ())


def choices_batch(model: nn.Module, rows):
    """What model_outputs asks of a collator: labels may be missing."""
    batch = padded([{"labels": 0, **row} for row in rows], "choices", model.config.pad_token_id)
    return {name: x for name, x in batch.items() if name != "labels"}


# --- the outputs of the encoder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_what_the_encoder_makes_of_each_sequence(kind, family):
    model = model_of(kind, family)
    rows = rows_of(family, 7)
    per_token = family in ("words", "questions")
    model.train()
    states = states_of(model, rows, per_token=per_token)
    assert all(module.training for module in model.modules())
    batch = padded(rows, family, model.config.pad_token_id)
    inputs = {name: batch[name].flatten(0, -2) for name in ("input_ids", "token_type_ids", "attention_mask")}
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
    lengths = inputs["attention_mask"].sum(1).tolist()
    several = CHOICES if family == "choices" else 1
    for number, vectors in enumerate(states):
        assert vectors.dtype == np.float32
        expected = hidden[number, : lengths[number]] if per_token else hidden[number * several : (number + 1) * several, 0]
        torch.testing.assert_close(torch.tensor(vectors), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_that_with_the_frozen_encoder_in_the_model(kind, family):
    """Losses, outputs and weights after some steps, the head's dropout off."""
    ordinary = model_of(kind, family)
    freeze_below(ordinary, 0, "head")
    for part in (part for part in ordinary.children() if part is not ordinary.base_model):
        for module in part.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    whole = copy.deepcopy(ordinary)
    rows = rows_of(family, 24)
    start = loaded(whole, family)
    head, with_states = head_model(start, family), rows_of_states(whole, rows, family, None, "train", silent)
    encoder_before = copy.deepcopy(whole.base_model.encoder.state_dict())

    losses = {}
    for name, model, collate, data in (
        ("ordinary", ordinary, lambda batch: padded(batch, family, ordinary.config.pad_token_id), rows),
        ("states", head.model, head.collate, with_states),
    ):
        optimizer = build_optimizer(model, 1e-2, 0.01)
        model.train()
        losses[name] = []
        for first in (0, 8, 16, 0, 8, 16):
            loss = model(**collate(data[first : first + 8])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["states"] == pytest.approx(losses["ordinary"], rel=TOLERANCE)
    assert losses["states"][3] < losses["states"][0]

    expected = dict(ordinary.named_parameters())
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert all(torch.equal(x, encoder_before[name]) for name, x in whole.base_model.encoder.state_dict().items())
    # The head trained on states is that of the whole model.
    of_head = model_outputs(head, with_states, family=family, tokens_per_batch=60)
    of_whole = model_outputs(start, rows, family=family, tokens_per_batch=60)
    for ours, theirs in zip(of_head, of_whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_the_heads_dropout_is_its_own():
    model = model_of("bert", "text", classifier_dropout=0.5)
    freeze_below(model, 0, "head")
    head = head_model(loaded(model, "text"), "text")
    batch = head.collate(rows_of_states(model, rows_of("text", 4), "text", None, "train", silent))
    head.model.train()
    torch.manual_seed(0)
    first = head.model(**batch).logits
    assert not torch.equal(first, head.model(**batch).logits)
    head.model.eval()
    assert torch.equal(head.model(**batch).logits, head.model(**batch).logits)


# --- the cache -------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def test_computed_once_and_found_by_later_runs(own_cache, monkeypatch):
    model, rows = model_of("bert", "text"), rows_of("text", 9)
    said: list[str] = []
    first = np.concatenate(states_of(model, rows, say=said.append))
    assert "9 sequences" in said[-1] and "computed" in said[-1] and str(own_cache) in said[-1]
    assert files(own_cache) == [".json", ".npy"]
    monkeypatch.setattr(head_features, "_compute", None)  # nobody calls it again

    again = model_of("bert", "text", hidden_dropout_prob=0.3, problem_type="single_label_classification")
    again.load_state_dict(model.state_dict())
    other_labels = [{**row, "labels": 0} for row in rows]
    with torch.no_grad():
        again.classifier.weight.add_(1.0)
        again.bert.pooler.dense.weight.add_(1.0)
    assert np.array_equal(np.concatenate(states_of(again, other_labels, say=said.append)), first)
    assert "found" in said[-1]


def test_other_weights_tokens_and_forms_have_files_of_their_own(own_cache):
    model, rows = model_of("bert", "text"), rows_of("text", 5)
    states_of(model, rows)
    states_of(model, rows, per_token=True)
    states_of(model, rows, autocast=torch.bfloat16)
    states_of(model, rows_of("text", 5, seed=1))
    states_of(model, rows[::-1])
    # The same tokens, cut elsewhere.
    tokens = list(range(20, 32))
    for cut in (5, 6):
        states_of(model, [{"input_ids": part, "token_type_ids": [0] * len(part)} for part in (tokens[:cut], tokens[cut:])])
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.bias[3] += 1e-3
    states_of(model, rows)
    model.config.layer_norm_eps = 1e-5
    states_of(model, rows)
    assert files(own_cache) == [".json"] * 9 + [".npy"] * 9


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "gone", "another shape", "a damaged checksum"])
def test_a_damaged_file_is_noticed_and_made_again(own_cache, damage):
    model, rows = model_of("bert", "text"), rows_of("text", 6)
    expected = np.concatenate(states_of(model, rows)).copy()
    (path,), (sidecar,) = own_cache.glob("*.npy"), own_cache.glob("*.json")
    content = bytearray(path.read_bytes())
    if damage == "a flipped bit":
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "cut short":
        path.write_bytes(content[:-40])
    elif damage == "gone":
        path.unlink()
    elif damage == "another shape":
        np.save(path, expected[:2])
    else:
        sidecar.write_text("{", encoding="utf-8")
    said: list[str] = []
    assert np.array_equal(np.concatenate(states_of(model, rows, say=said.append)), expected)
    assert any("is damaged" in line and str(path) in line for line in said)
    said.clear()
    states_of(model, rows, say=said.append)
    assert len(said) == 1 and "found" in said[0]


def test_an_interrupted_computation_leaves_nothing_that_counts(own_cache, monkeypatch):
    model, rows = model_of("bert", "text"), rows_of("text", 6)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(head_features, "_compute", interrupted)
        states_of(model, rows)
    assert files(own_cache) == []
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(head_features, "write_json", interrupted)
        states_of(model, rows)
    assert files(own_cache) == [".npy"]
    said: list[str] = []
    states_of(model, rows, say=said.append)
    assert "computed" in said[0]


def test_two_runs_that_keep_the_same_states_at_once(own_cache, monkeypatch):
    """The other one, of another process, comes to its end between this one's writing of a file and its renaming."""
    model, rows = model_of("bert", "text"), rows_of("text", 6)
    rename, processes = os.replace, iter([1])

    def second_run_first(source: Path, target: Path) -> None:
        if Path(target).suffix == ".json" and next(processes, None):
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                shape = np.load(next(own_cache.glob("[!.]*.npy"))).shape
                head_features._write(next(own_cache.glob("[!.]*.npy")), shape, lambda states: None)
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_run_first)
    states_of(model, rows)
    assert files(own_cache) == [".json", ".npy"]


def test_a_disk_that_is_too_full(own_cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="XDG_CACHE_HOME names another place"):
        states_of(model_of("bert", "text"), rows_of("text", 6))


def test_a_cache_that_cannot_be_made(own_cache):
    own_cache.parent.parent.mkdir(parents=True, exist_ok=True)
    own_cache.parent.write_text("a file where the folder would be")
    with pytest.raises(OSError, match=r"head-features cannot be made \(.*\); XDG_CACHE_HOME names another place"):
        states_of(model_of("bert", "text"), rows_of("text", 6))


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda user: (_ for _ in ()).throw(KeyError(user)))
    assert cache_folder().is_absolute()


# --- from files to a folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["text", "words"])
def test_from_files_to_a_folder(toy_model, sentiment_folder, entity_folder, tmp_path, family):
    task, data = ("sentiment", sentiment_folder) if family == "text" else ("ner", entity_folder)
    settings = FinetuneSettings(
        task=task, model=str(toy_model), data=str(data), output=str(tmp_path / "run"), mode="head", epochs=20, batch_size=16,
        learning_rate=3e-2, seeds=(0, 1), early_stopping=5, device="cpu",
    )  # fmt: skip
    said: list[str] = []
    result = finetune(settings, said.append)
    assert result.scores["dev"][result.main_metric]["mean"] > 0.6  # an encoder of random weights tells less than a trained one
    assert sum("computed" in line for line in said) == sum("found" in line for line in said) == (3 if family == "text" else 2)

    folder = tmp_path / "run"
    before, after = fastbert.BertModel.from_pretrained(toy_model), fastbert.BertModel.from_pretrained(folder)
    assert all(torch.equal(x, after.encoder.state_dict()[name]) for name, x in before.encoder.state_dict().items())
    # The folder, encoder and all, predicts what the head on states was scored with.
    predict = Predictor.from_pretrained(folder, device="cpu")
    examples = predict.task.read(finetune_dev(data))
    features = predict.task.features(examples, predict.loaded.tokenizer, predict.max_seq_length, labelled=True)
    scores = predict.task.scores(model_outputs(predict.loaded, features.rows, family=family), features, examples)
    best = next(seed for seed in result.seeds if seed["seed"] == result.best_seed)
    assert scores == pytest.approx(best["scores"]["dev"])
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(predict.loaded.model).__name__]


def finetune_dev(folder: Path):
    from fastbert.data.splits import find_splits

    return find_splits(str(folder))["dev"]


def test_a_real_checkpoint(minilm, data_folder):
    """MiniLM and the first rows of SST-2: the losses of the frozen model, in evaluation mode but for its head."""
    import transformers

    from fastbert.data.tokenizer import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(minilm)
    lines = (data_folder / "glue/SST-2/train.tsv").read_text(encoding="utf-8").split("\n")[1:65]
    texts, labels = zip(*(line.split("\t") for line in lines))
    rows = [{**tokenizer(text, return_attention_mask=False), "labels": int(label)} for text, label in zip(texts, labels)]
    options = {"num_labels": 2, "classifier_dropout": 0.0, "dtype": torch.float32}
    model = fastbert.BertForSequenceClassification.from_pretrained(minilm, **options)
    theirs = transformers.BertForSequenceClassification.from_pretrained(minilm, **options).eval()
    theirs.load_state_dict(model.state_dict())
    theirs.bert.requires_grad_(False)
    theirs.bert.pooler.requires_grad_(True)
    freeze_below(model, 0, "head")
    head = head_model(loaded(model, "text"), "text")
    with_states = rows_of_states(model, rows, "text", None, "train", silent)
    pairs = [(theirs, build_optimizer(theirs, 1e-3, 0.01)), (head.model, build_optimizer(head.model, 1e-3, 0.01))]
    losses = []
    for first in range(0, 64, 16):
        batches = padded(rows[first : first + 16], "text", 0), head.collate(with_states[first : first + 16])
        step = []
        for (part, optimizer), batch in zip(pairs, batches, strict=True):
            loss = part(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step.append(loss.item())
        losses.append(step)
    expected, given = zip(*losses)
    assert given == pytest.approx(expected, abs=TOLERANCE)
