"""A thread writes what was, while training goes on; what goes wrong there is told here."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert import BertConfig, BertForPreTraining
from fastbert.train import background, checkpoint
from fastbert.train.background import CheckpointWriter
from fastbert.train.checkpoint import Snapshot, checkpoint_folders
from fastbert.train.errors import TrainingError
from fastbert.train.learner import Learner
from fastbert.train.optimizer import optimizer_tensors
from fastbert.train.settings import PretrainSettings


def writes(text: str, until: threading.Event | None = None) -> Snapshot:
    def write(folder: Path) -> None:
        if until is not None:
            assert until.wait(30)
        (folder / "state").write_text(text, encoding="utf-8")

    return Snapshot(write, 4)


def fails(folder: Path) -> None:
    raise OSError("the disk is full")


def names(output: Path) -> list[str]:
    return [folder.name for folder in checkpoint_folders(output)]


def test_training_goes_on_meanwhile_and_one_waits_for_the_one_before(tmp_path):
    may_end = threading.Event()
    with CheckpointWriter(tmp_path, keep=2, log=tmp_path / "log") as writer:
        assert writer.start(1, writes("one", may_end)) == tmp_path / "checkpoint-1"
        writer.raise_error()
        assert names(tmp_path) == []
        threading.Timer(0.1, may_end.set).start()
        writer.start(2, writes("two"))
        assert "checkpoint-1" in names(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-1"]


def test_an_error_is_told_once_and_leaves_the_others(tmp_path):
    with CheckpointWriter(tmp_path, keep=2, log=tmp_path / "log") as writer:
        writer.start(1, writes("one"))
        writer.start(2, Snapshot(fails, 4))
        with pytest.raises(TrainingError, match="checkpoint-2 could not be written: the disk is full"):
            writer.wait()
        writer.raise_error()
    assert names(tmp_path) == ["checkpoint-1"]
    with pytest.raises(TrainingError, match="checkpoint-3"), CheckpointWriter(tmp_path, keep=2, log=tmp_path / "log") as writer:
        writer.start(3, Snapshot(fails, 4))
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, keep=2, log=tmp_path / "log") as writer:
        writer.start(3, Snapshot(fails, 4))
        raise ZeroDivisionError  # is what the run has failed of


def test_lines_of_the_log_are_durable_before_the_checkpoint_is_there(tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("line\n", encoding="utf-8")
    done: list[str] = []
    replace = checkpoint.os.replace
    monkeypatch.setattr(background, "sync_path", lambda path: done.append(path.name))
    monkeypatch.setattr(checkpoint.os, "replace", lambda source, target: done.append(target.name) or replace(source, target))
    with CheckpointWriter(tmp_path, keep=2, log=log) as writer:
        writer.start(1, writes("one"))
    assert done == ["log", "checkpoint-1"]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_snapshot_is_what_was(tmp_path, optimizer):
    """Weights and moments are changed in place by the steps that follow."""
    model = BertForPreTraining(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    learner = Learner(model, PretrainSettings(optimizer=optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.step()
    snapshot = learner.snapshot()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {name: tensor.clone() for name, tensor in optimizer_tensors(model, learner.optimizer).items()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *optimizer_tensors(model, learner.optimizer).values()):
            tensor.add_(1)
    snapshot.write(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights and all(torch.equal(tensor, before[name]) for name, tensor in weights.items())
    written = load_file(tmp_path / "optimizer.safetensors")
    assert written.keys() == moments.keys() and all(torch.equal(tensor, moments[name]) for name, tensor in written.items())
    tied = before["bert.embeddings.word_embeddings.weight"].nbytes  # counted once, as it is written once
    assert snapshot.nbytes == sum(t.nbytes for t in (*before.values(), *moments.values())) - tied - _tied_bias(before)


def _tied_bias(state: dict[str, torch.Tensor]) -> int:
    return state["cls.predictions.bias"].nbytes
