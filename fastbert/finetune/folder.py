"""The output folder of fine-tuning: whose it is, what may be deleted there, and how a model gets there whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastbert.tasks.glue_tasks import GLUE_TASKS
from fastbert.tasks.model import first_line
from fastbert.train.errors import SettingsError, TrainingError
from fastbert.train.run_folder import check_writable

RUN_NAME = "run.json"
CHECKPOINTS = "checkpoints"
_NEW = ".new"
# torch.save raises a RuntimeError where it cannot write, which only the name of torch's source file in it tells from others.
_TORCH_CANNOT_WRITE = "inline_container"
# What save_pretrained of models and tokenizers leaves, in the versions of transformers that fastbert works with.
_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "vocab.*",
                "added_tokens.json", "merges.txt", "*.model")  # fmt: skip
# What a run writes, by its command: --overwrite deletes nothing else.
_OWN = {
    "finetune": (RUN_NAME, CHECKPOINTS, *_MODEL_FILES, "task.json", "predictions_*.jsonl", "README.md", "learning_curves.png",
                 "confusion.png", "adapter", "adapted", "without-adaptation"),
    "glue": (RUN_NAME, "report.md", "scores.png", "submission", "submission.zip", *(task.name for task in GLUE_TASKS)),
}  # fmt: skip


def check_folder(output: Path, command: str, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The document of the run in ``output`` that is to be continued, or None. Raises SettingsError, before any work, for a folder
    that must not be written to."""
    check_writable(output)
    run = read_run(output)
    if run is None:
        if output.is_dir() and any(path.name != f".{RUN_NAME}.new" for path in output.iterdir()):  # which a killed run leaves
            raise SettingsError(f"{output} holds files but no {RUN_NAME} of fastbert {command}: choose another --output")
        if resume:
            raise SettingsError(f"{output} holds no run: there is nothing to resume (leave out --resume to start one)")
        return None
    if run.get("command_name") != command:
        raise SettingsError(f"{output} holds a run of another command ({run.get('command')}): choose another --output")
    if not (resume or overwrite):
        raise SettingsError(
            f"{output} already holds a run: --resume continues it, --overwrite deletes it, --output names another folder"
        )
    if overwrite and (strangers := sorted(_strangers(output, command))):
        raise SettingsError(
            f"--overwrite deletes the run in {output}, but {', '.join(strangers)} there is none of its files: move it, or choose "
            "another --output"
        )
    return run if resume else None


def _strangers(output: Path, command: str) -> list[str]:
    """What lies in ``output`` and a run does not write; hidden files are what an interrupted run was writing."""
    names = [path.name for path in output.iterdir() if not path.name.startswith(".")]
    return [name for name in names if not any(fnmatch(name, own) for own in _OWN[command])]


def read_run(output: Path) -> dict[str, Any] | None:
    """``run.json``, or None where there is none. Raises SettingsError for a damaged one."""
    path = output / RUN_NAME
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("no object")
        return document
    except ValueError as error:
        raise SettingsError(f"{path} is not readable ({error}); choose another --output") from error


def delete_folder(output: Path) -> None:
    """Deletes a run; ``run.json``, which says whose folder it is, goes last, so that an interrupted deletion can be repeated."""
    if not output.is_dir():
        return
    for path in sorted(output.iterdir(), key=lambda path: path.name == RUN_NAME):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def move_in(new: Path, output: Path) -> None:
    """Moves the files of ``new`` into ``output``, over those of their names, and deletes ``new``."""
    for path in sorted(new.iterdir()):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    new.rmdir()


def new_folder(output: Path) -> Path:
    """An empty folder inside ``output``, to write to before :func:`move_in`."""
    new = output / _NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """What weights are written to ``folder`` in: a full disk, of which safetensors and torch have errors of their own, is a
    TrainingError that names the folder and how much is free there. Other errors stay as they are."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _TORCH_CANNOT_WRITE not in str(error):
            raise
        free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
        raise TrainingError(
            f"{folder} cannot be written to: {first_line(error)} ({free / 1e6:,.1f} MB are free there); what is done stays, and "
            "--resume goes on from it"
        ) from error
