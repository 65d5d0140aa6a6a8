"""Everything a run needs to go on where it stopped: what a checkpoint folder holds, and how it gets in and out.

``model.safetensors``, ``config.json`` and the tokenizer's files make the folder a model that transformers loads;
``optimizer.safetensors``, ``rng.safetensors`` and ``run_state.json`` are for the run. JSON and safetensors only.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from fastbert.data.loader import Position

from .checkpoint import write_checkpoint
from .compare import Comparison
from .errors import TrainingError
from .learner import Learner, os_errors
from .metrics import Window
from .run_folder import STATE_NAME

RNG_NAME = "rng.safetensors"


@dataclass
class RunState:
    """How far a run has come, after ``step`` steps.

    ``settings`` and ``data`` (counts and a fingerprint of the corpus) say which run it is; ``held_out_start``: scores before
    the first step; ``processes``: how many trained last; ``position``: of the next batch in the data, a ``loader.Position``;
    ``tokens``: real tokens trained on; ``seconds``: spent in training steps and on their data; ``window``: what is not yet in
    ``metrics.jsonl``; ``skipped``: the steps that were left out, each with its number, the position of its first batch and the
    reason; ``comparison``: the state of ``--compare``, None without.
    """

    settings: dict[str, Any]
    data: dict[str, Any]
    held_out_start: dict[str, float]
    processes: int = 1
    step: int = 0
    position: dict[str, int] = field(default_factory=lambda: dataclasses.asdict(Position()))
    tokens: int = 0
    seconds: float = 0.0
    window: Window = field(default_factory=Window.empty)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    comparison: dict[str, Any] | None = None

    @classmethod
    def read(cls, checkpoint: Path) -> RunState:
        values = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
        if "position" not in values:
            raise TrainingError(
                f"{checkpoint} is from an earlier version of fastbert, which made other batches: --overwrite starts the run anew"
            )
        return cls(**{**values, "window": Window.from_dict(values["window"])})

    def write(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        (folder / STATE_NAME).write_text(text, encoding="utf-8")


def save_run(
    output: Path, state: RunState, learner: Learner, tokenizer: PreTrainedTokenizerBase, comparison: Comparison | None
) -> Path:
    """Writes ``checkpoint-<step>`` and returns its path. ``comparison``: the one that is still under way, if any.

    Raises ``OSError`` where the disk takes no more; the checkpoints before it stay.
    """

    def write(folder: Path) -> None:
        learner.save(folder)
        tokenizer.save_pretrained(folder)
        with os_errors(folder):
            save_file(_rng_states(learner.model.device), folder / RNG_NAME)
        if comparison is not None:
            comparison.save(folder)
        state.write(folder)

    return write_checkpoint(output, state.step, write)


def load_run(checkpoint: Path, state: RunState, learner: Learner, comparison: Comparison | None) -> None:
    """Puts weights, optimizer and random numbers back to where they were when the checkpoint was written.

    Raises :class:`~fastbert.train.errors.TrainingError` where the checkpoint is of another model.
    """
    learner.load(checkpoint)
    if comparison is not None:
        comparison.load(checkpoint, state.comparison)
    _restore_rng(load_file(checkpoint / RNG_NAME), learner.model.device)


def _rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_rng(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """A run moved to a GPU finds no state for it and goes on with the generator as it was seeded."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
