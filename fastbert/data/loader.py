"""The batches of optimizer steps: which of them a process trains on, and where the next step begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastbert.data.batches import PackedBatch, PretrainingBatches
from fastbert.data.errors import CorpusError


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
    return _steps(batches, position, batches_per_step, rank, world_size)


def _steps(
    batches: PretrainingBatches, position: Position, batches_per_step: int, rank: int, world_size: int
) -> Iterator[StepBatches]:
    own: list[PackedBatch] = []
    for taken, place in enumerate(_places(batches, position), start=1):
        within = (taken - 1) % batches_per_step
        if within % world_size == rank:
            own.append(batches.batch(place.epoch, place.block, place.batch))
        if within == batches_per_step - 1:
            yield StepBatches(own, Position(place.epoch, place.block, place.batch + 1))
            own = []


def _places(batches: PretrainingBatches, position: Position) -> Iterator[Position]:
    """The places of all batches from ``position`` on, block after block, epoch after epoch."""
    epoch, first_block, first_batch = position.epoch, position.block, position.batch
    while True:
        found = first_batch > 0
        for block in range(first_block, batches.num_blocks(epoch)):
            for batch in range(first_batch, batches.num_batches_in_block(epoch, block)):
                found = True
                yield Position(epoch, block, batch)
            first_batch = 0
        if not found:
            raise CorpusError("no sequence can be made of the corpus: its documents are single tokens")
        epoch, first_block = epoch + 1, 0
