"""Runs that are stopped, and what two runs have in common."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert.train.loop import TrainingLoop
from fastbert.train.metrics import read_metrics

SPEEDS = ("tokens_per_second", "seconds", "loader_wait", "peak_rss_bytes", "peak_cuda_bytes")


def quiet(text: str) -> None:
    """Instead of print."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in the middle of step number ``step``."""
    take_step = TrainingLoop._take_step

    def interrupted(loop, step_batches):
        if loop.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        take_step(loop, step_batches)

    monkeypatch.setattr(TrainingLoop, "_take_step", interrupted)


def rows_without_speed(output: str) -> list[dict]:
    rows = read_metrics(Path(output) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in SPEEDS} for row in rows]


def same_weights(first: Path | str, second: Path | str) -> bool:
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
