"""The texts of ``fastbert embed``, from all its inputs, checked before a model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.data.errors import DataError
from fastbert.data.sources import DATASET_NAME, Source
from fastbert.data.tables import TABLE_TYPES, Table, file_kind, read_stdin, read_table

STANDARD_INPUT = "-"
_TEXT = "text"


@dataclass(frozen=True)
class Texts:
    """``texts``: strings, or lists of words; ``pairs``: the second text of each, None without; ``sources``: where they come from,
    one behind the other, each with the places of its texts."""

    texts: list[str] | list[list[str]]
    pairs: list[str] | None
    sources: list[tuple[str, list[str]]]

    def __len__(self) -> int:
        return len(self.texts)

    def error(self, index: int, problem: str) -> DataError:
        """The error of ``problem`` with one text, which names its file and line."""
        for source, places in self.sources:
            if index < len(places):
                return DataError.at(source, places[index], None, problem)
            index -= len(places)
        raise IndexError(f"there are only {len(self)} texts")

    def fingerprint(self) -> str:
        """SHA-256 of the texts and their pairs, wherever they come from."""
        digest = hashlib.sha256()
        for index, text in enumerate(self.texts):
            parts = [text] if isinstance(text, str) else list(text)
            if self.pairs is not None:
                parts.append(self.pairs[index])
            # Behind its length each, so that texts cannot run into each other.
            for part in parts:
                encoded = part.encode()
                digest.update(b"%d\0" % len(encoded) + encoded)
            digest.update(b"\n")
        return digest.hexdigest()


def read_texts(
    inputs: Sequence[str],
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    words_column: str | None = None,
    split: str = "train",
) -> Texts:
    """All texts of ``inputs``: files that :func:`fastbert.data.tables.read_table` reads, "-" for lines of standard input, or names
    of Hugging Face datasets (of which ``split`` is read).

    text_column: None is the column "text", or the only one that there is. words_column instead: words, in a list or with spaces
    between them. Raises DataError for what cannot be read, a column that is not there, and a text that is empty or no text.
    """
    texts: list[Any] = []
    pairs: list[str] | None = None if text_pair_column is None else []
    sources = []
    for name in inputs:
        table = _table(name, split)
        sources.append((table.source, table.places))  # and not its other columns, which would stay in memory
        if words_column is not None:
            column = _column(table, words_column, "--words-column")
            texts += [_words(table, row, column) for row in range(len(table))]
            continue
        column = _column(table, text_column, "--text-column")
        texts += [_text(table, row, column) for row in range(len(table))]
        if pairs is not None:
            second = _column(table, text_pair_column, "--text-pair-column")
            pairs += [_text(table, row, second) for row in range(len(table))]
    return Texts(texts, pairs, sources)


def _table(source: str, split: str) -> Table:
    if source == STANDARD_INPUT:
        return read_stdin()
    path = Path(source)
    if path.exists() or file_kind(path) in TABLE_TYPES or DATASET_NAME.fullmatch(source) is None:
        return read_table(Source(path))
    return read_table(Source(dataset=source, split=split))


def _column(table: Table, name: str | None, option: str) -> str:
    if name is None:
        if _TEXT in table.columns:
            return _TEXT
        if len(table.columns) == 1:
            return table.columns[0]
        problem = "there is no column 'text'"
    elif name in table.columns:
        return name
    else:
        problem = f"there is no column {name!r}"
    raise table.error(None, None, f"{problem}; it has {', '.join(map(repr, table.columns))} ({option} names one)")


def _text(table: Table, row: int, column: str) -> str:
    text = table.rows[row][column]
    if text is None or (isinstance(text, str) and not text.strip()):
        raise table.error(row, column, "the text is empty; every row needs one")
    if not isinstance(text, str):
        raise table.error(row, column, f"expected a text, found {text!r:.60}")
    return text


def _words(table: Table, row: int, column: str) -> list[str]:
    words = table.rows[row][column]
    words = words.split() if isinstance(words, str) else words
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise table.error(row, column, f"expected a list of words, or words with spaces between them, found {words!r:.60}")
    if not words:
        raise table.error(row, column, "there are no words; every row needs some")
    return words
