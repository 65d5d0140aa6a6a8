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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from fastbert.data.loader import Position
from fastbert.data.tokenizer import save_tokenizer
from fastbert.runs.errors import TrainingError

from .checkpoint import Snapshot
from .compare import Comparison
from .learner import Learner, os_errors
from .metrics import Window
from .run_folder import STATE_NAME, read_state

RNG_NAME = "rng.safetensors"


@dataclass
class RunState:
    """How far a run has come, after ``step`` steps.

    ``settings`` and ``data`` (counts and a fingerprint of the corpus) say which run it is; ``held_out_start``: scores before
    the first step; ``run_name``: among the runs of a tracker; ``processes``: how many trained last; ``position``: of the next batch
    in the data, a ``loader.Position``;
    ``tokens``: real tokens trained on; ``seconds``: spent in training steps and on their data; ``window``: what is not yet in
    ``metrics.jsonl``; ``skipped``: the steps that were left out, each with its number, the position of its first batch and the
    reason; ``comparison``: the state of ``--compare``, None without.
    """

    settings: dict[str, Any]
    data: dict[str, Any]
    held_out_start: dict[str, float]
    run_name: str = ""
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
        """Raises :class:`TrainingError` where the file is none of this version's."""
        values = read_state(checkpoint)
        try:
            return cls(**{**values, "window": Window.from_dict(values["window"])})
        except (KeyError, TypeError) as error:
            raise TrainingError(f"{checkpoint / STATE_NAME} is not the state of a run ({error!r})") from error

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)


def snapshot_run(state: RunState, learner: Learner, tokenizer: PreTrainedTokenizerFast, comparison: Comparison | None) -> Snapshot:
    """The run as it stands now, for a checkpoint. ``comparison``: the one that is still under way, if any.

    Its memory on the host is that of the weights and the optimizer's two moments once more, until it has been written.
    """
    learners = learner.snapshot()
    comparisons = None if comparison is None else comparison.snapshot()
    rng_states = _rng_states(learner.model.device)
    state_text = state.to_json()

    def write(folder: Path) -> None:
        learners.write(folder)
        save_tokenizer(tokenizer, folder)
        with os_errors(folder / RNG_NAME):
            save_file(rng_states, folder / RNG_NAME)
        if comparisons is not None:
            comparisons.write(folder)
        (folder / STATE_NAME).write_text(state_text, encoding="utf-8")

    return Snapshot(write, learners.nbytes + (0 if comparisons is None else comparisons.nbytes))


def load_run(checkpoint: Path, state: RunState, learner: Learner, comparison: Comparison | None) -> None:
    """Puts weights, optimizer and random numbers back to where they were when the checkpoint was written.

    Raises :class:`~fastbert.runs.errors.TrainingError` where the checkpoint is of another model.
    """
    learner.load(checkpoint)
    if comparison is not None:
        comparison.load(checkpoint, state.comparison)
    try:
        _restore_rng(load_file(checkpoint / RNG_NAME), learner.model.device)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise TrainingError(f"{checkpoint / RNG_NAME} holds no states of random generators: {error}") from error


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
