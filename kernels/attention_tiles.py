"""What the attention kernels share: which head of which sequence a program works on, and tiles of its rows.

A sequence is rows ``start`` to ``start + length`` of the packed batch. Offsets within a tile are 32-bit, the offset of a tile in
the batch 64-bit. Rows past the end of a sequence belong to the next one: they are masked, never read or written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .precision import fma, round_to

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def block_program(cu_seqlens_ptr, num_blocks, num_heads: tl.constexpr):
    """This program's block, head, first row in the batch and sequence length; neighbours share a sequence, then a head."""
    pid = tl.program_id(0)
    sequence = pid // (num_blocks * num_heads)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    return pid % num_blocks, pid // num_blocks % num_heads, start, length


@triton.jit
def tile_pointers(ptr, first_row, rows, row_stride: tl.constexpr, BLOCK_HEAD_DIM: tl.constexpr):
    offsets = rows[:, None] * row_stride + tl.arange(0, BLOCK_HEAD_DIM)[None, :]
    return ptr + tl.cast(first_row, tl.int64) * row_stride + offsets


@triton.jit
def tile_mask(rows, num_rows, head_dim: tl.constexpr, BLOCK_HEAD_DIM: tl.constexpr):
    mask = (rows < num_rows)[:, None]
    if head_dim != BLOCK_HEAD_DIM:
        mask = mask & (tl.arange(0, BLOCK_HEAD_DIM) < head_dim)[None, :]
    return mask


@triton.jit
def load_tile(ptr, first_row, rows, num_rows, row_stride: tl.constexpr, head_dim: tl.constexpr, BLOCK_HEAD_DIM: tl.constexpr):
    """Rows first_row + rows of a (num_rows, head_dim) matrix, zero outside of it; ``rows`` (R,) are those of one block."""
    pointers = tile_pointers(ptr, first_row, rows, row_stride, BLOCK_HEAD_DIM)
    return tl.load(pointers, mask=tile_mask(rows, num_rows - first_row, head_dim, BLOCK_HEAD_DIM), other=0.0)


@triton.jit
def store_tile(
    ptr, tile, first_row, rows, num_rows, row_stride: tl.constexpr, head_dim: tl.constexpr, BLOCK_HEAD_DIM: tl.constexpr
):
    pointers = tile_pointers(ptr, first_row, rows, row_stride, BLOCK_HEAD_DIM)
    mask = tile_mask(rows, num_rows - first_row, head_dim, BLOCK_HEAD_DIM)
    tl.store(pointers, round_to(tile, ptr.dtype.element_ty), mask=mask)


@triton.jit
def probabilities(scores, lse, softmax_scale, EXACT: tl.constexpr):
    """exp(scores * softmax_scale - lse), from products (queries, keys) and the log-sum-exp (queries,) of their softmax.

    EXACT, for float32: the difference of two numbers of like size first, then base 2. Otherwise one multiply-add, whose error of
    some 1e-6 is nothing beside a 16-bit rounding.
    """
    if EXACT:
        return tl.exp2(fma(scores, softmax_scale, -lse[:, None]) * LOG2_E)
    return tl.exp2(fma(scores, softmax_scale * LOG2_E, -(lse * LOG2_E)[:, None]))
