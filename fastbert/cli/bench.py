"""``fastbert bench``: the benchmarks of the checkout that this installation runs from.

They are no part of the package: they measure other engines, too, and keep results in the repository.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .command import DONE, FAILED, WRONG_USAGE, CommandFailure, CommandResult, Say

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def bench(options: dict[str, Any], save: str | None, output: Path | None, command: str, say: Say) -> CommandResult:
    """options: fields of benchmarks.bench.Options; save: a folder below benchmarks/results; output: any folder, for a report.
    :data:`FAILED` where a result of fastbert is missing or wrong; a peer that cannot take part is reported and no failure."""
    suites = benchmarks(CHECKOUT)
    settings = suites.Options(**options)
    if problems := settings.problems():
        raise CommandFailure("; ".join(problems), WRONG_USAGE)
    folders = {} if output is None else {"--output": output}
    if save is not None:
        try:
            folders["--save"] = suites.results_folder(save)
        except ValueError as error:
            raise CommandFailure(f"--save {error}", WRONG_USAGE) from error
    for option, folder in folders.items():
        make_folder(folder, option)
    with suites.unfinished(settings, command, list(folders.values())) as keep:
        document = suites.run(settings, say, keep)
        if save is not None:
            suites.save(settings, document, command, save)
        if output is not None:
            for path in suites.report(settings, document, command, output):
                say(f"written to {path}")
    for name, reason in document["failed"].items():
        say(f"failed: {name}: {reason}")
    return CommandResult({"suite": settings.suite, **document}, FAILED if document["failed"] else DONE)


def make_folder(path: Path, option: str) -> None:
    """Before anything is measured; CommandFailure where there can be none, or none that can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{option} {path}: expected a folder, or a path where one can be made: {error.strerror}"
        raise CommandFailure(message, WRONG_USAGE) from error
    if not os.access(path, os.W_OK):
        raise CommandFailure(f"{option} {path}: the folder cannot be written to", WRONG_USAGE)


def benchmarks(checkout: Path) -> ModuleType:
    """The module benchmarks.bench of a checkout; CommandFailure where there is none, as beside an installed wheel."""
    if not (checkout / "benchmarks" / "bench.py").is_file():
        raise CommandFailure(
            f"there are no benchmarks in {checkout}: they are in the repository, not in the package; "
            "clone it, and in the clone: pip install -e '.[bench]' && fastbert bench"
        )
    sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.bench")
