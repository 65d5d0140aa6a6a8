"""A checkpoint is whole or not there, whenever a crash comes; a damaged one is named and passed over."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fastbert.train import checkpoint
from fastbert.train.checkpoint import (
    checkpoint_defect,
    checkpoint_folders,
    latest_checkpoint,
    unfinished_folders,
    write_checkpoint,
)


class Crash(BaseException):
    """Like a KeyboardInterrupt: nothing may swallow it."""


def write_files(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "inner").mkdir()
    (folder / "inner" / "state.json").write_text("{}", encoding="utf-8")


def sound_checkpoints(output: Path) -> list[str]:
    return [folder.name for folder in checkpoint_folders(output) if checkpoint_defect(folder) is None]


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100):
        assert write_checkpoint(tmp_path, step, write_files, keep=2) == tmp_path / f"checkpoint-{step}"
    assert sound_checkpoints(tmp_path) == ["checkpoint-100", "checkpoint-10"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


@pytest.mark.parametrize("stage", ["write", "manifest", "sync", "rename", "delete"])
def test_a_crash_leaves_whole_checkpoints_only(tmp_path, monkeypatch, stage):
    """The process ends at ``stage``: what its ``finally`` blocks would tidy up stays."""
    write_checkpoint(tmp_path, 1, write_files, keep=2)
    write_checkpoint(tmp_path, 2, write_files, keep=2)

    def crash(*args, **kwargs):
        raise Crash

    def write_half(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"wei")
        raise Crash

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        if stage == "manifest":
            patch.setattr(checkpoint, "_write_manifest", crash)
        elif stage == "sync":
            patch.setattr(os, "fsync", crash)
        elif stage == "rename":
            patch.setattr(os, "replace", crash)
        patch.setattr(shutil, "rmtree", lambda path, **kwargs: rmtree(path) if Path(path).exists() and not kwargs else None)
        if stage == "delete":
            patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else crash())
        with pytest.raises(Crash):
            write_checkpoint(tmp_path, 3, write_half if stage == "write" else write_files, keep=2)
    survivors = ["checkpoint-3", "checkpoint-2"] if stage == "delete" else ["checkpoint-2", "checkpoint-1"]
    assert sound_checkpoints(tmp_path) == survivors
    assert unfinished_folders(tmp_path)

    write_checkpoint(tmp_path, 3, write_files, keep=2)
    write_checkpoint(tmp_path, 4, write_files, keep=2)
    assert sound_checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-3"]


def test_a_failed_write_tidies_up(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"wei")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_checkpoint(tmp_path, 1, fail, keep=2)
    assert list(tmp_path.iterdir()) == []


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[500] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "model.safetensors has 100 bytes instead of 7000"),
        (flip_a_bit, "model.safetensors is not what was written"),
        (lambda folder: (folder / "inner" / "state.json").unlink(), "inner/state.json is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{", encoding="utf-8"), "manifest.json is not JSON"),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_taken(tmp_path, damage, named):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, write_files, keep=2)
    damage(tmp_path / "checkpoint-2")
    heard = []
    found = latest_checkpoint(tmp_path, lambda folder, defect: heard.append((folder.name, defect)))
    assert found == tmp_path / "checkpoint-1"
    assert heard[0][0] == "checkpoint-2" and named in heard[0][1]
    write_checkpoint(tmp_path, 2, write_files, keep=2)
    assert latest_checkpoint(tmp_path, lambda *broken: pytest.fail(str(broken))) == tmp_path / "checkpoint-2"


def test_no_sound_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path, pytest.fail) is None
