"""The names that ``--task`` takes, and a task as the JSON file that lies beside a fine-tuned model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.data.errors import DataError
from fastbert.runs.errors import SettingsError
from fastbert.runs.folder import write_json

from .choices import MultipleChoice
from .glue_data import GlueTextTask, glue_text_fields
from .glue_tasks import GLUE_TASKS, glue_task, is_glue_task
from .questions import QuestionAnswering
from .sequence import MULTI, REGRESSION, SINGLE, TextClassification
from .task import Task
from .tokens import TokenClassification

TASK_NAME = "task.json"
_MAKERS: dict[str, tuple[type[Task], dict[str, Any]]] = {
    "text-classification": (TextClassification, {"problem": SINGLE}),
    "sentiment": (TextClassification, {"problem": SINGLE}),
    "multi-label-classification": (TextClassification, {"problem": MULTI}),
    "regression": (TextClassification, {"problem": REGRESSION}),
    "token-classification": (TokenClassification, {}),
    "ner": (TokenClassification, {"entities": True}),
    "pos": (TokenClassification, {"entities": False}),
    "question-answering": (QuestionAnswering, {}),
    "multiple-choice": (MultipleChoice, {}),
    **{task.name: (GlueTextTask, glue_text_fields(task)) for task in GLUE_TASKS},
}
TASK_NAMES = tuple(_MAKERS)
# Fields of tasks that are tuples, which JSON makes lists of.
_TUPLES = ("labels", "header")


def task_for(name: str, columns: Mapping[str, str] | None = None, **options: Any) -> Task:
    """The task of a name, with ``columns`` and other fields of it. Raises SettingsError for an unknown name."""
    if is_glue_task(name):
        name = glue_task(name).name  # in any spelling: SST-2
    if name not in _MAKERS:
        raise SettingsError(f"--task {name} is unknown; known are {', '.join(TASK_NAMES)}")
    maker, fields = _MAKERS[name]
    return maker(name=name, columns=dict(columns or {}), **{**fields, **options})


def save_task(task: Task, max_seq_length: int, folder: Path) -> None:
    """Writes what a fine-tuned folder must know to predict."""
    document = {"class": type(task).__name__, **dataclasses.asdict(task), "max_seq_length": max_seq_length}
    write_json(folder / TASK_NAME, document)


def load_task(folder: Path) -> tuple[Task, int]:
    """(task, longest sequence) of a fine-tuned folder. Raises DataError where there is none, or it is damaged."""
    path = folder / TASK_NAME
    if not folder.is_dir():
        found = "a file, expected a folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {found}; fastbert finetune writes the models that predict")
    if not path.is_file():
        raise DataError(f"{folder}: the folder holds no {TASK_NAME}; fastbert finetune writes it beside the model")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        maker = {cls.__name__: cls for cls, _ in _MAKERS.values()}[document.pop("class")]
        max_seq_length = int(document.pop("max_seq_length"))
        fields = {key: tuple(value) if key in _TUPLES and value is not None else value for key, value in document.items()}
        task = maker(**fields)
        if not isinstance(task.labels, tuple) or not all(isinstance(label, str) for label in task.labels):
            raise TypeError(f"labels are {document['labels']!r:.40}")
        if max_seq_length < 1:
            raise ValueError(f"max_seq_length is {max_seq_length}")
        return task, max_seq_length
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a task of this version of fastbert ({type(error).__name__}: {error})") from error
