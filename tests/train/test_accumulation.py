"""Gradients of several batches add up in place: a step keeps one gradient per parameter, however many batches it has."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastbert import BertForMaskedLM, BertForPreTraining
from fastbert.train.learner import Learner, MicroBatch

from .test_learner import config, micro_batches, settings


def bytes_kept(learner: Learner, batch: MicroBatch) -> int:
    """What a batch's forward and backward pass leave allocated, by torch's own allocator's count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        learner.backward(batch)
    return sum(event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_class", [BertForPreTraining, BertForMaskedLM])
def test_gradients_add_up_in_place(model_class, dtype):
    """The first batch leaves the gradients, float32, and nothing else; a later one adds to them where they are."""
    learner = Learner(model_class(config(dropout=0.1)).train(), settings(dtype=dtype))
    first, *others = micro_batches(learner.model, [3, 3, 2])
    learner.backward(first)  # moves queries', keys' and values' weights together
    learner.optimizer.zero_grad(set_to_none=True)
    kept = bytes_kept(learner, first)
    parameters = list(learner.model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert kept == sum(gradient.nbytes for gradient in gradients)
    places, before = [gradient.data_ptr() for gradient in gradients], [gradient.clone() for gradient in gradients]
    for batch in others:
        assert bytes_kept(learner, batch) == 0
        assert [parameter.grad.data_ptr() for parameter in parameters] == places
        assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, gradients, strict=True))
    assert sum(not torch.equal(*pair) for pair in zip(gradients, before, strict=True)) > 0.9 * len(before)
