"""The test files of transformers' models, where FASTBERT_TRANSFORMERS_SOURCE names a checkout of its source.

transformers publishes these in its repository alone. How they run is tested everywhere, on a checkout of our own making.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from .upstream import FAMILIES, doors
from .upstream_checkout import lost, outcomes, test_file

test_file.__test__ = False
CHECKOUT = os.environ.get("FASTBERT_TRANSFORMERS_SOURCE")


@pytest.mark.skipif(CHECKOUT is None, reason="FASTBERT_TRANSFORMERS_SOURCE names no checkout of transformers' source")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_test_that_passes_for_theirs_passes_for_ours(family):
    theirs = outcomes(Path(CHECKOUT), family, "theirs")
    for door in doors(family):
        assert not lost(theirs, outcomes(Path(CHECKOUT), family, door)), door


# --- a checkout of our own making ----------------------------------------------------------------------------------------

TESTS = """
import unittest

import pytest, transformers
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel

from ...helpers import small
from ...test_modeling_common import global_rng


def test_same_random_numbers():
    assert global_rng.randint(0, 999) == 864


def test_of_both():
    assert isinstance(small(BertModel), transformers.models.bert.modeling_bert.BertModel)


def test_of_theirs():
    fast = type(small(BertForMaskedLM).bert.encoder.layer[0]).__module__.startswith("fastbert")
    assert not fast


def test_of_theirs_loaded(tmp_path):
    small(BertModel).save_pretrained(tmp_path)
    assert not type(AutoModel.from_pretrained(tmp_path).encoder.layer[0]).__module__.startswith("fastbert")


class TestParts(unittest.TestCase):
    def test_of_theirs_in_part(self):
        for cls in (BertModel, BertForMaskedLM):
            with self.subTest(cls.__name__):
                self.assertFalse(type(small(cls).base_model).__module__.startswith("fastbert"))


@pytest.mark.skip(reason="for everybody")
def test_of_nobody():
    pass
"""
COMMON = """
import random

global_rng = random.Random()
"""
HELPERS = """
from transformers import BertConfig


def small(cls):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    return cls(BertConfig(vocab_size=30, **sizes))
"""


def make_checkout(root: Path, of_version: str) -> Path:
    folder = root / "tests" / "models" / "bert"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "test_modeling_bert.py").write_text(TESTS)
    (root / "tests" / "helpers.py").write_text(HELPERS)
    (root / "tests" / "test_modeling_common.py").write_text(COMMON)
    source = root / "src" / "transformers"
    source.mkdir(parents=True)
    # What transformers' conftest.py does; the source of the checkout must not hide the installed package.
    (root / "conftest.py").write_text('import sys\n\nsys.path.insert(1, "src")\n')
    (source / "__init__.py").write_text(f'__version__ = "{of_version}"\n')
    return root


def test_doors_on_a_checkout(tmp_path):
    checkout = make_checkout(tmp_path, version("transformers"))
    file = "tests/models/bert/test_modeling_bert.py"
    names = (
        "test_same_random_numbers",
        "test_of_both",
        "test_of_theirs",
        "test_of_theirs_loaded",
        "TestParts::test_of_theirs_in_part",
        "test_of_nobody",
    )
    seeded, both, *of_theirs, nobody = (f"{file}::{name}" for name in names)
    theirs = {seeded: "passed", both: "passed", **dict.fromkeys(of_theirs, "passed"), nobody: "skipped"}
    for door in doors("bert"):
        ours = outcomes(checkout, "bert", door)
        assert ours == {**theirs, **dict.fromkeys(of_theirs, "failed")}, door
        assert lost(theirs, ours) == of_theirs


def test_what_is_not_run_is_lost():
    assert lost({"a": "passed", "b": "passed", "c": "failed", "d": "skipped"}, {"a": "passed"}) == ["b"]


def test_checkout_of_another_version(tmp_path):
    checkout = make_checkout(tmp_path, "4.0.0")
    with pytest.raises(ValueError, match=r"is transformers 4\.0\.0, installed is .*the two must be the same"):
        outcomes(checkout, "bert", "theirs")


def test_no_checkout(tmp_path):
    with pytest.raises(ValueError, match="is no checkout of transformers' source"):
        outcomes(tmp_path, "bert", "theirs")


def test_pytest_that_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="false -m pytest .* ended with 1"):
        outcomes(make_checkout(tmp_path, version("transformers")), "bert", "theirs")
