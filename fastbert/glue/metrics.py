"""GLUE's scores out of those of :mod:`fastbert.tasks.metrics`: a task's metrics, its score, and the averages, all times 100.

A task's score is the unweighted mean of its metrics, MNLI's that of both its dev (or test) sets, and the GLUE score the unweighted
mean of the nine tasks' scores (Wang et al. 2019, https://arxiv.org/abs/1804.07461). The diagnostic set does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastbert.tasks.glue_tasks import GLUE_TASKS, GlueTask

_CONSTANT = {
    "matthews_correlation": "gives every text the same class",
    "pearson": "gives every pair the same number, for which a correlation is not defined",
    "spearman": "gives every pair the same number, for which a correlation is not defined",
}
METRIC_NAMES = {
    "matthews_correlation": "Matthews correlation",
    "accuracy": "accuracy",
    "f1": "F1",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}


def glue_figures(task: GlueTask, scores: Mapping[str, float]) -> dict[str, float]:
    """The task's metrics, in GLUE's order, on the scale to 100, out of the scores (to 1) that a task computes."""
    return {metric: 100.0 * scores[metric] for metric in task.metrics}


def figure_notes(task: GlueTask, figures: Mapping[str, float], split: str) -> list[str]:
    """What has to be said beside figures that are 0 by convention: the model answers the same everywhere."""
    zero = [metric for metric in task.metrics if metric in _CONSTANT and figures[metric] == 0.0]
    return [f"{task.title}, {split}: {METRIC_NAMES[metric]} is 0, as where a model {_CONSTANT[metric]}" for metric in zero[:1]]


def task_score(figures_by_split: Mapping[str, Mapping[str, float]]) -> float:
    """The mean over splits (MNLI has two) of the mean over metrics."""
    return statistics.fmean(statistics.fmean(figures.values()) for figures in figures_by_split.values())


def average(scores: Mapping[str, float], *, whole: bool = True) -> dict[str, Any]:
    """``value``: the mean of the tasks' scores (by task name); ``name``: "GLUE score" where all nine are there and the sets were
    ``whole``, else of what it is the mean, by name; ``tasks``: their names. Without scores the value is None."""
    tasks = [task for task in GLUE_TASKS if task.name in scores]
    value = statistics.fmean(scores[task.name] for task in tasks) if tasks else None
    name = "GLUE score" if whole and len(tasks) == len(GLUE_TASKS) else f"mean of {_counted(tasks)}"
    return {"name": name, "value": value, "tasks": [task.name for task in tasks]}


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """``mean``, ``sd`` (the sample's standard deviation, None of a single value) and ``n``."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def average_over_seeds(scores: Mapping[str, Mapping[int, float]], *, whole: bool = True) -> dict[str, Any]:
    """:func:`average` of the tasks' means, with the standard deviation over seeds of the average of each seed.

    ``scores``: for each task and seed the task's score. ``sd`` is None where the tasks have not all the same two or more seeds.
    """
    result = average({name: statistics.fmean(by_seed.values()) for name, by_seed in scores.items()}, whole=whole)
    seeds = {frozenset(by_seed) for by_seed in scores.values()}
    per_seed = []
    if len(seeds) == 1:
        per_seed = [average({name: by_seed[seed] for name, by_seed in scores.items()})["value"] for seed in next(iter(seeds))]
    return {**result, "sd": statistics.stdev(per_seed) if len(per_seed) > 1 else None, "n": len(per_seed) or None}


def figure_of_bert_paper(task: GlueTask, figures: Mapping[str, float]) -> float:
    """The one figure that BERT's paper reports of a task: F1 of MRPC and QQP, Spearman correlation of STS-B, else the only one."""
    return figures["spearman"] if "spearman" in task.metrics else figures[task.metrics[0]]


def _counted(tasks: Sequence[GlueTask]) -> str:
    if not tasks:
        return "no task"
    names = ", ".join(task.title for task in tasks)
    return f"{len(tasks)} task{'s' if len(tasks) > 1 else ''} ({names})"
