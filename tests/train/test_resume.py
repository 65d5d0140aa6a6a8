"""Whatever is set, a run that was stopped and continued is the run that was not, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastbert.runs.errors import SettingsError, TrainingError, TrainingInterrupted
from fastbert.train.learner import Learner
from fastbert.train.metrics import MLM_LOSS, read_metrics
from fastbert.train.pretrain import pretrain
from fastbert.train.run_state import RunState

from .runs import quiet, rows_without_speed, same_weights, stop_at

TWO_PHASES = {"second_phase_steps": 4, "second_phase_seq_length": 64}
OWN_PEAK = {**TWO_PHASES, "second_phase_learning_rate": 2e-3}


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({"batches_per_step": 3}, [5]),
        ({"batches_per_step": 3, "optimizer": "lamb", "schedule": "polynomial", "learning_rate": 2e-2}, [4]),
        ({"dtype": "bfloat16", "gradient_checkpointing": True}, [5]),
        ({"objective": "mlm", "schedule": "one-cycle"}, [3]),
        ({**TWO_PHASES, "schedule": "one-cycle", "steps": 9}, [3, 5, 7]),
        ({**OWN_PEAK, "batches_per_step": 2, "workers": 2}, [4, 5]),
        ({"batches_per_step": 40, "steps": 3}, [1, 2]),  # the corpus has no 40 batches: a step goes on in the next epoch
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_stopped_and_continued_run_is_the_same_run(toy_settings, tmp_path, monkeypatch, changes, stops):
    straight = toy_settings(output=str(tmp_path / "straight"), save_steps=100, **{**changes, "workers": 0})
    pretrain(straight, quiet)
    stopped = str(tmp_path / "stopped")
    for number, step in enumerate(stops):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(TrainingInterrupted):
                pretrain(toy_settings(output=stopped, save_steps=100, resume=number > 0, **changes), quiet)
    pretrain(toy_settings(output=stopped, save_steps=100, resume=True, **changes), quiet)
    assert same_weights(straight.output, stopped)
    assert rows_without_speed(straight.output) == rows_without_speed(stopped)
    states = [RunState.read(Path(output) / f"checkpoint-{straight.steps}") for output in (straight.output, stopped)]
    assert states[0].position == states[1].position and states[0].tokens == states[1].tokens


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Gradients and loss of the last batch of these steps are NaN."""
    backward = Learner.backward

    def poisoned(learner: Learner, batch):
        scores = backward(learner, batch)
        if learner.schedule._step + 1 in steps:
            scores[MLM_LOSS] = float("nan")
            for parameter in learner.model.parameters():
                parameter.grad.fill_(float("nan"))
        return scores

    monkeypatch.setattr(Learner, "backward", poisoned)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_steps_that_are_left_out_are_named_and_stay_so(toy_settings, tmp_path, monkeypatch, optimizer):
    poison(monkeypatch, 1, 3, 6)
    changes = {"optimizer": optimizer, "batches_per_step": 2, "save_steps": 100, "max_skipped_steps": 3}
    lines: list[str] = []
    result = pretrain(toy_settings(output=str(tmp_path / "straight"), **changes), lines.append)
    assert [(skipped["step"], skipped["batch"]) for skipped in result.skipped] == [(1, 0), (3, 4), (6, 10)]
    assert {skipped["reason"] for skipped in result.skipped} == {"the loss is nan"}
    assert any("left out step 3 (epoch 0, block 0, from batch 4 on): the loss is nan" in line for line in lines)
    rows = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert [row["skipped"] for row in rows if "skipped" in row] == result.skipped
    assert sum(row.get("tokens", 0) for row in rows) == result.tokens
    card = (tmp_path / "straight" / "README.md").read_text(encoding="utf-8")
    assert "| steps | 8, 3 of them left out |" in card

    stopped = str(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(TrainingInterrupted):
            pretrain(toy_settings(output=stopped, **changes), quiet)
    again = pretrain(toy_settings(output=stopped, resume=True, **changes), quiet)
    assert again.skipped == result.skipped
    assert same_weights(tmp_path / "straight", stopped)
    assert rows_without_speed(str(tmp_path / "straight")) == rows_without_speed(stopped)


def test_a_run_of_which_every_step_was_left_out_is_no_result(toy_settings, monkeypatch):
    poison(monkeypatch, 1, 2)
    settings = toy_settings(steps=2)
    with pytest.raises(TrainingError, match="all 2 steps were left out"):
        pretrain(settings, quiet)
    assert not (Path(settings.output) / "model.safetensors").exists()


def test_what_a_continued_run_changes_stays_changed(toy_settings, monkeypatch):
    for step, changes in ((2, {}), (5, {"max_skipped_steps": 50, "resume": True})):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(TrainingInterrupted):
                pretrain(toy_settings(**changes), quiet)
    assert RunState.read(Path(toy_settings().output) / "checkpoint-5").settings["max_skipped_steps"] == 50


@pytest.mark.parametrize(("most", "last"), [(0, 2), (1, 4), (2, 5)])
def test_too_many_end_the_run(toy_settings, tmp_path, monkeypatch, most, last):
    poison(monkeypatch, 2, 4, 5)
    settings = toy_settings(max_skipped_steps=most)
    with pytest.raises(TrainingError, match=rf"left out: {most + 1}, .*step {last} \(epoch 0, block 0, from batch {last - 1} on\)"):
        pretrain(settings, quiet)
    with pytest.raises((TrainingError, SettingsError), match="nothing to resume|left out"):
        pretrain(toy_settings(max_skipped_steps=most, resume=True), quiet)


def test_a_spike_after_the_first_steps(toy_settings, monkeypatch):
    """Of the learning rate, not of the data: it goes up until the loss does."""
    monkeypatch.setattr("fastbert.train.guard.LEAST_STEPS", 3)
    settings = toy_settings(steps=40, learning_rate=3.0, warmup_steps=20, max_skipped_steps=4, loss_spike=1.3)
    with pytest.raises(TrainingError, match=r"left out: 5, .*the loss is [\d.]+, above [\d.]+"):
        pretrain(settings, quiet)


def test_a_spike_soon_after_resuming_is_seen(toy_settings, tmp_path, monkeypatch):
    """The mean of the losses is part of a checkpoint."""
    monkeypatch.setattr("fastbert.train.guard.LEAST_STEPS", 3)
    backward = Learner.backward

    def spiked(learner: Learner, batch):
        return backward(learner, batch) * (3.0 if learner.schedule._step + 1 == 7 else 1.0)

    monkeypatch.setattr(Learner, "backward", spiked)
    straight = pretrain(toy_settings(output=str(tmp_path / "straight")), quiet)
    assert [skipped["step"] for skipped in straight.skipped] == [7]
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(TrainingInterrupted):
            pretrain(toy_settings(), quiet)
    assert pretrain(toy_settings(resume=True), quiet).skipped == straight.skipped
    assert same_weights(straight.output, toy_settings().output)


def test_a_longer_phase_is_no_spike(toy_settings, monkeypatch):
    """Losses of one phase are no measure of the other's."""
    monkeypatch.setattr("fastbert.train.guard.LEAST_STEPS", 3)
    backward = Learner.backward

    def higher(learner: Learner, batch):
        return backward(learner, batch) * (3.0 if learner.schedule._step >= 4 else 1.0)

    monkeypatch.setattr(Learner, "backward", higher)
    assert pretrain(toy_settings(**TWO_PHASES), quiet).skipped == []


def test_two_phases_are_two_lengths(toy_settings, monkeypatch):
    lengths: list[int] = []
    step = Learner.step

    def watched(learner, batches):
        lengths.append(max(batch.inputs["max_length_q"] for batch in batches))
        return step(learner, batches)

    monkeypatch.setattr(Learner, "step", watched)
    settings = toy_settings(**OWN_PEAK)
    result = pretrain(settings, quiet)
    assert all(16 < length <= 32 for length in lengths[:4]) and all(32 < length <= 64 for length in lengths[4:])
    rows = [row for row in read_metrics(Path(settings.output) / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["learning_rate"] < 2e-3 and result.phases == [
        {"steps": 4, "max_seq_length": 32}, {"steps": 4, "max_seq_length": 64},
    ]  # fmt: skip
    assert 0.7 < result.fill <= 1
    positions = [RunState.read(Path(settings.output) / f"checkpoint-{step}").position for step in (6, 8)]
    assert positions == [{"epoch": 1, "block": 0, "batch": 2}, {"epoch": 1, "block": 0, "batch": 4}]


def test_masked_words_alone(toy_settings):
    import transformers

    settings = toy_settings(objective="mlm", steps=20)
    result = pretrain(settings, quiet)
    output = Path(settings.output)
    assert set(result.held_out) == {"loss", "mlm_loss", "mlm_accuracy"}
    assert result.held_out["mlm_loss"] < result.held_out_start["mlm_loss"]
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(output, output_loading_info=True)
    assert type(model) is transformers.BertForMaskedLM and not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((output / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    text = (output / "README.md").read_text(encoding="utf-8") + (output / "metrics.jsonl").read_text(encoding="utf-8")
    assert "BertForMaskedLM.from_pretrained" in text and "ext sentence" not in text and "nsp" not in text
    assert (output / "loss.png").is_file()
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
