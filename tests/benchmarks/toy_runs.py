"""``fastbert bench`` at toy size, for the tests of whole runs."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner, Result

from benchmarks import bench as suites
from benchmarks import inference, training
from fastbert.cli.main import app

TOY = ["--model", "tiny", "--rounds", "1", "--threads", "1", "--peers", "transformers", "--dtype", "float32"]
LIMITS = {"matmul_flops": 1e12, "matmul_flops_by_library": {"oneDNN": 1e12}, "copy_bytes": 1e10}
_BATCHES = {"inference": ("3xsst2", "1x32"), "finetune": ("8xsst2",), "pretrain": ("2x32",)}


def use_toy_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own take seconds to measure."""
    for module in (inference, training):
        monkeypatch.setattr(module, "ceilings", lambda device, dtype: LIMITS)


def use_toy_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real batches and ceilings take seconds even for a tiny model."""
    use_toy_limits(monkeypatch)
    monkeypatch.setattr(suites, "_BATCHES", _BATCHES)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments, "--json"])
