"""Checkpoint folders that are either whole or not there: ``checkpoint-<step>`` with a manifest of sizes and SHA-256 sums.

A checkpoint is written to a hidden sibling, flushed to the disk and renamed, so a crash, a full disk or a power cut at any
moment leaves the earlier checkpoints as they were. What a checkpoint contains is the caller's business (``run_state.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

CHECKPOINT_PREFIX = "checkpoint-"
UNFINISHED_PREFIX = ".unfinished-"
MANIFEST_NAME = "manifest.json"
KEPT_CHECKPOINTS = 2
_CHECKPOINT_NAME = re.compile(rf"{CHECKPOINT_PREFIX}(\d+)")
_READ_BYTES = 1 << 20


def checkpoint_folders(output: Path) -> list[Path]:
    """The checkpoints in ``output``, newest first, sound or not."""
    folders = [entry for entry in output.iterdir() if _CHECKPOINT_NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(folders, key=checkpoint_step, reverse=True)


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))


def checkpoint_path(output: Path, step: int) -> Path:
    return output / f"{CHECKPOINT_PREFIX}{step}"


def unfinished_folders(output: Path) -> list[Path]:
    """What crashes left behind while they wrote or deleted a checkpoint."""
    return [entry for entry in output.iterdir() if entry.name.startswith(UNFINISHED_PREFIX) and entry.is_dir()]


def write_checkpoint(output: Path, step: int, write: Callable[[Path], None], *, keep: int = KEPT_CHECKPOINTS) -> Path:
    """Has ``write`` fill a folder, makes it ``output/checkpoint-<step>``, and deletes all but the ``keep`` newest.

    Returns the checkpoint's path. Whatever ``write`` raises leaves no checkpoint of this step and all earlier ones.
    """
    target = checkpoint_path(output, step)
    unfinished = output / f"{UNFINISHED_PREFIX}{target.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        _write_manifest(unfinished)
        _sync_tree(unfinished)
        if target.exists():
            _delete_folder(target)
        os.replace(unfinished, target)
        _sync_path(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for folder in checkpoint_folders(output)[keep:]:
        _delete_folder(folder)
    return target


def delete_checkpoints(output: Path) -> None:
    """Deletes every checkpoint and every leftover of one."""
    for folder in checkpoint_folders(output):
        _delete_folder(folder)
    for folder in unfinished_folders(output):
        shutil.rmtree(folder)


def latest_checkpoint(output: Path, on_broken: Callable[[Path, str], None]) -> Path | None:
    """The newest sound checkpoint, or None; ``on_broken`` hears of every newer one that is not, with the reason."""
    for folder in checkpoint_folders(output):
        defect = checkpoint_defect(folder)
        if defect is None:
            return folder
        on_broken(folder, defect)
    return None


def checkpoint_defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None where every file is as it was written."""
    manifest_path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except ValueError as error:
        return f"{MANIFEST_NAME} is not JSON ({error})"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def _write_manifest(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_path(path)


def _sync_path(path: Path) -> None:
    """fsync; folders cannot be opened for it on Windows, where a rename is durable by itself."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete_folder(folder: Path) -> None:
    """Renamed first: a crash halfway through must not leave half a checkpoint under a checkpoint's name."""
    doomed = folder.with_name(f"{UNFINISHED_PREFIX}deleted-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
