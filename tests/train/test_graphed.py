"""A step that is recorded once and repeated is the step of the learner, and nothing in it asks the device for a number.

There is no CUDA graph on a CPU: :class:`Tape` records torch's operators below autograd and repeats them on the memory that they had,
which is what a graph does with kernels. Whatever Python decided or computed while it was recorded is frozen in both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastbert import BertForMaskedLM, BertForPreTraining
from fastbert.data.batches import PackedBatch
from fastbert.data.masking import IGNORE_INDEX
from fastbert.train.distributed import ALONE, Processes
from fastbert.train.graphed import WARMUP_STEPS, GraphedStep, not_recorded_reasons
from fastbert.train.launch import Launch
from fastbert.train.learner import Learner, MicroBatch
from fastbert.train.optimizer import optimizer_tensors

from .test_learner import config, packed, settings

TOKENS, SEQUENCES, LONGEST, CAP = 96, 9, 30, 40
STEPS = 8


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


def filled(batch: PackedBatch, cap: int = CAP) -> PackedBatch:
    return batch.with_shape(TOKENS, SEQUENCES, max_seqlen=LONGEST, pad_id=0, num_labels=cap)


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
    """The same bits, with dropout, a falling rate, a step that is left out because a weight is infinite, and one with too many labels."""
    pairs = model_class is BertForPreTraining
    plain, other = two_learners(model_class, optimizer=optimizer)
    tape = Tape(lambda: state_of(other))
    graphed = GraphedStep(other, tape)
    left_out = []
    for step in range(STEPS):
        batch = batch_of(step, pairs)
        given = batch if step == 6 else filled(batch)
        if step == 5:
            spoilt = [learner.model.bert.embeddings.word_embeddings.weight for learner in (plain, other)]
            saved = [weight.detach().clone() for weight in spoilt]
            for weight in spoilt:
                weight.data[7] = float("inf")
        expected, found = (taken([micro_batch(given, step)]) for taken in (plain.step, graphed.step))
        assert torch.equal(expected, found) or (step == 5 and torch.equal(expected.isnan(), found.isnan()))
        left_out.append(bool(found[-1]))
        if step == 5:
            for weight, value in zip(spoilt, saved, strict=True):
                weight.data.copy_(value)
        assert other.learning_rate == plain.learning_rate
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

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
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
