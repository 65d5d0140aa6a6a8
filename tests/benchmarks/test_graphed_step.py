"""fastbert's step as a CUDA graph is the step that is measured beside it; a tape records it where there is no GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import fastbert
from benchmarks import finetune, gpu, pretrain, training
from benchmarks.graphed import GRAPHED, RecordedPlainStep, RecordedStep, graphed_batch
from benchmarks.workloads import padded_batch, workload
from fastbert.train.graphed import WARMUP_STEPS

from ..model.helpers import small_config
from ..train.test_graphed import Tape

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")
VOCABULARY = 130


@pytest.fixture(autouse=True)
def torchs_matmuls() -> Iterator[None]:
    """Ours are called without torch's dispatcher, where no tape hears of them."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


class MeasuringTape(Tape):
    kept_bytes = 1234


@pytest.fixture
def steps() -> tuple[training.TrainingStep, RecordedStep, list[Tape]]:
    """The plain step and the recorded one of models with the same weights, without dropout; and the tapes of the second."""
    config = small_config(
        vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = fastbert.BertForPreTraining(config)
    plain, other = (training.TrainingStep(copy.deepcopy(model), "cpu", torch.float32) for _ in range(2))
    tapes: list[Tape] = []

    def recorder() -> Tape:
        tapes.append(MeasuringTape(lambda: [*recorded.model.parameters(), *states(recorded)]))
        return tapes[-1]

    recorded = RecordedStep(other, "float32", recorder)
    return plain, recorded, tapes


def states(step) -> list[torch.Tensor]:
    return [tensor for state in step.optimizer.state.values() for tensor in state.values()]


def parts_of(spec: str) -> dict[str, training.Parts]:
    of = workload(spec)
    return training.batches_of(pretrain.with_labels(padded_batch(of, VOCABULARY)), pretrain.TASK, padded=of.has_padding)


def test_it_takes_the_same_steps(steps):
    """Two batches, dense and padded, one after the other, as two lines of the table are."""
    plain, recorded, tapes = steps
    for number, spec in enumerate(("4x24", "6xsst2/longest")):
        parts = parts_of(spec)
        for _ in range(3):
            recorded(parts[GRAPHED])
        for _ in range(WARMUP_STEPS + 3):
            plain(parts[training.OURS])
        assert (len(tapes), tapes[number].recorded, tapes[number].repeated) == (number + 1, 1, 3)
        for ours, theirs in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        assert all(tensor == (number + 1) * (WARMUP_STEPS + 3) for tensor in states(recorded) if tensor.dim() == 0)
        assert recorded.loss_without_dropout(parts[GRAPHED]) == pytest.approx(plain.loss_without_dropout(parts[training.OURS]))
    assert recorded.peak_bytes(parts[GRAPHED]) == 1234


def test_its_batch_names_the_labelled_rows():
    batch = pretrain.with_labels(padded_batch(workload("6xsst2"), VOCABULARY))
    inputs = graphed_batch(batch, pretrain.TASK.labelled)
    labels = inputs["labels"][0]
    assert torch.equal(labels[inputs["labelled_rows"]], batch["labels"][batch["labels"] != -100])
    assert len(inputs["labelled_rows"]) == int((labels != -100).sum()) < len(labels)


def test_make_gpu_measures_it_in_every_training_step(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with_graph = {step.name for step in gpu.gpu_steps(tmp_path) if "--graphed" in step.command}
    assert with_graph == {
        "graphed base",
        *(f"{suite} {model}" for suite in ("pretrain", "finetune", "compile") for model in gpu.MODEL_TOKENS),
    }


@pytest.mark.parametrize("labelled", [pretrain.LABELLED, 0.0])
def test_on_a_cpu_it_is_named_with_the_reason(labelled):
    model = fastbert.BertForPreTraining(small_config())
    options = training.Options("tiny", (), graphed=True, peers=())
    made, not_run = training.make_steps(model, copy.deepcopy(model), options, lambda _: None, labelled)
    assert GRAPHED not in made and not_run == {GRAPHED: "the run is on cpu"}


@pytest.mark.cuda
def test_a_step_without_masked_labels_is_recorded_as_it_is():
    """The weights after a number of steps, of which the first are those that come before a recording."""
    torch.manual_seed(5)
    config = small_config(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain, recorded = (
        training.TrainingStep(model.cuda(), "cuda", torch.float32)
        for model in map(copy.deepcopy, [fastbert.BertForSequenceClassification(config)] * 2)
    )
    batch = finetune.with_labels(padded_batch(workload("6xsst2"), VOCABULARY, "cuda"))
    parts = training.batches_of(batch, finetune.TASK, padded=True)
    step = RecordedPlainStep(recorded)
    for _ in range(3):
        step(parts[GRAPHED])
    for _ in range(WARMUP_STEPS + 3):
        plain(parts[training.PACKED])
    for ours, theirs in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert step.peak_bytes(parts[GRAPHED]) > 0
