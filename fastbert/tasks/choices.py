"""Multiple choice (SWAG, RACE): which of several texts follows a context, or answers a question about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.tables import Table, read_table

from .examples import ChoiceExample, Examples
from .task import Features, Outputs, Task, labels_config, unnamed

# What published data sets call them, the first that is there wins.
_CONTEXTS = ("context", "sent1", "premise", "article", "passage", "ctx")
_QUESTIONS = ("question", "sent2")
_LABELS = ("label", "answer", "answerKey")
_CHOICE_LISTS = ("choices", "endings", "options")
_CHOICE = re.compile(r"(choice|ending|option)[ _]?(\d+|[a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class MultipleChoice(Task):
    """``columns``: text is that of the context, text_pair that of the question, choices the one of lists of choices or, with
    commas between, those of a choice each, label that of the right one: its number from 0, or a letter from A.

    A row is as many sequences as there are choices, [CLS] context [SEP] question choice [SEP]; :func:`pad_choices` makes batches.
    """

    auto_class: ClassVar[str] = "AutoModelForMultipleChoice"
    family: ClassVar[str] = "choices"
    pads: ClassVar[bool] = True

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("accuracy",)

    def read(self, source: Source) -> Examples[ChoiceExample]:
        """A table with a column of the context (context, sent1, premise, article, passage, ctx), of the question, if any (question,
        sent2), of the label, if known (label, answer, answerKey), and of the choices: lists (choices, endings, options), or a
        column each (ending0, choice_1, option A, ...). A question without any context is the context."""
        return self._examples(read_table(source), labelled=True)

    def read_unlabelled(self, source: Source) -> Examples[ChoiceExample]:
        return self._examples(read_table(source), labelled=False)

    def _examples(self, table: Table, *, labelled: bool) -> Examples[ChoiceExample]:
        context = _column(table, self.columns.get("text"), _CONTEXTS)
        question = _column(table, self.columns.get("text_pair"), _QUESTIONS)
        if context is None:
            context, question = question, None
        if context is None:
            raise table.error(None, None, f"no column of contexts ({', '.join(_CONTEXTS)}); it has {', '.join(table.columns)}")
        choices = _choice_columns(table, self.columns.get("choices"))
        label = _column(table, self.columns.get("label"), _LABELS) if labelled else None
        names = {"context": context, "question": question, "choices": ", ".join(choices), "label": label}
        items = []
        for number, place in enumerate(table.places):
            texts = _choices(table, number, choices)
            asked = None if question is None else _text(table, number, question).strip() or None
            right = None if label is None else _label(table, number, label, len(texts))
            items.append(ChoiceExample(place, _text(table, number, context), texts, asked, right))
        return Examples(table.source, items, {field: name for field, name in names.items() if name is not None}, table.columns)

    def examples_from(self, inputs: Sequence[Any]) -> Examples[ChoiceExample]:
        """inputs: dicts with context, choices and, if wanted, question; or pairs (context, choices)."""
        items = []
        for number, value in enumerate(inputs, 1):
            place = f"input {number}"
            if not isinstance(value, dict) and not (isinstance(value, (list, tuple)) and len(value) == 2):
                raise DataError.at("inputs", place, None, "expected a dict with context and choices, or a pair of them")
            fields = value if isinstance(value, dict) else dict(zip(("context", "choices"), value))
            if not isinstance(fields.get("context"), str):
                raise DataError.at("inputs", place, "context", "expected a text")
            choices = fields.get("choices")
            if not isinstance(choices, (list, tuple)) or not all(isinstance(choice, str) for choice in choices):
                raise DataError.at("inputs", place, "choices", "expected a list of texts")
            question = fields.get("question")
            if not isinstance(question, str | None):
                raise DataError.at("inputs", place, "question", "expected a text")
            items.append(ChoiceExample(place, fields["context"], tuple(choices), question))
        return Examples("inputs", items, {})

    def with_labels_of(self, train: Examples[ChoiceExample]) -> MultipleChoice:
        self._check_present(train)
        return self

    def check(self, examples: Examples[ChoiceExample], *, labelled: bool) -> None:
        for example in examples:
            if not example.context.strip():
                raise examples.error(example, "context", "is empty")
            count, expected = len(example.choices), len(examples.items[0].choices)
            if count < 2:
                raise examples.error(example, "choices", f"{count} choice(s), expected two or more")
            if count != expected:
                where = examples.items[0].place
                raise examples.error(example, "choices", f"{count} choices, but {expected} at {where}; all need as many")
            for number, choice in enumerate(example.choices):
                if not choice.strip():
                    raise examples.error(example, "choices", f"choice {number} (counted from 0) is empty")
        if labelled:
            self._check_present(examples)

    def _check_present(self, examples: Examples[ChoiceExample]) -> None:
        if "label" not in examples.columns:
            problem = f"no column of labels ({', '.join(_LABELS)}); it has {', '.join(examples.available)}"
            raise examples.error(None, None, f"{problem}; --label-column names the column of the labels")
        for example in examples:
            if example.label is None:
                raise examples.error(example, "label", "has no label")
            if not 0 <= example.label < len(example.choices):
                problem = f"holds {example.label}; the {len(example.choices)} choices are counted from 0"
                raise examples.error(example, "label", problem)

    def config(self) -> dict[str, Any]:
        return labels_config(unnamed(2))  # as transformers has it by itself: the head is one logit a choice, whatever this says

    def features(
        self, examples: Examples[ChoiceExample], tokenizer: PreTrainedTokenizerBase, max_seq_length: int, *, labelled: bool
    ) -> Features:
        """A row maps input_ids (and token_type_ids) to a list per choice, and labels to the number of the right one. Of a pair that
        is longer than ``max_seq_length`` the longer text is cut."""
        if not len(examples):
            return Features([], [])
        contexts = [example.context for example in examples for _ in example.choices]
        choices = [choice if e.question is None else f"{e.question} {choice}" for e in examples for choice in e.choices]
        encoded = tokenizer(contexts, choices, truncation=True, max_length=max_seq_length, return_attention_mask=False)
        rows: list[dict[str, Any]] = []
        truncated, first = 0, 0
        for example in examples:
            end = first + len(example.choices)
            for encoding in encoded.encodings[first:end]:
                for sequence, field in enumerate(("context", "choices")):
                    if sequence not in encoding.sequence_ids:
                        raise examples.error(example, field, "holds a text of which the tokenizer keeps nothing")
            row: dict[str, Any] = {name: values[first:end] for name, values in encoded.items()}
            if labelled:
                row["labels"] = example.label
            rows.append(row)
            truncated += any(encoding.overflowing for encoding in encoded.encodings[first:end])
            first = end
        return Features(rows, list(range(len(rows))), truncated=truncated)

    def scores(self, outputs: Outputs, features: Features, examples: Examples[ChoiceExample]) -> dict[str, float]:
        right = [int(logits.argmax()) == example.label for logits, example in zip(outputs, examples, strict=True)]
        return {"accuracy": float(np.mean(right))}

    def predictions(self, outputs: Outputs, features: Features, examples: Examples[ChoiceExample]) -> list[dict[str, Any]]:
        """``label`` (the number of the choice, from 0), ``choice``, its ``probability``, and ``probabilities`` of all choices."""
        results = []
        for logits, example in zip(outputs, examples, strict=True):
            scores = logits.astype(np.float64)
            probabilities = np.exp(scores - np.logaddexp.reduce(scores)).tolist()
            best = int(scores.argmax())
            found = {"label": best, "choice": example.choices[best], "probability": probabilities[best]}
            results.append({**found, "probabilities": probabilities})
        return results


def pad_choices(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
    """A collator of :meth:`MultipleChoice.features`: input_ids, attention_mask, ... (batch, num_choices, longest), labels (batch,)
    where the rows have them (transformers' DataCollatorForMultipleChoice insists on labels, which prediction has not)."""

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        num_choices = len(rows[0]["input_ids"])
        inputs = [name for name in rows[0] if name != "labels"]
        sequences = [{name: row[name][choice] for name in inputs} for row in rows for choice in range(num_choices)]
        padded = tokenizer.pad(sequences, return_tensors="pt")
        batch = {name: values.view(len(rows), num_choices, -1) for name, values in padded.items()}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    return collate


# --- tables ----------------------------------------------------------------------------------------------------------------


def _column(table: Table, named: str | None, known: Sequence[str]) -> str | None:
    """The column that the user named or, without one, the first of the known that is there."""
    if named is not None and named not in table.columns:
        raise table.error(None, None, f"no column {named!r}; it has {', '.join(table.columns)}")
    return named or next((name for name in known if name in table.columns), None)


def _choice_columns(table: Table, named: str | None) -> list[str]:
    """The column of lists of choices, or those of one choice each, in their order."""
    if named is not None:
        return [str(_column(table, name, ())) for name in named.split(",")]
    if (lists := _column(table, None, _CHOICE_LISTS)) is not None:
        return [lists]
    found = {name: match for name in table.columns if (match := _CHOICE.fullmatch(name))}
    if len(found) < 2:
        known = f"{', '.join(_CHOICE_LISTS)}, or ending0, ending1, ..."
        raise table.error(None, None, f"no columns of choices ({known}); it has {', '.join(table.columns)}")
    return sorted(found, key=lambda name: (len(found[name][2]), found[name][2].lower()))


def _choices(table: Table, number: int, columns: Sequence[str]) -> tuple[str, ...]:
    cells = [table.rows[number][column] for column in columns]
    if len(cells) == 1:
        if not isinstance(cells[0], list) or not all(isinstance(choice, str) for choice in cells[0]):
            raise table.error(number, columns[0], "expected a list of texts")
        return tuple(cells[0])
    return tuple(_text(table, number, column) for column in columns)


def _text(table: Table, number: int, column: str) -> str:
    value = table.rows[number][column]
    if not isinstance(value, str):
        raise table.error(number, column, f"expected a text, found {'null' if value is None else type(value).__name__}")
    return value


def _label(table: Table, number: int, column: str, num_choices: int) -> int | None:
    """The number of the right choice, from 0; None for null, "" and -1, which stand for a label that is held back."""
    value = table.rows[number][column]
    whole = int(value) if isinstance(value, float) and value.is_integer() else value  # as where one label of a column is missing
    text = "" if value is None else str(whole).strip()
    if text in ("", "-1"):
        return None
    label = int(text) if text.isdecimal() else ord(text.upper()) - ord("A") if re.fullmatch("[A-Za-z]", text) else -1
    if not 0 <= label < num_choices:
        last = chr(ord("A") + num_choices - 1)
        raise table.error(number, column, f"holds {value!r}; expected 0 to {num_choices - 1} or A to {last}")
    return label
