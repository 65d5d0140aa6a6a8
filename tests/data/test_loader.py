from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastbert.data import batches as batches_module
from fastbert.data.batches import PretrainingBatches
from fastbert.data.errors import CorpusError
from fastbert.data.loader import Position, StepBatches, step_batches
from fastbert.data.tokens import TokenizedCorpus

from .helpers import numbered_corpus, same

BATCH = 300


def shards_of(corpus: TokenizedCorpus, count: int) -> list[TokenizedCorpus]:
    """The corpus, cut between documents into parts of as many documents."""
    edges = np.linspace(0, corpus.num_documents, count + 1).astype(int)
    parts = []
    for first, last in zip(edges, edges[1:]):
        chosen = np.zeros(corpus.num_documents, dtype=bool)
        chosen[first:last] = True
        parts.append(corpus._select(np.repeat(chosen, np.diff(corpus.document_offsets))))
    return parts


@pytest.fixture(scope="module")
def batches(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast) -> PretrainingBatches:
    """Three blocks an epoch, of different numbers of batches."""
    tokens = corpus.num_tokens // 3
    made = PretrainingBatches(
        shards_of(corpus, 7), tokenizer, max_seq_length=48, tokens_per_batch=BATCH, seed=3, block_tokens=tokens
    )
    assert 3 <= made.num_blocks(0) <= 6
    return made


def places(batches: PretrainingBatches, epochs: int) -> list[Position]:
    return [
        Position(epoch, block, batch)
        for epoch in range(epochs)
        for block in range(batches.num_blocks(epoch))
        for batch in range(batches.num_batches_in_block(epoch, block))
    ]


def test_steps_take_all_batches_in_order_over_blocks_and_epochs(batches: PretrainingBatches) -> None:
    expected = places(batches, 3)
    steps = list(islice(step_batches(batches, Position(), batches_per_step=5), len(expected) // 5))
    made = [batch for step in steps for batch in step.batches]
    for place, batch in zip(expected, made):
        assert same(batch, batches.batch(place.epoch, place.block, place.batch))
    assert all(len(step.batches) == 5 for step in steps)
    lasts = [expected[5 * number + 4] for number in range(len(steps))]
    assert [step.position for step in steps] == [Position(last.epoch, last.block, last.batch + 1) for last in lasts]
    within = [{(place.epoch, place.block) for place in expected[first : first + 5]} for first in range(0, len(made), 5)]
    assert max(map(len, within)) > 1, "a step spans blocks"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_processes_together_take_the_batches_of_one(batches: PretrainingBatches, world_size: int) -> None:
    count = len(places(batches, 2)) // 4
    single = list(islice(step_batches(batches, Position(), batches_per_step=4), count))
    ranks = [
        list(islice(step_batches(batches, Position(), batches_per_step=4, rank=rank, world_size=world_size), count))
        for rank in range(world_size)
    ]
    for number, step in enumerate(single):
        shares = [rank[number] for rank in ranks]
        assert {share.position for share in shares} == {step.position}, "all begin the next step at the same place"
        together = [share.batches[turn] for turn in range(4 // world_size) for share in shares]
        assert len(together) == 4 and all(map(same, together, step.batches))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_make_the_same_steps_from_any_position(batches: PretrainingBatches, workers: int) -> None:
    options = {"batches_per_step": 4, "rank": 1, "world_size": 2}
    steps = list(islice(step_batches(batches, Position(), **options), 25))
    for begin in (0, 11):
        position = Position() if begin == 0 else steps[begin - 1].position
        made = list(islice(step_batches(batches, position, **options, workers=workers), 25 - begin))
        for step, other in zip(steps[begin:], made, strict=True):
            assert step.position == other.position
            assert len(other.batches) == 2 and all(map(same, step.batches, other.batches))


def test_a_run_goes_on_from_any_position(batches: PretrainingBatches) -> None:
    steps = list(islice(step_batches(batches, Position(), batches_per_step=3), 60))
    for begin in (1, 7, 30, 59):
        resumed = list(islice(step_batches(batches, steps[begin - 1].position, batches_per_step=3), 60 - begin))
        for step, other in zip(steps[begin:], resumed, strict=True):
            assert step.position == other.position and all(map(same, step.batches, other.batches))


def test_nothing_before_a_position_is_planned(batches: PretrainingBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, load = [], batches.blocks.load
    monkeypatch.setattr(batches.blocks, "load", lambda *place: planned.append(place) or load(*place))
    masked, mask_tokens = [], batches_module.mask_tokens
    monkeypatch.setattr(batches_module, "mask_tokens", lambda *args, **kwargs: masked.append(1) or mask_tokens(*args, **kwargs))
    next(step_batches(batches, Position(1000, 1, 4), batches_per_step=2, rank=1, world_size=2))
    assert planned == [(1000, 1)]
    assert len(masked) == 1, "only the own batch is made"


def test_wrong_requests_are_refused_at_once(batches: PretrainingBatches) -> None:
    for position in (Position(-1), Position(0, -1), Position(0, 0, -2)):
        with pytest.raises(ValueError, match="a position has no negative parts: Position"):
            step_batches(batches, position)
    for position, message in (
        (Position(0, 99), r"epoch 0 has \d blocks: there is no Position\(epoch=0, block=99, batch=0\)"),
        (Position(0, 0, 9999), r"block 0 of epoch 0 has \d+ batches: there is no Position\(epoch=0, block=0, batch=9999\)"),
    ):
        with pytest.raises(ValueError, match=message):
            next(step_batches(batches, position))
    for options, message in (
        ({"batches_per_step": 3, "world_size": 2}, "batches_per_step is 3, which 2 processes cannot share evenly"),
        ({"batches_per_step": 0}, "batches_per_step is 0"),
        ({"rank": 1}, "rank is 1, expected 0 to 0"),
        ({"workers": -1}, "workers must not be negative, it is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            step_batches(batches, Position(), **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corpus_without_a_pair_ends_with_an_error(tokenizer: PreTrainedTokenizerFast, workers: int) -> None:
    single = PretrainingBatches(numbered_corpus([[1]] * 5), tokenizer, max_seq_length=32, tokens_per_batch=64, seed=0)
    with pytest.raises(CorpusError, match="no sequence can be made of the corpus: its documents are single tokens"):
        next(step_batches(single, Position(), workers=workers))


def test_an_error_in_a_worker_is_the_error_of_the_caller(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast) -> None:
    """A foreign shard is found when its turn comes: after some good steps, with the place where it happened."""
    foreign = numbered_corpus([[100] * 10, [100] * 10])
    shards = [*shards_of(corpus, 3), foreign]
    for seed in range(20):
        batches = PretrainingBatches(shards, tokenizer, max_seq_length=48, tokens_per_batch=BATCH, seed=seed, block_tokens=1)
        if batches.blocks.shards(0, 0) != [3]:
            break
    seen: list[StepBatches] = []
    before = children_of(os.getpid())
    with pytest.raises(ValueError, match="the corpus holds token id 2004") as caught:
        for step in step_batches(batches, Position(), workers=2):
            seen.append(step)
    assert len(seen) > 3
    assert "in a process that makes batches" in str(caught.value.__cause__) and "_check_ids" in str(caught.value.__cause__)
    assert no_more_than(before)


def no_more_than(before: list[int]) -> bool:
    """Whether all processes that this one has started since then have ended; waits for them for some seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if set(children_of(os.getpid())) <= set(before):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_workers_end_when_the_consumer_stops(batches: PretrainingBatches) -> None:
    before = children_of(os.getpid())  # those of other tests, such as a fork server
    steps = step_batches(batches, Position(), batches_per_step=2, workers=2)
    next(steps)
    assert len(set(children_of(os.getpid())) - set(before)) == 2
    steps.close()
    assert no_more_than(before)


def test_workers_leave_the_generator_of_the_model_alone(batches: PretrainingBatches) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(islice(step_batches(batches, Position(), workers=1), 2))
    assert torch.equal(before, torch.get_rng_state())


_CONSUMER = """
import sys, time
from fastbert.data.batches import PretrainingBatches
from fastbert.data.loader import Position, step_batches
from tests.data.helpers import numbered_corpus, story
from fastbert.data.tokenizer import train_wordpiece
from fastbert.data.tokens import tokenize_documents

stories = [story(number, 5) for number in range(40)]
tokenizer = train_wordpiece((paragraph for document in stories for paragraph in document.paragraphs), 400)
batches = PretrainingBatches(tokenize_documents(stories, tokenizer), tokenizer, max_seq_length=48, tokens_per_batch=4096, seed=0)
steps = step_batches(batches, Position(), batches_per_step=4, workers=2)
next(steps)
print("ready", flush=True)
time.sleep(1)
next(steps)
print("alive", flush=True)
time.sleep(60)
"""


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_signals_to_the_group_leave_workers_alone_and_a_killed_consumer_leaves_none() -> None:
    """Ctrl-C reaches all processes of a terminal: the one that trains saves a checkpoint, for which it may need its workers."""
    root = Path(__file__).parents[2]
    consumer = subprocess.Popen([sys.executable, "-c", _CONSUMER], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert consumer.stdout.readline() == "ready\n"
        workers = children_of(consumer.pid)
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGINT)
            os.kill(worker, signal.SIGTERM)
        assert consumer.stdout.readline() == "alive\n"
        assert children_of(consumer.pid) == workers
    finally:
        consumer.kill()
        consumer.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives the process that started it"
        time.sleep(0.05)
