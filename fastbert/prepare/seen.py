"""Which documents were read already: their digests in a database on disk, so that memory does not grow with the corpus.

SQLite's tree takes some 10 microseconds a document once it is larger than its cache, beside the milliseconds that a document takes
to be encoded, and keeps its promise through a kill at any moment; a set in memory would be faster and take 120 bytes a document.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

_CACHE_KIB = 64 << 10


class SeenDocuments:
    """Digests, each with the number of the batch that it was first seen in.

    ``path`` is made anew, or with ``from_batch`` > 0 is what an earlier run left there, of which batches from that number on are
    forgotten. Methods raise sqlite3.Error where the file cannot be read or written.
    """

    def __init__(self, path: Path, from_batch: int) -> None:
        if from_batch == 0:
            delete_seen(path)
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._execute = self._connection.execute
        self._execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        if from_batch == 0:
            self._execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, batch INTEGER NOT NULL) WITHOUT ROWID")
        self._execute("BEGIN")
        self._execute("DELETE FROM seen WHERE batch >= ?", (from_batch,))

    def add(self, digest: bytes, batch: int) -> bool:
        """Whether ``digest`` is new; it is kept."""
        return self._execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, batch)).rowcount == 1

    def commit(self) -> None:
        """From here on what was added outlasts the process."""
        self._execute("COMMIT")
        self._execute("BEGIN")

    def close(self) -> None:
        self._connection.close()


def delete_seen(path: Path) -> None:
    for name in (path.name, f"{path.name}-journal"):
        path.with_name(name).unlink(missing_ok=True)
