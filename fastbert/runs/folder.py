"""The folder that a run writes to: whether it can be, and files in it that are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import SettingsError
from .whole_file import whole_file

_LONGEST_NAME = 250  # bytes: file systems take 255, and whole_file adds to it


def write_json(path: Path, document: Any) -> None:
    """Writes ``document`` so that readers see the old file or the new one. NaN and infinity are refused (``ValueError``)."""
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def check_writable(output: Path) -> None:
    """Raises :class:`SettingsError` or ``PermissionError`` where no folder ``output`` can be made and written to."""
    if output.exists() and not output.is_dir():
        raise SettingsError(f"--output {output} is a file; give a folder")
    existing = output.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise SettingsError(f"--output {output}: {existing} is a file, so there can be no folder below it")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--output {output}: no permission to write to {existing}")


def check_place(output: Path) -> None:
    """Raises :class:`SettingsError` or ``PermissionError`` where no file ``output`` can be written beside the others of its folder,
    which is that of what a link leads to."""
    folder = output.resolve().parent
    if not folder.is_dir():
        raise SettingsError(f"--output {output}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"--output {output}: no permission to write to {folder}")
    if len(os.fsencode(output.name)) > _LONGEST_NAME:
        raise SettingsError(f"--output: the name {output.name[:40]}... is longer than {_LONGEST_NAME} bytes")


def check_outside(output: Path, inputs: Iterable[str]) -> None:
    """Raises SettingsError for an input (a path, or a name) that lies in a folder that is to be deleted."""
    for name in inputs:
        if Path(name).exists() and Path(name).resolve().is_relative_to(output.resolve()):
            raise SettingsError(f"--overwrite deletes {output}, and {name}, which the run needs, is in it: choose another --output")
