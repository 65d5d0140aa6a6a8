"""Labelled examples, one class per family of tasks, each with the place that it was read from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastbert.data.errors import DataError


@dataclass(frozen=True, slots=True)
class TextExample:
    """One text or a pair. ``label``: a class, a number (regression), several classes (multi-label), None where it is not known."""

    place: str
    text: str
    text_pair: str | None = None
    label: str | float | tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class WordsExample:
    """A sentence in words; ``tags``: one per word, or None. ``text``, ``spans``: where the words were cut out of a text, it and the
    (start, end) of each in characters."""

    place: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    text: str | None = None
    spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """``start``: of ``text``, in characters of the context."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class QuestionExample:
    """``answers``: None where they are not known, empty where the context has none (SQuAD 2.0)."""

    place: str
    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None = None


@dataclass(frozen=True, slots=True)
class ChoiceExample:
    """``choices`` follow ``context`` (with ``question``, where there is one, in front of each choice); ``label``: of the right
    one, from 0."""

    place: str
    context: str
    choices: tuple[str, ...]
    question: str | None = None
    label: int | None = None


E = TypeVar("E")


@dataclass(frozen=True)
class Examples(Generic[E]):
    """One split. ``source``: its file or dataset, for messages; ``columns``: what the source calls the fields of an example, so
    that messages can name a column (``{"text": "sentence", "label": "gold_label"}``); ``available``: all columns of a table;
    ``label_columns``: those that are a label each; ``notes``: what was unusual about the source, for people."""

    source: str
    items: list[E]
    columns: dict[str, str]
    available: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[E]:
        return iter(self.items)

    def fingerprint(self) -> str:
        """SHA-256 of the examples with their labels: what a resumed run must find again."""
        digest = hashlib.sha256()
        for example in self.items:
            digest.update(repr(example).encode())
        return digest.hexdigest()

    def with_places(self, predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One prediction of each example, behind ``input``, the place that the example was read from."""
        places = [example.place for example in self.items]
        return [{"input": place, **prediction} for place, prediction in zip(places, predictions, strict=True)]

    def error(self, example: E | None, field: str | None, problem: str) -> DataError:
        """The error of ``problem`` in a field of an example, or of all of them."""
        place = None if example is None else example.place
        return DataError.at(self.source, place, None if field is None else self.columns.get(field, field), problem)
