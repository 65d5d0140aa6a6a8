"""What a GLUE run has reached, as one JSON-ready document, out of the ``run.json`` that fine-tuning left for each task and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert import __version__
from fastbert.tasks.glue_data import finetune_names
from fastbert.tasks.glue_tasks import GLUE_TASKS, GlueTask

from .metrics import average_over_seeds, figure_notes, glue_figures, spread, task_score
from .settings import GlueSettings

# For each task, by name, and seed: the document of its fine-tuning.
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]


def glue_document(
    settings: GlueSettings,
    results: Results,
    *,
    notes: Mapping[str, list[str]],
    left_out: Mapping[str, str],
    submission: dict[str, Any],
) -> dict[str, Any]:
    """``tasks``: by name what :func:`task_entry` says; ``average`` of their scores; ``left_out``: by name the reason; ``notes``: of
    the files of each task. All figures are on the scale to 100."""
    tasks = {
        task.name: task_entry(task, results[task.name], settings.model, notes[task.name])
        for task in GLUE_TASKS
        if task.name in results
    }
    scores = {name: {int(seed): one["score"] for seed, one in entry["seeds"].items()} for name, entry in tasks.items()}
    return {
        "command_name": settings.command_name,
        "command": _command(settings, results),
        "settings": settings.to_dict(),
        "fastbert": __version__,
        "model": settings.model,
        "mode": settings.mode,
        "data": settings.data,
        "limit": settings.limit,
        "tasks": tasks,
        "average": average_over_seeds(scores, whole=settings.limit is None),
        "left_out": dict(left_out),
        "submission": submission,
    }


def _command(settings: GlueSettings, results: Results) -> str:
    """That gives these results and what else was asked for: a resumed run may have been asked for some of them alone."""
    tasks = tuple(task.name for task in GLUE_TASKS if task.name in results or task.name in settings.tasks)
    seeds = sorted({*settings.seeds, *(seed for runs in results.values() for seed in runs)})
    asked = tasks if settings.tasks and len(tasks) < len(GLUE_TASKS) else ()
    return dataclasses.replace(settings, tasks=asked, seeds=tuple(seeds)).command()


def task_entry(task: GlueTask, runs: Mapping[int, Mapping[str, Any]], model: str, notes: list[str]) -> dict[str, Any]:
    """``figures`` (by split of dev and metric) and ``score`` of a task with mean, sd and n over its seeds; in ``seeds`` the single
    ones; ``best_seed``: that of the highest score; ``rows``: examples by split."""
    names = finetune_names(task)
    notes = list(notes)
    seeds = {}
    for seed, run in sorted(runs.items()):
        (trained,) = run["results"]["seeds"]
        scores = trained["scores"]
        figures = {split: glue_figures(task, scores[names[split]]) for split in task.dev if names[split] in scores}
        seeds[str(seed)] = {
            "figures": figures,
            "score": task_score(figures),
            "seconds": trained["train_seconds"],
            "started_from": run["settings"]["model"],
        }
        notes += [f"{note} (seed {seed})" for split in figures for note in figure_notes(task, figures[split], split)]
    if others := sorted({Path(one["started_from"]).name for one in seeds.values() if one["started_from"] != model}):
        notes.append(f"{task.title}: started from the MNLI model of {', '.join(others)}, not from {model} (Phang et al. 2018)")
    rows = next(iter(runs.values()))["results"]["data"]
    splits = next(iter(seeds.values()))["figures"]
    return {
        "rows": {split: rows[name]["examples"] for split, name in names.items() if name in rows},
        "seeds": seeds,
        "score": spread([one["score"] for one in seeds.values()]),
        "figures": {
            split: {metric: spread([one["figures"][split][metric] for one in seeds.values()]) for metric in task.metrics}
            for split in splits
        },
        "best_seed": int(max(seeds, key=lambda seed: seeds[seed]["score"])),
        "notes": notes,
    }
