"""Attention for short sequences, with what a program reads more than once kept on the chip.

Forward, at most 256 keys: a program loads K and V of its head once, as tiles that stay in shared memory, and walks over the
queries. No running maximum and no rescaling: by Cauchy and Schwarz no score of a query exceeds |q| * max |k|, so that this
bound, known before the first product, serves as the maximum in exp(score - maximum); the sum divides it out again. Only where
the bound is so loose that exponentials could leave the dtype's range does a program find the maximum itself, with one more
product.

Backward, at most 512 tokens: one program for all of a head, 10 * length^2 * head_dim FLOPs and one exponential and one dropout
mask per score, where two kernels of one output each take 14, two and two. It holds a block of keys with their dK and dV, walks
over the queries, and computes the transposed scores, so that probabilities and dS go from the products' registers straight
into the next ones. dQ is summed up over the blocks of keys in a float32 buffer that stays in the L2 cache and that no other
program touches: no atomics, the same bits in every run.

Not taken: K and V of 512 keys on chip in the forward. Their 128 KiB leave one program of 8 warps to a multiprocessor, nothing to
run while it waits, and the compiler spills the addresses of so many tiles. Longer sequences stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LN_2, LOG2_E, block_program, load_tile, store_tile, tile_mask, tile_pointers
from .dropout import interleaved_columns, keep_tile, keep_tile_transposed, paired_rows
from .precision import dot, round_to


@triton.jit
def _squared_norms(rows):
    rows = rows.to(tl.float32)
    return tl.sum(rows * rows, 1)


@triton.jit
def _largest_scores(q, k_tiles, keys, length, NUM_TILES: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    row_max = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    for tile in tl.static_range(NUM_TILES):
        scores = dot(q, k_tiles[tile], zeros, "ieee")
        scores = tl.where((tile * BLOCK_KEYS + keys < length)[None, :], scores, float("-inf"))
        row_max = tl.maximum(row_max, tl.max(scores, 1))
    return row_max


@triton.jit
def _attend(
    q_ptr,
    out_ptr,
    lse_ptr,
    seed_ptr,
    k_tiles,
    v_tiles,
    key_bound,
    start,
    length,
    head,
    block,
    num_blocks,
    scale_log2,
    threshold,
    dropout_scale,
    stream,
    hidden: tl.constexpr,
    head_dim: tl.constexpr,
    DROPOUT: tl.constexpr,
    BOUND_LIMIT: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
):
    """Every num_blocks-th block of queries, from ``block`` on, against the first NUM_TILES tiles of keys, which hold them all.

    k_tiles: transposed. key_bound: the largest norm of a key times the scale.
    """
    queries = tl.arange(0, BLOCK_QUERIES)
    keys = interleaved_columns(BLOCK_KEYS)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    for first_query in range(block * BLOCK_QUERIES, length, num_blocks * BLOCK_QUERIES):
        q = load_tile(q_ptr, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        bound = tl.sqrt(_squared_norms(q)) * key_bound
        if tl.max(bound, 0) > BOUND_LIMIT:
            bound = _largest_scores(q, k_tiles, keys, length, NUM_TILES, BLOCK_QUERIES, BLOCK_KEYS) * scale_log2
        row_sum = tl.zeros((BLOCK_QUERIES,), tl.float32)
        acc = tl.zeros((BLOCK_QUERIES, BLOCK_HEAD_DIM), tl.float32)
        for tile in tl.static_range(NUM_TILES):
            exponent = tl.fma(dot(q, k_tiles[tile], zeros, "ieee"), scale_log2, -bound[:, None])
            if tile == NUM_TILES - 1:
                exponent = tl.where((tile * BLOCK_KEYS + keys < length)[None, :], exponent, float("-inf"))
            p = tl.exp2(exponent)
            row_sum += tl.sum(p, 1)
            if DROPOUT:
                rows = start + first_query + queries
                p = tl.where(keep_tile(seed_ptr, rows, tile * BLOCK_KEYS, head, stream, threshold, BLOCK_KEYS, True), p, 0.0)
            acc = dot(round_to(p, q.dtype), v_tiles[tile], acc, "ieee")
        normalizer = 1.0 / row_sum
        if DROPOUT:
            normalizer *= dropout_scale
        store_tile(out_ptr, acc * normalizer[:, None], first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
        tl.store(lse_ptr + first_query + queries, (bound + tl.log2(row_sum)) * LN_2, mask=first_query + queries < length)


@triton.jit(do_not_specialize=["total", "num_blocks", "threshold", "stream"])
def on_chip_forward_kernel(
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
    BOUND_LIMIT: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
):
    hidden: tl.constexpr = num_heads * head_dim
    block, head, start, length = block_program(cu_seqlens_ptr, num_blocks, num_heads)
    if block * BLOCK_QUERIES >= length:
        return
    q_ptr = qkv_ptr + start.to(tl.int64) * (3 * hidden) + head * head_dim
    out_ptr += start.to(tl.int64) * hidden + head * head_dim
    lse_ptr += head.to(tl.int64) * total + start
    keys = interleaved_columns(BLOCK_KEYS)
    k_tiles = ()
    v_tiles = ()
    squared_bound = 0.0
    for tile in tl.static_range(NUM_TILES):
        first_key = tile * BLOCK_KEYS
        k = load_tile(q_ptr + hidden, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        v = load_tile(q_ptr + 2 * hidden, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        # Transposed here, outside of the loops: a tile transposed inside of one would wait in registers until then.
        k_tiles = k_tiles + (tl.trans(k),)
        v_tiles = v_tiles + (v,)
        squared_bound = tl.maximum(squared_bound, tl.max(_squared_norms(k), 0))
    key_bound = tl.sqrt(squared_bound) * scale_log2
    # A loop over as many tiles as the sequence fills, straight-line code for each number of them: only constants can say which
    # tile is meant, and between branches the compiler would keep everything in two layouts.
    for num_tiles in tl.static_range(1, NUM_TILES + 1):
        if (length > (num_tiles - 1) * BLOCK_KEYS) & (length <= num_tiles * BLOCK_KEYS):
            _attend(
                q_ptr, out_ptr, lse_ptr, seed_ptr, k_tiles, v_tiles, key_bound, start, length, head, block, num_blocks,
                scale_log2, threshold, dropout_scale, stream,
                hidden, head_dim, DROPOUT, BOUND_LIMIT, num_tiles, BLOCK_QUERIES, BLOCK_KEYS, BLOCK_HEAD_DIM,
            )  # fmt: skip


@triton.jit(do_not_specialize=["total", "threshold", "stream"])
def on_chip_backward_kernel(
    dout_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    seed_ptr,
    dqkv_ptr,
    dq_sum_ptr,
    delta_ptr,
    total,
    softmax_scale,
    threshold,
    dropout_scale,
    stream,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    hidden: tl.constexpr = num_heads * head_dim
    _, head, start, length = block_program(cu_seqlens_ptr, 1, num_heads)
    q_ptr = qkv_ptr + start.to(tl.int64) * (3 * hidden) + head * head_dim
    dq_ptr = dqkv_ptr + start.to(tl.int64) * (3 * hidden) + head * head_dim
    out_offset = start.to(tl.int64) * hidden + head * head_dim
    row_offset = head.to(tl.int64) * total + start
    dout_ptr += out_offset
    lse_ptr += row_offset
    delta_ptr += row_offset
    queries = tl.arange(0, BLOCK_QUERIES)
    keys = paired_rows(BLOCK_KEYS)

    for first_query in range(0, length, BLOCK_QUERIES):
        do = load_tile(dout_ptr, first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
        out = load_tile(out_ptr + out_offset, first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(delta_ptr + first_query + queries, delta, mask=first_query + queries < length)
    # Other threads than those that write delta, and below dQ, read it.
    tl.debug_barrier()

    scale_log2 = softmax_scale * LOG2_E
    zeros = tl.zeros((BLOCK_KEYS, BLOCK_QUERIES), tl.float32)
    for first_key in range(0, length, BLOCK_KEYS):
        k = load_tile(q_ptr + hidden, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        v = load_tile(q_ptr + 2 * hidden, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        dk = tl.zeros((BLOCK_KEYS, BLOCK_HEAD_DIM), tl.float32)
        dv = tl.zeros((BLOCK_KEYS, BLOCK_HEAD_DIM), tl.float32)
        for first_query in tl.range(0, length, BLOCK_QUERIES, num_stages=NUM_STAGES):
            q = load_tile(q_ptr, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
            do = load_tile(dout_ptr, first_query, queries, length, hidden, head_dim, BLOCK_HEAD_DIM)
            # An infinite log-sum-exp makes the probabilities of queries past the end zero.
            inside = first_query + queries < length
            lse_log2 = tl.load(lse_ptr + first_query + queries, mask=inside, other=float("inf")) * LOG2_E
            delta = tl.load(delta_ptr + first_query + queries, mask=inside, other=0.0)
            if DROPOUT:
                rows = start + first_query + queries
                keep = keep_tile_transposed(seed_ptr, rows, first_key, head, stream, threshold, BLOCK_KEYS)
            p = tl.exp2(tl.fma(dot(k, tl.trans(q), zeros, "ieee"), scale_log2, -lse_log2[None, :]))
            # A key past the end is 0 and so is its part of dQ, but not where its probability, exp(-lse), has become infinite.
            p = tl.where((first_key + keys < length)[:, None], p, 0.0)
            dp = dot(v, tl.trans(do), zeros, "ieee")
            p_dropped = p
            if DROPOUT:
                p_dropped = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            dv = dot(round_to(p_dropped, do.dtype), do, dv, "ieee")
            ds = round_to(p * (dp - delta[None, :]), q.dtype)
            dk = dot(ds, q, dk, "ieee")
            dq = dot(tl.trans(ds), k, tl.zeros((BLOCK_QUERIES, BLOCK_HEAD_DIM), tl.float32), "ieee")
            # Scaled before the branches: triton 3.6 cannot wait inside of one for a product that was started outside.
            dq *= softmax_scale
            if dq_sum_ptr is not None:
                sum_pointers = tile_pointers(dq_sum_ptr + out_offset, first_query, queries, hidden, BLOCK_HEAD_DIM)
                mask = tile_mask(queries, length - first_query, head_dim, BLOCK_HEAD_DIM)
                dq += tl.load(sum_pointers, mask=mask & (first_key > 0), other=0.0)
                if first_key + BLOCK_KEYS < length:
                    tl.store(sum_pointers, dq, mask=mask)
            if first_key + BLOCK_KEYS >= length:
                store_tile(dq_ptr, dq, first_query, queries, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        if DROPOUT:
            dv *= dropout_scale
        store_tile(dq_ptr + hidden, dk * softmax_scale, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        store_tile(dq_ptr + 2 * hidden, dv, first_key, keys, length, 3 * hidden, head_dim, BLOCK_HEAD_DIM)
        if dq_sum_ptr is not None:
            tl.debug_barrier()
