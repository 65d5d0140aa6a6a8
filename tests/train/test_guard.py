"""Which steps are left out: by the formula, with nothing forgotten in a checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastbert.runs.errors import TrainingError
from fastbert.train.guard import DECAY, LEAST_STEPS, Guard, check_skipped

CPU = torch.device("cpu")


def decide(guard: Guard, loss: float, grad_norm: float = 1.0) -> tuple[bool, float]:
    left_out, limit = guard.check(torch.tensor(loss, dtype=torch.float64), torch.tensor(grad_norm))
    return bool(left_out), float(limit)


def test_what_is_not_finite_is_left_out_from_the_first_step_on():
    guard = Guard(2.0, CPU)
    for loss, grad_norm in ((math.nan, 1.0), (math.inf, 1.0), (5.0, math.nan), (5.0, math.inf)):
        assert decide(guard, loss, grad_norm)[0]
    assert not decide(guard, 5.0)[0]


def test_a_spike_is_measured_against_the_mean_of_the_steps_that_count():
    guard = Guard(1.5, CPU)
    kept: list[float] = []
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        loss = 8 * 0.99**step * (3.0 if step % 40 in (5, 39) else 1.0) * (1 + 0.1 * torch.rand((), generator=generator).item())
        weights = [(1 - DECAY) * DECAY ** (len(kept) - 1 - index) for index in range(len(kept))]
        limit = math.inf
        if len(kept) >= LEAST_STEPS:
            limit = 1.5 * sum(w * x for w, x in zip(weights, kept, strict=True)) / sum(weights)
        left_out, found = decide(guard, loss)
        assert found == pytest.approx(limit) and left_out == (loss > limit)
        if not left_out:
            kept.append(loss)
    assert len(kept) == 200 - 9


def test_a_state_goes_on():
    guard, other = Guard(2.0, CPU), Guard(2.0, CPU)
    for step in range(30):
        decide(guard, 5 + step / 7)
    other.load_state(json.loads(json.dumps(guard.state())))
    assert decide(other, 6.0) == decide(guard, 6.0) and decide(guard, 7.0)[1] < math.inf
    guard.reset()
    assert decide(guard, 1000.0) == (False, math.inf)


def test_no_limit():
    guard = Guard(0, CPU)
    for _ in range(30):
        decide(guard, 1.0)
    assert decide(guard, 1e9) == (False, math.inf)


def test_too_many_are_named():
    skipped = [{"step": n, "epoch": 1, "block": 2, "batch": 3 * n, "reason": "the loss is nan"} for n in (4, 9)]
    check_skipped([], 0)
    check_skipped(skipped, 2)
    named = r"left out: 2, .*allows 1.*step 4 \(epoch 1, block 2, from batch 12 on\): the loss is nan; step 9"
    with pytest.raises(TrainingError, match=named):
        check_skipped(skipped, 1)
    with pytest.raises(TrainingError, match="left out: 1, .*allows 0"):
        check_skipped(skipped[:1], 0)
