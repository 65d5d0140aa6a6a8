"""Experiment trackers by name, each through accelerate: they get the lines of ``metrics.jsonl``, which stays the record of a run.

tensorboard writes ``<output>/tensorboard``; trackio and wandb have a project :data:`PROJECT`, in which a run keeps its name when it
is resumed. Without a network: tensorboard and trackio (``$TRACKIO_DIR``) write to this machine only, wandb does with
``WANDB_MODE=offline``, into ``<output>/wandb``, from where ``wandb sync`` sends it later.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastbert.runs import Say
from fastbert.runs.errors import SettingsError

from .run_folder import METRICS_NAME, TENSORBOARD_NAME

PROJECT = "fastbert"


def check_trackers(names: Sequence[str]) -> None:
    """Raises :class:`SettingsError` with the command that installs what ``names`` need and is missing."""
    if not names:
        return
    if importlib.util.find_spec("accelerate") is None:
        raise SettingsError(f"--report-to {' '.join(names)} needs accelerate: pip install 'fastbert[train]'")
    from accelerate import utils
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if unknown := [name for name in names if name not in LOGGER_TYPE_TO_CLASS]:
        raise SettingsError(f"--report-to {' '.join(unknown)} needs a newer accelerate: pip install -U accelerate")
    # accelerate's own checks: a folder of the same name, which wandb makes, is no package.
    if missing := [name for name in names if not getattr(utils, f"is_{name}_available")()]:
        raise SettingsError(f"--report-to {' '.join(missing)}: not installed (pip install {' '.join(missing)})")


def new_run_name(output: Path) -> str:
    """That of the output folder and a few letters that no other run has."""
    return f"{output.resolve().name}-{uuid.uuid4().hex[:8]}"


class Trackers:
    """Sends rows to the trackers ``names`` until :meth:`close`.

    ``step``: after which the run goes on, None for a new one. A tracker that fails is said so once and gets nothing more; training
    goes on.
    """

    def __init__(
        self, names: Sequence[str], output: Path, run_name: str, step: int | None, settings: dict[str, Any], say: Say
    ) -> None:
        self._say = say
        self._trackers: dict[str, Any] = {}
        for name in names:
            self._guarded(name, lambda name=name: self._start(name, output, run_name, step, settings))

    def log(self, row: dict[str, Any]) -> None:
        """``row``: of ``metrics.jsonl``. Names of what is nested have a slash: ``held_out/mlm_loss``."""
        values = _flat(row)
        step = values.pop("step")
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(values, step=step))

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.finish)
        self._trackers.clear()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, name: str, output: Path, run_name: str, step: int | None, settings: dict[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers ask it whether they may log
        arguments = _arguments(name, output, run_name, step)
        tracker = LOGGER_TYPE_TO_CLASS[name](**arguments)
        tracker.start()
        if name != "tensorboard":  # it would make a run of its own of them; they are in run.json beside
            tracker.store_init_configuration(settings)
        self._trackers[name] = tracker

    def _guarded(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker does must not end the run
            self._trackers.pop(name, None)
            text = str(error).strip().split("\n")[0]
            self._say(
                f"{name} failed and gets nothing more of this run ({type(error).__name__}: {text}); {METRICS_NAME} has it all"
            )


def _arguments(name: str, output: Path, run_name: str, step: int | None) -> dict[str, Any]:
    """Of accelerate's tracker; what accelerate calls the run's name is the project to trackio and wandb."""
    if name == "tensorboard":
        # Of a run that was killed, what came after its last checkpoint comes again.
        return {"run_name": TENSORBOARD_NAME, "logging_dir": str(output), "purge_step": None if step is None else step + 1}
    if name == "trackio":
        return {"run_name": PROJECT, "name": run_name, "resume": "allow"}
    return {"run_name": PROJECT, "name": run_name, "id": run_name.rpartition("-")[2], "resume": "allow", "dir": str(output)}


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in row.items():
        values |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return values
