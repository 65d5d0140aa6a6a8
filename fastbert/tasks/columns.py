"""Which columns of a table hold the text, the second text and the label, where nobody said so."""

from __future__ import annotations

from collections.abc import Mapping

from fastbert.data.errors import DataError
from fastbert.data.tables import Table

# What published data sets call them, the first that is there wins: a text, and the second text that belongs to it.
_TEXTS = {
    "sentence1": "sentence2", "text1": "text2", "question1": "question2", "premise": "hypothesis", "#1 String": "#2 String",
    "question": "sentence", "text": "text_pair", "sentence": None, "review": None, "content": None,
}  # fmt: skip
_LABELS = ("label", "labels", "gold_label", "is_duplicate", "Quality", "score", "target", "class", "category", "sentiment")


def find_text_columns(table: Table, columns: Mapping[str, str]) -> tuple[str, str | None]:
    """The column of the text and, for pairs, of the second text; ``columns`` are those that the user named."""
    if "text" in columns:
        return _named(table, columns["text"], "text"), _named(
            table, columns["text_pair"], "text"
        ) if "text_pair" in columns else None
    if "text_pair" in columns:
        raise DataError.at(table.source, None, None, "--text-pair-column needs --text-column, too")
    for text, pair in _TEXTS.items():
        if text in table.columns:
            return text, pair if pair in table.columns else None
    raise DataError.at(table.source, None, None, f"has the columns {_listed(table)}; --text-column names the one with the text")


def find_label_columns(table: Table, columns: Mapping[str, str]) -> list[str]:
    """The columns of the labels, none where the table has no labels; a column's own name may have commas in it."""
    if "label" in columns:
        names = _names_in(columns["label"], table)
        present = [name for name in names if name in table.columns]
        if present and present != names:
            _named(table, next(name for name in names if name not in present), "label")
        return present
    return next(([name] for name in _LABELS if name in table.columns), [])


def _names_in(joined: str, table: Table) -> list[str]:
    """The names between the commas of ``joined``; where a column's name has commas, the longest one that is there."""
    names, pieces = [], joined.split(",")
    while pieces:
        count = next((n for n in range(len(pieces), 0, -1) if ",".join(pieces[:n]) in table.columns), 1)
        names.append(",".join(pieces[:count]))
        pieces = pieces[count:]
    return names


def _named(table: Table, name: str, what: str) -> str:
    if name not in table.columns:
        raise DataError.at(table.source, None, None, f"has no column {name!r} for the {what}; it has {_listed(table)}")
    return name


def _listed(table: Table) -> str:
    return ", ".join(map(repr, table.columns))
