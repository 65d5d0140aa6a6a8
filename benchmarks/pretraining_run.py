"""The same pretraining by fastbert and by transformers in the same time: what each reaches on held-out text.

    python -m benchmarks.pretraining_run --corpus PATH... --tokenizer FOLDER --work FOLDER [--minutes 20] [--dtype bfloat16]
        [--save FOLDER] [--picture FILE]

Both start from the same weights and take batches of the same pairs and masks in the same order, with AdamW, dropout 0.1 and a
learning rate that falls to 0 at their own last step. fastbert runs its command; transformers' BertForPreTraining (sdpa) gets each
batch padded to its longest sequence, in the loop of this file. Each has one core of its own and one thread, both run at the same
time. Steps are as many as a trial of each fits into the minutes. Time is that of the steps and their batches: held-out scores and
checkpoints are not counted on either side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastbert.data.loader import Position, step_batches
from fastbert.runs.command_settings import CommandSettings
from fastbert.train.compare import Comparison, transformers_scores
from fastbert.train.evaluate import evaluate
from fastbert.train.inputs import build_model, prepare_data
from fastbert.train.learner import MicroBatch
from fastbert.train.metrics import BatchScores, read_metrics
from fastbert.train.pretrain import pretrain
from fastbert.train.run_folder import METRICS_NAME
from fastbert.train.settings import PretrainSettings

from .harness import write_results
from .machine import machine

OURS, THEIRS = "fastbert", "transformers"
WINDOW = 50  # steps of a point of a curve
TRIAL_STEPS = 2 * WINDOW
SIDE_RESULT = "side.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True, help="files and folders of text, or a folder of fastbert prepare")
    parser.add_argument("--tokenizer", help="folder; left out where the corpus is prepared")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs; deleted by nobody")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--side", choices=[OURS, THEIRS], help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        run_side(given)
        return
    given.work.mkdir(parents=True, exist_ok=True)
    trials = run_both(given, {OURS: TRIAL_STEPS, THEIRS: TRIAL_STEPS})
    steps = {side: round(given.minutes * 60 / trial["seconds_per_step"]) for side, trial in trials.items()}
    print(f"steps in {given.minutes:g} minutes: {steps}", flush=True)
    results = run_both(given, steps)
    settings = CommandSettings.to_dict(settings_of(given, given.work, 1))
    for name in ("output", "steps", "warmup_steps"):
        del settings[name]
    document = {"machine": machine(), "minutes": given.minutes, "settings": settings, "results": results}
    if given.picture:
        plot(results, given.picture)
    show(results)
    write_results("pretraining_run" if given.dtype == "float32" else f"pretraining_run_{given.dtype}", document, given.save)


def settings_of(given: argparse.Namespace, folder: Path, steps: int) -> PretrainSettings:
    return PretrainSettings(
        corpus=tuple(given.corpus), tokenizer=given.tokenizer, model=given.model, output=str(folder), steps=steps,
        tokens_per_batch=given.tokens_per_batch, learning_rate=given.learning_rate, dtype=given.dtype, device="cpu",
        log_steps=WINDOW, save_steps=1000, overwrite=True,
    )  # fmt: skip


def run_both(given: argparse.Namespace, steps: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What each side reached after its ``steps``, both in processes of their own, on cores of their own, at the same time."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RuntimeError("two cores are needed: each side has one of its own")

    def run(side: str, core: int) -> dict[str, Any]:
        folder = side_folder(given.work, side, steps[side])
        command = [sys.executable, "-m", "benchmarks.pretraining_run", *sys.argv[1:], "--side", side, "--steps", str(steps[side])]
        with open(given.work / f"{side}.log", "a", encoding="utf-8") as log:
            subprocess.run(
                ["taskset", "-c", str(core), *command],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                check=True,
            )
        return json.loads((folder / SIDE_RESULT).read_text(encoding="utf-8"))

    with ThreadPoolExecutor(2) as pool:
        running = {side: pool.submit(run, side, core) for side, core in zip((OURS, THEIRS), cores)}
        return {side: future.result() for side, future in running.items()}


def side_folder(work: Path, side: str, steps: int) -> Path:
    return work / f"{side}-{steps}"


def run_side(given: argparse.Namespace) -> None:
    folder = side_folder(given.work, given.side, given.steps)
    settings = settings_of(given, folder, given.steps)
    if given.side == OURS:
        result = our_run(settings, folder)
    else:
        folder.mkdir(exist_ok=True)
        result = their_run(replace(settings, overwrite=False))
    (folder / SIDE_RESULT).write_text(json.dumps(result), encoding="utf-8")


def our_run(settings: PretrainSettings, folder: Path) -> dict[str, Any]:
    run = pretrain(settings)
    rows = [row for row in read_metrics(folder / METRICS_NAME) if "tokens_per_second" in row]
    seconds, curve = 0.0, []
    for row in rows:
        seconds += row["tokens"] / row["tokens_per_second"]
        curve.append((row["step"], seconds, row["loss"]))
    windows = [row["tokens"] / row["tokens_per_second"] / WINDOW for row in rows if row["step"] % WINDOW == 0]
    return side_result(run.steps, run.tokens, run.seconds, run.parameters, run.held_out_start, run.held_out, curve, windows)


def their_run(settings: PretrainSettings) -> dict[str, Any]:
    data = prepare_data(settings, print, None)
    torch.manual_seed(settings.seed)
    comparison = Comparison(build_model(settings, data.tokenizer, None), settings, data.tokenizer.pad_token_id)
    learner, scores = comparison.learner, transformers_scores(data.tokenizer.pad_token_id)
    held_out_start = evaluate(learner.model, data.held_out, scores)
    learner.model.train()
    batches = step_batches(data.batches[1], Position())
    tokens, losses, curve, windows = 0, [], [], []
    started = window_started = time.perf_counter()
    for step in range(1, settings.steps + 1):
        batch = next(batches).batches[0]
        losses.append(BatchScores(*learner.step([MicroBatch(batch.padded(data.tokenizer.pad_token_id))]).tolist()).loss)
        tokens += batch.num_tokens
        now = time.perf_counter()
        if step % WINDOW == 0:
            curve.append((step, now - started, statistics.fmean(losses)))
            windows.append((now - window_started) / WINDOW)
            print(
                f"step {step:,} of {settings.steps:,}: loss {curve[-1][2]:.3f}, {tokens / (now - started):,.0f} tokens/s",
                flush=True,
            )
            losses, window_started = [], now
    seconds = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in learner.model.parameters())
    held_out = evaluate(learner.model, data.held_out, scores)
    return side_result(settings.steps, tokens, seconds, parameters, held_out_start, held_out, curve, windows)


def side_result(steps, tokens, seconds, parameters, held_out_start, held_out, curve, windows) -> dict[str, Any]:
    """``curve``: (step, seconds, training loss of the last steps)."""
    return {
        "parameters": parameters, "steps": steps, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "seconds_per_step": statistics.median(windows) if windows else seconds / steps, "held_out_start": held_out_start,
        "held_out": held_out, "curve": curve,
    }  # fmt: skip


def show(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'':<14}{'steps':>8}{'tokens':>13}{'seconds':>9}{'tokens/s':>10}{'MLM loss':>10}{'MLM acc.':>10}{'NSP acc.':>10}")
    for side, result in results.items():
        scores = result["held_out"]
        print(
            f"{side:<14}{result['steps']:>8,}{result['tokens']:>13,}{result['seconds']:>9,.0f}{result['tokens_per_second']:>10,.0f}"
            f"{scores['mlm_loss']:>10.3f}{scores['mlm_accuracy']:>10.1%}{scores['nsp_accuracy']:>10.1%}"
        )


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Training loss over time, with the held-out loss at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for colour, (side, result) in zip(("C0", "C1"), results.items()):
        minutes = [seconds / 60 for _, seconds, _ in result["curve"]]
        axes.plot(minutes, [loss for _, _, loss in result["curve"]], color=colour, label=f"{side}, training")
        axes.plot(result["seconds"] / 60, result["held_out"]["loss"], "o", color=colour, label=f"{side}, held out")
    axes.set(title="Masked-LM and next-sentence loss", xlabel="minutes", ylabel="nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
