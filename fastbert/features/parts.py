"""The finished chunks of a run of ``fastbert embed``, in ``OUT.parts/`` until the output is whole.

A part appears under its name when it is whole, so that a run that was killed at any moment goes on from what is there. What the
chunks belong to stands in manifest.json; a part's name says it, too, so that a process that outlives its run does no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.data.errors import DataError
from fastbert.runs.errors import SettingsError
from fastbert.runs.folder import write_json
from fastbert.runs.whole_file import whole_file

from .embedder import Embedded
from .settings import MANIFEST, parts_folder


@dataclass(frozen=True)
class Totals:
    """Of one chunk: tokens that the model saw, texts that were cut, rows of the output."""

    tokens: int
    truncated: int
    rows: int


class Parts:
    """The folder of one run. ``manifest``: what decides about the chunks, JSON-ready; ``count``: how many there are."""

    def __init__(self, output: Path, manifest: dict[str, Any], count: int) -> None:
        self.folder, self.count = parts_folder(output), count
        self._manifest = manifest
        self._key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]

    def open(self, *, resume: bool) -> list[int]:
        """Makes the folder ready and returns the numbers of the chunks that are still to be made.

        With ``resume`` what is there stays, and SettingsError says where it belongs to another run; else it is deleted.
        """
        path = self.folder / MANIFEST
        if path.exists() and resume:
            _refuse_another_run(self.folder, _read_manifest(path), self._manifest)
        else:
            self.delete()
            self.folder.mkdir(exist_ok=True)
            write_json(path, self._manifest)
        return [index for index in range(self.count) if not self.path(index).exists()]

    def path(self, index: int) -> Path:
        return self.folder / f"chunk-{index:06d}-{self._key}.npz"

    @contextlib.contextmanager
    def _arrays(self, index: int) -> Iterator[Mapping[str, NDArray[Any]]]:
        """Of a part. Raises DataError for one that is damaged, after deleting it: the next run makes it again."""
        path = self.path(index)
        try:
            with np.load(path, allow_pickle=False) as part:
                yield part
        except (ValueError, KeyError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise self._damaged(path, error) from error
        except Exception as error:  # zipfile's and zlib's own, which have no class in common
            raise self._damaged(path, error) from error

    def read(self, index: int) -> Embedded:
        """Raises DataError for a part that is damaged, as counts and totals do."""
        with self._arrays(index) as part:
            names = json.loads(part["names"].tobytes()) if "names" in part else None
            return Embedded(part["rows"], part["counts"], names, int(part["tokens"]), int(part["truncated"]))

    def counts(self, index: int) -> NDArray[np.int64]:
        """The rows of each text of a chunk, without reading the rows."""
        with self._arrays(index) as part:
            return part["counts"]

    def totals(self, index: int) -> Totals:
        with self._arrays(index) as part:
            return Totals(int(part["tokens"]), int(part["truncated"]), int(part["counts"].sum()))

    def progress(self) -> str:
        """What there is, for the end of a run that failed."""
        finished = sum(self.path(index).exists() for index in range(self.count))
        return f"{finished} of {self.count} chunks are finished in {self.folder}; the same command with --resume goes on from them"

    def delete(self) -> None:
        """Deletes the run's files; the manifest goes last, so that what an interrupted deletion leaves is still a run."""
        if not self.folder.exists():
            return
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == MANIFEST):
            path.unlink()
        self.folder.rmdir()

    @staticmethod
    def _damaged(path: Path, error: Exception) -> DataError:
        path.unlink()
        return DataError(f"{path}: the chunk was damaged ({error}) and is deleted; the same command with --resume makes it again")


def write_part(path: Path, embedded: Embedded) -> None:
    """Writes a chunk so that ``path`` is there whole or not at all."""
    arrays: dict[str, Any] = {
        "rows": embedded.rows, "counts": embedded.counts, "tokens": embedded.tokens, "truncated": embedded.truncated
    }  # fmt: skip
    if embedded.names is not None:  # as JSON: numpy's strings lose NULs at their end
        arrays["names"] = np.frombuffer(json.dumps(embedded.names).encode(), np.uint8)
    with whole_file(path, on_disk=True) as beside, beside.open("wb") as file:
        np.savez(file, **arrays)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{path}: not readable ({error}); --overwrite begins anew") from error


def _refuse_another_run(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises SettingsError that names what differs between the run in ``folder`` and this one."""
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    if not differing:
        return
    changes: Sequence[str] = [
        f"--{name.replace('_', '-')} was {_shown(theirs.get('settings', {}).get(name))} and is now {_shown(value)}"
        for name, value in ours["settings"].items()
        if theirs.get("settings", {}).get(name) != value
    ]
    others = [_OTHER_NAMES.get(name, name) for name in differing if name != "settings"]
    changes = [*changes, *(f"{name} is not the same" for name in others)]
    raise SettingsError(
        f"{folder} belongs to another run: {'; '.join(changes)}. Give the command of that run, or --overwrite to begin anew"
    )


_OTHER_NAMES = {
    "model": "the model (weights, configuration or tokenizer)", "input": "the text", "chunks": "the division into chunks",
    "device": "the kind of device", "format": "the format",
}  # fmt: skip


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)
