"""The finished chunks of a run of ``fastbert embed``, in ``OUT.parts/`` until the output is whole.

A part appears under its name when it is whole, so that a run that was killed at any moment goes on from what is there. What the
chunks belong to stands in manifest.json; a part's name says it, too, so that a process that outlives its run does no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.errors import DataError
from fastbert.train.errors import SettingsError
from fastbert.train.run_folder import write_json

from .embed import Embedded

MANIFEST = "manifest.json"
_OURS = re.compile(r"manifest\.json|\.manifest\.json\.new|\.?chunk-\d+-[0-9a-f]+\.npz(\.\d+)?")


def parts_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses, before any work, an output that must not be written.

    Raises SettingsError where it, or what a run has left of it, is there and neither ``resume`` nor ``overwrite`` is set, where
    there is nothing left to resume, and where the folder of parts holds files that are none of ours; OSError where the output
    cannot be written.
    """
    folder = parts_folder(output)
    if output.is_dir():
        raise SettingsError(f"--output {output} is a folder; give the name of a file")
    if not output.absolute().parent.is_dir():
        raise SettingsError(f"--output {output}: there is no folder {output.absolute().parent}")
    if not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise PermissionError(f"--output {output}: no permission to write to {output.absolute().parent}")
    if folder.exists() and (not folder.is_dir() or any(not _OURS.fullmatch(path.name) for path in folder.iterdir())):
        raise SettingsError(
            f"{folder} holds files that no run of fastbert embed wrote; they are left alone: choose another --output"
        )
    if resume and output.exists() and not folder.exists():
        raise SettingsError(f"{output} is there and whole: there is nothing to resume (--overwrite makes it anew)")
    if not (resume or overwrite):
        if folder.exists():
            raise SettingsError(f"{folder} holds an unfinished run: --resume goes on with it, --overwrite begins anew")
        if output.exists():
            raise SettingsError(f"{output} is there already: --overwrite makes it anew, --output names another file")


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

    def read(self, index: int) -> Embedded:
        """Raises DataError for a part that is damaged, after deleting it: the next run makes it again."""
        path = self.path(index)
        try:
            with np.load(path, allow_pickle=False) as part:
                names = [str(name) for name in part["names"]] if "names" in part else None
                return Embedded(part["rows"], part["counts"], names, int(part["tokens"]), int(part["truncated"]))
        except (ValueError, KeyError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise self._damaged(path, error) from error
        except Exception as error:  # zipfile's and zlib's own, which have no class in common
            raise self._damaged(path, error) from error

    def counts(self, index: int) -> np.ndarray:
        """The rows of each text of a chunk, without reading the rows."""
        with np.load(self.path(index), allow_pickle=False) as part:
            return part["counts"]

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
    if embedded.names is not None:
        arrays["names"] = np.array(embedded.names, dtype=np.str_)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


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
