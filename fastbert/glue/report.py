"""The report of a GLUE run, in Markdown and for a terminal: own scores on dev sets beside published ones on test sets.

Made of the run's document alone (``glue.json``, see :mod:`fastbert.glue.run`), so it can be made again at any time.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastbert.tasks.glue_tasks import GLUE_TASKS, GlueTask, glue_task

from .metrics import figure_of_bert_paper
from .published import BERT_PAPER, BERT_ROWS, LEADERBOARD, LEADERBOARD_ROWS, PublishedRow

Document = Mapping[str, Any]
_SHORT = {"matthews_correlation": "Mcc", "accuracy": "acc", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman"}
_NOTHING = "–"


def markdown_report(run: Document, picture: str) -> str:
    """``picture``: the name of the picture's file, beside the report."""
    sections = [f"# GLUE: {model_title(run)}", _what(run)]
    if run["limit"] is not None:
        sections.append(
            f"**A quick look: at most {run['limit']:,} examples of each split were used. These scores are no results on GLUE.**"
        )
    sections += ["## Scores on the dev sets", _own_table(run), _average_line(run), f"![scores]({picture})"]
    sections += ["## Beside published scores", _comparison_text(), _comparison_table(run)]
    if same := _same_tasks(run):
        sections.append(same)
    if run["left_out"]:
        sections += ["## Left out", _list(f"{glue_task(name).title}: {reason}" for name, reason in run["left_out"].items())]
    sections += ["## Submission", _submission(run)]
    if notes := _notes(run):
        sections += ["## Notes", _list(notes)]
    sections += ["## How to repeat it", f"```\n{run['command']}\n```", f"fastbert {run['fastbert']}"]
    return "\n\n".join(sections) + "\n"


def terminal_table(run: Document) -> str:
    """The scores in aligned columns, a line per task, and the average."""
    rows = [["task", "metric", "dev, mean ± sd", "seeds", "BERT-base, test", "leaderboard's first, test"]]
    for task, entry in _tasks(run):
        rows.append(
            [task.title, _metric_names(task), _own(task, entry), str(entry["score"]["n"]), _published(task, BERT_ROWS[0]),
             _published(task, LEADERBOARD_ROWS[0])]
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    limited = [] if run["limit"] is None else [f"A quick look at {run['limit']:,} examples of each split: no results on GLUE."]
    return "\n".join([*lines, _average_line(run).replace("**", ""), *limited])


def model_title(run: Document) -> str:
    """The model's name; of a path the last two folders."""
    return "/".join(run["model"].rstrip("/").split("/")[-2:])


def _tasks(run: Document) -> list[tuple[GlueTask, Mapping[str, Any]]]:
    return [(task, run["tasks"][task.name]) for task in GLUE_TASKS if task.name in run["tasks"]]


def _what(run: Document) -> str:
    modes = {"full": "all weights", "head": "the output layer only", "lora": "LoRA adapters"}
    seeds = ", ".join(sorted({seed for entry in run["tasks"].values() for seed in entry["seeds"]}, key=int))
    return (
        f"Fine-tuned: {modes.get(run['mode'], run['mode'])}; a model per task and seed (seeds {seeds}), from `{run['model']}` "
        f"where the notes name nothing else; scored on GLUE's dev sets in `{run['data']}`. All figures are times 100."
    )


def _own_table(run: Document) -> str:
    rows = [
        [task.title, _metric_names(task), _own(task, entry), str(entry["score"]["n"]), str(entry["best_seed"]),
         _counts(task, entry["rows"]), f"{sum(seed['seconds'] for seed in entry['seeds'].values()):,.0f}"]
        for task, entry in _tasks(run)
    ]  # fmt: skip
    header = ["task", "metric", "dev: mean ± standard deviation", "seeds", "best seed", "examples: train, dev", "seconds"]
    return _table(header, rows)


def _average_line(run: Document) -> str:
    average = run["average"]
    if average["value"] is None:
        return "No task was scored."
    value = _with_spread(average["value"], average["sd"])
    note = "" if average["name"] == "GLUE score" else "; it is no GLUE score, which needs all nine tasks, whole"
    return f"**{average['name'][0].upper()}{average['name'][1:]}, dev: {value}**{note}."


def _comparison_text() -> str:
    return (
        "Own scores are of the **dev** sets, all others of the **test** sets, which only GLUE's server can score: they are near "
        "each other, not the same. A dash: not published there, or not run.\n\n"
        f"- BERT-base and BERT-large: {BERT_PAPER}. F1 for MRPC and QQP, Spearman for STS-B. The paper's average leaves WNLI out "
        "and counts MNLI's two sets as two of nine columns: it is no GLUE score.\n"
        f"- The ranks: {LEADERBOARD}, the columns that were at hand; the average is the GLUE score over all nine tasks."
    )


def _comparison_table(run: Document) -> str:
    header = ["", "set", *(f"{task.title}<br>{_metric_names(task)}" for task in GLUE_TASKS), "average"]
    entries = dict((task.name, entry) for task, entry in _tasks(run))
    average = run["average"]
    own_average = _NOTHING if average["value"] is None else _with_spread(average["value"], average["sd"])
    if average["value"] is not None and average["name"] != "GLUE score":
        own_average += f" (of {len(average['tasks'])})"
    own = [_own(task, entries[task.name]) if task.name in entries else _NOTHING for task in GLUE_TASKS]
    rows = [[f"**{model_title(run)}**", "dev", *own, own_average]]
    for row in (*BERT_ROWS, *LEADERBOARD_ROWS):
        name = row.model if row.rank is None else f"{row.rank}. {row.model} ({row.team})"
        average_cell = f"{row.average:.1f}" + ("" if row.rank else " (see above)")
        rows.append([name, "test", *(_published(task, row) for task in GLUE_TASKS), average_cell])
    return _table(header, rows)


def _same_tasks(run: Document) -> str | None:
    """Own scores and BERT's averaged over the same tasks with the same metrics."""
    shared = [(task, entry) for task, entry in _tasks(run) if task.name in BERT_ROWS[0].figures]
    if not shared:
        return None
    own = statistics.fmean(
        figure_of_bert_paper(task, {metric: value["mean"] for metric, value in entry["figures"][task.dev[0]].items()})
        for task, entry in shared
    )
    theirs = [
        f"{row.model} {statistics.fmean(figure_of_bert_paper(task, row.figures[task.name]) for task, _ in shared):.1f} (test)"
        for row in BERT_ROWS
    ]
    titles = ", ".join(task.title for task, _ in shared)
    return (
        f"On the tasks that both have ({titles}), with the paper's metrics and MNLI matched only, the means are: "
        f"{model_title(run)} {own:.1f} (dev), {', '.join(theirs)}."
    )


def _submission(run: Document) -> str:
    submission = run["submission"]
    if not submission["files"]:
        return f"There is none: {submission['why_none']}."
    files = ", ".join(f"{name}.tsv" for name in submission["files"])
    text = f"`{submission['zip']}` holds {files}, predicted by the seed that is best on dev."
    if submission["missing"]:
        missing = ", ".join(f"{name}.tsv" for name in submission["missing"])
        text += f" GLUE's server wants all files and refuses a zip without {missing}."
    return text


def _notes(run: Document) -> list[str]:
    notes = [note for _, entry in _tasks(run) for note in entry["notes"]]
    if "wnli" in run["tasks"]:
        notes.append(
            "WNLI: its dev set shares sentences with its training set, with the opposite answer; scores below 50 are common, and "
            "BERT's paper leaves the task out."
        )
    return notes


def _metric_names(task: GlueTask) -> str:
    names = "/".join(_SHORT[metric] for metric in task.metrics)
    return f"{names} m/mm" if task.name == "mnli" else names


def _own(task: GlueTask, entry: Mapping[str, Any]) -> str:
    """``88.9 ± 0.4 / 84.3 ± 0.6``: for each split and metric; a dash for a dev set that was not there."""
    cells = []
    for split in task.dev:
        figures = entry["figures"].get(split)
        for metric in task.metrics:
            cells.append(_NOTHING if figures is None else _with_spread(figures[metric]["mean"], figures[metric]["sd"]))
    return " / ".join(cells)


def _published(task: GlueTask, row: PublishedRow) -> str:
    figures = row.figures.get(task.name)
    if figures is None:
        return _NOTHING
    metrics = ("accuracy", "accuracy_mismatched") if task.name == "mnli" else task.metrics
    return " / ".join(f"{figures[metric]:.1f}" if metric in figures else _NOTHING for metric in metrics)


def _with_spread(mean: float, sd: float | None) -> str:
    return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"


def _counts(task: GlueTask, rows: Mapping[str, int]) -> str:
    return ", ".join(f"{rows[split]:,}" for split in ("train", *task.dev) if split in rows)


def _list(items: Any) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])
