"""``fastbert pretrain``: the options of the command line to settings, errors to exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastbert.train.checkpoint import checkpoint_folders, latest_checkpoint
from fastbert.train.errors import TrainingError, TrainingInterrupted
from fastbert.train.run_folder import STATE_NAME, check_output_folder
from fastbert.train.settings import PretrainSettings

from .command import DONE, FAILED, INTERRUPTED, CommandFailure, CommandResult, Say


def pretrain(given: dict[str, Any], say: Say) -> CommandResult:
    """Runs the command with the options ``given`` by name.

    Raises :class:`CommandFailure`; other errors are left to ``run_command``.
    """
    settings = settings_from_options(given)
    # Before torch and transformers are imported: a refusal comes at once.
    check_output_folder(Path(settings.output), resume=settings.resume, overwrite=settings.overwrite)
    from fastbert.train.memory import keep_freed_memory
    from fastbert.train.pretrain import pretrain as run

    output = Path(settings.output)
    keep_freed_memory()  # this process does nothing else; where it cannot be, training is a little slower
    try:
        result = run(settings, say)
    except TrainingInterrupted as stop:
        raise CommandFailure(f"{stop}\nTo go on: {resume_command(output)}", INTERRUPTED) from stop
    except KeyboardInterrupt as interrupt:
        raise CommandFailure(f"interrupted; {_what_is_left(output)}", INTERRUPTED) from interrupt
    except TrainingError as error:
        raise CommandFailure(f"{error}; {_what_is_left(output)}") from error
    agree = result.comparison is None or result.comparison["agree"]
    return CommandResult(result.to_dict(), DONE if agree else FAILED)


def settings_from_options(given: dict[str, Any]) -> PretrainSettings:
    """Settings with defaults for the options that are not given; with ``--resume``, those of the run instead.

    Raises :class:`SettingsError` for values that cannot work, and for options that differ from those of a resumed run.
    """
    if not given.get("resume"):
        return PretrainSettings(**given)
    output = given.get("output", PretrainSettings.output)
    check_output_folder(Path(output), resume=True, overwrite=False)
    checkpoint = latest_checkpoint(Path(output), lambda folder, defect: None)
    if checkpoint is None:
        return PretrainSettings(output=output, resume=True)
    run_settings = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))["settings"]
    PretrainSettings.refuse_changes(output, given, run_settings)
    return PretrainSettings.from_dict({**run_settings, "overwrite": False, **given, "output": output})


def resume_command(output: Path) -> str:
    return PretrainSettings(output=str(output)).command() + " --resume"


def _what_is_left(output: Path) -> str:
    checkpoints = checkpoint_folders(output) if output.is_dir() else []
    if not checkpoints:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {checkpoints[0]}, and this goes on from it: {resume_command(output)}"
