"""The rates of every step against plain formulas, in one cycle and in two, from any step on."""

from __future__ import annotations

import math

import pytest
from torch import nn

from fastbert.train.optimizer import build_lamb, build_optimizer
from fastbert.train.schedules import Schedule, cycles
from fastbert.train.settings import PretrainSettings

PEAK = 1e-3


def settings(**changes) -> PretrainSettings:
    return PretrainSettings(**{"steps": 12, "warmup_steps": 4, "learning_rate": PEAK, **changes})


def rates(run: PretrainSettings, start: int = 0, build=build_optimizer) -> list[tuple[float, float]]:
    """(rate, beta1) of each step from ``start`` on."""
    optimizer = build(nn.Linear(2, 2), 1.0, 0.01)
    schedule = Schedule(optimizer, run, start)
    seen = []
    for _ in range(start, run.steps):
        assert schedule.learning_rate == optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"]
        seen.append((schedule.learning_rate, optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        schedule.step()
    return seen


def cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def one_cycle(step: int, warmup: int, steps: int, peak: float) -> tuple[float, float]:
    if step < warmup:
        share = step / (warmup - 1)
        return cosine(peak / 25, peak, share), cosine(0.95, 0.85, share)
    share = (step - warmup + 1) / (steps - warmup + 1)
    return cosine(peak, peak / 25e4, share), cosine(0.85, 0.95, share)


def test_linear_warmup_and_decay():
    expected = [PEAK * step / 4 for step in range(4)] + [PEAK * (12 - step) / 8 for step in range(4, 12)]
    assert [rate for rate, _ in rates(settings())] == pytest.approx(expected)


def test_polynomial_decay_goes_by_the_square_root():
    expected = [PEAK * step / 4 for step in range(4)] + [PEAK * math.sqrt((12 - step) / 8) for step in range(4, 12)]
    assert [rate for rate, _ in rates(settings(schedule="polynomial"))] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "polynomial"])
@pytest.mark.parametrize("start", [0, 5, 12])
def test_warmup_over_all_steps(schedule: str, start: int):
    run = settings(schedule=schedule, warmup_steps=12)
    assert [rate for rate, _ in rates(run, start)] == pytest.approx([PEAK * step / 12 for step in range(start, 12)])


@pytest.mark.parametrize("build", [build_optimizer, build_lamb])
def test_one_cycle_of_the_rate_and_of_beta(build):
    seen = rates(settings(schedule="one-cycle"), build=build)
    for found, expected in zip(seen, [one_cycle(step, 4, 12, PEAK) for step in range(12)], strict=True):
        assert found == pytest.approx(expected)
    assert max(rate for rate, _ in seen) == pytest.approx(PEAK)


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 11, 12])
def test_one_cycle_with_any_warmup(warmup_steps):
    seen = [rate for rate, _ in rates(settings(schedule="one-cycle", warmup_steps=warmup_steps))]
    assert len(seen) == 12 and all(0 < rate <= PEAK * (1 + 1e-9) for rate in seen)


TWO = {"second_phase_steps": 5, "second_phase_learning_rate": 3e-4, "max_seq_length": 32, "second_phase_seq_length": 64}


def test_a_second_peak_begins_anew():
    run = settings(**{**TWO, "steps": 35, "second_phase_steps": 20})
    assert [(cycle.first_step, cycle.last_step, cycle.peak, cycle.warmup_steps) for cycle in cycles(run)] == [
        (0, 15, PEAK, 4), (15, 35, 3e-4, 2),
    ]  # fmt: skip
    expected = [PEAK * step / 4 for step in range(4)] + [PEAK * (15 - step) / 11 for step in range(4, 15)]
    expected += [0, 3e-4 / 2] + [3e-4 * (20 - step) / 18 for step in range(2, 20)]
    assert [rate for rate, _ in rates(run)] == pytest.approx(expected)
    assert len(cycles(settings(**{**TWO, "second_phase_learning_rate": None}))) == 1
    assert cycles(settings(**TWO, warmup_steps=None))[0].warmup_steps == 0


@pytest.mark.parametrize("schedule", ["linear", "polynomial", "one-cycle"])
@pytest.mark.parametrize("phases", [{}, TWO])
def test_a_schedule_begins_anywhere_with_the_same_rates(schedule, phases):
    run = settings(schedule=schedule, **phases)
    straight = rates(run)
    for start in range(12):
        assert rates(run, start) == straight[start:]


def test_nobody_is_warned(recwarn):
    for schedule in ("linear", "polynomial", "one-cycle"):
        rates(settings(schedule=schedule, **TWO), start=3)
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
