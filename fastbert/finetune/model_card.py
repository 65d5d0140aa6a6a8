"""The model card (README.md) of a fine-tuned folder: for what, from what, how well, how fast, and how to use and repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fastbert.runs.whole_file import whole_file
from fastbert.tasks.registry import task_for
from fastbert.tasks.task import Task
from fastbert.train.model_card import closing_sections, table

CARD_NAME = "README.md"
_MOST_LABELS = 50  # with their counts; the rest are in config.json
# Names of tasks on the Hugging Face Hub, by the families of ours; the first two are those of transformers' pipelines, too.
_HUB_TASKS = {
    "text": "text-classification",
    "words": "token-classification",
    "questions": "question-answering",
    "choices": "multiple-choice",
}
_EXAMPLES = {
    "text": '["A text to be judged."]',
    "words": '["A sentence whose words are tagged."]',
    "questions": '[{"question": "Where is the house?", "context": "The house stands by the river."}]',
    "choices": '[{"context": "The house stands", "choices": ["by the river.", "by the hour."]}]',
}


def write_card(facts: Mapping[str, Any], folder: Path) -> Path:
    """Writes :func:`model_card` as README.md into ``folder``, whole or not at all."""
    path = folder / CARD_NAME
    text = model_card(facts)
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def model_card(facts: Mapping[str, Any]) -> str:
    """Markdown with the metadata block that the Hugging Face Hub reads.

    ``facts`` holds, JSON-ready as run.json does:

    - task (as ``--task`` names it), base_model, main_metric, command, versions (package: version);
    - data: for each split source (a file or dataset), examples, and where they are known tokens, truncated (examples that were
      cut), labels (label: count);
    - scores: for each split and metric mean, std (of a sample; None with one seed) and values, one per seed;
    - seeds; best_seed: the one whose model lies in the folder;
    - settings: name: value, shown as they are; pipelines of texts are told to cut at max_seq_length, where it is there;
    - speed, where it was measured: any of seconds, examples_per_second, tokens_per_second, machine;
    - and if there are any labels (the label names in the model's order), pictures (file name: caption), notes (lines).
    """
    sections = [
        f"# {_title(facts)}",
        f"{_origin(facts['base_model'])}, fine-tuned with fastbert for the task {facts['task']}.",
        "## How to use it",
        _use(task_for(facts["task"]), facts["settings"].get("max_seq_length")),
        "## Scores",
        _scores(facts),
    ]
    sections += [f"![{caption}]({name})\n\n{caption}" for name, caption in facts.get("pictures", {}).items()]
    sections += ["## Data", _data(facts["data"])]
    if labels := _labels(facts):
        sections += ["### Labels", labels]
    sections += ["## Training", table(_training_rows(facts))]
    if facts.get("notes"):
        sections.append("\n".join(f"- {note}" for note in facts["notes"]))
    sections += closing_sections(facts["command"], facts["versions"])
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(facts: Mapping[str, Any]) -> ModelCardData:
    results = [
        EvalResult(
            task_type=_hub_task(facts["task"]),
            dataset_type=_source(facts["data"][split]["source"]),
            dataset_name=_source(facts["data"][split]["source"]),
            dataset_split=split,
            metric_type=metric,
            metric_value=round(score["values"][facts["seeds"].index(facts["best_seed"])], 4),
            metric_name=metric,
        )
        for split, metrics in facts["scores"].items()
        for metric, score in metrics.items()
    ]
    base = facts["base_model"]
    return ModelCardData(
        # A folder's name means nothing on the Hub.
        base_model=None if Path(base).is_dir() else base,
        library_name="transformers",
        license="other",
        metrics=sorted({metric for metrics in facts["scores"].values() for metric in metrics}),
        model_name=_title(facts),
        pipeline_tag=_hub_task(facts["task"]),
        tags=["bert", "fastbert", *([facts["task"]] if facts["task"] != _hub_task(facts["task"]) else [])],
        eval_results=results,
    )


def _hub_task(task: str) -> str:
    return _HUB_TASKS[task_for(task).family]


def _title(facts: Mapping[str, Any]) -> str:
    return f"{Path(facts['base_model']).name} for {facts['task']}"


def _origin(base_model: str) -> str:
    path = Path(base_model)
    return f"The model in the folder `{path.name}`" if path.is_dir() else f"[{base_model}](https://huggingface.co/{base_model})"


def _use(task: Task, max_seq_length: int | None) -> str:
    fast = (
        "```python\nfrom fastbert.tasks.predictor import Predictor\n\n"
        f'predictor = Predictor.from_pretrained("PATH_OF_THIS_FOLDER")\nprint(predictor({_EXAMPLES[task.family]}))\n```'
    )
    command = "```\nfastbert predict --model PATH_OF_THIS_FOLDER --input FILE\n```"
    if task.family in ("text", "words"):
        # Texts are cut where they were in training; pipelines of tokens have no such option.
        cut = f", truncation=True, max_length={max_seq_length}" if task.family == "text" and max_seq_length is not None else ""
        imported, loaded = "pipeline", f'pipeline("{_HUB_TASKS[task.family]}", model="PATH_OF_THIS_FOLDER"{cut})'
    else:  # transformers has no pipeline for choices, and since version 5 none for questions
        imported, loaded = task.auto_class, f'{task.auto_class}.from_pretrained("PATH_OF_THIS_FOLDER")'
    theirs = (
        f"```python\nimport fastbert\nfrom transformers import {imported}\n\n"
        f"fastbert.register()  # left out, the same numbers come more slowly\n{loaded}\n```"
    )
    return "\n\n".join([command, "In Python:", fast, "Or as any model of transformers:", theirs])


def _scores(facts: Mapping[str, Any]) -> str:
    seeds, best = facts["seeds"], facts["seeds"].index(facts["best_seed"])
    several = len(seeds) > 1
    splits = list(facts["scores"])
    metrics = dict.fromkeys(metric for split in splits for metric in facts["scores"][split])
    lines = [f"| | {' | '.join(splits)} |", "|---|" + "---|" * len(splits)]
    for metric in metrics:
        cells = []
        for split in splits:
            score = facts["scores"][split].get(metric)
            cells.append("" if score is None else _score(score, score["values"][best], several))
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    if several:
        text += (
            f"\n\nThis model, then the mean and standard deviation of {len(seeds)} trainings (seeds {', '.join(map(str, seeds))}). "
            f"This one is that of seed {facts['best_seed']}, the best in {facts['main_metric']} on dev."
        )
    if "dev" in splits:
        text += f"\n\nThe checkpoint was chosen by {facts['main_metric']} on dev, which flatters the scores on dev a little."
    return text


def _score(score: Mapping[str, Any], value: float, several: bool) -> str:
    return f"{value:.4f} ({score['mean']:.4f} ± {score['std']:.4f})" if several else f"{value:.4f}"


def _data(data: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| split | source | examples | tokens | cut to the longest sequence |", "|---|---|---|---|---|"]
    for split, of in data.items():
        counts = (f"{of[name]:,}" if of.get(name) is not None else "" for name in ("examples", "tokens", "truncated"))
        lines.append(f"| {split} | `{_source(of['source'])}` | {' | '.join(counts)} |")
    return "\n".join(lines)


def _source(source: str) -> str:
    """A dataset's name, or a file's without the folders of the machine."""
    return source if ", split " in source else Path(source).name


def _labels(facts: Mapping[str, Any]) -> str:
    """A table of the labels and how often each occurs in each split; empty where there are none."""
    counted = {split: of["labels"] for split, of in facts["data"].items() if of.get("labels")}
    names = list(dict.fromkeys([*facts.get("labels", ()), *(label for labels in counted.values() for label in labels)]))
    if not names:
        return ""
    lines = [f"| label | {' | '.join(counted)} |" if counted else "| label |", "|---|" + "---|" * len(counted)]
    for name in names[:_MOST_LABELS]:
        counts = [f"{labels.get(name, 0):,}" for labels in counted.values()]
        lines.append("| " + " | ".join([_cell(name), *counts]) + " |")
    more = len(names) - _MOST_LABELS
    return "\n".join(lines) + (f"\n\nand {more} more, which `config.json` lists." if more > 0 else "")


def _training_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name.replace("_", " "), _cell(_value(value))) for name, value in facts["settings"].items() if value is not None]
    rows.append(("seeds", ", ".join(map(str, facts["seeds"]))))
    speed = facts.get("speed", {})
    for name, title, text in (
        ("seconds", "time", "{:,.0f} s of training"),
        ("examples_per_second", "speed", "{:,.1f} examples/s"),
        ("tokens_per_second", "speed", "{:,.0f} real tokens/s"),
        ("machine", "machine", "{}"),
    ):
        if speed.get(name) is not None:
            rows.append((title, text.format(speed[name])))
    return rows


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _cell(text: str) -> str:
    """Markdown's tables end a cell at a bar."""
    return text.replace("|", "\\|").replace("\n", " ")
