"""Bidirectional attention within each sequence of a packed batch, with dropout (Dao et al., 2022; Dao, 2023): launchers.

Fused so that scores and probabilities, (length, length) per head, never reach memory: the forward reads qkv and writes out,
8 bytes per hidden element and token in a 16-bit dtype, and keeps one number per query and head, the log-sum-exp; the
backward recomputes the probabilities from it and reads and writes 16 bytes and more.

Two families of kernels, chosen by the longest sequence, the dtype, head_dim and architecture: attention_on_chip.py for short
sequences on Hopper and later, attention_streaming.py for everything else. Neither has atomics, both are bitwise repeatable.

In both, keys stand within a tile in an order (dropout.py) that lets each thread draw the dropout mask of its own
probabilities; softmax and products over keys do not mind. Exponentials are base 2, with log2(e) folded into the scale.

All tensors are contiguous, float32, bfloat16 or float16; row offsets within a batch are 64-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .attention_on_chip import on_chip_backward_kernel, on_chip_forward_kernel
from .attention_streaming import backward_dkv_kernel, backward_dq_kernel, forward_kernel
from .attention_tiles import LOG2_E
from .dropout import dropout_arguments
from .launch import cuda_capability, device_guard, num_processors
from .precision import dot_precision

MIN_BLOCK_HEAD_DIM = 16
# By itemsize.
MAX_HEAD_DIM = {2: 256, 4: 128}


class TileConfig(NamedTuple):
    """Queries and keys per tile, warps per program, stages of the software pipeline."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# Streaming, keyed by itemsize and BLOCK_HEAD_DIM, and by architecture where the tiles of the others would spill registers there
# (compute capability // 10: 8 for Ampere and Ada, 9 for Hopper, 10 for Blackwell, 0 for AMD). Those that still do are float32 at
# 128: the forward on sm_80 (8 bytes) and dQ on sm_90 and sm_100 (16). float32 shares its tiles between the plain ("ieee")
# products, which hold their operands in registers, and the matrix units ("tf32", 24 bytes in the forward on sm_90 at head_dim
# 80); beyond 128 they would fill the shared memory of small GPUs.
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
    (4, 128, 0): TileConfig(64, 32, 8, 2),
}
BACKWARD_DQ_CONFIGS = {
    (2, 16): TileConfig(64, 64, 4, 2),
    (2, 32): TileConfig(64, 64, 4, 2),
    (2, 64): TileConfig(64, 64, 4, 2),
    (2, 128): TileConfig(64, 32, 4, 2),
    (2, 128, 8): TileConfig(64, 32, 8, 2),
    (2, 256): TileConfig(32, 32, 8, 2),
    (4, 16): TileConfig(64, 32, 4, 2),
    (4, 32): TileConfig(32, 32, 4, 2),
    (4, 64): TileConfig(64, 32, 8, 2),
    (4, 64, 0): TileConfig(32, 32, 4, 2),
    (4, 128): TileConfig(16, 32, 8, 2),
    (4, 128, 0): TileConfig(16, 32, 4, 2),
    (4, 128, 8): TileConfig(16, 32, 4, 2),
}
BACKWARD_DKV_CONFIGS = {
    (2, 16): TileConfig(64, 64, 4, 2),
    (2, 32): TileConfig(64, 64, 4, 2),
    (2, 64): TileConfig(64, 64, 4, 3),
    (2, 64, 8): TileConfig(64, 64, 8, 3),
    (2, 128): TileConfig(32, 64, 8, 2),
    (2, 128, 0): TileConfig(32, 32, 4, 1),
    (2, 128, 10): TileConfig(32, 64, 8, 1),
    (2, 256): TileConfig(32, 32, 8, 1),
    (4, 16): TileConfig(32, 32, 8, 1),
    (4, 32): TileConfig(32, 32, 8, 1),
    (4, 64): TileConfig(16, 32, 4, 1),
    (4, 128): TileConfig(16, 32, 4, 1),
}


class OnChipForwardConfig(NamedTuple):
    """Queries per tile, keys per tile and tiles, warps per program."""

    block_queries: int
    block_keys: int
    num_tiles: int
    num_warps: int


# On chip, for 16-bit dtypes: of an architecture and BLOCK_HEAD_DIM the first whose tiles hold the longest sequence. What is
# missing here spills registers.
_ONE_TILE, _TWO_TILES, _TWO_LARGE_TILES = (
    OnChipForwardConfig(64, 64, 1, 4),
    OnChipForwardConfig(64, 64, 2, 4),
    OnChipForwardConfig(64, 128, 2, 4),
)
ON_CHIP_FORWARD_CONFIGS = {
    **{(9, width): (_ONE_TILE, _TWO_TILES, _TWO_LARGE_TILES) for width in (16, 32, 64)},
    **{(9, 128): (_ONE_TILE, _TWO_TILES)},
    **{(10, width): (_ONE_TILE, _TWO_TILES) for width in (16, 32, 64)},
}
# What an upper bound on the scores may be, in powers of 2: exponentials reach down to 2 ** (-2 * bound), where bfloat16 still
# has all its digits and float16 those that count.
ON_CHIP_BOUND_LIMITS = {torch.bfloat16: 60.0, torch.float16: 5.0}
# Backward, keyed by architecture, BLOCK_HEAD_DIM and whether there is dropout. One program per head: where there are fewer heads
# than multiprocessors, the two kernels that split a head keep more of them busy.
ON_CHIP_BACKWARD_MAX_SEQLEN = 512
_STAGED, _UNSTAGED = TileConfig(64, 128, 8, 2), TileConfig(64, 128, 8, 1)
ON_CHIP_BACKWARD_CONFIGS = {
    **{(9, width, dropout): _STAGED for width in (16, 32) for dropout in (False, True)},
    (9, 64, False): _STAGED,
    (9, 64, True): _UNSTAGED,
    **{(10, width, dropout): _UNSTAGED for width in (16, 32, 64) for dropout in (False, True)},
}


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

    qkv: (total, 3, num_heads, head_dim) contiguous, head_dim at most 256 (128 in float32); cu_seqlens: (batch + 1,) int32, from
    0 to total, not decreasing; max_seqlen: at least the longest sequence, or results are undefined; softmax_scale: positive;
    seed: one int64 on qkv's device where dropout_p > 0.
    Returns out (total, num_heads, head_dim) and lse (num_heads, total) float32.
    """
    total, _, num_heads, head_dim = qkv.shape
    if softmax_scale <= 0.0:
        raise ValueError(f"the Triton attention kernel takes a positive softmax_scale, got {softmax_scale}")
    out = torch.empty((total, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((num_heads, total), dtype=torch.float32, device=qkv.device)
    if total == 0:
        return out, lse
    threshold, scale = dropout_arguments(dropout_p)
    heads = (cu_seqlens.numel() - 1) * num_heads
    width = _block_head_dim(qkv)
    constants = {"num_heads": num_heads, "head_dim": head_dim, "BLOCK_HEAD_DIM": width, "DROPOUT": dropout_p > 0.0}
    with device_guard(qkv):
        on_chip = _on_chip_forward_config(qkv, max_seqlen, width)
        if on_chip is not None:
            # A program walks over all blocks of queries of its head, or over a share where there are few heads.
            num_blocks = min(triton.cdiv(max_seqlen, on_chip.block_queries), triton.cdiv(2 * num_processors(qkv), heads))
            on_chip_forward_kernel[(heads * num_blocks,)](
                qkv, cu_seqlens, seed, out, lse, total, num_blocks, softmax_scale * LOG2_E.value, threshold, scale, stream,
                BOUND_LIMIT=ON_CHIP_BOUND_LIMITS[qkv.dtype], NUM_TILES=on_chip.num_tiles, BLOCK_QUERIES=on_chip.block_queries,
                BLOCK_KEYS=on_chip.block_keys, num_warps=on_chip.num_warps, num_stages=1, **constants,
            )  # fmt: skip
        else:
            config = _streaming_config(FORWARD_CONFIGS, qkv, width)
            num_blocks = triton.cdiv(max_seqlen, config.block_queries)
            forward_kernel[(heads * num_blocks,)](
                qkv, cu_seqlens, seed, out, lse, total, num_blocks, softmax_scale, threshold, scale, stream,
                **constants, **_tile_options(config, qkv.dtype),
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
    heads = (cu_seqlens.numel() - 1) * num_heads
    width = _block_head_dim(qkv)
    constants = {"num_heads": num_heads, "head_dim": head_dim, "BLOCK_HEAD_DIM": width, "DROPOUT": dropout_p > 0.0}
    with device_guard(qkv):
        on_chip = _on_chip_backward_config(qkv, max_seqlen, width, heads, dropout_p)
        if on_chip is not None:
            one_block = max_seqlen <= on_chip.block_keys
            dq_sum = None if one_block else torch.empty(out.shape, dtype=torch.float32, device=qkv.device)
            on_chip_backward_kernel[(heads,)](
                dout, qkv, out, lse, cu_seqlens, seed, dqkv, dq_sum, delta, total, softmax_scale, threshold, scale, stream,
                BLOCK_QUERIES=on_chip.block_queries, BLOCK_KEYS=on_chip.block_keys, NUM_STAGES=on_chip.num_stages,
                num_warps=on_chip.num_warps, **constants,
            )  # fmt: skip
        else:
            dq_config = _streaming_config(BACKWARD_DQ_CONFIGS, qkv, width)
            dkv_config = _streaming_config(BACKWARD_DKV_CONFIGS, qkv, width)
            query_blocks = triton.cdiv(max_seqlen, dq_config.block_queries)
            key_blocks = triton.cdiv(max_seqlen, dkv_config.block_keys)
            backward_dq_kernel[(heads * query_blocks,)](
                dout, qkv, out, lse, cu_seqlens, seed, dqkv, delta, total, query_blocks, softmax_scale, threshold, scale, stream,
                **constants, **_tile_options(dq_config, qkv.dtype),
            )  # fmt: skip
            backward_dkv_kernel[(heads * key_blocks,)](
                dout, qkv, lse, delta, cu_seqlens, seed, dqkv, total, key_blocks, softmax_scale, threshold, scale, stream,
                **constants, **_tile_options(dkv_config, qkv.dtype),
            )  # fmt: skip
    return dqkv


def _block_head_dim(qkv: Tensor) -> int:
    head_dim, limit = qkv.shape[-1], MAX_HEAD_DIM[qkv.itemsize]
    if not 0 < head_dim <= limit:
        raise ValueError(f"the Triton attention kernels take a head_dim from 1 to {limit} in {qkv.dtype}, got {head_dim}")
    return max(MIN_BLOCK_HEAD_DIM, triton.next_power_of_2(head_dim))


def _streaming_config(configs: dict[tuple[int, ...], TileConfig], qkv: Tensor, width: int) -> TileConfig:
    key = (qkv.itemsize, width)
    return configs.get((*key, cuda_capability() // 10), configs[key])


def _on_chip_forward_config(qkv: Tensor, max_seqlen: int, width: int) -> OnChipForwardConfig | None:
    configs = ON_CHIP_FORWARD_CONFIGS.get((cuda_capability() // 10, width), ()) if qkv.itemsize == 2 else ()
    return next((config for config in configs if max_seqlen <= config.num_tiles * config.block_keys), None)


def _on_chip_backward_config(qkv: Tensor, max_seqlen: int, width: int, heads: int, dropout_p: float) -> TileConfig | None:
    if qkv.itemsize != 2 or max_seqlen > ON_CHIP_BACKWARD_MAX_SEQLEN or heads < num_processors(qkv):
        return None
    return ON_CHIP_BACKWARD_CONFIGS.get((cuda_capability() // 10, width, dropout_p > 0.0))


def _tile_options(config: TileConfig, dtype: torch.dtype) -> dict[str, object]:
    return {
        "PRECISION": dot_precision(dtype),
        "BLOCK_QUERIES": config.block_queries,
        "BLOCK_KEYS": config.block_keys,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
