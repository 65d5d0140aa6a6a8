"""Checkpoints are written beside the training, one at a time; what goes wrong there stops the run, and nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastbert.cli.main import app
from fastbert.runs import one_writer
from fastbert.runs.errors import TrainingError, TrainingInterrupted
from fastbert.train.background import CheckpointWriter
from fastbert.train.checkpoint import Snapshot, _write_manifest, checkpoint_defect, checkpoint_folders
from fastbert.train.loop import TrainingLoop
from fastbert.train.pretrain import pretrain

from .runs import quiet, rows_without_speed, same_weights, stop_at


def names(output: Path) -> list[str]:
    return sorted(entry.name for entry in output.iterdir())


def snapshot(release: threading.Event | None = None, error: Exception | None = None) -> Snapshot:
    def write(folder: Path) -> None:
        if release is not None:
            assert release.wait(10)
        if error is not None:
            raise error
        (folder / "file").write_bytes(b"1")

    return Snapshot(write, 1)


def test_a_second_checkpoint_waits_for_the_first(tmp_path):
    release = threading.Event()
    with CheckpointWriter(tmp_path, keep=1, log=tmp_path / "log") as writer:
        assert writer.start(1, snapshot(release)) == tmp_path / "checkpoint-1"
        writer.raise_error()
        assert names(tmp_path) in ([], [".unfinished-checkpoint-1"])
        threading.Timer(0.05, release.set).start()
        writer.start(2, snapshot())
        assert (tmp_path / "checkpoint-1").is_dir() or (tmp_path / "checkpoint-2").is_dir()
    assert names(tmp_path) == ["checkpoint-2"]


def test_an_error_is_raised_once_and_the_earlier_stay(tmp_path):
    with CheckpointWriter(tmp_path, keep=1, log=tmp_path / "log") as writer:
        writer.start(1, snapshot())
        writer.start(2, snapshot(error=OSError(28, "No space left on device", "weights")))
        with pytest.raises(TrainingError, match=r"checkpoint-2 could not be written: .*'weights' \(it takes 0\.0 MB"):
            writer.wait()
        writer.wait()
    assert names(tmp_path) == ["checkpoint-1"]
    with pytest.raises(TrainingError), CheckpointWriter(tmp_path, keep=1, log=tmp_path / "log") as writer:
        writer.start(3, snapshot(error=OSError("full")))


def test_any_end_waits_and_tells_its_own_error(tmp_path):
    release = threading.Event()
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, keep=1, log=tmp_path / "log") as writer:
        writer.start(1, snapshot(release))
        threading.Timer(0.05, release.set).start()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_checkpoint_holds_the_step_it_was_taken_at(toy_settings, tmp_path, monkeypatch):
    """The steps after it change neither weights nor moments nor counts that are still to be written."""
    straight = toy_settings(output=str(tmp_path / "straight"), steps=8, save_steps=3, keep_checkpoints=3)
    pretrain(straight, quiet)
    write, taken = CheckpointWriter._write, threading.Event()
    take_step = TrainingLoop._take_step

    def late(writer: CheckpointWriter, step: int, snapshot: Snapshot) -> None:
        assert step != 3 or taken.wait(30)
        write(writer, step, snapshot)

    def step(loop, batches):
        take_step(loop, batches)
        if loop.state.step == 5:
            assert not (loop.output / "checkpoint-3").exists()
            taken.set()

    monkeypatch.setattr(CheckpointWriter, "_write", late)
    monkeypatch.setattr(TrainingLoop, "_take_step", step)
    settings = toy_settings(output=str(tmp_path / "late"), steps=8, save_steps=3, keep_checkpoints=3)
    pretrain(settings, quiet)
    first, second = (Path(output) / "checkpoint-3" for output in (straight.output, settings.output))
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    states = [json.loads((folder / "run_state.json").read_text(encoding="utf-8")) for folder in (first, second)]
    assert states[0]["step"] == states[1]["step"] == 3 and states[0]["position"] == states[1]["position"]


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_stay_as_asked(toy_settings, keep):
    settings = toy_settings(save_steps=2, keep_checkpoints=keep)
    pretrain(settings, quiet)
    folders = checkpoint_folders(Path(settings.output))
    assert [folder.name for folder in folders] == ["checkpoint-8", "checkpoint-6", "checkpoint-4"][:keep]
    assert all(checkpoint_defect(folder) is None for folder in folders)


def test_a_new_checkpoint_stays_beside_broken_later_ones(toy_settings, tmp_path):
    """With room for one only, after the newest two have broken."""
    settings = toy_settings(save_steps=2, keep_checkpoints=3)
    pretrain(settings, quiet)
    output = Path(settings.output)
    for step in (8, 6):
        os.truncate(output / f"checkpoint-{step}" / "model.safetensors", 10)
    stopped = toy_settings(save_steps=1, keep_checkpoints=1, resume=True)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(TrainingInterrupted):
            pretrain(stopped, quiet)
    assert [folder.name for folder in checkpoint_folders(output)] == ["checkpoint-5"]
    assert not list(output.glob(".unfinished*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB; a checkpoint of the toy run takes 0.4."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def command(settings) -> list[str]:
    return shlex.split(settings.command())[1:]


def test_a_full_disk_stops_the_run_and_it_goes_on_once_there_is_room(toy_settings, tmp_path, small_disk):
    straight = toy_settings(output=str(tmp_path / "straight"), save_steps=2)
    pretrain(straight, quiet)
    settings = toy_settings(output=str(small_disk / "run"), save_steps=2)
    output = Path(settings.output)
    ballast = small_disk / "ballast"
    save = TrainingLoop._save

    def fill(loop):
        if loop.state.step == 6:
            loop.writer.wait()
            free = shutil.disk_usage(small_disk).free
            ballast.write_bytes(bytes(max(0, free - 60_000)))
        return save(loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_save", fill)
        result = CliRunner().invoke(app, command(settings))
    assert result.exit_code == 1, result.output
    assert "checkpoint-6 could not be written: " in result.output and "No space left" in result.output
    assert ".safetensors: " in result.output and "MB are free there" in result.output
    assert f"the last checkpoint is {output}/checkpoint-4" in result.output and "--resume" in result.output
    assert [folder.name for folder in checkpoint_folders(output)] == ["checkpoint-4", "checkpoint-2"]
    assert not list(output.glob(".unfinished*")) and checkpoint_defect(output / "checkpoint-4") is None

    ballast.unlink()
    again = CliRunner().invoke(app, ["pretrain", "--output", str(output), "--resume"])
    assert again.exit_code == 0, again.output
    assert same_weights(straight.output, output)
    assert rows_without_speed(straight.output) == rows_without_speed(settings.output)


def test_a_disk_that_is_full_at_the_end(toy_settings, monkeypatch):
    """The final model is written whole or not at all, and again by --resume."""
    settings = toy_settings()

    def full(model, folder, weights=None):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(folder / "model.safetensors"))

    output = Path(settings.output)
    with monkeypatch.context() as patch:
        patch.setattr("fastbert.train.pretrain.save_model", full)
        result = CliRunner().invoke(app, command(settings))
    assert result.exit_code == 1 and "No space left on device: '" in result.output
    assert f"the last checkpoint is {output}/checkpoint-8" in result.output
    assert not (output / "model.safetensors").exists() and not list(output.glob(".unfinished*"))
    assert pretrain(toy_settings(resume=True), quiet).steps == 8
    assert (output / "model.safetensors").is_file()


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture(scope="module")
def stopped_run(toy_corpus, tmp_path_factory) -> Path:
    from .test_kill import killed_settings

    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(TrainingInterrupted):
            pretrain(killed_settings(toy_corpus, output), quiet)
    shutil.rmtree(output / "checkpoint-2")
    return output


READ = ["manifest.json", "run_state.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "guard.json",
        "config.json", "tokenizer.json", "tokenizer_config.json", "../metrics.jsonl"]  # fmt: skip


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("format", ["pickle", "torch.save"])
def test_a_pickle_is_an_error_and_is_not_run(stopped_run, tmp_path, name, format):
    """Under every name that a resume reads, with a manifest that vouches for it."""
    output = tmp_path / "run"
    shutil.copytree(stopped_run, output)
    checkpoint, mark = checkpoint_folders(output)[0], tmp_path / "mark"
    if format == "pickle":
        (checkpoint / name).write_bytes(pickle.dumps(Trap(mark)) + b"\n")
    else:
        torch.save(Trap(mark), checkpoint / name)
    if name != "manifest.json":
        (checkpoint / "manifest.json").unlink()
        _write_manifest(checkpoint)
    result = CliRunner().invoke(app, ["pretrain", "--output", str(output), "--resume"])
    assert result.exit_code == 1 and not mark.exists()
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert Path(name).name in result.output or str(checkpoint) in result.output, result.output


def test_pickles_that_nobody_asked_for_are_not_read(stopped_run, tmp_path):
    output, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(stopped_run, output)
    checkpoint = checkpoint_folders(output)[0]
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.pt"):
        torch.save(Trap(mark), checkpoint / name)
    result = CliRunner().invoke(app, ["pretrain", "--output", str(output), "--resume"])
    assert result.exit_code == 0 and not mark.exists(), result.output


def test_a_second_process_is_refused(toy_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = toy_settings()
    with one_writer._lock(settings.output):
        result = CliRunner().invoke(app, command(settings))
    assert result.exit_code == 2 and "another process is writing to" in result.output
    assert not Path(settings.output).exists()
