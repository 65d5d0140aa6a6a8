"""Killed before its first checkpoint or while the last old one goes, a run that is continued is the run that was not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from fastbert.train import checkpoint, loop
from fastbert.train.checkpoint import checkpoint_folders, unfinished_folders
from fastbert.train.errors import SettingsError
from fastbert.train.pretrain import pretrain
from fastbert.train.settings import PretrainSettings

from .runs import quiet, rows_without_speed, same_weights

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


def killed_by(settings: PretrainSettings, module: object, name: str, call: int) -> None:
    """Runs ``settings`` in a process that is killed after call number ``call`` (from 1) of ``module.name``."""
    process = os.fork()
    if process == 0:
        try:
            calls = []

            def deadly(function: Callable) -> Callable:
                def called(*args, **kwargs):
                    calls.append(name)
                    result = function(*args, **kwargs)
                    if len(calls) == call:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result

                return called

            setattr(module, name, deadly(getattr(module, name)))
            pretrain(settings, quiet)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@needs_fork
@pytest.mark.parametrize(
    ("module", "name", "call", "left"),
    [
        (loop.TrainingLoop, "_take_step", 2, []),  # before the first checkpoint
        (checkpoint, "set_aside", 1, [8, 6]),  # checkpoint-3 goes when checkpoint-8 is there
    ],
)
def test_killed_and_continued(toy_settings, tmp_path, module, name, call, left):
    straight = toy_settings(output=str(tmp_path / "straight"))
    pretrain(straight, quiet)
    killed = toy_settings(output=str(tmp_path / "killed"))
    killed_by(killed, module, name, call)
    folder = tmp_path / "killed"
    assert [found.name for found in checkpoint_folders(folder)] == [f"checkpoint-{step}" for step in left]
    assert not (folder / "model.safetensors").exists()
    lines: list[str] = []
    pretrain(toy_settings(output=killed.output, resume=True), lines.append)
    said = [line for line in lines if "Resuming" in line or "begins anew" in line]
    assert len(said) == 1 and (f"after step {left[0]}" if left else "before its first checkpoint") in said[0]
    assert same_weights(straight.output, killed.output)
    assert rows_without_speed(straight.output) == rows_without_speed(killed.output)
    assert [found.name for found in checkpoint_folders(folder)] == ["checkpoint-8", "checkpoint-6"]
    assert unfinished_folders(folder) == []


@needs_fork
def test_killed_with_processes_that_make_batches(toy_settings):
    """They outlive it for a second, and must not keep the run's lock."""
    pretrain(toy_settings(output=toy_settings().output + "-first", steps=1), quiet)  # torch must have been used before a fork
    killed_by(toy_settings(workers=1), loop.TrainingLoop, "_take_step", 5)
    assert pretrain(toy_settings(workers=1, resume=True), quiet).steps == 8


@needs_fork
def test_begun_anew_with_the_same_settings_only(toy_settings):
    pretrain(toy_settings(output=toy_settings().output + "-first", steps=1), quiet)
    killed_by(toy_settings(), loop.TrainingLoop, "_take_step", 2)
    with pytest.raises(SettingsError, match="--seed was 0 and is now 3"):
        pretrain(toy_settings(seed=3, resume=True), quiet)
