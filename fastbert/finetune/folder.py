"""The output folder of fine-tuning: whose it is, what may be deleted there, and how a model gets there whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastbert.runs.command_settings import CommandSettings, option
from fastbert.runs.errors import SettingsError
from fastbert.runs.folder import check_writable
from fastbert.tasks.glue_tasks import GLUE_TASKS

RUN_NAME = "run.json"
CHECKPOINTS = "checkpoints"
_NEW = ".new"
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


def with_those_of_the_run(settings: type[CommandSettings], given: dict[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """The options ``given``, with ``--resume`` over the settings of the run in the output folder.

    Raises SettingsError where ``required`` ones are missing, and for a folder that holds no such run.
    """
    values = dict(given)
    if given.get("resume") and not given.get("overwrite"):
        output = Path(given.get("output", settings.output))
        run = check_folder(output, settings.command_name, resume=True, overwrite=False)
        values = {**(run or {}).get("settings", {}), "overwrite": False, **given}
    if missing := [option(name) for name in required if name not in values]:
        raise SettingsError(f"{', '.join(missing)} missing; fastbert {settings.command_name} --help shows all options")
    return values


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
