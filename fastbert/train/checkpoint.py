"""Checkpoint folders that are either whole or not there: ``checkpoint-<step>`` with a manifest of sizes and SHA-256 sums.

A checkpoint is written to a hidden sibling, flushed to the disk and renamed, so a crash, a full disk or a power cut at any
moment leaves the earlier checkpoints as they were; they are deleted when the new one is durable. What a checkpoint contains is the
caller's business (``run_state.py``), and so is the thread that writes it (``background.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHECKPOINT_PREFIX = "checkpoint-"
UNFINISHED_PREFIX = ".unfinished-"
MANIFEST_NAME = "manifest.json"
_CHECKPOINT_NAME = re.compile(rf"{CHECKPOINT_PREFIX}(\d+)")
_READ_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a checkpoint will hold, as it was at one moment: ``write`` puts it into a folder, later and in any thread; ``nbytes`` of
    tensors.
    """

    write: Callable[[Path], None]
    nbytes: int


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


def write_checkpoint(output: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Has ``write`` fill a folder, makes it ``output/checkpoint-<step>``, and deletes all but this one and the ``keep - 1`` newest.

    Returns the checkpoint's path. Whatever ``write`` raises leaves no new checkpoint of this step and all others. What crashes and
    :func:`set_aside` have left goes, too, once the new checkpoint is durable.
    """
    target = checkpoint_path(output, step)
    unfinished = output / f"{UNFINISHED_PREFIX}{target.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        _write_manifest(unfinished)
        sync_tree(unfinished)
        if target.exists():
            set_aside(target)
        os.replace(unfinished, target)
        sync_path(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    others = [folder for folder in checkpoint_folders(output) if folder != target]
    for folder in others[keep - 1 :]:
        set_aside(folder)
    for folder in unfinished_folders(output):
        shutil.rmtree(folder)
    return target


def set_aside(folder: Path) -> None:
    """Makes a checkpoint one of the ``unfinished_folders``, which the next checkpoint replaces.

    So is each that goes: a crash halfway through its deletion must not leave half a checkpoint under a checkpoint's name.
    """
    doomed = folder.with_name(f"{UNFINISHED_PREFIX}deleted-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)


def delete_checkpoints(output: Path) -> None:
    """Deletes every checkpoint and every leftover of one."""
    for folder in checkpoint_folders(output):
        set_aside(folder)
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
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except ValueError as error:
        return f"{MANIFEST_NAME} is not JSON ({error})"
    except (AttributeError, KeyError, TypeError) as error:
        return f"{MANIFEST_NAME} is not a list of files with their sizes and sums ({error!r})"
    for name, (expected_size, expected_sum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected_size:
            return f"{name} has {size} bytes instead of {expected_size}"
        if _sha256(path) != expected_sum:
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


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """fsync; folders cannot be opened for it on Windows, where a rename is durable by itself."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
