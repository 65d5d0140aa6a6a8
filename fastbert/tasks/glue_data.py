"""A folder laid out as GLUE's own download (CoLA/train.tsv, MNLI/dev_matched.tsv, ...) to splits, and splits to examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Encoding

from fastbert.data.errors import DataError
from fastbert.data.lines import read_lines, without_line_end
from fastbert.data.sources import Source
from fastbert.data.tables import Table, file_kind, read_table
from fastbert.runs.errors import SettingsError

from .examples import Examples, TextExample
from .glue_tasks import AX_PATHS, AX_SPLIT, GLUE_TASKS, GlueTask, glue_task, is_glue_task
from .sequence import REGRESSION, SINGLE, TextClassification


@dataclass(frozen=True)
class GlueSplits:
    """``files``: the splits that are there; ``missing``: for each other one what was looked for; ``notes``: files that were taken
    under another name than GLUE's."""

    task: GlueTask
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def why_not(self) -> str | None:
        """Why the task cannot be learned and scored from these files, or None where it can: it needs train and a (first) dev."""
        lacking = [self.missing[split] for split in ("train", self.task.dev[0]) if split in self.missing]
        return " and ".join(lacking) or None


def find_folders(root: Path) -> dict[str, Path]:
    """The folder of each task (by its name) in ``root``; ``SST-2`` may also be called sst2, and so on.

    Raises DataError for a ``root`` that has none.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: {'a file' if root.exists() else 'no such folder'}; expected a folder with GLUE's own, {_titles()}"
        )
    found: dict[str, Path] = {}
    for entry in sorted(root.iterdir()):
        if not entry.is_dir() or not is_glue_task(entry.name):
            continue
        name = glue_task(entry.name).name
        if name in found:
            raise DataError(f"{root}: both {found[name].name} and {entry.name} are folders of {glue_task(name).title}")
        found[name] = entry
    if not found:
        raise DataError(f"{root}: holds no folder of a task of GLUE; expected {_titles()}")
    return found


def find_glue_splits(task: GlueTask, folder: Path) -> GlueSplits:
    """The files of a task's splits: ``train.tsv``, or else the one table whose name starts with ``train``, which is noted.

    Raises DataError where several could be meant.
    """
    splits = GlueSplits(task, folder)
    tables = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith((".tsv", ".tsv.gz")))
    for split in task.splits:
        if split == AX_SPLIT:
            _add_ax(splits, folder.parent)
            continue
        exact = folder / f"{split}.tsv"
        others = [path for path in tables if path.name.startswith(split)]
        if exact in tables:
            splits.files[split] = exact
        elif len(others) > 1:
            names = " and ".join(path.name for path in others)
            raise DataError(f"{folder}: there is no {exact.name}, but {names}; rename the right one {exact.name}")
        elif others:
            splits.files[split] = others[0]
            splits.notes.append(f"{task.title}: {split} is read from {others[0].name}, there is no {exact.name}")
        else:
            held = ", ".join(path.name for path in tables) or "no .tsv file"
            splits.missing[split] = f"{folder.name}/{exact.name} is missing (the folder holds {held})"
    return splits


def _add_ax(splits: GlueSplits, root: Path) -> None:
    path = next((path for name in AX_PATHS if (path := root / name).is_file()), None)
    if path is None:
        splits.missing[AX_SPLIT] = f"the diagnostic set is missing ({AX_PATHS[0]})"
    else:
        splits.files[AX_SPLIT] = path


def glue_sources(splits: GlueSplits) -> dict[str, Source]:
    """The splits under the names that fine-tuning gives them: train, dev, test, and MNLI's dev_mismatched, test_mismatched and ax.

    Raises DataError naming the file where train is missing; for dev there are other ways (--dev, examples held out).
    """
    if "train" in splits.missing:
        raise DataError(f"{splits.task.title}: {splits.missing['train']}")
    names = finetune_names(splits.task)
    return {names[split]: Source(path=path) for split, path in splits.files.items()}


def finetune_names(task: GlueTask) -> dict[str, str]:
    """For each split of GLUE what fine-tuning calls it: the dev set that chooses the best checkpoint is "dev"."""
    first = {task.dev[0]: "dev", next(iter(task.submissions)): "test"}
    return {split: first.get(split, split) for split in task.splits}


def read_glue(task: GlueTask, source: Source, *, labelled: bool = True) -> Examples[TextExample]:
    """A split of a task (train, dev or test: the file's columns tell); its notes count what was unusual about it. Without
    ``labelled`` labels are not looked at.

    Raises DataError for columns that are not GLUE's, labels out of the label set or range, and rows without any text. Rows with
    one empty text of two are kept: QQP has a few, in test files, too, where every row needs its answer.
    """
    table, notes = _read(task, source)
    if lacking := [column for column in task.texts if column not in table.columns]:
        listed = ", ".join(map(repr, table.columns))
        raise DataError.at(
            table.source, None, None, f"has no column {lacking[0]!r}, which {task.title} has in GLUE; its columns are {listed}"
        )
    fields = dict(zip(("text", "text_pair"), task.texts))
    labelled = labelled and task.label in table.columns
    if labelled:
        fields["label"] = task.label
    examples: Examples[TextExample] = Examples(table.source, [], fields)
    empty = 0
    for row, place in zip(table.rows, table.places, strict=True):
        texts = [row[column] for column in task.texts]
        for column, text in zip(task.texts, texts, strict=True):
            if not isinstance(text, str):
                raise DataError.at(table.source, place, column, f"expected a text, found {text!r}")
        label = _label(task, row[task.label], table, place) if labelled else None
        empty += any(not text.strip() for text in texts)
        examples.items.append(TextExample(place, *texts, label=label))
    if empty:
        notes.append(
            f"{task.title}: {_rows(empty)} of {Path(table.source).name} {'has' if empty == 1 else 'have'} an empty text; kept"
        )
    return replace(examples, notes=tuple(notes))


def read_index(task: GlueTask, source: Source) -> list[str]:
    """What a test file calls its rows, for the submission. Raises DataError for a file without that column."""
    table, _ = _read(task, source)
    if task.index not in table.columns:
        raise DataError.at(
            table.source, None, None, f"has no column {task.index!r}, which numbers the rows of {task.title}'s test file"
        )
    return [row[task.index].strip() for row in table.rows]


@dataclass(frozen=True)
class GlueTextTask(TextClassification):
    """Text classification that reads GLUE's files as they are. ``name``: that of one of the nine tasks.

    Raises SettingsError where ``columns`` are given, which GLUE has fixed.
    """

    def __post_init__(self) -> None:
        if self.columns:
            given = ", ".join(f"--{name.replace('_', '-')}-column" for name in self.columns)
            raise SettingsError(f"--task {self.name} reads GLUE's files, whose columns are known: leave {given} out")

    def read(self, source: Source) -> Examples[TextExample]:
        return read_glue(glue_task(self.name), source)

    def read_unlabelled(self, source: Source) -> Examples[TextExample]:
        """A file of GLUE, or any other table whose columns of texts are known by their names."""
        if source.path is not None and file_kind(source.path) == ".tsv":
            task, first = glue_task(self.name), _first_fields(source.path)
            if all(column in first for column in task.texts) or len(first) == len(task.header or ()):
                return read_glue(task, source, labelled=False)
        return super().read_unlabelled(source)

    def check(self, examples: Examples[TextExample], *, labelled: bool) -> None:
        """As for other texts, but one text of a pair may be empty."""
        self.check_pairs(examples)
        for example in examples:
            if not (example.text.strip() or (example.text_pair or "").strip()):
                raise examples.error(example, "text", "is empty")
        if labelled:
            self.check_present(examples)

    def check_tokens(self, examples: Examples[TextExample], encodings: Sequence[Encoding]) -> None:
        """As for other texts, but the tokenizer may keep nothing of one text of a pair."""
        for example, encoding in zip(examples, encodings, strict=True):
            if {0, 1}.isdisjoint(encoding.sequence_ids):
                raise examples.error(example, "text", f"holds {example.text!a}, of which the tokenizer keeps nothing")


def glue_text_fields(task: GlueTask) -> dict[str, Any]:
    """What a :class:`GlueTextTask` must be made of, besides its name."""
    return {"labels": task.labels, "problem": SINGLE if task.labels else REGRESSION, "metric": task.main_metric}


def glue_text_task(name: str) -> GlueTextTask:
    """The task as fine-tuning takes it, with labels and main metric. ``name``: in any spelling."""
    task = glue_task(name)
    return GlueTextTask(task.name, **glue_text_fields(task))


def _read(task: GlueTask, source: Source) -> tuple[Table, list[str]]:
    """The table of a split, and a note on rows that were left out of it.

    CoLA's train and dev have no header line, its test has one: a first line that names the text's column is a header. Of QQP's
    files with labels, rows that a line end within a question has cut in two are left out, as the library datasets does.
    """
    if source.path is None or file_kind(source.path) != ".tsv":
        return read_table(source), []
    first = _first_fields(source.path)
    headless = task.header is not None and task.texts[0] not in first
    if not (task.broken_rows and task.label in first):
        return read_table(source, header=task.header if headless else None), []
    table = Table(str(source), tuple(first), [], [])
    broken = 0
    for number, line in read_lines(source.path):
        fields = without_line_end(line).split("\t")
        if number == 1 or not line.strip():
            continue
        if len(fields) == len(first):
            table.rows.append(dict(zip(first, fields)))
            table.places.append(f"line {number}")
        else:
            broken += 1
    if not table.rows:
        raise DataError(f"{source}: none of its {broken} rows has the {len(first)} fields that the header names")
    notes = (
        [f"{task.title}: {_rows(broken)} of {source.path.name} without the {len(first)} fields of the header; left out"]
        if broken
        else []
    )
    return table, notes


def _first_fields(path: Path) -> list[str]:
    return next((without_line_end(line).split("\t") for _, line in read_lines(path)), [])


def _label(task: GlueTask, value: Any, table: Table, place: str) -> str | float | None:
    """None for a label that is held back, as Hugging Face's test sets say it."""
    if value is None:
        return None
    text = str(value).strip()
    if task.label_range is None:
        if text not in task.labels:
            raise DataError.at(table.source, place, task.label, f"holds {text!r}, expected {_either(task.labels)}")
        return text
    low, high = task.label_range
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise DataError.at(table.source, place, task.label, f"holds {text!r}, expected a number from {low:g} to {high:g}")
    return number


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _titles() -> str:
    return ", ".join(task.title for task in GLUE_TASKS)
