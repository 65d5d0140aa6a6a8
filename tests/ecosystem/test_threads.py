"""One model in several Python threads: the results of one after the other, bit for bit, from the first calls on."""

from __future__ import annotations

import copy
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fastbert
from fastbert.model import adjacent, packed_layer, register
from fastbert.ops import calibration

from ..model.helpers import inputs_for
from ..model.test_packed_inputs import packed
from .helpers import DOORS, fast_pair

THREADS, ROUNDS, CALLS = 4, 8, 3


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Python changes threads every few microseconds, and at every line of the function that moves weights at first calls."""

    def wait(frame, event, _):
        if event == "line":
            time.sleep(0.001)
        return wait

    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-6)
    threading.settrace(lambda frame, event, _: wait if frame.f_code is adjacent._flatten.__code__ else None)
    yield
    threading.settrace(None)
    sys.setswitchinterval(before)


def batches() -> list[dict[str, torch.Tensor]]:
    """Padded, without padding and packed, one per thread; a thread's calls are those of no other."""
    padded, other = inputs_for("BertForPreTraining"), inputs_for("BertForPreTraining")
    whole = {key: value for key, value in inputs_for("BertForPreTraining").items() if key != "attention_mask"}
    return [padded, other, whole, packed(inputs_for("BertForPreTraining"))]


def outcome(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    output = model(**batch, output_hidden_states=True)
    return [output.loss, output.prediction_logits, output.seq_relationship_logits, *output.hidden_states]


def in_threads(work: Callable[[int], object], beside: Callable[[], object] | None = None) -> list:
    """``work(0)``, ... at the same time, while one more thread does ``beside`` again and again; raises what they raise."""
    start, done = threading.Barrier(THREADS + (beside is not None)), threading.Event()

    def begin(index: int):
        start.wait()
        time.sleep(0.003 * index)  # some come while another moves weights
        return work(index)

    def repeat():
        start.wait()
        beside()  # at least once, however slow the machine
        while not done.is_set():
            beside()

    with ThreadPoolExecutor(THREADS + 1) as pool:
        disturbance = pool.submit(repeat) if beside is not None else None
        try:
            results = [future.result() for future in [pool.submit(begin, index) for index in range(THREADS)]]
        finally:
            done.set()
        if disturbance is not None:
            disturbance.result()
    return results


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("door", DOORS)
def test_the_results_of_one_thread(frequent_switches, door, mode):
    """Each round begins with a model that has never run: its first calls move query, key and value into one buffer."""
    _, model = fast_pair(door, "BertForPreTraining", num_hidden_layers=2)
    inputs = batches()
    with mode():
        expected = [outcome(copy.deepcopy(model), batch) for batch in inputs]
    for _ in range(ROUNDS):
        fresh = copy.deepcopy(model)

        def work(index: int, fresh=fresh):
            with mode():
                return [outcome(fresh, inputs[index]) for _ in range(CALLS)]

        for wanted, results in zip(expected, in_threads(work), strict=True):
            for result in results:
                assert all(torch.equal(got, want) for got, want in zip(result, wanted, strict=True))
        attention = fresh.bert.encoder.layer[0].attention.self
        projections = [attention.query.weight, attention.key.weight, attention.value.weight]
        # Without gradients the layer is packed, and they stay where they are.
        assert adjacent.follow_each_other(projections) or mode is not torch.enable_grad


@pytest.mark.parametrize(
    "beside",
    [fastbert.explain, copy.deepcopy, lambda model: {name: p.clone() for name, p in model.state_dict().items()}],
    ids=["explain", "deepcopy", "state_dict"],
)
@pytest.mark.parametrize("door", DOORS)
def test_while_another_thread_looks_at_the_model(frequent_switches, door, beside):
    _, model = fast_pair(door, "BertForPreTraining", num_hidden_layers=2)
    inputs = batches()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        expected = [outcome(copy.deepcopy(model), batch) for batch in inputs]
    for _ in range(ROUNDS // 2):
        fresh, seen = copy.deepcopy(model), []

        def work(index: int, fresh=fresh):
            with torch.no_grad():
                return [outcome(fresh, inputs[index]) for _ in range(CALLS)]

        for wanted, results in zip(expected, in_threads(work, lambda m=fresh, s=seen: s.append(beside(m))), strict=True):
            for result in results:
                assert all(torch.equal(got, want) for got, want in zip(result, wanted, strict=True))
        assert seen
        for sight in seen[-3:]:
            assert not isinstance(sight, dict) or all(torch.equal(p, weights[name]) for name, p in sight.items())
            assert not isinstance(sight, nn.Module) or all(torch.equal(p, weights[n]) for n, p in sight.state_dict().items())


@pytest.mark.parametrize("door", DOORS)
def test_gradients_of_several_threads(frequent_switches, door):
    """Each thread has leaves of its own; the weights of the one model are frozen."""
    _, model = fast_pair(door, "BertModel", num_hidden_layers=2)
    model.requires_grad_(False)
    embeds = torch.randn(THREADS, 3, 9, 48)

    def gradient(fresh: nn.Module, index: int) -> torch.Tensor:
        leaf = embeds[index].clone().requires_grad_()
        fresh(inputs_embeds=leaf).last_hidden_state.square().sum().backward()
        return leaf.grad

    expected = [gradient(copy.deepcopy(model), index) for index in range(THREADS)]
    for _ in range(ROUNDS):
        fresh = copy.deepcopy(model)
        results = in_threads(lambda index, m=fresh: [gradient(m, index) for _ in range(CALLS)])
        for wanted, gradients in zip(expected, results, strict=True):
            assert all(torch.equal(got, wanted) for got in gradients)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_is_forked_during_a_first_call_waits_for_no_thread_of_the_other():
    """Workers of a server that loads the model first, or of a DataLoader: the thread that was at work is not in them."""
    locks = [adjacent._flatten_lock, packed_layer._lock, calibration._lock, register._lock]
    held, done = threading.Event(), threading.Event()

    def hold():
        with locks[0], locks[1], locks[2], locks[3]:
            held.set()
            done.wait()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        held.wait()
        child = os.fork()
        if child == 0:
            os._exit(0 if all(lock.acquire(blocking=False) for lock in locks) else 1)
        done.set()
    assert os.waitpid(child, 0)[1] == 0
