"""Counter-based dropout: the keep-mask of a tile, recomputed wherever it is needed and never stored.

The mask is a pure function of (row, column, plane, stream) under a 64-bit seed, the one that ``fastbert.ops.reference``
specifies: the Philox 4x32-10 call (Salmon et al., SC 2011) with counter (column // 8, row, plane, stream) gives 128 bits, 16
for each of eight neighbouring columns, and an element is dropped where its 16 bits are below round(p * 65536). That is one
call per eight elements where ``tl.rand`` spends one per element: some 12 instructions per element instead of 60.

The seed is read from device memory, so that a captured CUDA graph draws new masks when the tensor behind it is advanced.
"""

from __future__ import annotations

import triton
import triton.language as tl

DROPOUT_LEVELS = 1 << 16


def dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """The threshold that 16 random bits are compared with, and the scale 1 / (1 - p) of what is kept (0 if nothing is)."""
    threshold = round(dropout_p * DROPOUT_LEVELS)
    kept = DROPOUT_LEVELS - threshold
    return threshold, DROPOUT_LEVELS / kept if kept else 0.0


@triton.jit
def keep_tile(
    seed_ptr,
    rows,
    first_column,
    plane,
    stream,
    threshold,
    BLOCK_COLUMNS: tl.constexpr,
    INTERLEAVED: tl.constexpr = False,
):
    """The keep-mask (rows, BLOCK_COLUMNS), bool, of int32 ``rows`` (R,) and the columns from ``first_column`` on.

    seed_ptr points to one int64; first_column and BLOCK_COLUMNS are multiples of 8, of 32 where INTERLEAVED, which gives the
    columns in the order of :func:`interleaved_columns`.
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
    if INTERLEAVED:
        bits = tl.reshape(bits, (rows.shape[0], BLOCK_GROUPS // 4, 4, 4, 2))
        bits = tl.permute(bits, (0, 1, 3, 2, 4))
    return tl.reshape(bits, (rows.shape[0], BLOCK_COLUMNS)) >= tl.cast(threshold, tl.uint32)


@triton.jit
def interleaved_columns(BLOCK_COLUMNS: tl.constexpr):
    """The order of columns that suits a tile of matrix-unit results, int32 (BLOCK_COLUMNS,), a multiple of 32.

    In such a tile (``mma`` and ``wgmma`` alike) thread t of four holds columns 2t and 2t + 1 of every eight. With place
    32c + 8j + 2t + h taken by column 32c + 8t + 2j + h, each thread holds whole groups of eight neighbouring columns, so it
    draws its own mask: no exchange through shared memory, and no Philox call twice.
    """
    place = tl.arange(0, BLOCK_COLUMNS)
    return place // 32 * 32 + ((place & 6) << 2) + ((place & 24) >> 2) + (place & 1)


@triton.jit
def keep_tile_transposed(seed_ptr, rows, first_column, plane, stream, threshold, BLOCK_COLUMNS: tl.constexpr):
    """The keep-mask (BLOCK_COLUMNS, rows), bool: that of :func:`keep_tile` transposed, its columns in the order of
    :func:`paired_rows`; first_column and BLOCK_COLUMNS are multiples of 16.

    Threads that share a group of eight columns draw it once and pass its words on.
    """
    groups = first_column // 8 + tl.arange(0, BLOCK_COLUMNS // 8)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed_ptr),
        groups[:, None].to(tl.uint32),
        rows[None, :].to(tl.uint32),
        tl.cast(plane, tl.uint32),
        tl.cast(stream, tl.uint32),
    )
    words = tl.permute(tl.join(tl.join(word0, word2), tl.join(word1, word3)), (0, 2, 3, 1))
    words = tl.reshape(words, (BLOCK_COLUMNS // 16, 1, 8, rows.shape[0]))
    halves = tl.arange(0, 2)[None, :, None, None].to(tl.uint32)
    bits = (words >> (16 * halves)) & 0xFFFF
    return tl.reshape(bits, (BLOCK_COLUMNS, rows.shape[0])) >= tl.cast(threshold, tl.uint32)


@triton.jit
def paired_rows(BLOCK_ROWS: tl.constexpr):
    """The order of rows that suits a transposed tile of matrix-unit results, int32 (BLOCK_ROWS,), a multiple of 16.

    There a thread holds rows g and g + 8 of every sixteen: place 16c + 8h + g taken by row 16c + 2g + h makes them the two
    that share one word of a Philox call.
    """
    place = tl.arange(0, BLOCK_ROWS)
    return place // 16 * 16 + ((place & 7) << 1) + ((place & 8) >> 3)
