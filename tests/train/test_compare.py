"""The report of a comparison, and that both models are measured with the same yardstick."""

from __future__ import annotations

import json

import pytest

from fastbert.train.compare import ComparedStep, Comparison, ComparisonReport
from fastbert.train.inputs import build_model, prepare_data


def compared(step: int, loss: float = 2.0, transformers_loss: float = 2.0, slower: float = 2.0) -> ComparedStep:
    return ComparedStep(step, 1000, loss, transformers_loss, seconds=0.5, transformers_seconds=0.5 * slower)


def test_medians_and_ratio():
    report = ComparisonReport([compared(1, slower=100.0), compared(2, slower=3.0), compared(3, slower=2.0)], None)
    assert (report.tokens_per_second, report.transformers_tokens_per_second) == (2000, pytest.approx(666.67, abs=0.01))
    assert report.summary()["speedup"] == pytest.approx(3.0)


@pytest.mark.parametrize(("wrong_step", "agree"), [(1, False), (20, False), (21, True)])
def test_the_first_twenty_steps_decide(wrong_step, agree):
    steps = [compared(step, loss=2.001 if step == wrong_step else 2.0001) for step in range(1, 31)]
    report = ComparisonReport(steps, None)
    assert report.agree is agree
    assert ("DISAGREE" in report.lines()[-1]) is not agree


def test_a_report_survives_json():
    report = ComparisonReport([compared(1), compared(2, loss=1.9)], {"fastbert": {"mlm_loss": 1.0}})
    assert ComparisonReport.from_state(json.loads(json.dumps(report.state()))) == report


@pytest.mark.parametrize("count", [1, 7, 20, 23, 300])
def test_shown_steps(count):
    shown = [step.step for step in ComparisonReport([compared(n) for n in range(1, count + 1)], None)._shown_steps()]
    assert shown == sorted(set(shown)) and shown[0] == 1 and shown[-1] == count and len(shown) <= 10


def test_one_yardstick_for_both(toy_settings):
    settings = toy_settings(compare=True)
    data = prepare_data(settings, lambda text: None, None)
    model = build_model(settings, data.tokenizer, None)
    comparison = Comparison(model, settings, data.tokenizer.pad_token_id)
    comparison.measure_held_out(model, data.held_out)
    assert comparison.held_out["fastbert"] == pytest.approx(comparison.held_out["transformers"], rel=1e-5)
