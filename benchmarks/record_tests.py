"""A pytest plugin that appends each test's outcome to a file as it ends: a run that is killed leaves what it knew.

python -m pytest -p benchmarks.record_tests --record FILE

An illegal access on a GPU ends all that its process can do there. A process of xdist's that finds itself so after a failed test
writes that down and ends: another takes its place, and the tests that follow fail for reasons of their own alone.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

_file: Path | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    """Under xdist the first process hears of every test; the workers stay silent."""
    global _file
    _file = None if hasattr(config, "workerinput") else config.getoption("--record")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test that runs has one line, of its call; one that is skipped or fails before or after it has that one."""
    if _file is not None and (report.when == "call" or not report.passed):
        _append(_file, report)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and hasattr(item.config, "workerinput") and not _gpu_answers():
        _append(item.config.getoption("--record"), report)
        os._exit(1)
    return report


def _gpu_answers() -> bool:
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _append(file: Path, report: pytest.TestReport) -> None:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longrepr if isinstance(report.longrepr, str) else ""  # a str of a lost process
    message = text.splitlines()[0][:300] if text else None
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "message": message}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def summarized(file: Path) -> dict[str, Any]:
    """Counts, the failed tests with the first line of their errors, and the slowest. Of a test's lines the first failed counts: one
    that ended its process has its own and then xdist's, and one may pass and fail while it is taken down."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    by_test: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["test"] not in by_test or (line["outcome"] == "failed" and by_test[line["test"]]["outcome"] != "failed"):
            by_test[line["test"]] = line
    lines = list(by_test.values())
    counts = Counter(line["outcome"] for line in lines)
    slowest = sorted(lines, key=lambda line: -line["seconds"])[:8]
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": [{key: line[key] for key in ("test", "message")} for line in lines if line["outcome"] == "failed"],
        "slowest": {line["test"]: line["seconds"] for line in slowest},
    }
