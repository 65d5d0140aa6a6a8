"""The benchmarks run, at toy size: a benchmark that nobody runs rots."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .conftest import REPOSITORY


@pytest.mark.parametrize("name", ["inference", "pretrain"])
def test_toy_run(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--size", "tiny", "--rounds", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["benchmark"] == name
    assert document["machine"]["torch"]
    for result in document["results"].values():
        assert result["ratio"]["median"] > 0
        assert 0 < result["share_of_matmul_rate"] < 2
