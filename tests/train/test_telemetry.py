"""FLOPs that a step needs, what the machine could do meanwhile, and what a line of metrics.jsonl says about both."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig

from fastbert.data.batches import PackedBatch
from fastbert.data.loader import Position, StepBatches
from fastbert.train import telemetry
from fastbert.train.metrics import BatchScores, read_metrics
from fastbert.train.prefetch import device_steps
from fastbert.train.pretrain import pretrain
from fastbert.train.run_state import RunState
from fastbert.train.telemetry import Telemetry, counting_waits, encoder_flops, measured_rate, peak_memory, summary, training_flops

from .runs import quiet

CONFIG = BertConfig(vocab_size=11, num_hidden_layers=3, hidden_size=4, num_attention_heads=2, intermediate_size=5)
LENGTHS = (3, 6)


def batch(lengths: tuple[int, ...], masked: int) -> PackedBatch:
    ids = torch.zeros(sum(lengths), dtype=torch.int64)
    labels = torch.where(torch.arange(len(ids)) < masked, 1, -100)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedBatch(ids, ids, ids, labels, bounds, max(lengths), torch.zeros(len(lengths), dtype=torch.int64))


def test_flops_are_those_of_the_matmuls():
    """Counted one by one: (rows, in, out) of every product of the forward pass."""
    tokens, h, i = sum(LENGTHS), CONFIG.hidden_size, CONFIG.intermediate_size
    layer = [(tokens, h, h)] * 4 + [(tokens, h, i), (tokens, i, h)]
    for length in LENGTHS:
        layer += [(length, h, length), (length, length, h)]  # scores, context: all heads together
    head = [(2, h, h), (2, h, CONFIG.vocab_size)]
    forward = sum(2 * m * k * n for m, k, n in layer * 3)
    pairs = sum(length**2 for length in LENGTHS)
    assert encoder_flops(CONFIG, tokens, pairs) == forward
    assert training_flops(CONFIG, tokens, pairs, labelled=2) == 3 * (forward + sum(2 * m * k * n for m, k, n in head))


def test_a_step_counts_its_own_sequences(toy_settings):
    """Of several batches, each with lengths of its own: attention is within a sequence."""
    steps = (step for step in [StepBatches([batch((3, 6), masked=2), batch((4,), masked=1)], Position())])
    step = next(device_steps(steps, torch.device("cpu")))
    flops = Telemetry(toy_settings(), CONFIG, None).flops(step)
    assert flops == training_flops(CONFIG, tokens=13, pairs=9 + 36 + 16, labelled=3)


def state_with_window(**window) -> RunState:
    state = RunState({}, {}, {}, step=8, skipped=[{"step": 3}])
    state.window.add(BatchScores(2.0, 1, 4, 0.5, 1, 2), tokens=400, flops=3e9)
    state.window.add(BatchScores(2.0, 1, 4, 0.5, 1, 2), tokens=240, flops=1e9)
    for name, value in window.items():
        setattr(state.window, name, value)
    return state


def test_a_row(toy_settings):
    meter = Telemetry(toy_settings(tokens_per_batch=200, batches_per_step=2), CONFIG, matmul_rate=10e9)
    row = meter.row(state_with_window(seconds=0.8, waited=0.2), 1e-4)
    assert row["mfu"] == pytest.approx(4e9 / 0.8 / 10e9)
    assert row["fill"] == pytest.approx(640 / 800)
    assert (row["skipped_steps"], row["learning_rate"], row["loader_wait"]) == (1, 1e-4, pytest.approx(0.25))


def test_without_a_rate_there_is_no_mfu(toy_settings):
    assert "mfu" not in Telemetry(toy_settings(), CONFIG, None).row(state_with_window(seconds=0.8), 1e-4)


def test_the_rate_is_the_fastest_librarys_in_the_runs_dtype(monkeypatch):
    monkeypatch.setattr(telemetry, "unmeasured_reason", lambda: None)
    monkeypatch.setattr(telemetry, "matmul_rates", lambda device, dtype: {"a": 1e9, "b": 3e9, str(dtype): 2e9})
    said = []
    assert measured_rate(torch.device("cpu"), "bfloat16", said.append) == 3e9
    assert said == ["Matmul rate of this machine: 3 GFLOP/s in bfloat16 (b)"]


def test_why_there_is_no_rate_is_said():
    said = []
    assert measured_rate(torch.device("cpu"), "float32", said.append) is None
    assert said == ["No MFU: the matmul rate of this machine is not measured, because FASTBERT_CALIBRATION is off"]


def test_only_the_waiting_counts(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.0])  # before and after each item, and the end
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(clock))
    state = RunState({}, {}, {})
    assert list(counting_waits(iter("ab"), state)) == ["a", "b"]
    assert state.window.waited == 3.5


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not tell")
def test_the_peak_stays_when_memory_is_freed():
    torch.ones(40_000_000)
    peak = peak_memory(torch.device("cpu"))
    assert peak.keys() == {"peak_rss_bytes"}
    assert 200e6 < peak["peak_rss_bytes"] < 1e12


def test_memory_of_a_gpu_is_its_allocators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    assert peak_memory(SimpleNamespace(type="cuda"))["peak_cuda_bytes"] == 123


def test_a_summary_weighs_by_seconds():
    rows = [
        {"step": 0, "held_out": {}},
        {"step": 1, "seconds": 1.0, "loader_wait": 0.5, "mfu": 0.2, "peak_rss_bytes": 9},
        {"step": 2, "seconds": 3.0, "loader_wait": 0.1, "mfu": 0.6, "peak_rss_bytes": 7},
        {"step": 3, "seconds": 4.0, "loader_wait": 0.0},  # continued where nothing may be measured
    ]
    found = summary(rows, 5e9)
    assert found["mfu"] == pytest.approx((0.2 + 3 * 0.6) / 4)
    assert found["loader_wait"] == pytest.approx((0.5 + 0.3) / 8)
    assert (found["matmul_rate"], found["peak_rss_bytes"], found["peak_cuda_bytes"]) == (5e9, 9, None)
    assert summary([{"step": 1, "seconds": 0.0, "mfu": 0.5}], None)["mfu"] is None


def test_a_run_reports_it(toy_settings, monkeypatch):
    monkeypatch.setattr(telemetry, "unmeasured_reason", lambda: None)
    monkeypatch.setattr(telemetry, "matmul_rates", lambda *_: {"any": 1e15})
    said = []
    settings = toy_settings(steps=4, log_steps=2)
    result = pretrain(settings, said.append)
    rows = [row for row in read_metrics(Path(settings.output) / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["mfu"] < 1e-3 and 0 < row["loader_wait"] < 1 and 0.5 < row["fill"] <= 1 and row["skipped_steps"] == 0
    assert result.telemetry["mfu"] == pytest.approx(sum(r["mfu"] * r["seconds"] for r in rows) / result.seconds, rel=1e-6)
    assert f"tokens/s, MFU {result.telemetry['mfu']:.1%}" in "\n".join(said)
    card = (Path(settings.output) / "README.md").read_text(encoding="utf-8")
    for text in (
        f"MFU {result.telemetry['mfu']:.1%} (matmul rate 1,000",
        "| waiting for batches |",
        "| peak memory of the process |",
    ):
        assert text in card


def test_a_run_without_a_rate(toy_settings):
    settings = toy_settings(steps=2)
    result = pretrain(settings, quiet)
    assert result.telemetry["mfu"] is None
    assert "MFU" not in (Path(settings.output) / "README.md").read_text(encoding="utf-8")
