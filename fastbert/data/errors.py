"""What is wrong with what a user gave to read: labelled data, a corpus, a tokenizer. The message names the place."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message names file, line or row, column, and what would be right."""

    @classmethod
    def at(cls, source: str, place: str | None, column: str | None, problem: str) -> DataError:
        """``dev.tsv, line 12, column 'label': problem``; a place or column that is None is left out."""
        where = [source, place, None if column is None else f"column {column!r}"]
        return cls(f"{', '.join(part for part in where if part is not None)}: {problem}")


class CorpusError(DataError):
    """The text cannot be used as a corpus; the message names the file and the line or row, and what would be right."""


def why_too_few(least_documents: int) -> str:
    """Why fewer documents than these, one or two, will not do."""
    return "next sentence prediction needs at least two documents" if least_documents > 1 else "there is nothing to train on"


class TokenizerError(DataError):
    """The tokenizer cannot be loaded or cannot serve BERT; the message names the file and what is missing."""
