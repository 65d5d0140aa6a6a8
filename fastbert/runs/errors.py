"""What can stop a run, one class per exit code of the command line."""

from __future__ import annotations

from pathlib import Path


class SettingsError(ValueError):
    """What was asked for cannot work (exit code 2); the message names the setting and what would be right."""


class TrainingError(RuntimeError):
    """The run started and failed (exit code 1). The message names the step or file."""


class TrainingInterrupted(Exception):
    """SIGINT or SIGTERM stopped the run after ``step`` steps; ``checkpoint`` is the folder to resume from (exit 130)."""

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(f"stopped after step {step}; everything up to it is in {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


def first_line(error: BaseException) -> str:
    """Of its message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
