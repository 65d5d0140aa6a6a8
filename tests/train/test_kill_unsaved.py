"""Killed before its first checkpoint or while the last old one goes, a run that is continued is the run that was not."""

from __future__ import annotations

import os
import pkgutil
import signal

import pytest
import torch

from fastbert.runs.errors import SettingsError
from fastbert.train.checkpoint import checkpoint_folders, unfinished_folders
from fastbert.train.pretrain import pretrain
from fastbert.train.settings import PretrainSettings

from ..processes import server
from .runs import quiet, rows_without_speed, same_weights

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
STEP = "fastbert.train.loop:TrainingLoop", "_take_step"


def killed_by(settings: PretrainSettings, owner: str, name: str, call: int) -> None:
    """Runs ``settings`` in a process that is killed after call number ``call`` (from 1) of function ``name`` of ``owner``.

    Not forked from this one: autograd refuses to work where its threads were lost in a fork.
    """
    process = server().Process(target=_run_until, args=(settings, owner, name, call, torch.get_num_threads()))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _run_until(settings: PretrainSettings, owner: str, name: str, call: int, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    of, calls = pkgutil.resolve_name(owner), []
    function = getattr(of, name)

    def deadly(*args, **kwargs):
        calls.append(name)
        result = function(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(of, name, deadly)
    pretrain(settings, quiet)


@pytest.mark.parametrize(
    ("owner", "name", "call", "left"),
    [
        (*STEP, 2, []),  # before the first checkpoint
        ("fastbert.train.checkpoint", "set_aside", 1, [8, 6]),  # checkpoint-3 goes when checkpoint-8 is there
    ],
)
def test_killed_and_continued(toy_settings, tmp_path, owner, name, call, left):
    straight = toy_settings(output=str(tmp_path / "straight"))
    pretrain(straight, quiet)
    killed = toy_settings(output=str(tmp_path / "killed"))
    killed_by(killed, owner, name, call)
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


def test_killed_with_processes_that_make_batches(toy_settings):
    """They outlive it for a second, and must not keep the run's lock."""
    killed_by(toy_settings(workers=1), *STEP, 5)
    assert pretrain(toy_settings(workers=1, resume=True), quiet).steps == 8


def test_begun_anew_with_the_same_settings_only(toy_settings):
    killed_by(toy_settings(), *STEP, 2)
    with pytest.raises(SettingsError, match="--seed was 0 and is now 3"):
        pretrain(toy_settings(seed=3, resume=True), quiet)
