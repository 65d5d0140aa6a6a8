"""The recorded step on a GPU: the bits of the same step unrecorded, and nothing in either waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from fastbert import BertConfig, BertForPreTraining
from fastbert.data.batches import PackedBatch
from fastbert.ops.cuda import unavailable_reason
from fastbert.runs.errors import TrainingInterrupted
from fastbert.train.graphed import WARMUP_STEPS, CudaRecorder, GraphedStep
from fastbert.train.learner import Learner, MicroBatch
from fastbert.train.metrics import MLM_LOSS, NSP_LOSS
from fastbert.train.optimizer import optimizer_tensors
from fastbert.train.pretrain import pretrain

from .runs import quiet, rows_without_speed, same_weights, stop_at
from .test_graphed import CAP, STEPS, batch_of, filled, losses
from .test_learner import VOCABULARY, settings

pytestmark = pytest.mark.cuda

OURS = pytest.mark.skipif(unavailable_reason() is not None, reason=f"no CUDA kernels: {unavailable_reason()}")
OPTIMIZERS = pytest.mark.parametrize(
    ("optimizer", "backend"),
    [("adamw", "torch"), ("lamb", "torch"), pytest.param("adamw", "cuda", marks=OURS), pytest.param("lamb", "cuda", marks=OURS)],
)


class Unrecorded:
    """A recorder whose record is the function itself."""

    def run(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


def learners(number: int, dtype: str, optimizer: str, backend: str) -> list[Learner]:
    torch.manual_seed(3)
    model = BertForPreTraining(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=256,
            max_position_embeddings=64,
        )  # fmt: skip
    )
    kernels = {"optimizer": optimizer, "optimizer_backend": backend}
    run = settings(learning_rate=2.0**-9, steps=16, max_grad_norm=1.0, dtype=dtype, **kernels)
    return [Learner(copy.deepcopy(model).to("cuda").train(), run) for _ in range(number)]


def micro_batch(step: int, shape: Callable[[PackedBatch], PackedBatch] = filled) -> MicroBatch:
    return MicroBatch(shape(batch_of(step, pairs=True)).to("cuda").model_inputs(), seed=1000 + step)


def state_of(learner: Learner) -> list[torch.Tensor]:
    moments = optimizer_tensors(learner.model, learner.optimizer)
    return [*learner.model.parameters(), *moments.values(), learner.guard._sum, learner.guard._steps]


@OPTIMIZERS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_repeated_step_is_the_step(dtype, optimizer, backend):
    plain, unrecorded, recorded = learners(3, dtype, optimizer, backend)
    said: list[str] = []
    steps = (
        plain.step,
        GraphedStep(unrecorded, CAP, Unrecorded()).step,
        GraphedStep(recorded, CAP, CudaRecorder(torch.device("cuda"), said.append)).step,
    )
    for step in range(STEPS):
        theirs, expected, found = (take([micro_batch(step)]).tolist() for take in steps)
        assert found == expected
        for score in (MLM_LOSS, NSP_LOSS):
            assert found[score] == pytest.approx(theirs[score], rel=1e-5 if dtype == "float32" else 1e-2)
    for expected, found in zip(state_of(unrecorded), state_of(recorded), strict=True):
        assert torch.equal(expected, found)
    (text,) = said
    assert "recorded as a CUDA graph, which keeps" in text and "MiB" in text


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@OPTIMIZERS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_waits_for_the_device(dtype, optimizer, backend):
    plain, recorded = learners(2, dtype, optimizer, backend)
    graphed = GraphedStep(recorded, CAP, CudaRecorder(torch.device("cuda"), quiet))
    for take, shape in ((plain.step, PackedBatch.with_labelled_rows), (plain.step, filled), (graphed.step, filled)):
        batches = [micro_batch(step, shape) for step in range(STEPS)]
        for batch in batches[: WARMUP_STEPS + 1]:
            take([batch])
        with no_waiting():
            for batch in batches[WARMUP_STEPS + 1 :]:
                take([batch])
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):  # the watch sees what it is for
        torch.ones(3, device="cuda").nonzero()


def test_a_recorded_run(toy_settings, tmp_path):
    """Two phases, dropout; stopped and continued it has the same bits, and its losses are those of a run that is not recorded."""
    run = {
        "steps": 14, "log_steps": 2, "dropout": 0.1, "save_steps": 100, "second_phase_steps": 6, "second_phase_seq_length": 64,
        "device": "cuda",
    }  # fmt: skip
    plain, straight, stopped = (str(tmp_path / name) for name in ("plain", "straight", "stopped"))
    said: list[str] = []
    pretrain(toy_settings(output=plain, **run), quiet)
    pretrain(toy_settings(output=straight, cuda_graph=True, **run), said.append)
    assert len([line for line in said if "recorded as a CUDA graph" in line]) == 2
    expected, found = (losses(tmp_path / name) for name in ("plain", "straight"))
    assert [row[0] for row in found] == pytest.approx([row[0] for row in expected], rel=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(TrainingInterrupted):
            pretrain(toy_settings(output=stopped, cuda_graph=True, **run), quiet)
    pretrain(toy_settings(output=stopped, cuda_graph=True, resume=True, **run), quiet)
    assert same_weights(straight, stopped) and rows_without_speed(straight) == rows_without_speed(stopped)
