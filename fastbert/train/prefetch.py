"""Batches on their way to the device: those of the next step travel while the device works on this one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastbert.data.batches import PackedBatch
from fastbert.data.loader import Position, StepBatches
from fastbert.data.masking import IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class DeviceStep:
    """A step's ``batches`` on the device and where the step after it begins. Of each, without what it was filled up with:
    ``masked``, ``tokens`` and ``sequences``; ``pairs``: of tokens of one sequence, in all of them.
    """

    batches: list[PackedBatch]
    masked: list[int]
    tokens: list[int]
    sequences: list[int]
    pairs: int
    position: Position


def device_steps(
    steps: Generator[StepBatches], device: torch.device, filled: Callable[[PackedBatch], PackedBatch | None] | None = None
) -> Iterator[DeviceStep]:
    """``steps`` on ``device``. For a GPU each is copied from pinned memory on a stream of its own, one step ahead.

    ``filled``: ``PretrainingBatches.filled`` where batches shall have one shape; those that cannot have it have their own. For all
    devices but CPUs they name their labelled rows.
    """

    def prepared(batch: PackedBatch) -> PackedBatch:
        if filled is not None and (of_one_shape := filled(batch)) is not None:
            return of_one_shape
        return batch if device.type == "cpu" else batch.with_labelled_rows()

    if device.type == "cuda":
        moved = _copied_ahead(steps, device, prepared)
    else:
        moved = (_moved(step, lambda batch: prepared(batch).to(device)) for step in steps)
    with closing(steps):  # ends the processes that make them
        yield from moved


def _copied_ahead(
    steps: Iterator[StepBatches], device: torch.device, prepared: Callable[[PackedBatch], PackedBatch]
) -> Iterator[DeviceStep]:
    stream = torch.cuda.Stream(device)

    def copied() -> DeviceStep:
        step = next(steps)
        with torch.cuda.stream(stream):
            return _moved(step, lambda batch: _map(prepared(batch), Tensor.pin_memory).to(device, non_blocking=True))

    upcoming = copied()
    while True:
        # The copy was given to the stream a step ago; what is computed from now on comes after it.
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        step = upcoming
        for batch in step.batches:
            _used_on(batch, current)
        upcoming = copied()
        yield step


def _moved(step: StepBatches, move: Callable[[PackedBatch], PackedBatch]) -> DeviceStep:
    # Counted before the copy, because a number from the device would have to be waited for, and before the filling.
    masked = [int((batch.labels != IGNORE_INDEX).sum()) for batch in step.batches]
    pairs = sum(int(batch.cu_seqlens.diff().long().square().sum()) for batch in step.batches)
    tokens, sequences = [batch.num_tokens for batch in step.batches], [batch.num_sequences for batch in step.batches]
    return DeviceStep([move(batch) for batch in step.batches], masked, tokens, sequences, pairs, step.position)


def _map(batch: PackedBatch, function: Callable[[Tensor], Tensor]) -> PackedBatch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})


def _used_on(batch: PackedBatch, stream: torch.cuda.Stream) -> None:
    """Tells the allocator that ``stream`` reads the batch, so that its memory is not given away before."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            value.record_stream(stream)
