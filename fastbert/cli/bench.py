"""``fastbert bench``: the benchmarks of the checkout that this installation runs from.

They are no part of the package: they measure other engines, too, and keep results in the repository.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .command import DONE, FAILED, WRONG_USAGE, CommandFailure, CommandResult, Say

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def bench(options: dict[str, Any], save: str | None, command: str, say: Say) -> CommandResult:
    """options: fields of benchmarks.bench.Options; save: a folder below benchmarks/results. :data:`FAILED` where a result of
    fastbert is missing or wrong; a peer that cannot take part is reported and no failure."""
    suites = benchmarks(CHECKOUT)
    settings = suites.Options(**options)
    if problems := settings.problems():
        raise CommandFailure("; ".join(problems), WRONG_USAGE)
    document = suites.run(settings, say)
    if save is not None:
        suites.save(settings, document, command, save)
    for name, reason in document["failed"].items():
        say(f"failed: {name}: {reason}")
    return CommandResult({"suite": settings.suite, **document}, FAILED if document["failed"] else DONE)


def benchmarks(checkout: Path) -> ModuleType:
    """The module benchmarks.bench of a checkout; CommandFailure where there is none, as beside an installed wheel."""
    if not (checkout / "benchmarks" / "bench.py").is_file():
        raise CommandFailure(
            f"there are no benchmarks in {checkout}: they are in the repository, not in the package; "
            "clone it, and in the clone: pip install -e '.[bench]' && fastbert bench"
        )
    sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.bench")
