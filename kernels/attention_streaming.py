"""Attention for sequences of any length: a program holds one block and streams over the other side of the score matrix.

The forward and the dQ kernel hold a block of queries and stream over keys, with the running maximum and sum of Milakov and
Gimelshein (2018) in the forward; the dK/dV kernel holds keys and streams over queries. Blocks past the end of a sequence leave
at once, so the grid is that of the longest sequence. FLOPs per head and sequence: 4 * length^2 * head_dim forward, 14 backward
(two passes, 10 of them necessary), one exponential per score and pass.

In float32 the dQ kernel sums delta = rowsum(P * dP) from the very products that it is subtracted from, in a pass of its own (18
FLOPs in all). Dao's delta = rowsum(dout * out) is equal but rounded differently, and where a query attends to one key alone
the difference of the two is all error: more than plain torch makes, less than a rounding of a 16-bit dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LN_2, LOG2_E, block_program, load_tile, probabilities, store_tile
from .dropout import interleaved_columns, keep_tile
from .precision import dot, fma, round_to


@triton.jit(do_not_specialize=["total", "num_blocks", "threshold", "stream"])
def forward_kernel(
    qkv_ptr,
    cu_seqlens_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
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
    block, head, start, length = block_program(cu_seqlens_ptr, num_blocks, num_heads)
    first_query = block * BLOCK_QUERIES
    if first_query >= length:
        return
    q_ptr = qkv_ptr + start.to(tl.int64) * (3 * hidden) + head * head_dim
    k_ptr, v_ptr = q_ptr + hidden, q_ptr + 2 * hidden
    queries = tl.arange(0, BLOCK_QUERIES)
    keys = interleaved_columns(BLOCK_KEYS)

    q = load_tile(q_ptr, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
    EXACT: tl.constexpr = qkv_ptr.dtype.element_ty == tl.float32
    scale_log2 = softmax_scale * LOG2_E
    row_max = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_QUERIES,), tl.float32)
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_HEAD_DIM), tl.float32)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    for first_key in range(0, length, BLOCK_KEYS):
        k = load_tile(k_ptr, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        scores = dot(q, tl.trans(k), zeros, PRECISION)
        scores = tl.where((first_key + keys < length)[None, :], scores, float("-inf"))
        # Every block of keys has a valid one, so the maximum is finite and no row becomes NaN.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        if EXACT:
            p = tl.exp2((scores - new_max[:, None]) * scale_log2)
        else:
            p = tl.exp2(tl.fma(scores, scale_log2, -(new_max * scale_log2)[:, None]))
        correction = tl.exp2((row_max - new_max) * scale_log2)
        row_sum = row_sum * correction + tl.sum(p, 1)
        row_max = new_max
        if DROPOUT:
            keep = keep_tile(seed_ptr, start + first_query + queries, first_key, head, stream, threshold, BLOCK_KEYS, True)
            p = tl.where(keep, p, 0.0)
        v = load_tile(v_ptr, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        acc = dot(round_to(p, v.dtype), v, acc * correction[:, None], PRECISION)

    normalizer = 1.0 / row_sum
    if DROPOUT:
        normalizer *= dropout_scale
    out_ptr += start.to(tl.int64) * hidden + head * head_dim
    store_tile(out_ptr, acc * normalizer[:, None], first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
    lse_ptr += head.to(tl.int64) * total + start + first_query
    lse = fma(row_max, softmax_scale, tl.log2(row_sum) * LN_2)
    tl.store(lse_ptr + queries, lse, mask=first_query + queries < length)


@triton.jit
def _p_and_dp(
    q,
    k,
    v,
    do,
    lse,
    seed_ptr,
    rows,
    first_key,
    keys,
    length,
    head,
    stream,
    softmax_scale,
    threshold,
    dropout_scale,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Probabilities of a tile, 0 past the end, and their gradients."""
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    p = probabilities(dot(q, tl.trans(k), zeros, PRECISION), lse, softmax_scale, EXACT)
    p = tl.where((first_key + keys < length)[None, :], p, 0.0)
    dp = dot(do, tl.trans(v), zeros, PRECISION)
    if DROPOUT:
        keep = keep_tile(seed_ptr, rows, first_key, head, stream, threshold, BLOCK_KEYS, True)
        dp = tl.where(keep, dp * dropout_scale, 0.0)
    return p, dp


@triton.jit(do_not_specialize=["total", "num_blocks", "threshold", "stream"])
def backward_dq_kernel(
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
    block, head, start, length = block_program(cu_seqlens_ptr, num_blocks, num_heads)
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

    q = load_tile(q_ptr, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
    do = load_tile(dout_ptr + out_offset, first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
    lse = tl.load(lse_ptr + row_offset + queries, mask=inside, other=0.0)
    rows = start + first_query + queries
    EXACT: tl.constexpr = qkv_ptr.dtype.element_ty == tl.float32
    if EXACT:
        # Of probabilities whose sum is off by the rounding of lse: what it is off by would come through as a part of delta.
        delta, p_sum = tl.zeros((BLOCK_QUERIES,), tl.float32), tl.zeros((BLOCK_QUERIES,), tl.float32)
        for first_key in range(0, length, BLOCK_KEYS):
            k = load_tile(k_ptr, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
            v = load_tile(v_ptr, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
            p, dp = _p_and_dp(
                q, k, v, do, lse, seed_ptr, rows, first_key, keys, length, head, stream,
                softmax_scale, threshold, dropout_scale, DROPOUT, EXACT, PRECISION, BLOCK_QUERIES, BLOCK_KEYS,
            )  # fmt: skip
            delta += tl.sum(p * dp, 1)
            p_sum += tl.sum(p, 1)
        delta /= p_sum
    else:
        out = load_tile(out_ptr + out_offset, first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row_offset + queries, delta, mask=inside)

    acc = tl.zeros((BLOCK_QUERIES, BLOCK_HEAD_DIM), tl.float32)
    for first_key in range(0, length, BLOCK_KEYS):
        k = load_tile(k_ptr, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        v = load_tile(v_ptr, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        p, dp = _p_and_dp(
            q, k, v, do, lse, seed_ptr, rows, first_key, keys, length, head, stream,
            softmax_scale, threshold, dropout_scale, DROPOUT, EXACT, PRECISION, BLOCK_QUERIES, BLOCK_KEYS,
        )  # fmt: skip
        acc = dot(round_to(p * (dp - delta[:, None]), k.dtype), k, acc, PRECISION)
    dq_ptr = dqkv_ptr + q_offset
    store_tile(dq_ptr, acc * softmax_scale, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)


@triton.jit(do_not_specialize=["total", "num_blocks", "threshold", "stream"])
def backward_dkv_kernel(
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
    block, head, start, length = block_program(cu_seqlens_ptr, num_blocks, num_heads)
    first_key = block * BLOCK_KEYS
    if first_key >= length:
        return
    q_offset = start.to(tl.int64) * (3 * hidden) + head * head_dim
    q_ptr = qkv_ptr + q_offset
    dout_ptr += start.to(tl.int64) * hidden + head * head_dim
    row_offset = head.to(tl.int64) * total + start
    queries = tl.arange(0, BLOCK_QUERIES)
    keys = interleaved_columns(BLOCK_KEYS)

    k = load_tile(q_ptr + hidden, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
    v = load_tile(q_ptr + 2 * hidden, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
    EXACT: tl.constexpr = qkv_ptr.dtype.element_ty == tl.float32
    dk = tl.zeros((BLOCK_KEYS, BLOCK_HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_KEYS, BLOCK_HEAD_DIM), tl.float32)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    for first_query in range(0, length, BLOCK_QUERIES):
        q = load_tile(q_ptr, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        do = load_tile(dout_ptr, first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
        # An infinite log-sum-exp makes the probabilities of queries past the end zero.
        rows = row_offset + first_query + queries
        inside = first_query + queries < length
        lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
        p = probabilities(dot(q, tl.trans(k), zeros, PRECISION), lse, softmax_scale, EXACT)
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
    store_tile(dk_ptr, dk * softmax_scale, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
    store_tile(dk_ptr + hidden, dv, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
