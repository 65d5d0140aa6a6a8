"""A step that is recorded once and repeated is the step of the learner, and nothing in it asks the device for a number.

There is no CUDA graph on a CPU: :class:`Tape` records torch's operators below autograd and repeats them on the memory that they
had, which is what a graph does with kernels. Whatever Python decided or computed while it was recorded is frozen in both.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastbert import BertForMaskedLM, BertForPreTraining
from fastbert.data.batches import PackedBatch
from fastbert.runs.errors import TrainingInterrupted
from fastbert.runs.torchrun import Launch
from fastbert.train import graphed as graphed_module
from fastbert.train import learner as learner_module
from fastbert.train import loop as loop_module
from fastbert.train import optimizer as optimizer_module
from fastbert.train.distributed import ALONE, Processes
from fastbert.train.graphed import WARMUP_STEPS, GraphedStep, not_recorded_reasons
from fastbert.train.learner import Learner, MicroBatch
from fastbert.train.metrics import STEP_SCORES, read_metrics
from fastbert.train.optimizer import optimizer_tensors
from fastbert.train.pretrain import pretrain

from .runs import quiet, rows_without_speed, same_weights, stop_at
from .test_learner import config, packed, settings

TOKENS, SEQUENCES, LONGEST, CAP = 96, 9, 30, 40
STEPS = 8


pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")


@pytest.fixture(autouse=True)
def torchs_matmuls() -> Iterator[None]:
    """Ours are called without torch's dispatcher, where no tape hears of them."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Tape:
    """A recorder that runs on a CPU. ``state``: everything that a step changes, which recording leaves as it was."""

    def __init__(self, state: Callable[[], list[Tensor]]) -> None:
        self._state, self.recorded, self.repeated = state, 0, 0

    def run(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        before = [(tensor, tensor.detach().clone()) for tensor in self._state()]
        random = torch.get_rng_state()
        with _Log() as log:
            function()
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        self.recorded += 1

        def repeat() -> None:
            self.repeated += 1
            with torch.no_grad():
                for func, args, kwargs, out in log.calls:
                    new = func(*args, **kwargs)
                    for place, value in zip(tree_flatten(out)[0], tree_flatten(new)[0], strict=True):
                        if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                            place.detach().copy_(value)

        return repeat


def state_of(learner: Learner) -> list[Tensor]:
    moments = optimizer_tensors(learner.model, learner.optimizer)
    return [*learner.model.parameters(), *moments.values(), learner.guard._sum, learner.guard._steps]


def batch_of(step: int, pairs: bool) -> PackedBatch:
    """Different sequences, lengths and labels in every step."""
    return packed(step % 4, step % 4 + 4, pairs)


def filled(batch: PackedBatch) -> PackedBatch:
    return batch.with_shape(TOKENS, SEQUENCES, max_seqlen=LONGEST, pad_id=0, num_labels=CAP)


def micro_batch(batch: PackedBatch, step: int) -> MicroBatch:
    return MicroBatch(batch.model_inputs(), seed=1000 + step)


def two_learners(model_class: type, **changes) -> tuple[Learner, Learner]:
    torch.manual_seed(3)
    # Rates that float32 holds exactly, so that those of the device and of the host are the same number.
    run = settings(**{"learning_rate": 2.0**-7, "steps": 16, "max_grad_norm": 1.0, **changes})
    model = model_class(config(dropout=0.1)).train()
    return Learner(model, run), Learner(copy.deepcopy(model).train(), run)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("model_class", [BertForPreTraining, BertForMaskedLM])
def test_repeated_steps_are_the_learners(model_class, optimizer):
    """The same bits, with dropout, a falling rate, a step that is left out (a weight is infinite), one with too many labels."""
    pairs = model_class is BertForPreTraining
    plain, other = two_learners(model_class, optimizer=optimizer)
    tape = Tape(lambda: state_of(other))
    graphed = GraphedStep(other, CAP, tape)
    left_out, both = [], []
    for step in range(STEPS):
        batch = batch_of(step, pairs)
        given = batch.with_labelled_rows() if step == 6 else filled(batch)
        if step == 5:
            spoilt = [learner.model.bert.embeddings.word_embeddings.weight for learner in (plain, other)]
            saved = [weight.detach().clone() for weight in spoilt]
            for weight in spoilt:
                weight.data[7] = float("inf")
        expected, found = (taken([micro_batch(given, step)]) for taken in (plain.step, graphed.step))
        assert torch.equal(expected, found) or (step == 5 and torch.equal(expected.isnan(), found.isnan()))
        left_out.append(bool(found[-1]))
        both.append((expected, found))
        if step == 5:
            for weight, value in zip(spoilt, saved, strict=True):
                weight.data.copy_(value)
        assert other.learning_rate == plain.learning_rate
    assert all(torch.equal(*values) for values in both if not values[0].isnan().any())  # nothing was written over
    assert left_out == [step == 5 for step in range(STEPS)]
    assert (tape.recorded, tape.repeated) == (1, STEPS - WARMUP_STEPS - 1)
    for expected, found in zip(state_of(plain), state_of(other), strict=True):
        assert torch.equal(expected, found)
    assert plain.guard.state() == other.guard.state()


class NoWaiting(TorchDispatchMode):
    """Raises where a kernel's result would decide on the host how to go on, or be copied between devices. Sees what runs under
    autograd, backward passes too.
    """

    FORBIDDEN = {
        "nonzero", "nonzero_numpy", "argwhere", "masked_select", "_local_scalar_dense", "item", "unique", "_unique2", "unique_dim",
        "unique_consecutive", "unique_dim_consecutive", "equal", "is_nonzero", "bincount", "masked_scatter", "_assert_async",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen.add(func._schema.name)
        name = func._schema.name.removeprefix("aten::")
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        assert name not in self.FORBIDDEN, f"{func} waits for the device"
        if name == "repeat_interleave":
            assert kwargs.get("output_size") is not None, "repeat_interleave without output_size waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{func} with a mask waits for the device"
        out = func(*args, **kwargs)
        devices = {value.device.type for value in tensors if value.dim() > 0 or name in ("copy_", "_to_copy")}
        devices |= {value.device.type for value in tree_flatten(out)[0] if isinstance(value, Tensor) and name == "_to_copy"}
        assert len(devices) < 2, f"{func} copies between {devices}"
        return out


def on_meta(learner_of: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch, optimizer: str, model_class: type) -> Learner:
    """A learner on the device without data, which takes every way that a GPU takes where the way depends on the device's type."""
    monkeypatch.setattr(learner_module, "autocast", lambda *_: nullcontext())  # torch has none for this device
    if optimizer == "adamw":  # in torch's fused kernel, as on a GPU
        torchs = importlib.import_module("torch.optim.optimizer")
        supported = torchs._get_fused_kernels_supported_devices()
        monkeypatch.setattr(torchs, "_get_fused_kernels_supported_devices", lambda: [*supported, "meta"])
        monkeypatch.setattr(optimizer_module, "FUSED_DEVICE_TYPES", {"meta"})
    return learner_of(model_class(config(dropout=0.1)).train().to("meta"), settings(optimizer=optimizer))


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("model_class", [BertForPreTraining, BertForMaskedLM])
def test_a_step_waits_for_nothing(model_class, optimizer, monkeypatch):
    """Forward, loss, backward, clipping, guard and optimizer, where no data can be read. What the ops do inside is not run."""
    learner = on_meta(Learner, monkeypatch, optimizer, model_class)
    batch = batch_of(0, model_class is BertForPreTraining)
    steps = [MicroBatch(given.to("meta").model_inputs(), seed=1) for given in (filled(batch), batch.with_labelled_rows())]
    with NoWaiting() as watched:
        for step in (*steps, *steps):  # the first makes the optimizer's state
            values = learner.step([step])
    assert values.shape == (STEP_SCORES,) and {"fastbert::attention", "fastbert::mlm_loss_backward"} <= watched.seen
    assert ("aten::_fused_adamw_" in watched.seen) == (optimizer == "adamw")


def test_rows_that_must_be_found_are_waited_for(monkeypatch):
    """The watch sees what it is for."""
    learner = on_meta(Learner, monkeypatch, "lamb", BertForPreTraining)
    inputs = filled(batch_of(0, True)).to("meta").model_inputs()
    del inputs["labelled_rows"]
    with NoWaiting(), pytest.raises(AssertionError, match="aten.nonzero.default waits for the device"):
        learner.backward(MicroBatch(inputs))
    x = torch.ones(3)
    for wait in (
        lambda: x[x > 0], lambda: x.sum().item(), lambda: torch.repeat_interleave(x, torch.tensor([1, 2, 0])), lambda: x.to("meta"),
        lambda: torch._foreach_add_([x], x.sum()), lambda: x.unique(), lambda: x.masked_select(x > 0),
    ):  # fmt: skip
        with NoWaiting(), pytest.raises(AssertionError, match="waits for the device|copies between"):
            wait()


def test_inputs_of_another_shape_are_refused():
    _, learner = two_learners(BertForPreTraining)
    graphed = GraphedStep(learner, CAP, Tape(lambda: state_of(learner)))
    batch = batch_of(0, True)
    graphed.step([micro_batch(filled(batch), 0)])
    larger = batch.with_shape(TOKENS + 8, SEQUENCES, max_seqlen=LONGEST, pad_id=0, num_labels=CAP)
    with pytest.raises(ValueError, match=r"the recorded step takes inputs of .*'input_ids': \(1, 96\).*'input_ids': \(1, 104\)"):
        graphed.step([micro_batch(larger, 0)])
    with pytest.raises(ValueError, match="has one batch, not 2"):
        graphed.step([micro_batch(filled(batch), 0)] * 2)


def test_why_a_step_is_not_recorded(monkeypatch):
    def reasons(processes: Processes = ALONE, attention: str = "sdpa", **changes) -> str:
        model, run = BertForPreTraining(config()), settings(**changes)
        model.set_attn_implementation(attention)
        learner = Learner(model, run)
        learner.model.to("meta")
        return "; ".join(not_recorded_reasons(run, learner, processes))

    monkeypatch.setattr(graphed_module, "not_supported_reasons", lambda *_: [])  # whether Triton is installed here or not
    assert reasons() == "the run is on meta"
    assert "several processes train" in reasons(Processes(Launch(0, 2, 0, 0, False)))
    assert "--batches-per-step 4" in reasons(batches_per_step=4)
    assert "--gradient-checkpointing reads" in reasons(gradient_checkpointing=True)
    assert "--schedule one-cycle changes" in reasons(schedule="one-cycle")
    assert "--compare takes" in reasons(compare=True)
    assert "transformers' forward pass" in reasons(attention="eager")
    monkeypatch.setattr(graphed_module, "not_supported_reasons", lambda *_: ["there is no Triton"])
    assert "attention in plain torch reads the sequences' lengths on the host; the kernel: there is no Triton" in reasons()


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Runs with ``cuda_graph`` record on a tape; these are the tapes, one for each phase of each run."""
    made: list[Tape] = []

    def graphed(learner: Learner, num_labels: int, _) -> GraphedStep:
        made.append(Tape(lambda: state_of(learner)))
        return GraphedStep(learner, num_labels, made[-1])

    monkeypatch.setattr(loop_module, "not_recorded_reasons", lambda *_: [])
    monkeypatch.setattr(loop_module, "CudaRecorder", lambda *_: None)
    monkeypatch.setattr(loop_module, "GraphedStep", graphed)
    return made


def losses(output: Path) -> list[tuple[float, float, float]]:
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    return [(row["loss"], row["tokens"], row.get("nsp_accuracy", 0.0)) for row in rows]


@pytest.mark.parametrize(
    "changes",
    [
        {"second_phase_steps": 6, "second_phase_seq_length": 64},
        {"objective": "mlm", "optimizer": "lamb", "masking": "whole-word", "workers": 1},
    ],
    ids=["two phases", "mlm"],
)
def test_a_recorded_run_has_the_losses_of_one_that_is_not(toy_settings, tmp_path, tapes, changes):
    """Batches filled up to one shape, their numbers counted without the filling; stopped and continued it has the same bits."""
    run = {"steps": 14, "log_steps": 2, "dropout": 0.1, "save_steps": 100, **changes}
    plain, straight, stopped = (tmp_path / name for name in ("plain", "straight", "stopped"))
    expected = pretrain(toy_settings(output=str(plain), **run), quiet)
    found = pretrain(toy_settings(output=str(straight), cuda_graph=True, **run), quiet)
    assert [(tape.recorded, tape.repeated > 2) for tape in tapes] == [(1, True)] * (2 if "second_phase_steps" in changes else 1)
    assert (found.tokens, found.fill) == (expected.tokens, expected.fill)
    for ours, theirs in zip(losses(straight), losses(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(TrainingInterrupted):
            pretrain(toy_settings(output=str(stopped), cuda_graph=True, **run), quiet)
    pretrain(toy_settings(output=str(stopped), cuda_graph=True, resume=True, **run), quiet)
    assert same_weights(straight, stopped) and rows_without_speed(str(straight)) == rows_without_speed(str(stopped))


def test_a_run_says_that_it_is_not_recorded_and_goes_on(toy_settings, tmp_path):
    said: list[str] = []
    result = pretrain(toy_settings(steps=2, cuda_graph=True), said.append)
    assert "The training step is not recorded as a CUDA graph (--cuda-graph): the run is on cpu" in said
    assert result.steps == 2
    said.clear()
    pretrain(toy_settings(steps=2, output=str(tmp_path / "other")), said.append)
    assert not any("CUDA graph" in line for line in said)
