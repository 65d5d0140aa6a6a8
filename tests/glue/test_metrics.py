"""GLUE's averages, and published figures that are consistent in themselves."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest

from fastbert.glue.metrics import (
    average,
    average_over_seeds,
    figure_notes,
    figure_of_bert_paper,
    glue_figures,
    spread,
    task_score,
)
from fastbert.glue.published import BERT_ROWS, LEADERBOARD_ROWS
from fastbert.tasks.glue_tasks import GLUE_TASKS, glue_task
from fastbert.tasks.metrics import classification_scores, regression_scores


def test_figures_are_glue_s_metrics_times_100():
    labels, predicted = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1, 1])
    scores = classification_scores(predicted, labels, 2)
    assert glue_figures(glue_task("mrpc"), scores) == pytest.approx({"f1": 75.0, "accuracy": 400 / 6})
    # (tp tn - fp fn) / sqrt(...) with tp 3, tn 1, fp 1, fn 1.
    assert glue_figures(glue_task("cola"), scores) == pytest.approx({"matthews_correlation": 100 * 2 / 8})
    assert list(glue_figures(glue_task("qqp"), scores)) == ["f1", "accuracy"]
    values = np.array([0.0, 1.0, 2.0, 5.0])
    assert glue_figures(glue_task("stsb"), regression_scores(values**3, values))["spearman"] == pytest.approx(100.0)


@pytest.mark.parametrize("name", ["cola", "stsb"])
def test_constant_predictions_are_0_with_a_note(name):
    task = glue_task(name)
    labels = np.array([0, 1, 1, 0])
    scores = classification_scores(np.ones(4, int), labels, 2) if task.labels else regression_scores(np.ones(4), labels)
    figures = glue_figures(task, scores)
    assert set(figures.values()) == {0.0}
    json.dumps(scores, allow_nan=False)
    (note,) = figure_notes(task, figures, "dev")
    assert note.startswith(f"{task.title}, dev: ") and "the same" in note
    assert not figure_notes(task, dict.fromkeys(task.metrics, 12.0), "dev")


def test_the_score_of_a_task_is_the_mean_of_its_metrics_and_sets():
    assert task_score({"dev": {"f1": 90.0, "accuracy": 80.0}}) == 85.0
    assert task_score({"dev_matched": {"accuracy": 84.0}, "dev_mismatched": {"accuracy": 82.0}}) == 83.0


def test_a_glue_score_needs_all_nine_tasks():
    scores = {task.name: float(number) for number, task in enumerate(GLUE_TASKS)}
    assert average(scores) == {"name": "GLUE score", "value": 4.0, "tasks": [task.name for task in GLUE_TASKS]}
    assert average(scores, whole=False)["name"].startswith("mean of 9 tasks (CoLA, ")
    del scores["wnli"]
    assert average(scores)["value"] == 3.5 and average(scores)["name"].startswith("mean of 8 tasks (CoLA, SST-2, MRPC, ")
    assert average({"rte": 60.0}) == {"name": "mean of 1 task (RTE)", "value": 60.0, "tasks": ["rte"]}
    assert average({})["value"] is None


def test_spread_over_seeds():
    assert spread([60.0]) == {"mean": 60.0, "sd": None, "n": 1}
    assert spread([60.0, 64.0]) == {"mean": 62.0, "sd": pytest.approx(8**0.5), "n": 2}
    both = average_over_seeds({"rte": {0: 60.0, 1: 64.0}, "cola": {0: 50.0, 1: 50.0}})
    assert both["value"] == 56.0 and both["sd"] == pytest.approx(2**0.5) and both["n"] == 2
    unequal = average_over_seeds({"rte": {0: 60.0, 1: 64.0}, "cola": {0: 50.0}})
    assert unequal["value"] == 56.0 and unequal["sd"] is None


def test_bert_s_row_is_its_paper_s():
    base, large = BERT_ROWS
    for row in (base, large):
        figures = [figure for by_metric in row.figures.values() for figure in by_metric.values()]
        assert len(figures) == 9 and "wnli" not in row.figures
        # Two of the nine columns are MNLI's: the paper's own average, to its one decimal.
        assert statistics.fmean(figures) == pytest.approx(row.average, abs=0.051)
    assert figure_of_bert_paper(glue_task("mrpc"), base.figures["mrpc"]) == 88.9
    assert figure_of_bert_paper(glue_task("stsb"), large.figures["stsb"]) == 86.5
    assert figure_of_bert_paper(glue_task("mnli"), base.figures["mnli"]) == 84.6


def test_rows_of_the_leaderboard(data_folder):
    """The file that they were copied from, where it is there."""
    path = data_folder.parent / "glue_leaderboard.tsv"
    if not path.is_file():
        pytest.skip(f"there is no {path.name}")
    header, *lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(LEADERBOARD_ROWS) == 13
    for line, row in zip(lines, LEADERBOARD_ROWS):
        cells = dict(zip(header, line))
        assert (cells["rank"], cells["team"], cells["model"], cells["score"]) == (
            str(row.rank),
            row.team,
            row.model,
            str(row.average),
        )
        for title in header[4:]:
            task = glue_task(title)
            figures = row.figures[task.name]
            assert list(figures) == list(task.metrics)
            assert cells[title] == "/".join(str(figure) for figure in figures.values())


def test_the_leaderboard_is_sorted():
    assert [row.rank for row in LEADERBOARD_ROWS] == list(range(1, 14))
    averages = [row.average for row in LEADERBOARD_ROWS]
    assert averages == sorted(averages, reverse=True)
