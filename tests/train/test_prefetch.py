"""Batches arrive as they are made, with the numbers that a step needs to know of them."""

from __future__ import annotations

from dataclasses import fields
from itertools import islice

import pytest
import torch

from fastbert.data.batches import PackedBatch
from fastbert.data.loader import Position, StepBatches, step_batches
from fastbert.data.masking import IGNORE_INDEX
from fastbert.train.prefetch import device_steps
from fastbert.train.prepare import prepare_data


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
            for field in fields(PackedBatch):
                found, value = getattr(batch, field.name), getattr(right, field.name)
                if isinstance(value, torch.Tensor):
                    assert found.device.type == device and torch.equal(found.cpu(), value)
                else:
                    assert found == value


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
