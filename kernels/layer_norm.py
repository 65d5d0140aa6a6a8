"""LayerNorm (Ba et al., 2016) of a tile of whole rows held in registers: the part that both LayerNorm ops share.

A tile is (BLOCK_ROWS, BLOCK_HIDDEN) float32, BLOCK_HIDDEN the next power of two of the width; ``inside`` masks the rest. The
statistics take two passes over registers, not over memory: the variance of centred values loses nothing on constant rows
or on rows far from zero, as the difference of two moments would.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import num_processors

MIN_BLOCK_HIDDEN = 16
MAX_HIDDEN = 8192


class TileConfig(NamedTuple):
    """How a kernel tiles its rows: rows per tile, warps per program and, for the backward, programs per multiprocessor."""

    block_rows: int
    num_warps: int
    programs_per_processor: int = 0


# Keyed by BLOCK_HIDDEN. Forward: a thread holds 16 elements of each operand, two 16-byte loads in 16-bit dtypes.
FORWARD_CONFIGS = {
    16: TileConfig(128, 4),
    32: TileConfig(64, 4),
    64: TileConfig(32, 4),
    128: TileConfig(16, 4),
    256: TileConfig(8, 4),
    512: TileConfig(4, 4),
    1024: TileConfig(2, 4),
    2048: TileConfig(1, 4),
    4096: TileConfig(1, 8),
    8192: TileConfig(1, 16),
}
# Backward: 8 elements per thread, because the accumulators of the parameter gradients triple what it holds. The loads of the
# next tile run during the work on the current one. At BERT-base's and -large's width a row is one warp's, with no barrier in its
# sums, which on an H200 outweighs the registers (docs/tuning-log.md).
BACKWARD_CONFIGS = {
    16: TileConfig(64, 4, 4),
    32: TileConfig(32, 4, 4),
    64: TileConfig(16, 4, 4),
    128: TileConfig(8, 4, 4),
    256: TileConfig(4, 4, 4),
    512: TileConfig(4, 8, 2),
    1024: TileConfig(1, 1, 8),
    2048: TileConfig(1, 8, 2),
    4096: TileConfig(1, 16, 1),
    8192: TileConfig(1, 16, 1),
}
BACKWARD_STAGES = tl.constexpr(2)


def block_hidden(hidden: int) -> int:
    """The tile's width for rows of ``hidden`` elements; ValueError beyond MAX_HIDDEN, which registers do not hold."""
    if not 0 < hidden <= MAX_HIDDEN:
        raise ValueError(f"the Triton LayerNorm kernels take a hidden size from 1 to {MAX_HIDDEN}, got {hidden}")
    return max(MIN_BLOCK_HIDDEN, triton.next_power_of_2(hidden))


def num_backward_programs(x: Tensor, config: TileConfig) -> int:
    """Programs of a backward launch over the rows of ``x`` (rows, hidden): a few per processor, at most one per tile."""
    return min(triton.cdiv(x.shape[0], config.block_rows), num_processors(x) * config.programs_per_processor)


@triton.jit
def load_columns(ptr, columns, inside_columns):
    """A parameter (hidden,) as one float32 row (1, BLOCK_HIDDEN), zero past the end."""
    return tl.load(ptr + columns, mask=inside_columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def row_statistics(z, inside_columns, eps, hidden: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of each row, (BLOCK_ROWS, 1); ``z`` is zero outside."""
    mean = tl.sum(z, 1, keep_dims=True) / hidden
    centred = tl.where(inside_columns[None, :], z - mean, 0.0)
    # The sum of the centred values, which exactly would be 0, is what rounding made of the mean: of a row of equal values all
    # that there is, and BERT's eps is small enough to show it.
    correction = tl.sum(centred, 1, keep_dims=True) / hidden
    variance = tl.maximum(tl.sum(centred * centred, 1, keep_dims=True) / hidden - correction * correction, 0.0)
    return mean + correction, tl.rsqrt(variance + eps)


@triton.jit
def layer_norm_gradient(dy, x_hat, weight, rstd, hidden: tl.constexpr):
    """dz = rstd * (dy * weight - x_hat * mean(dy * weight * x_hat) - mean(dy * weight)); dy and x_hat are zero outside."""
    dx_hat = dy * weight
    c1 = tl.sum(dx_hat * x_hat, 1, keep_dims=True) / hidden
    c2 = tl.sum(dx_hat, 1, keep_dims=True) / hidden
    return (dx_hat - x_hat * c1 - c2) * rstd
