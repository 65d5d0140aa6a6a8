"""Bidirectional attention within each sequence of a packed batch, with dropout (Dao et al., 2022; Dao, 2023).

Fused so that scores and probabilities, (length, length) per head, never reach memory: the forward reads qkv and writes out,
8 bytes per hidden element and token in a 16-bit dtype, and keeps one number per query and head, the log-sum-exp; the
backward recomputes the probabilities from it and reads and writes 16 bytes and more. FLOPs per head and sequence:
4 * length^2 * head_dim forward, 14 backward (two passes, 10 of them necessary), one exponential per score and pass.

A program takes one block of queries (the dK/dV kernel: of keys) of one head and sequence and streams over the other side.
Blocks past the end of a sequence leave at once, so the grid is that of the longest sequence. The backward has no atomics and
is bitwise repeatable: one kernel owns dQ (and delta = rowsum(dout * out) as a by-product), the next dK and dV.

Within a tile keys stand in the order of ``dropout.interleaved_columns``, which lets each thread draw the dropout mask of its
own probabilities; softmax and products over keys do not mind. Exponentials are base 2, with log2(e) folded into the scale.

All tensors are contiguous, float32, bfloat16 or float16; row offsets within a batch are 64-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import dropout_arguments, interleaved_columns, keep_tile
from .launch import device_guard
from .precision import dot, dot_precision, round_to

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MIN_BLOCK_HEAD_DIM = 16
MAX_HEAD_DIM = 256


class TileConfig(NamedTuple):
    """Queries and keys per tile, warps per program, stages of the software pipeline."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# Keyed by (itemsize, BLOCK_HEAD_DIM): tiles that compile for sm_80 and sm_90 without spilling registers (16 bytes of the dQ
# kernel for float32 and 256 apart). float32 shares its tiles between the plain ("ieee") products, which hold their operands
# in registers, and the matrix units ("tf32").
FORWARD_CONFIGS = {
    (2, 16): TileConfig(64, 64, 4, 3),
    (2, 32): TileConfig(64, 64, 4, 3),
    (2, 64): TileConfig(64, 64, 4, 3),
    (2, 128): TileConfig(128, 64, 8, 2),
    (2, 256): TileConfig(64, 32, 8, 2),
    (4, 16): TileConfig(64, 32, 4, 2),
    (4, 32): TileConfig(64, 32, 8, 2),
    (4, 64): TileConfig(64, 32, 8, 2),
    (4, 128): TileConfig(64, 32, 16, 2),
    (4, 256): TileConfig(16, 32, 16, 2),
}
BACKWARD_DQ_CONFIGS = {
    (2, 16): TileConfig(64, 64, 4, 2),
    (2, 32): TileConfig(64, 64, 4, 2),
    (2, 64): TileConfig(64, 64, 4, 2),
    (2, 128): TileConfig(64, 32, 4, 2),
    (2, 256): TileConfig(32, 32, 8, 2),
    (4, 16): TileConfig(64, 32, 4, 2),
    (4, 32): TileConfig(64, 32, 8, 2),
    (4, 64): TileConfig(64, 32, 8, 2),
    (4, 128): TileConfig(16, 32, 8, 2),
    (4, 256): TileConfig(16, 32, 8, 2),
}
BACKWARD_DKV_CONFIGS = {
    (2, 16): TileConfig(64, 64, 4, 2),
    (2, 32): TileConfig(64, 64, 4, 2),
    (2, 64): TileConfig(64, 64, 4, 3),
    (2, 128): TileConfig(32, 64, 8, 2),
    (2, 256): TileConfig(32, 32, 8, 1),
    (4, 16): TileConfig(32, 32, 8, 1),
    (4, 32): TileConfig(32, 32, 8, 1),
    (4, 64): TileConfig(16, 32, 4, 1),
    (4, 128): TileConfig(16, 32, 8, 1),
    (4, 256): TileConfig(16, 32, 16, 1),
}


@triton.jit
def _program(cu_seqlens_ptr, num_blocks, num_heads: tl.constexpr):
    """This program's block, head, first row in the batch and sequence length; neighbours share a sequence, then a head."""
    pid = tl.program_id(0)
    sequence = pid // (num_blocks * num_heads)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    return pid % num_blocks, pid // num_blocks % num_heads, start, length


@triton.jit
def _tile_pointers(ptr, first_row, rows, row_stride: tl.constexpr, BLOCK_HEAD_DIM: tl.constexpr):
    offsets = rows[:, None] * row_stride + tl.arange(0, BLOCK_HEAD_DIM)[None, :]
    return ptr + tl.cast(first_row, tl.int64) * row_stride + offsets


@triton.jit
def _tile_mask(rows, num_rows, head_dim: tl.constexpr, BLOCK_HEAD_DIM: tl.constexpr):
    mask = (rows < num_rows)[:, None]
    if head_dim != BLOCK_HEAD_DIM:
        mask = mask & (tl.arange(0, BLOCK_HEAD_DIM) < head_dim)[None, :]
    return mask


@triton.jit
def _load_tile(ptr, first_row, rows, num_rows, row_stride: tl.constexpr, head_dim: tl.constexpr, BLOCK_HEAD_DIM: tl.constexpr):
    """Rows first_row + rows of a (num_rows, head_dim) matrix, zero outside of it; ``rows`` (R,) are those of one block."""
    pointers = _tile_pointers(ptr, first_row, rows, row_stride, BLOCK_HEAD_DIM)
    return tl.load(pointers, mask=_tile_mask(rows, num_rows - first_row, head_dim, BLOCK_HEAD_DIM), other=0.0)


@triton.jit
def _store_tile(
    ptr, tile, first_row, rows, num_rows, row_stride: tl.constexpr, head_dim: tl.constexpr, BLOCK_HEAD_DIM: tl.constexpr
):
    pointers = _tile_pointers(ptr, first_row, rows, row_stride, BLOCK_HEAD_DIM)
    mask = _tile_mask(rows, num_rows - first_row, head_dim, BLOCK_HEAD_DIM)
    tl.store(pointers, round_to(tile, ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["total", "num_blocks", "threshold", "stream"])
def _forward_kernel(
    qkv_ptr,
    cu_seqlens_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    total,
    num_blocks,
    scale_log2,
    threshold,
    dropout_scale,
    stream,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
):
    hidden: tl.constexpr = num_heads * head_dim
    block, head, start, length = _program(cu_seqlens_ptr, num_blocks, num_heads)
    first_query = block * BLOCK_QUERIES
    if first_query >= length:
        return
    q_ptr = qkv_ptr + start.to(tl.int64) * (3 * hidden) + head * head_dim
    k_ptr, v_ptr = q_ptr + hidden, q_ptr + 2 * hidden
    queries = tl.arange(0, BLOCK_QUERIES)
    keys = interleaved_columns(BLOCK_KEYS)

    q = _load_tile(q_ptr, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
    row_max = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_QUERIES,), tl.float32)
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_HEAD_DIM), tl.float32)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    for first_key in range(0, length, BLOCK_KEYS):
        k = _load_tile(k_ptr, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        scores = dot(q, tl.trans(k), zeros, PRECISION)
        scores = tl.where((first_key + keys < length)[None, :], scores, float("-inf"))
        # Every block of keys has a valid one, so the maximum is finite and no row becomes NaN.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(tl.fma(scores, scale_log2, -new_max[:, None]))
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, 1)
        row_max = new_max
        if DROPOUT:
            keep = keep_tile(seed_ptr, start + first_query + queries, first_key, head, stream, threshold, BLOCK_KEYS, True)
            p = tl.where(keep, p, 0.0)
        v = _load_tile(v_ptr, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        acc = dot(round_to(p, v.dtype), v, acc * correction[:, None], PRECISION)

    normalizer = 1.0 / row_sum
    if DROPOUT:
        normalizer *= dropout_scale
    out_ptr += start.to(tl.int64) * hidden + head * head_dim
    _store_tile(out_ptr, acc * normalizer[:, None], first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
    lse_ptr += head.to(tl.int64) * total + start + first_query
    tl.store(lse_ptr + queries, (row_max + tl.log2(row_sum)) * LN_2, mask=first_query + queries < length)


@triton.jit(do_not_specialize=["total", "num_blocks", "threshold", "stream"])
def _backward_dq_kernel(
    dout_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    seed_ptr,
    dqkv_ptr,
    delta_ptr,
    total,
    num_blocks,
    softmax_scale,
    threshold,
    dropout_scale,
    stream,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
):
    hidden: tl.constexpr = num_heads * head_dim
    block, head, start, length = _program(cu_seqlens_ptr, num_blocks, num_heads)
    first_query = block * BLOCK_QUERIES
    if first_query >= length:
        return
    q_offset = start.to(tl.int64) * (3 * hidden) + head * head_dim
    q_ptr = qkv_ptr + q_offset
    k_ptr, v_ptr = q_ptr + hidden, q_ptr + 2 * hidden
    out_offset = start.to(tl.int64) * hidden + head * head_dim
    row_offset = head.to(tl.int64) * total + start + first_query
    queries = tl.arange(0, BLOCK_QUERIES)
    keys = interleaved_columns(BLOCK_KEYS)
    inside = first_query + queries < length

    q = _load_tile(q_ptr, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
    do = _load_tile(dout_ptr + out_offset, first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
    out = _load_tile(out_ptr + out_offset, first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row_offset + queries, delta, mask=inside)
    lse_log2 = tl.load(lse_ptr + row_offset + queries, mask=inside, other=0.0) * LOG2_E

    scale_log2 = softmax_scale * LOG2_E
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_HEAD_DIM), tl.float32)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    for first_key in range(0, length, BLOCK_KEYS):
        k = _load_tile(k_ptr, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        v = _load_tile(v_ptr, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        exponent = tl.fma(dot(q, tl.trans(k), zeros, PRECISION), scale_log2, -lse_log2[:, None])
        p = tl.exp2(tl.where((first_key + keys < length)[None, :], exponent, float("-inf")))
        dp = dot(do, tl.trans(v), zeros, PRECISION)
        if DROPOUT:
            keep = keep_tile(seed_ptr, start + first_query + queries, first_key, head, stream, threshold, BLOCK_KEYS, True)
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        acc = dot(round_to(ds, k.dtype), k, acc, PRECISION)
    dq_ptr = dqkv_ptr + q_offset
    _store_tile(dq_ptr, acc * softmax_scale, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)


@triton.jit(do_not_specialize=["total", "num_blocks", "threshold", "stream"])
def _backward_dkv_kernel(
    dout_ptr,
    qkv_ptr,
    lse_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    seed_ptr,
    dqkv_ptr,
    total,
    num_blocks,
    softmax_scale,
    threshold,
    dropout_scale,
    stream,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
):
    hidden: tl.constexpr = num_heads * head_dim
    block, head, start, length = _program(cu_seqlens_ptr, num_blocks, num_heads)
    first_key = block * BLOCK_KEYS
    if first_key >= length:
        return
    q_offset = start.to(tl.int64) * (3 * hidden) + head * head_dim
    q_ptr = qkv_ptr + q_offset
    dout_ptr += start.to(tl.int64) * hidden + head * head_dim
    row_offset = head.to(tl.int64) * total + start
    queries = tl.arange(0, BLOCK_QUERIES)
    keys = interleaved_columns(BLOCK_KEYS)

    k = _load_tile(q_ptr + hidden, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
    v = _load_tile(q_ptr + 2 * hidden, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
    scale_log2 = softmax_scale * LOG2_E
    dk = tl.zeros((BLOCK_KEYS, BLOCK_HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_KEYS, BLOCK_HEAD_DIM), tl.float32)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    for first_query in range(0, length, BLOCK_QUERIES):
        q = _load_tile(q_ptr, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        do = _load_tile(dout_ptr, first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
        # An infinite log-sum-exp makes the probabilities of queries past the end zero.
        rows = row_offset + first_query + queries
        inside = first_query + queries < length
        lse_log2 = tl.load(lse_ptr + rows, mask=inside, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
        p = tl.exp2(tl.fma(dot(q, tl.trans(k), zeros, PRECISION), scale_log2, -lse_log2[:, None]))
        p_dropped = p
        if DROPOUT:
            keep = keep_tile(seed_ptr, start + first_query + queries, first_key, head, stream, threshold, BLOCK_KEYS, True)
            p_dropped = tl.where(keep, p, 0.0)
        dv = dot(tl.trans(round_to(p_dropped, do.dtype)), do, dv, PRECISION)
        dp = dot(do, tl.trans(v), zeros, PRECISION)
        if DROPOUT:
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dk = dot(tl.trans(round_to(ds, q.dtype)), q, dk, PRECISION)
    if DROPOUT:
        dv *= dropout_scale
    dk_ptr = dqkv_ptr + q_offset + hidden
    _store_tile(dk_ptr, dk * softmax_scale, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
    _store_tile(dk_ptr + hidden, dv, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)


def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """Bidirectional attention within each sequence of a packed batch.

    qkv: (total, 3, num_heads, head_dim) contiguous, head_dim at most 256; cu_seqlens: (batch + 1,) int32, from 0 to total,
    not decreasing; max_seqlen: the longest sequence; softmax_scale: positive; seed: one int64 on qkv's device where
    dropout_p > 0. Returns out (total, num_heads, head_dim) and lse (num_heads, total) float32.
    """
    total, _, num_heads, head_dim = qkv.shape
    if softmax_scale <= 0.0:
        raise ValueError(f"the Triton attention kernel takes a positive softmax_scale, got {softmax_scale}")
    out = torch.empty((total, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((num_heads, total), dtype=torch.float32, device=qkv.device)
    if total == 0:
        return out, lse
    threshold, scale = dropout_arguments(dropout_p)
    width = _block_head_dim(head_dim)
    config = FORWARD_CONFIGS[qkv.itemsize, width]
    num_blocks = triton.cdiv(max_seqlen, config.block_queries)
    with device_guard(qkv):
        _forward_kernel[((cu_seqlens.numel() - 1) * num_heads * num_blocks,)](
            qkv, cu_seqlens, seed, out, lse, total, num_blocks, softmax_scale * LOG2_E.value, threshold, scale, stream,
            num_heads=num_heads, head_dim=head_dim, BLOCK_HEAD_DIM=width, **_tile_options(config, dropout_p),
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """dqkv (total, 3, num_heads, head_dim) of :func:`attention_forward` with the same arguments; dout is contiguous."""
    total, _, num_heads, head_dim = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if total == 0:
        return dqkv
    delta = torch.empty(lse.shape, dtype=torch.float32, device=qkv.device)
    threshold, scale = dropout_arguments(dropout_p)
    width = _block_head_dim(head_dim)
    dq_config = BACKWARD_DQ_CONFIGS[qkv.itemsize, width]
    dkv_config = BACKWARD_DKV_CONFIGS[qkv.itemsize, width]
    query_blocks = triton.cdiv(max_seqlen, dq_config.block_queries)
    key_blocks = triton.cdiv(max_seqlen, dkv_config.block_keys)
    heads = (cu_seqlens.numel() - 1) * num_heads
    with device_guard(qkv):
        _backward_dq_kernel[(heads * query_blocks,)](
            dout, qkv, out, lse, cu_seqlens, seed, dqkv, delta, total, query_blocks, softmax_scale, threshold, scale, stream,
            num_heads=num_heads, head_dim=head_dim, BLOCK_HEAD_DIM=width, **_tile_options(dq_config, dropout_p),
        )  # fmt: skip
        _backward_dkv_kernel[(heads * key_blocks,)](
            dout, qkv, lse, delta, cu_seqlens, seed, dqkv, total, key_blocks, softmax_scale, threshold, scale, stream,
            num_heads=num_heads, head_dim=head_dim, BLOCK_HEAD_DIM=width, **_tile_options(dkv_config, dropout_p),
        )  # fmt: skip
    return dqkv


def _block_head_dim(head_dim: int) -> int:
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the Triton attention kernels take a head_dim from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    return max(MIN_BLOCK_HEAD_DIM, triton.next_power_of_2(head_dim))


def _tile_options(config: TileConfig, dropout_p: float) -> dict[str, object]:
    return {
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": dot_precision(),
        "BLOCK_QUERIES": config.block_queries,
        "BLOCK_KEYS": config.block_keys,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
