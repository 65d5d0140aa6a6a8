"""Arguments of accelerated models: a call that names none of them means the same in both libraries."""

from __future__ import annotations

import inspect

import pytest
from transformers import PreTrainedModel

import fastbert.model.accelerate  # noqa: F401 (it imports every class that stands for one of transformers')
from fastbert.model.swap import counterparts

PAIRS = [pair for pair in counterparts().items() if issubclass(pair[0], PreTrainedModel)]


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=lambda cls: cls.__name__)
def test_forward_takes_the_same_arguments_in_the_same_order(theirs, ours):
    def arguments(cls):
        return [(p.name, p.kind, p.default) for p in inspect.signature(cls.forward).parameters.values()]

    assert arguments(ours) == arguments(theirs)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=lambda cls: cls.__name__)
def test_forward_says_which_keyword_arguments_it_takes(theirs, ours):
    def annotation(cls):
        return inspect.signature(cls.forward).parameters["kwargs"].annotation

    assert annotation(ours) == annotation(theirs)
