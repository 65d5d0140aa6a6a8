"""``fastbert bench --model FOLDER``: a checkpoint's own weights are what is measured."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import fastbert
from benchmarks import finetune, inference, peers, pretrain, training
from benchmarks.workloads import config_for

from . import toy_runs
from .toy_runs import use_toy_limits


@pytest.fixture(autouse=True)
def quick(monkeypatch, one_thread):
    use_toy_limits(monkeypatch)


def invoke(*arguments: str):
    result = toy_runs.invoke("--rounds", "1", "--dtype", "float32", *arguments)
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def test_the_subject_has_the_checkpoints_weights(toy_model, tmp_path):
    saved = transformers.BertModel.from_pretrained(toy_model, add_pooling_layer=False).state_dict()
    subject = peers.Subject(config_for(str(toy_model)), "cpu", tmp_path, str(toy_model))
    found = subject.model.state_dict()
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    assert not subject.model.training and subject.config.hidden_size == 32


@pytest.mark.parametrize("task", [finetune.TASK, pretrain.TASK])
@pytest.mark.parametrize("library", [transformers, fastbert])
def test_training_starts_from_the_checkpoints_weights(task, library, toy_model):
    saved = transformers.BertModel.from_pretrained(toy_model).state_dict()
    model = training.model_of(task, library, str(toy_model), config_for(str(toy_model), **task.config))
    found = {name.removeprefix("bert."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(found[name], value) for name, value in saved.items())


def test_inference(toy_model, monkeypatch):
    subjects = []
    made = peers.Subject

    def kept(*given):
        subjects.append(made(*given))
        return subjects[-1]

    monkeypatch.setattr(inference, "Subject", kept)
    code, document = invoke("--model", str(toy_model), "--batches", "2x64", "3xsst2/longest", "--peers", "transformers", "openvino")
    assert code == 0, document
    saved = transformers.BertModel.from_pretrained(toy_model).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in subjects[0].model.state_dict().items())
    assert document["model"] == str(toy_model) and document["goals"] == []
    assert list(document["results"])[0] == "2 x 64"  # as they were named, though the smaller one is measured first
    assert list(document["peers"]) == ["fastbert", "transformers", "openvino"]
    assert document["peers"]["transformers"]["version"].startswith("transformers ")
    for result in document["results"].values():
        assert result["contenders"]["fastbert float32"]["largest_difference"] < 2e-5


@pytest.mark.parametrize("suite", ["finetune", "pretrain"])
def test_training(suite, toy_model):
    code, document = invoke("--suite", suite, "--model", str(toy_model), "--batches", "3xsst2/longest")
    assert code == 0, document
    (measured,) = document["runs"]["float32"]["results"].values()
    assert measured["fastbert"]["median_s"] > 0 and measured["relative_loss_difference"] < 1e-4
    assert document["not_run"] == {
        "transformers flash-attention float32": "not on cpu, only on cuda",
        "transformers with Liger float32": "not on cpu, only on cuda",
    }
    assert list(document["peers"]) == [
        "fastbert", "transformers", "transformers-sorted", "transformers-flash", "transformers-liger"
    ]  # fmt: skip


def test_a_batch_that_is_longer_than_the_models_positions(toy_model):
    code, document = invoke("--model", str(toy_model))
    assert code == 2
    assert document["error"] == f"--batches: 512 tokens, and {toy_model} takes 64 at most"


def test_data_without_a_tokenizer(tmp_path):
    code, document = invoke("--model", "tiny", "--batches", "mnli", "--data", str(tmp_path))
    assert code == 2
    assert document["error"] == "--data needs --tokenizer (folder or Hub name), since --model tiny has none"
