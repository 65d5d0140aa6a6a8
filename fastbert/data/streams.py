"""Random numbers by place: what is drawn for an epoch, a block or a batch depends on the seed and on that place alone.

The generator is counter-based (Philox 4x64-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), so any place
is as near as any other: no process has to draw what another one draws before it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LARGEST_SEED = 2**64 - 1


class Stream(IntEnum):
    """What the numbers are for. Two streams of a seed have nothing in common."""

    SHARDS = 0
    SEQUENCES = 1
    ORDER = 2
    MASKS = 3


def generator(seed: int, stream: Stream, epoch: int, block: int = 0, batch: int = 0) -> np.random.Generator:
    """The generator of a place. Raises ValueError for a seed outside 0 .. 2**64 - 1.

    The counter's lowest word counts the draws and the others hold the place, so the numbers of two places never overlap.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must lie between 0 and {LARGEST_SEED}, it is {seed}")
    import numpy as np  # the command line knows the largest seed without it

    key, counter = np.array([seed, stream], np.uint64), np.array([0, batch, block, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
