"""The batches of optimizer steps: which of them a process trains on, and where the next step begins."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fastbert.data.batches import PackedBatch, PretrainingBatches
from fastbert.data.errors import CorpusError

# Enough to go on with while the workers plan their next block.
_BATCHES_AHEAD = 64
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Position:
    """The next batch that no step has taken: its epoch, the block of shards within the epoch, its number within the block."""

    epoch: int = 0
    block: int = 0
    batch: int = 0


@dataclass(frozen=True, eq=False)
class StepBatches:
    """``batches``: this process's share of a step's batches; ``position``: where the next step begins."""

    batches: list[PackedBatch]
    position: Position


def step_batches(
    batches: PretrainingBatches,
    position: Position,
    *,
    batches_per_step: int = 1,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[StepBatches]:
    """Endless steps from ``position`` on, whose block is the first to be planned. A step takes the next ``batches_per_step``
    batches in their order, of which process ``rank`` of ``world_size`` gets every ``world_size``-th: all processes together train
    on the same batches, however many they are. A step goes on over the ends of blocks and epochs.

    ``workers``: processes that make the batches (0: this one). Raises ValueError where ``batches_per_step`` is no multiple of
    ``world_size``, for a rank that does not exist, and for a position that is none of ``batches``.
    """
    if world_size < 1 or batches_per_step < 1 or batches_per_step % world_size:
        raise ValueError(f"batches_per_step is {batches_per_step}, which {world_size} processes cannot share evenly")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1}")
    if workers < 0:
        raise ValueError(f"workers must not be negative, it is {workers}")
    if min(position.epoch, position.block, position.batch) < 0:
        raise ValueError(f"a position has no negative parts: {position}")
    steps = _Steps(batches, position, batches_per_step, rank, world_size)
    return _made_by_workers(steps, workers) if workers else steps.share(0, 1)


class _Steps(IterableDataset):
    """The steps of a process; each of its workers makes every ``workers``-th of them, but plans all."""

    def __init__(self, batches: PretrainingBatches, position: Position, batches_per_step: int, rank: int, world_size: int) -> None:
        self.batches, self.position = batches, position
        self.batches_per_step, self.rank, self.world_size = batches_per_step, rank, world_size

    def share(self, worker: int, workers: int) -> Iterator[StepBatches]:
        own: list[PackedBatch] = []
        for number, place in enumerate(_places(self.batches, self.position)):
            step, within = divmod(number, self.batches_per_step)
            if step % workers != worker:
                continue
            if within % self.world_size == self.rank:
                own.append(self.batches.batch(place.epoch, place.block, place.batch))
            if within == self.batches_per_step - 1:
                yield StepBatches(own, Position(place.epoch, place.block, place.batch + 1))
                own = []

    def __iter__(self) -> Iterator[_Arrays | _Failure]:
        """In a worker process."""
        worker = get_worker_info()
        try:
            for step in self.share(worker.id, worker.num_workers):
                yield _Arrays.of_step(step)
        except Exception as error:
            yield _Failure.of_error(error)


@dataclass(frozen=True)
class _Arrays:
    """A step as it goes from process to process. Tensors would each take a file descriptor with them, arrays are copied."""

    batches: list[dict[str, Any]]
    position: Position

    @classmethod
    def of_step(cls, step: StepBatches) -> _Arrays:
        names = [field.name for field in fields(PackedBatch)]
        values = [{name: getattr(batch, name) for name in names} for batch in step.batches]
        return cls(
            [{name: x.numpy() if isinstance(x, Tensor) else x for name, x in batch.items()} for batch in values], step.position
        )

    def step(self) -> StepBatches:
        made = [
            PackedBatch(**{name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in batch.items()})
            for batch in self.batches
        ]
        return StepBatches(made, self.position)


@dataclass(frozen=True)
class _Failure:
    """What ended a worker, and where."""

    error: Exception
    traceback: str

    @classmethod
    def of_error(cls, error: Exception) -> _Failure:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error, text)


def _made_by_workers(steps: _Steps, workers: int) -> Iterator[StepBatches]:
    own_batches = steps.batches_per_step // steps.world_size
    loader = DataLoader(
        steps,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=max(2, _BATCHES_AHEAD // (own_batches * workers)),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the default one belongs to the model: its dropout must not depend on the workers
    )
    for item in loader:
        if isinstance(item, _Failure):
            raise item.error from RuntimeError(f"in a process that makes batches:\n{item.traceback}")
        yield item.step()


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    """Signals mean the process that trains, which ends its workers when it is done; they end themselves when it is no more."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    # A worker of DataLoader looks for its parent, too, but waits for somebody to read what it made before it ends.
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _places(batches: PretrainingBatches, position: Position) -> Iterator[Position]:
    """The places of all batches from ``position`` on, block after block, epoch after epoch."""
    epoch, first_block, first_batch = position.epoch, position.block, position.batch
    if first_block >= batches.num_blocks(epoch):
        raise ValueError(f"epoch {epoch} has {batches.num_blocks(epoch)} blocks: there is no {position}")
    if first_batch > (count := batches.num_batches_in_block(epoch, first_block)):
        raise ValueError(f"block {first_block} of epoch {epoch} has {count} batches: there is no {position}")
    while True:
        found = first_batch > 0 or first_block > 0
        for block in range(first_block, batches.num_blocks(epoch)):
            for batch in range(first_batch, batches.num_batches_in_block(epoch, block)):
                found = True
                yield Position(epoch, block, batch)
            first_batch = 0
        if not found:
            raise CorpusError("no sequence can be made of the corpus: its documents are single tokens")
        epoch, first_block = epoch + 1, 0
