"""Counter-based dropout: the keep-mask of a tile, recomputed wherever it is needed and never stored.

The mask is a pure function of (row, column, plane, stream) under a 64-bit seed, the one that ``fastbert.ops.reference``
specifies: the Philox 4x32-10 call (Salmon et al., SC 2011) with counter (column // 8, row, plane, stream) gives 128 bits, 16 for
each of eight neighbouring columns, and an element is dropped where its 16 bits are below round(p * 65536). That is one call
per eight elements where ``tl.rand`` spends one per element: about 8 integer instructions per element instead of 60.

The seed is read from device memory, so that a captured CUDA graph draws new masks when the tensor behind it is advanced.
"""

from __future__ import annotations

import triton
import triton.language as tl

DROPOUT_LEVELS = 1 << 16


def dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """The threshold that 16 random bits are compared with, and the scale 1 / (1 - p) of what is kept (0 if all is dropped)."""
    threshold = round(dropout_p * DROPOUT_LEVELS)
    kept = DROPOUT_LEVELS - threshold
    return threshold, DROPOUT_LEVELS / kept if kept else 0.0


@triton.jit
def keep_tile(seed_ptr, rows, first_column, plane, stream, threshold, BLOCK_COLUMNS: tl.constexpr):
    """The keep-mask (rows, BLOCK_COLUMNS), bool, of int32 ``rows`` (R,) and the columns from ``first_column`` on.

    first_column and BLOCK_COLUMNS are multiples of 8; seed_ptr points to one int64.
    """
    BLOCK_GROUPS: tl.constexpr = BLOCK_COLUMNS // 8
    groups = first_column // 8 + tl.arange(0, BLOCK_GROUPS)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed_ptr),
        groups[None, :].to(tl.uint32),
        rows[:, None].to(tl.uint32),
        tl.cast(plane, tl.uint32),
        tl.cast(stream, tl.uint32),
    )
    # tl.join appends the innermost axis: (word // 2, word % 2, half) reads in the order of the columns.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, (rows.shape[0], BLOCK_COLUMNS)) >= tl.cast(threshold, tl.uint32)
