"""The picture of a GLUE run: own scores on dev sets as bars with their spread, published ones on test sets as marks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.runs.whole_file import whole_file
from fastbert.tasks.glue_tasks import GLUE_TASKS, GlueTask

from .published import BERT_ROWS, LEADERBOARD_ROWS, PublishedRow
from .report import model_title


def plot_scores(run: Mapping[str, Any], path: Path) -> None:
    """Draws the run's document to a PNG at ``path``, written whole."""
    figure = _figure(run)
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def _figure(run: Mapping[str, Any]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(GLUE_TASKS))
    own = [(place, run["tasks"][task.name]["score"]) for place, task in enumerate(GLUE_TASKS) if task.name in run["tasks"]]
    axes.bar(
        [place for place, _ in own],
        [score["mean"] for _, score in own],
        yerr=[score["sd"] or 0.0 for _, score in own],
        width=0.6, color="C0", alpha=0.75, capsize=4, label=f"{model_title(run)}, {run['mode']}: dev, mean ± sd over seeds",
    )  # fmt: skip
    for place, score in own:
        axes.annotate(f"{score['mean']:.1f}", (place, 2), ha="center", fontsize=9)
    for row, marker, colour in zip(BERT_ROWS, "os", ("C1", "C3")):
        points = [(place, score) for place, task in enumerate(GLUE_TASKS) if (score := published_score(task, row)) is not None]
        axes.plot(*zip(*points), marker, color=colour, label=f"{row.model}: test (F1 or Spearman alone)")
    leaders = [
        (place, score)
        for row in LEADERBOARD_ROWS
        for place, task in enumerate(GLUE_TASKS)
        if (score := published_score(task, row)) is not None
    ]
    axes.plot(
        *zip(*leaders), "_", color="black", markersize=14, alpha=0.5, label=f"leaderboard, ranks 1 to {len(LEADERBOARD_ROWS)}: test"
    )
    low = min([0.0, *(score["mean"] - (score["sd"] or 0.0) for _, score in own)])
    axes.set(ylim=(low, 102), ylabel="score (mean of the task's metrics), times 100")
    axes.set_xticks(list(places), [task.title for task in GLUE_TASKS])
    limited = f", at most {run['limit']:,} examples of each split" if run["limit"] is not None else ""
    axes.set_title(f"GLUE{limited}: own scores are of dev sets, published ones of test sets", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    return figure


def published_score(task: GlueTask, row: PublishedRow) -> float | None:
    """The mean of what was published of a task: BERT's paper has one metric of each, the leaderboard all."""
    figures = row.figures.get(task.name)
    return None if figures is None else statistics.fmean(figures.values())
