"""The output folder of a run: whose it is, what may be written there, and how its JSON files get there whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastbert.runs.errors import SettingsError, TrainingError
from fastbert.runs.folder import check_outside, check_writable

from .checkpoint import UNFINISHED_PREFIX, checkpoint_folders, delete_checkpoints, sync_path, sync_tree
from .settings import PretrainSettings

RUN_NAME = "run.json"
METRICS_NAME = "metrics.jsonl"
PLOT_NAME = "loss.png"
TENSORBOARD_NAME = "tensorboard"  # a folder, of --report-to tensorboard
CARD_NAME = "README.md"
COMPARISON_NAME = "compare.json"
STATE_NAME = "run_state.json"  # in every checkpoint
_MODEL_FILES = ("config.json", "model.safetensors")
# What the save_pretrained of tokenizers leaves, in the versions of transformers that fastbert works with.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
OWN_FILES = (RUN_NAME, METRICS_NAME, PLOT_NAME, CARD_NAME, COMPARISON_NAME, *_MODEL_FILES, *_TOKENIZER_FILES)


def own_files(output: Path) -> list[Path]:
    """The files in ``output`` whose names a run writes (checkpoint folders not among them)."""
    return [path for name in OWN_FILES if (path := output / name).is_file()]


def check_folders(settings: PretrainSettings) -> None:
    """Refuses, before any work, an output folder as :func:`check_output_folder` does, and one that has to do with what is read.

    Raises :class:`SettingsError` where ``overwrite`` would delete the model or the tokenizer that the run starts from, and where
    the run's own files would be text of a ``corpus`` folder.
    """
    output = Path(settings.output)
    check_output_folder(output, resume=settings.resume, overwrite=settings.overwrite)
    if settings.overwrite:
        check_outside(output, [name for name in (settings.model, settings.tokenizer) if name is not None])
    from fastbert.data.shards import is_prepared  # here: it brings NumPy, for which no command line waits

    for source in settings.corpus:
        if Path(source).is_dir() and not is_prepared(source) and output.resolve().is_relative_to(Path(source).resolve()):
            raise SettingsError(
                f"--output {output} lies in --corpus {source}, a folder of which all is read as text, {METRICS_NAME} of the run "
                "too: choose another --output"
            )


def check_output_folder(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses, before any work, an output folder that a run must not be written to.

    Raises :class:`SettingsError` where it holds a run and neither ``resume`` nor ``overwrite`` is set, where there is none
    to resume (one that was stopped before its first checkpoint can be), and where files of the same names are not from a run of
    fastbert; ``OSError`` where it cannot be written.
    """
    check_writable(output)
    holds_run = (output / RUN_NAME).is_file()
    checkpoints = checkpoint_folders(output) if output.is_dir() else []
    if resume and not checkpoints and not (holds_run and read_run(output)["results"] is None):
        instead = "--overwrite starts the run anew" if holds_run else "leave out --resume to start a run"
        raise SettingsError(f"{output} holds no checkpoint: there is nothing to resume ({instead})")
    if holds_run and not (resume or overwrite):
        raise SettingsError(
            f"{output} already holds a run: --resume continues it, --overwrite deletes it, --output names another folder"
        )
    if not holds_run:
        strangers = [*own_files(output), *checkpoints]
        if strangers:
            raise SettingsError(
                f"{output} holds {', '.join(path.name for path in strangers)} but no {RUN_NAME}, so these are not from a "
                "run of fastbert and are left alone; choose another --output"
            )


def read_run(output: Path) -> dict[str, Any]:
    """What ``run.json`` holds: ``settings``, and ``results``, None until the run is finished.

    Raises :class:`SettingsError` where it is no such file.
    """
    try:
        run = json.loads((output / RUN_NAME).read_text(encoding="utf-8"))
        return {"settings": dict(run["settings"]), "results": run["results"]}
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{output / RUN_NAME} is not that of a run ({error!r}): --overwrite starts the run anew") from error


def delete_run(output: Path) -> None:
    """Deletes the files of a run and nothing else; ``run.json`` goes last, so an interrupted deletion can be repeated."""
    if not output.is_dir():
        return
    delete_checkpoints(output)
    for path in (output / TENSORBOARD_NAME).glob("events.out.tfevents.*"):
        path.unlink()
    for path in sorted(own_files(output), key=lambda path: path.name == RUN_NAME):
        path.unlink()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The values of a ``RunState``, with the settings of the run in ``"settings"``.

    Raises :class:`TrainingError` where the file is none that this version of fastbert has written.
    """
    path = checkpoint / STATE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainingError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("settings"), dict):
        raise TrainingError(f"{path} is not the state of a run: it has no settings")
    if "position" not in values:
        raise TrainingError(
            f"{checkpoint} is from an earlier version of fastbert, which made other batches: --overwrite starts the run anew"
        )
    return values


@contextmanager
def whole_files(output: Path, last: str) -> Iterator[Path]:
    """A hidden folder for files, which become those of ``output`` together at the end, on the disk; the file named ``last`` comes
    last, so where it is, they all are. Where the writing fails ``output`` is as it was.
    """
    folder = output / f"{UNFINISHED_PREFIX}files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        sync_tree(folder)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
            os.replace(path, output / path.name)
        sync_path(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
