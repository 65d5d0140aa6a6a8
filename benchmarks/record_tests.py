"""A pytest plugin that appends each test's outcome to a file as it ends: a run that is killed leaves what it knew.

python -m pytest -p benchmarks.record_tests --record FILE
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

_file: Path | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    """Under xdist the first process hears of every test; the workers stay silent."""
    global _file
    _file = None if hasattr(config, "workerinput") else config.getoption("--record")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test that runs has one line, of its call; one that is skipped or fails before or after it has that one."""
    if _file is None or (report.passed and report.when != "call"):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    message = None if crash is None else crash.message.splitlines()[0][:300]
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "message": message}
    with _file.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def summarized(file: Path) -> dict[str, Any]:
    """Counts, the failed tests with the first line of their errors, and the slowest."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    counts = Counter(line["outcome"] for line in lines)
    slowest = sorted(lines, key=lambda line: -line["seconds"])[:8]
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": [{key: line[key] for key in ("test", "message")} for line in lines if line["outcome"] == "failed"],
        "slowest": {line["test"]: line["seconds"] for line in slowest},
    }
