"""A pytest plugin for the tests in a checkout of transformers: it puts our classes in the place of theirs, and notes outcomes.

Runs in pytest processes of :mod:`tests.ecosystem.upstream_checkout`, as a module of its own name, since the checkout has a package
``tests`` too. FASTBERT_DOOR, FASTBERT_CLASSES (names, comma-separated) and FASTBERT_OUTCOMES (a file to write) say what to do.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path

import transformers  # before the checkout's conftest.py puts its own source on the path
import upstream

import fastbert

_outcomes: dict[str, str] = {}
_patches = contextlib.ExitStack()


def put_in_place(name: str) -> None:
    """fastbert's class is what the name means, in the package, in the model's package and in its module."""
    module = getattr(transformers, name).__module__
    for home in ("transformers", module.rpartition(".")[0], module):
        setattr(importlib.import_module(home), name, getattr(fastbert, name))


def pytest_configure() -> None:
    door, names = os.environ["FASTBERT_DOOR"], os.environ["FASTBERT_CLASSES"].split(",")
    if door == "class":
        for name in names:
            put_in_place(name)
    if door == "accelerate":
        _patches.enter_context(upstream.accelerating(names))


def pytest_runtest_setup() -> None:
    common = sys.modules.get("tests.test_modeling_common")
    if common is not None:
        upstream.fix_random_numbers(common)


def pytest_runtest_logreport(report) -> None:
    """One outcome per test, whose subtests and teardown report on their own: nothing passes after a failure."""
    if (report.when == "call" or not report.passed) and _outcomes.get(report.nodeid) != "failed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    _patches.close()
    Path(os.environ["FASTBERT_OUTCOMES"]).write_text(json.dumps(_outcomes))
