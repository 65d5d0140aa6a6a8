"""Batches arrive as they are made, with the numbers that a step needs to know of them."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import islice

import pytest
import torch

from fastbert.data.batches import PackedBatch
from fastbert.data.loader import Position, StepBatches, step_batches
from fastbert.data.masking import IGNORE_INDEX
from fastbert.train.inputs import prepare_data
from fastbert.train.prefetch import device_steps


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("objective", ["mlm-nsp", "mlm"])
def test_steps_arrive_as_they_are_made(toy_settings, device, objective):
    batches = prepare_data(toy_settings(objective=objective), lambda text: None, None).batches[1]
    made = list(islice(step_batches(batches, Position(), batches_per_step=3), 12))
    arrived = device_steps(step_batches(batches, Position(), batches_per_step=3), torch.device(device))
    for step, expected in zip(arrived, made, strict=False):
        torch.ones(1000, 1000, device=device) @ torch.ones(1000, 1000, device=device)
        assert step.position == expected.position and len(step.batches) == 3
        for batch, masked, right in zip(step.batches, step.masked, expected.batches, strict=True):
            assert masked == (right.labels != IGNORE_INDEX).sum() > 0
            if device == "cuda":  # named, so that nobody waits for the GPU to find them
                assert torch.equal(batch.labelled_rows.cpu(), (right.labels != IGNORE_INDEX).nonzero().squeeze(1))
                batch = replace(batch, labelled_rows=None)
            for field in fields(PackedBatch):
                found, value = getattr(batch, field.name), getattr(right, field.name)
                if isinstance(value, torch.Tensor):
                    assert found.device.type == device and torch.equal(found.cpu(), value)
                else:
                    assert found == value


def test_rows_are_named_where_a_device_would_be_waited_for(toy_settings):
    batches = prepare_data(toy_settings(), lambda text: None, None).batches[1]
    own = [int((batches.batch(0, 0, number).labels != IGNORE_INDEX).sum()) for number in (0, 1)]
    for device, filled, lengths in (
        ("cpu", None, [None, None]),
        ("meta", None, own),
        ("meta", batches.filled, [batches.most_labels] * 2),
        ("cpu", batches.filled, [batches.most_labels] * 2),
        ("meta", lambda batch: None, own),
    ):
        steps = device_steps(step_batches(batches, Position()), torch.device(device), filled)
        for number, length in enumerate(lengths):
            step, made = next(steps), batches.batch(0, 0, number)
            (batch,) = step.batches
            assert (None if batch.labelled_rows is None else len(batch.labelled_rows)) == length
            assert (step.masked, step.tokens, step.sequences) == ([own[number]], [made.num_tokens], [made.num_sequences])
            assert batch.num_tokens == (256 if length == batches.most_labels else made.num_tokens)


def test_whoever_makes_them_is_told_to_stop():
    closed = []

    def made():
        try:
            while True:
                yield StepBatches([], Position())
        finally:
            closed.append(True)

    source = made()  # held on to, or it would be closed with the last reference
    steps = device_steps(source, torch.device("cpu"))
    next(steps)
    assert not closed
    steps.close()
    assert closed == [True]
