"""transformers' own model tests, of exactly the version that is installed, run on classes of our choice.

transformers' wheel carries no tests. Its source distribution carries the mixin that every model there is tested with
(``tests/test_modeling_common.py``). ``python -m tests.ecosystem.upstream download`` puts it beside the installed packages, and
``python -m tests.ecosystem.upstream`` counts what passes.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import importlib.util
import random
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any
from unittest import mock

import pytest

_PACKAGE = "transformers_tests"
# What the mixin imports and the source distribution lacks: base classes with tests of their own, empty here.
_STAND_INS = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


# --- where the tests come from -------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the tests of the installed version are, or would be."""
    return Path(sys.prefix) / f"transformers-{version('transformers')}" / "tests"


def missing() -> str | None:
    """Why transformers' tests cannot run here; None where they can."""
    if importlib.util.find_spec("parameterized") is None:
        return "transformers' tests need the package 'parameterized'"
    if not folder().is_dir():
        return f"there are no tests of transformers in {folder()}; `python -m tests.ecosystem.upstream download` gets them"
    return None


def download() -> None:
    """Puts the tests in the source distribution of the installed transformers into :func:`folder`, unless they are there.

    Raises ``subprocess.CalledProcessError`` where pip cannot download it.
    """
    if folder().is_dir():
        return
    with tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--dest", scratch]
        requirement = f"transformers=={version('transformers')}"
        subprocess.run([*pip, "--no-deps", "--no-binary", "transformers", requirement], check=True)
        tests = Path(scratch) / "tests"
        tests.mkdir()
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if member.isfile() and path.suffix == ".py" and path.parts[1:-1] == ("tests",):
                    (tests / path.name).write_bytes(archive.extractfile(member).read())
        folder().parent.mkdir(exist_ok=True)
        tests.rename(folder())


@functools.cache
def common() -> types.ModuleType:
    """``tests/test_modeling_common.py``, in a package whose name is not that of our own tests."""

    def add_module(name: str, path: list[str]) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__path__ = path
        sys.modules[name] = module
        return module

    add_module(_PACKAGE, [str(folder())])
    for name, mixin in _STAND_INS.items():
        add_module(f"{_PACKAGE}.{name.partition('.')[0]}", [])
        setattr(add_module(f"{_PACKAGE}.{name}", []), mixin, type(mixin, (), {}))
    # transformers marks tests with names that our pytest, which is strict about them, does not know.
    with mock.patch.object(pytest.mark, "_config", None):
        return importlib.import_module(f"{_PACKAGE}.test_modeling_common")


# --- the models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Models that share a configuration: ``prefix`` and each of ``suffixes`` make the name of a class.

    Each class costs the mixin's tests 3 s of one core. They leave out those in ``others``, whose head is transformers' own or the
    code of another class that they have.
    """

    prefix: str
    suffixes: tuple[str, ...]
    others: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    def class_names(self) -> list[str]:
        return [self.prefix + suffix for suffix in self.suffixes + self.others]


_HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering")
_AFTER_PADDING = {"pad_token_id": 1}  # positions of RoBERTa and what was made from it start behind this number


def _relative(prefix: str, all_suffixes: tuple[str, ...], in_mixin: tuple[str, ...], config: dict[str, Any]) -> Family:
    return Family(prefix, in_mixin, tuple(suffix for suffix in all_suffixes if suffix not in in_mixin), config)


_ROBERTA, _ELECTRA = ("Model", "ForCausalLM", *_HEADS), ("Model", "ForCausalLM", "ForPreTraining", *_HEADS)
FAMILIES = {
    "bert": Family("Bert", ("Model", "LMHeadModel", "ForPreTraining", "ForNextSentencePrediction", *_HEADS)),
    "roberta": _relative("Roberta", _ROBERTA, ("Model", "ForMaskedLM", "ForMultipleChoice"), _AFTER_PADDING),
    "electra": _relative("Electra", _ELECTRA, ("ForPreTraining", *_HEADS[:2]), {"embedding_size": 24}),
    "xlm_roberta": _relative("XLMRoberta", _ROBERTA, ("ForMaskedLM",), _AFTER_PADDING),
    "camembert": _relative("Camembert", _ROBERTA, ("ForMaskedLM",), _AFTER_PADDING),
}


def doors(family_name: str) -> tuple[str, ...]:
    """The ways in which a model of the family can be ours.

    "class": fastbert's class in the place of transformers'. "accelerate": transformers' class, and what it builds goes through
    ``fastbert.accelerate``.
    """
    return ("class", "accelerate") if family_name == "bert" else ("accelerate",)


class ModelTester:
    """Makes small configurations and batches for transformers' mixin, which reads its attributes by name."""

    batch_size, seq_length, is_training = 5, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    vocab_size, type_vocab_size, num_labels, num_choices = 99, 2, 3, 4

    def __init__(self, family: Family) -> None:
        self.family = family

    def get_config(self):
        import transformers

        return getattr(transformers, f"{self.family.prefix}Config")(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=40,
            max_position_embeddings=64,
            type_vocab_size=self.type_vocab_size,
            **self.family.config,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        return self.get_config(), {
            "input_ids": common().ids_tensor(shape, self.vocab_size),
            "token_type_ids": common().ids_tensor(shape, self.type_vocab_size),
            "attention_mask": common().random_attention_mask(shape),
        }


@functools.cache
def case_class(family_name: str, door: str) -> type[unittest.TestCase]:
    """The test case with every test of transformers' mixin, on the classes of one door; "theirs" is transformers' own."""
    import torch
    import transformers

    import fastbert

    family = FAMILIES[family_name]
    library = fastbert if door == "class" else transformers
    classes = tuple(getattr(library, family.prefix + suffix) for suffix in family.suffixes)
    mixins = [common().ModelTesterMixin]
    if any(cls.can_generate() for cls in classes):
        mixins.append(common().GenerationTesterMixin)

    class Case(*mixins, unittest.TestCase):
        all_model_classes = classes

        def setUp(self):
            self.model_tester = ModelTester(family)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
            if return_labels and model_class.__name__.endswith("ForPreTraining"):
                inputs["labels"] = torch.zeros(inputs["input_ids"].shape, dtype=torch.long)
                if family_name == "bert":
                    inputs["next_sentence_label"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
            return inputs

    # The mixin knows some exceptions by the name of the test case.
    Case.__name__ = Case.__qualname__ = f"{family.prefix}ModelTest"
    return Case


@contextlib.contextmanager
def accelerating(class_names: list[str]) -> Iterator[None]:
    """Every model that these classes of transformers build meanwhile has been through ``fastbert.accelerate``.

    The classes stay what they are: what a constructor or ``from_pretrained`` gives is made fast before its caller sees it.
    """
    import transformers

    import fastbert

    depth = 0

    def building(function):
        """Accelerates what the outermost of nested calls has built: the instance of a constructor, or what is returned."""

        @functools.wraps(function)
        def build(instance_or_class, *args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                result = function(instance_or_class, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                built = instance_or_class if result is None else result
                fastbert.accelerate(built[0] if isinstance(built, tuple) else built)
            return result

        return build

    with contextlib.ExitStack() as patches:
        for name in class_names:
            theirs = getattr(transformers, name)
            from_pretrained = classmethod(building(theirs.from_pretrained.__func__))
            patches.enter_context(mock.patch.object(theirs, "__init__", building(theirs.__init__)))
            patches.enter_context(mock.patch.object(theirs, "from_pretrained", from_pretrained))
        yield


# --- one test ------------------------------------------------------------------------------------------------------------


@functools.cache
def test_names(family_name: str) -> list[str]:
    """The tests of the mixin, less those that need what this machine does not have (an accelerator, a package)."""
    case = case_class(family_name, "theirs")
    names = unittest.TestLoader().getTestCaseNames(case)
    return [name for name in names if not getattr(getattr(case, name), "__unittest_skip__", False)]


def fix_random_numbers(module: types.ModuleType) -> None:
    """What follows draws the same numbers each time, also from ``test_modeling_common``: some tests fail on some inputs."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    module.global_rng.seed(0)


def outcome(family_name: str, door: str, test: str) -> tuple[str, str]:
    """("passed", "skipped" or "failed", and why) of one test."""
    import torch

    fix_random_numbers(common())
    result = unittest.TestResult()
    with contextlib.ExitStack() as stack:
        if door == "accelerate":
            stack.enter_context(accelerating(FAMILIES[family_name].class_names()))
        # Some tests write whole models into messages that nobody reads, which takes a third of their time.
        stack.enter_context(mock.patch.object(torch.Tensor, "__repr__", lambda tensor, **_: f"tensor of {tuple(tensor.shape)}"))
        case_class(family_name, door)(test).run(result)
    if result.failures or result.errors:
        return "failed", "\n".join(text for _, text in result.failures + result.errors)
    return ("skipped", result.skipped[0][1]) if result.skipped else ("passed", "")


def _count() -> None:
    for family_name in FAMILIES:
        names = test_names(family_name)
        for door in ("theirs", *doors(family_name)):
            counts = collections.Counter(outcome(family_name, door, name)[0] for name in names)
            print(f"transformers {version('transformers')} {family_name:12} {door:10} {dict(counts)}")


if __name__ == "__main__":
    download() if sys.argv[1:] == ["download"] else _count()
