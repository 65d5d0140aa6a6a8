"""What people look at in a fine-tuned folder: learning curves, a confusion matrix, the model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastbert.runs.model import pick_device
from fastbert.train.run_facts import device_name, versions

from .model_card import write_card
from .plots import missing_packages, plot_confusion, plot_learning_curves
from .prepared import DEV, PreparedTask
from .settings import FinetuneSettings

CURVES_NAME, CONFUSION_NAME = "learning_curves.png", "confusion.png"
# What the card says of the settings; data, seeds and model have sections of their own.
_SETTINGS = ("mode", "epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "warmup", "weight_decay", "dtype")


def write_report(
    settings: FinetuneSettings,
    prepared: PreparedTask,
    seeds: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Pictures and README.md in the run's folder; ``seeds``: those of run.json, with their logs; ``results``: a FinetuneResult.
    Without matplotlib or scikit-learn ``say`` says why there are no pictures."""
    output = Path(settings.output)
    pictures = {}
    if (missing := missing_packages()) is not None:
        say(f"No pictures: {missing}")
    else:
        metric = results["main_metric"]
        plot_learning_curves({f"seed {seed}": result["log"] for seed, result in seeds.items()}, metric, output / CURVES_NAME)
        pictures[CURVES_NAME] = f"Training loss, and {metric} on the dev set"
        if (labels := _confusion(prepared, output)) is not None:
            plot_confusion(*labels, prepared.task.labels, output / CONFUSION_NAME)
            pictures[CONFUSION_NAME] = "Labels of the dev set (rows) and what the best seed's model takes them for (columns)"
    write_card(_facts(settings, prepared, results, pictures), output)


def _confusion(prepared: PreparedTask, output: Path) -> tuple[list[str], list[str]] | None:
    with (output / f"predictions_{DEV}.jsonl").open(encoding="utf-8") as file:
        predictions = [json.loads(line) for line in file]
    return prepared.task.confusion(predictions, prepared.dev.examples)


def _facts(
    settings: FinetuneSettings, prepared: PreparedTask, results: Mapping[str, Any], pictures: Mapping[str, str]
) -> dict[str, Any]:
    seconds = sum(seed["train_seconds"] for seed in results["seeds"])
    tokens = sum(seed["train_seconds"] * seed["tokens_per_second"] for seed in results["seeds"])
    # A process that was left the end of a run alone has no speed.
    speed = {
        "seconds": seconds,
        "examples_per_second": tokens / prepared.train.tokens * len(prepared.train.examples) / seconds,
        "tokens_per_second": tokens / seconds,
    }
    chosen = {name: getattr(settings, name) for name in _SETTINGS if getattr(settings, name) is not None}
    return {
        "task": prepared.task.name,
        "base_model": settings.model,
        "main_metric": results["main_metric"],
        "command": settings.command(),
        "versions": versions(),
        "data": results["data"],
        "labels": list(prepared.task.labels),
        "scores": results["scores"],
        "seeds": list(settings.seeds),
        "best_seed": results["best_seed"],
        "settings": {**chosen, "learning_rate": settings.effective_learning_rate, "max_seq_length": prepared.max_seq_length},
        "speed": {**(speed if tokens else {}), "machine": device_name(pick_device(settings.device))},
        "pictures": dict(pictures),
        "notes": [*_adaptation(results["adaptation"]), *results["notes"]],
    }


def _adaptation(facts: Mapping[str, Any] | None) -> list[str]:
    """A line on the text that --adapt added to what the weights have seen."""
    if facts is None:
        return []
    # A dataset's name, or a file's without the folders of the machine.
    corpus = ", ".join(f"`{Path(source).name if Path(source).exists() else source}`" for source in facts["corpus"])
    return [
        f"Before, the masked language model went on with {corpus}: {facts['steps']:,} steps on {facts['train_tokens']:,} tokens; "
        f"its loss on held-out text went from {facts['before']['loss']:.3f} to {facts['after']['loss']:.3f}"
    ]
