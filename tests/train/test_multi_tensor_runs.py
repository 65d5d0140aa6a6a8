"""Training with AdamW and LAMB by CUDA C++: the steps of torch's, checkpoints that go from one to the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastbert import BertForPreTraining
from fastbert.ops.cuda import DEVICE_TYPE, unavailable_reason
from fastbert.runs.errors import SettingsError, TrainingInterrupted
from fastbert.train import optimizer as optimizer_module
from fastbert.train.learner import Learner, MicroBatch
from fastbert.train.metrics import BatchScores
from fastbert.train.multi_tensor import MultiTensorAdamW, MultiTensorLAMB
from fastbert.train.optimizer import build_lamb, build_optimizer, load_optimizer_tensors, optimizer_tensors
from fastbert.train.pretrain import pretrain

from .runs import quiet, rows_without_speed, same_weights, stop_at
from .test_learner import config, micro_batches, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"no CUDA kernels: {unavailable_reason()}"),
]


@pytest.mark.parametrize("build", [build_optimizer, build_lamb])
def test_a_models_state_goes_to_tensors_and_back(build):
    model = BertForPreTraining(config(layers=1)).to(DEVICE_TYPE)
    optimizer, torchs = build(model, 1e-3, 0.01, "cuda"), build(model, 1e-3, 0.01)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [g["weight_decay"] for g in torchs.param_groups]
    assert [g.get("trust_ratio") for g in optimizer.param_groups] == [g.get("trust_ratio") for g in torchs.param_groups]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    load_optimizer_tensors(model, torchs, tensors)
    assert {name: t.dtype for name, t in optimizer_tensors(model, torchs).items()} == {name: t.dtype for name, t in tensors.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_learner_takes_the_same_steps(optimizer):
    run = {"max_grad_norm": 1.0, "optimizer": optimizer, "learning_rate": 1e-3}
    torchs = BertForPreTraining(config(layers=1)).to(DEVICE_TYPE).train()
    model = copy.deepcopy(torchs)
    learners = [Learner(torchs, settings(**run)), Learner(model, settings(**run, optimizer_backend="cuda"))]
    (batch,) = micro_batches(model, [8])
    inputs = {name: value.to(DEVICE_TYPE) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    for _ in range(4):
        expected, found = (learner.step([MicroBatch(inputs)]).tolist() for learner in learners)
        assert found == pytest.approx(expected, rel=1e-4)
        assert BatchScores(*expected).grad_norm > 1.0
    assert isinstance(learners[1].optimizer, MultiTensorAdamW if optimizer == "adamw" else MultiTensorLAMB)


def test_a_run_goes_on_with_the_same_bits(toy_settings, tmp_path):
    run = {"optimizer_backend": "cuda", "steps": 6, "dropout": 0.1, "device": DEVICE_TYPE}
    straight, stopped = (str(tmp_path / name) for name in ("straight", "stopped"))
    pretrain(toy_settings(output=straight, **run), quiet)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(TrainingInterrupted):
            pretrain(toy_settings(output=stopped, **run), quiet)
    pretrain(toy_settings(output=stopped, resume=True, **run), quiet)
    assert same_weights(straight, stopped) and rows_without_speed(straight) == rows_without_speed(stopped)


def test_a_run_goes_on_without_the_kernels(toy_settings, tmp_path):
    """As one may that began on a GPU: the state is torch's."""
    run = {"steps": 6, "device": DEVICE_TYPE, "output": str(tmp_path / "run")}
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(TrainingInterrupted):
            pretrain(toy_settings(optimizer_backend="cuda", **run), quiet)
    pretrain(toy_settings(optimizer_backend="torch", resume=True, **run), quiet)
    assert [row["step"] for row in rows_without_speed(run["output"])][-1] == 6


def test_a_run_without_the_kernels_is_refused(toy_settings, monkeypatch):
    monkeypatch.setattr(optimizer_module, "not_supported_reason", lambda device: "nvcc is not there")
    with pytest.raises(SettingsError, match="--optimizer-backend cuda is not possible: nvcc is not there"):
        pretrain(toy_settings(optimizer_backend="cuda"), quiet)
