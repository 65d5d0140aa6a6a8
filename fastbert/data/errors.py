"""What is wrong with data that a user gave: one class, whose message names the place."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message names file, line or row, column, and what would be right."""

    @classmethod
    def at(cls, source: str, place: str | None, column: str | None, problem: str) -> DataError:
        """``dev.tsv, line 12, column 'label': problem``; a place or column that is None is left out."""
        where = [source, place, None if column is None else f"column {column!r}"]
        return cls(f"{', '.join(part for part in where if part is not None)}: {problem}")
