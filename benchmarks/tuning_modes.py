"""What a mode of tuning costs and brings: seconds of an epoch, memory and dev scores of full, top-k, LoRA and the head alone.

    python -m benchmarks.tuning_modes --data FOLDER [--tasks SST-2 WNUT-17] [--examples 3200] [--rounds 3] [--epochs 3]
        [--save FOLDER]

MiniLM (six layers of 384), 32 examples a batch. Beside ours stand transformers' model in transformers' Trainer, all of it and with
a frozen encoder, on batches padded to their longest, its matmuls through oneDNN (faster here than torch's default). All take
turns, an epoch each, timed from its first batch to its last step. The head's first epoch has the encoder's outputs to compute,
which is part of its time; its later ones, and those of later runs, find them. Peak memory is that of a run of one epoch beyond the
loaded model and the data. Scores are those of a run of --epochs with each mode's own learning rate. The last line of stdout is one
JSON document; --save keeps it in benchmarks/results/FOLDER.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fastbert.finetune.head_features import cache_folder
from fastbert.finetune.modes import prepare_mode
from fastbert.finetune.prepared import DEV, TRAIN, PreparedTask
from fastbert.finetune.run import train_seed
from fastbert.finetune.settings import MODES, FinetuneSettings
from fastbert.finetune.trainer import build_trainer
from fastbert.tasks.model import TaskModel, load_model

from .harness import interleaved, paired_ratio, quiet, summary, write_results
from .machine import machine
from .memory import peak_bytes
from .peers import onednn_float32_matmul
from .tasks import prepared

THEIRS_FULL, THEIRS_FROZEN = "transformers, full", "transformers, frozen encoder"
# With which of them each mode of ours is compared.
PEERS = {"full": THEIRS_FULL, "top-k": THEIRS_FULL, "lora": THEIRS_FULL, "head": THEIRS_FROZEN}
HEAD_GOAL = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["SST-2", "WNUT-17"])
    parser.add_argument("--examples", type=int, default=3200, help="of each split at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3.0, help="of the runs whose scores are shown; 0 for none")
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as cache, onednn_float32_matmul():
        os.environ["XDG_CACHE_HOME"] = cache  # what is measured is computed here
        for name in given.tasks:
            results[name] = measure(name, given)
    write_results("tuning_modes", {"machine": machine(), "goals": {"head": HEAD_GOAL}, "results": results}, given.save)


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One task: seconds of each contender's epochs, its memory, its scores."""
    settings, inputs = prepared(name, given.data, learning_rate=None, limit=given.examples)
    rows = inputs.train.features.rows
    tokens = sum(len(row["input_ids"]) for row in rows)
    print(f"{name}: {len(rows):,} examples, {tokens:,} tokens")
    print(f"  {'':<30}{'s / epoch':>10}{'peak MB':>9}{'tokens/s':>10}  beside")
    epochs = {name: Epoch(tuned, rows, settings) for name, (tuned, rows) in contenders(settings, inputs, rows).items()}
    with quiet():
        first_head = head_with_its_outputs(settings, inputs, rows)
        peaks = {contender: peak_bytes(epoch, "cpu") for contender, epoch in epochs.items()}
        interleaved(epochs, given.rounds, uncounted_rounds=0)
    seconds = {contender: epoch.seconds[1:] for contender, epoch in epochs.items()}  # the first was that of the memory
    result: dict[str, Any] = {"examples": len(rows), "tokens": tokens, "head_first_epoch_s": first_head, "modes": {}}
    for contender, times in seconds.items():
        figures = {**summary(times), "tokens_per_second": tokens / summary(times)["median_s"], "peak_bytes": peaks[contender]}
        beside = ""
        if contender in PEERS:
            ratio = figures["times_peer"] = paired_ratio(seconds[PEERS[contender]], times)
            beside = f"{ratio['median']:.1f}x {PEERS[contender]}"
        if contender == "head":
            figures["times_full"] = paired_ratio(seconds["full"], times)
            beside += f", {figures['times_full']['median']:.1f}x full"
        result["modes"][contender] = figures
        memory = f"{figures['peak_bytes'] / 1e6:,.0f}" if figures["peak_bytes"] is not None else "?"
        rate = figures["tokens_per_second"]
        print(f"  {contender:<30}{figures['median_s']:>10.2f}{memory:>9}{rate:>10,.0f}  {beside}", flush=True)
    print(f"  {'head, first epoch':<30}{first_head:>10.2f}", flush=True)
    if given.epochs:
        result["scores"] = scores(settings, inputs, given.epochs)
    return result


class Epoch:
    """Trains ``loaded`` for an epoch on ``rows`` when called, with a Trainer of its own each time; ``seconds``: of each epoch."""

    def __init__(self, loaded: TaskModel, rows: Sequence[dict[str, Any]], settings: FinetuneSettings) -> None:
        self.loaded, self.rows, self.settings = loaded, rows, replace(settings, epochs=1.0)
        self.seconds: list[float] = []

    def __call__(self) -> None:
        off = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        nothing = {"metric": "", "score": dict, "say": lambda line: None}
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(self.loaded, self.rows, self.settings, 0, folder=Path(folder), **nothing, **off)
            trainer.add_callback(Clock(self.seconds))
            trainer.train()


class Clock(TrainerCallback):
    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.started = seconds, 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def contenders(
    settings: FinetuneSettings, inputs: PreparedTask, rows: list[dict[str, Any]]
) -> dict[str, tuple[TaskModel, Sequence[dict[str, Any]]]]:
    """What trains, and on what, of each contender."""
    theirs, frozen = (load_model(settings.model, inputs.task, fast=False) for _ in range(2))
    encoder = frozen.model.base_model
    encoder.requires_grad_(False)
    if encoder.pooler is not None:
        encoder.pooler.requires_grad_(True)
    ours = {mode: tuned(settings, inputs, rows, mode) for mode in MODES}
    return {THEIRS_FULL: (theirs, rows), THEIRS_FROZEN: (frozen, rows), **ours}


def tuned(
    settings: FinetuneSettings, inputs: PreparedTask, rows: list[dict[str, Any]], mode: str
) -> tuple[TaskModel, Sequence[dict[str, Any]]]:
    """Our model prepared for ``mode``, and the rows it takes."""
    loaded = load_model(settings.model, inputs.task)
    mine = replace(settings, mode=mode)
    tuning = prepare_mode(loaded, {TRAIN: rows}, mine, family=inputs.task.family, say=lambda line: None)
    return tuning.trained, tuning.rows[TRAIN]


def head_with_its_outputs(settings: FinetuneSettings, inputs: PreparedTask, rows: list[dict[str, Any]]) -> float:
    """Seconds of the head's first epoch, with the encoder's outputs to compute."""
    shutil.rmtree(cache_folder(), ignore_errors=True)
    loaded = load_model(settings.model, inputs.task)
    started = time.perf_counter()
    mine = replace(settings, mode="head")
    tuning = prepare_mode(loaded, {TRAIN: rows}, mine, family=inputs.task.family, say=lambda line: None)
    computed = time.perf_counter() - started
    epoch = Epoch(tuning.trained, tuning.rows[TRAIN], mine)
    epoch()
    return computed + epoch.seconds[0]


def scores(settings: FinetuneSettings, inputs: PreparedTask, epochs: float) -> dict[str, Any]:
    """Dev scores of each mode after a whole run, with the mode's own learning rate."""
    inputs = replace(inputs, splits={TRAIN: inputs.train, DEV: inputs.dev})
    results = {}
    print(f"  after {epochs:g} epochs: learning rate, seconds (evaluations and checkpoints left out), dev scores")
    for mode in MODES:
        with tempfile.TemporaryDirectory() as folder:
            run = replace(settings, mode=mode, epochs=epochs, output=folder)
            result, _ = train_seed(run, inputs, 0, torch.device("cpu"), lambda line: print(line, file=sys.stderr))
        results[mode] = {
            "learning_rate": run.effective_learning_rate, "train_seconds": result.train_seconds, "scores": result.scores[DEV],
        }  # fmt: skip
        shown = ", ".join(f"{metric} {100 * value:.2f}" for metric, value in result.scores[DEV].items())
        print(f"  {mode:<30}{run.effective_learning_rate:>10g}{result.train_seconds:>9.1f}  {shown}", flush=True)
    return results


if __name__ == "__main__":
    main()
