"""The batches of optimizer steps: which of them a process trains on, and where the next step begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastbert.data.batches import PackedBatch, PretrainingBatches


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
    """Endless steps from ``position`` on. A step takes the next ``batches_per_step`` batches in their order, of which process
    ``rank`` of ``world_size`` gets every ``world_size``-th: all processes together train on the same batches, however many they
    are.

    ``workers``: processes that make the batches (0: this one). Raises ValueError where ``batches_per_step`` is no multiple of
    ``world_size``.
    """
    if batches_per_step % world_size:
        raise ValueError(f"batches_per_step is {batches_per_step}, which {world_size} processes cannot share evenly")
    epoch, batch = position.epoch, position.batch
    own: list[PackedBatch] = []
    taken = 0
    while True:
        for made in batches.epoch(epoch, batch):
            batch += 1
            if taken % world_size == rank:
                own.append(made)
            taken += 1
            if taken == batches_per_step:
                yield StepBatches(own, Position(epoch, 0, batch))
                own, taken = [], 0
        epoch, batch = epoch + 1, 0
