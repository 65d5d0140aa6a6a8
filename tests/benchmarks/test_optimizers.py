"""The benchmark of the optimizers: all contenders take the same steps, and one that does not is not timed."""

from __future__ import annotations

import pytest
import torch

import fastbert
from benchmarks import gpu, optimizers
from fastbert.ops.cuda import DEVICE_TYPE, unavailable_reason
from fastbert.train.multi_tensor import MultiTensorAdamW, MultiTensorOptimizer

from ..model.helpers import small_config

BANDWIDTH = 1e9
OURS = pytest.mark.skipif(unavailable_reason() is not None, reason=f"no CUDA kernels: {unavailable_reason()}")


def measured(device: str = DEVICE_TYPE) -> dict[str, dict]:
    model = fastbert.BertForPreTraining(small_config(num_hidden_layers=1)).to(device)
    return {record["contender"]: record for record in optimizers.measure(model, device, 3, 60.0, BANDWIDTH)}


@OURS
def test_figures_of_all_contenders():
    """The bytes are those that fastbert/train/optimizer.py counts."""
    parameters = sum(p.numel() for p in fastbert.BertForPreTraining(small_config(num_hidden_layers=1)).parameters())
    records = measured()
    assert {name: record["bytes_per_parameter"] for name, record in records.items()} == {
        "adamw cuda": 32, "adamw torch": 40, "lamb cuda": 44, "lamb torch": 136,
    }  # fmt: skip
    for name, record in records.items():
        assert record["rounds"] == 3
        assert record["bytes_per_s"] == pytest.approx(record["bytes_per_parameter"] * parameters / record["median_s"])
        assert record["share_of_ceiling"] == pytest.approx(record["bytes_per_s"] / BANDWIDTH)
        assert ("fastbert_ratio" in record) == name.endswith("torch")
        assert f"{record['share_of_ceiling']:.0%} of the bandwidth" in optimizers.line(record)
    assert records["lamb torch"]["fastbert_ratio"]["of"] == "lamb cuda"
    assert "lamb cuda is" in optimizers.line(records["lamb torch"])


@OURS
@pytest.mark.parametrize("wrong", ["no clipping", "another rate"])
def test_a_wrong_step_is_not_timed(wrong, monkeypatch):
    if wrong == "no clipping":
        monkeypatch.setattr(MultiTensorOptimizer, "clip_grad_norm", lambda self, max_norm: None)
    else:
        group = MultiTensorAdamW._group
        monkeypatch.setattr(MultiTensorAdamW, "_group", lambda self, options: group(self, {**options, "lr": 1.01 * options["lr"]}))
    records = measured()
    assert "differ by" in records["adamw cuda"]["failed"] and "median_s" not in records["adamw cuda"]
    assert "fastbert_ratio" not in records["adamw torch"] and records["adamw torch"]["median_s"] > 0
    assert "failed: its steps differ" in optimizers.line(records["adamw cuda"])


def test_a_contender_that_fails_leaves_the_others_in_the_race(monkeypatch):
    def refuse(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(optimizers.BUILDERS, "lamb", refuse)
    records = measured("cpu")
    assert records["lamb torch"]["failed"] == "RuntimeError: out of memory"
    assert records["adamw torch"]["median_s"] > 0


def test_make_gpu_measures_them(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    steps = {step.name: step for step in gpu.gpu_steps(tmp_path)}
    assert steps["optimizers"].command[-1] == "benchmarks.optimizers"
