"""Settings refuse what cannot work, by the option's name; a continued run may change only what leaves its steps alone."""

from __future__ import annotations

import json

import pytest

from fastbert.runs.errors import SettingsError
from fastbert.train.settings import ModelSize, PretrainSettings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"output": ""}, "--output is empty"),
        ({"corpus": ("a.txt", "")}, "--corpus is empty"),
        ({"tokenizer": ""}, "--tokenizer is empty"),
        ({"steps": 0}, "--steps"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"held_out_fraction": 1.0}, "--held-out-fraction"),
        ({"dropout": 1.0}, "--dropout"),
        ({"tokens_per_batch": 64, "max_seq_length": 128}, "--tokens-per-batch"),
        ({"warmup_steps": 20, "steps": 10}, "--warmup-steps"),
        ({"tokenizer": "folder", "vocab_size": 1000}, "--vocab-size"),
        ({"vocab_size": 199}, "--vocab-size is 199; it must be at least 200"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**64}, "--seed is 18446744073709551616; the largest seed is 18446744073709551615"),
        ({"compare_steps": 5}, "--compare-steps"),
        ({"compare": True, "dropout": 0.1}, "--dropout"),
        ({"resume": True, "overwrite": True}, "--resume"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "--num-attention-heads"),
        ({"model": "some/checkpoint", "hidden_size": 128}, "--hidden-size"),
        ({"model": "some/checkpoint", "vocab_size": 1000}, "--vocab-size"),
    ],
)
def test_what_cannot_work_is_refused_by_name(values, named):
    with pytest.raises(SettingsError, match=named):
        PretrainSettings(**values)


def test_sizes_override_a_preset():
    assert PretrainSettings(model="tiny").model_size() == ModelSize(2, 128, 2, 512)
    assert PretrainSettings(model="tiny", num_hidden_layers=5).model_size() == ModelSize(5, 128, 2, 512)
    assert PretrainSettings(model="tiny", hidden_size=320).model_size() == ModelSize(2, 320, 5, 1280)
    assert PretrainSettings(model="tiny", hidden_size=32, intermediate_size=48).model_size() == ModelSize(2, 32, 1, 48)


def test_derived_values():
    assert PretrainSettings(steps=300).effective_warmup_steps == 30
    assert PretrainSettings().effective_dropout == 0.1
    assert PretrainSettings(compare=True).effective_dropout == 0.0
    assert PretrainSettings(compare=True, steps=7).effective_compare_steps == 7
    assert PretrainSettings(compare=True, steps=7, compare_steps=3).effective_compare_steps == 3
    assert PretrainSettings().effective_compare_steps == 0


def test_settings_survive_json():
    settings = PretrainSettings(corpus=("a.txt", "b"), compare=True, learning_rate=3e-4)
    assert PretrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(SettingsError, match="colour"):
        PretrainSettings.from_dict({"colour": "red"})


def test_the_command_repeats_the_settings():
    settings = PretrainSettings(corpus=("a.txt", "b c.txt"), compare=True, steps=20, overwrite=True)
    assert settings.command() == "fastbert pretrain --corpus a.txt 'b c.txt' --steps 20 --compare"


def test_a_continued_run_keeps_what_matters():
    run_settings = PretrainSettings(steps=20).to_dict()
    PretrainSettings.refuse_changes("runs/a", PretrainSettings(steps=20, save_steps=3, resume=True).to_dict(), run_settings)
    with pytest.raises(SettingsError, match=r"--steps was 20 and is now 30; --seed was 0 and is now 1"):
        PretrainSettings.refuse_changes("runs/a", {"steps": 30, "seed": 1}, run_settings)
