"""The option of ``pytest benchmarks/test_ops.py``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", default="cpu", help="sizes of the ops, a name in benchmarks.op_contenders.SCALES (default: cpu)")
