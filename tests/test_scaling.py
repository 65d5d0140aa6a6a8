"""The model of data-parallel training: its counts are torch's, its limits are right, and docs/scaling.md shows its tables."""

from __future__ import annotations

import pytest
import torch

import fastbert
from benchmarks import scaling_tables
from benchmarks.scaling_model import (
    GpuCluster,
    Load,
    buckets,
    checkpoint_interval,
    least_tokens,
    model,
    step_time,
    wasted_share,
)
from benchmarks.workloads import config_for

from .conftest import REPOSITORY


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_parameters_are_those_of_torch(size):
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in fastbert.BertForPreTraining(config_for(size)).parameters())
    assert model(size).parameters == expected
    assert sum(bucket.size for bucket in buckets(model(size))) == 4 * expected


def test_flops_per_token():
    found = [round(model(size, length).flops_per_token / 1e6) for size in ("base", "large") for length in (128, 512)]
    assert found == [545, 588, 1879, 1992]


def test_one_process_waits_for_nobody():
    step = step_time(GpuCluster(1).all_reduce_seconds, model("base"), Load(1e6, 1e6, optimizer_seconds=0.5))
    assert (step.seconds, step.exposed, step.efficiency) == (1.5, 0, 1)


def test_a_slow_network_hides_nothing_and_a_fast_one_all_but_the_last_gradients():
    base, load = model("base"), Load(1e6, 1e6)
    # The first layer's gradients are ready when the backward pass ends, and so are the embeddings'.
    last = sum(bucket.size for bucket in buckets(base) if bucket.ready > 0.9999)
    fast = step_time(lambda size: size * 1e-12, base, load)
    assert fast.exposed == pytest.approx(last * 1e-12)
    slow = step_time(lambda size: size * 1e-6, base, load)
    assert slow.exposed == pytest.approx(slow.communication, rel=0.01)
    serial = step_time(lambda size: size * 1e-9, base, load, overlap=False)
    assert serial.exposed == pytest.approx(4 * base.parameters * 1e-9)


def test_more_gpus_need_more_tokens_each():
    found = [least_tokens(GpuCluster(gpus), model("base"), 1e6) for gpus in (8, 64, 1024)]
    assert found == sorted(found)
    step = step_time(GpuCluster(64).all_reduce_seconds, model("base"), Load(1e6, found[1]))
    assert step.efficiency == pytest.approx(0.9, abs=1e-3)


def test_the_interval_wastes_the_least():
    best = checkpoint_interval(2.0, 1e5)
    assert all(wasted_share(best, 2.0, 1e5, 60) < wasted_share(other, 2.0, 1e5, 60) for other in (best / 1.5, best * 1.5))


@pytest.mark.parametrize("table", ["sizes_table", "steps_table", "time_table", "limit_table"])
def test_the_page_shows_the_tables(table):
    assert "\n".join(getattr(scaling_tables, table)()) in (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
