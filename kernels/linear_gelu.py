"""y = gelu(x W^T + bias) with the exact erf-GELU in the epilogue of the matmul: the first half of the feed-forward network.

Apart, the GELU reads and writes the widest activation of the layer, 16 bytes per hidden element and token in a 16-bit dtype
and 7 to 9% of a training step; here it works on the accumulator. With gradients the pre-activation u is written beside y, or
not at all: the backward then repeats the matmul (2 * rows * in * out FLOPs, a third on top). The gradient of u and the bias's
take one pass over u and dy (6 bytes per element). The backward's matmuls are the vendor's. Not taken: this pass as the epilogue
of the repeated matmul. A tile of dy beside the accumulator spills registers on Hopper and Blackwell.

A program is persistent: it takes every num_programs-th tile, on Hopper two programs to a multiprocessor, so that one multiplies
while the other is in its epilogue. On Hopper and later, tiles come and go through tensor descriptors (TMA) where rows are multiples
of 16 bytes; elsewhere by pointers. float32 without TF32 is no work for matrix units: the vendor's matmul, then one pass.

All tensors are contiguous, of one dtype: float32, bfloat16 or float16; products accumulate in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gelu import gaussian
from .launch import cuda_capability, device_guard, num_processors
from .precision import dot, dot_precision, round_to
from .reduction import empty_partials, num_row_programs, sum_partials


class GemmConfig(NamedTuple):
    """Rows and columns of a tile, depth of a step, warps per program, stages of the pipeline, programs per multiprocessor."""

    block_rows: int
    block_columns: int
    block_depth: int
    num_warps: int
    num_stages: int
    programs_per_processor: int


class PassConfig(NamedTuple):
    """Rows and columns of a tile, warps per program, programs per multiprocessor."""

    block_rows: int
    block_columns: int
    num_warps: int
    programs_per_processor: int


TMA_CAPABILITY = 90
# Keyed by itemsize: on Hopper and later, and elsewhere (Ampere, Ada, AMD).
TMA_GEMM_CONFIGS = {2: GemmConfig(128, 128, 64, 8, 2, 2), 4: GemmConfig(128, 128, 32, 8, 2, 1)}
GEMM_CONFIGS = {2: GemmConfig(128, 128, 32, 8, 3, 1), 4: GemmConfig(64, 64, 32, 4, 2, 2)}
PASS_CONFIG = PassConfig(8, 256, 4, 4)


@triton.jit
def _tile(tile, row_tiles, column_tiles, GROUP_ROWS: tl.constexpr = 8):
    """Row and column of the tile with this number: down a group of rows, then to the next column, so that programs at work
    together share rows of W in the L2 cache.
    """
    group = tile // (GROUP_ROWS * column_tiles)
    first_row = group * GROUP_ROWS
    group_rows = tl.minimum(row_tiles - first_row, GROUP_ROWS)
    within = tile % (GROUP_ROWS * column_tiles)
    return first_row + within % group_rows, within // group_rows


@triton.jit
def _load(source, rows, first_row, num_rows, first_column, num_columns, BLOCK_COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """A tile (rows, BLOCK_COLUMNS) of a matrix (num_rows, num_columns), zero outside; a descriptor or a pointer."""
    if TMA:
        return source.load([first_row, first_column])
    else:
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        return tl.load(source + offsets, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0.0)


@triton.jit
def _store(target, tile, rows, first_row, num_rows, columns, first_column, num_columns, DTYPE: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        target.store([first_row, first_column], round_to(tile, DTYPE))
    else:
        offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        tl.store(target + offsets, round_to(tile, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _gemm_kernel(
    x,
    weight,
    bias_ptr,
    y,
    u,
    num_rows,
    depth: tl.constexpr,
    num_columns: tl.constexpr,
    DTYPE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """y = gelu(x W^T + bias), and u = x W^T unless None; x, weight, y and u are descriptors where TMA, else pointers."""
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    column_tiles: tl.constexpr = (num_columns + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = _tile(tile, row_tiles, column_tiles)
        first_row, first_column = row_tile * BLOCK_ROWS, column_tile * BLOCK_COLUMNS
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for first in range(0, depth, BLOCK_DEPTH):
            a = _load(x, rows, first_row, num_rows, first, depth, BLOCK_DEPTH, TMA)
            b = _load(weight, columns, first_column, num_columns, first, depth, BLOCK_DEPTH, TMA)
            acc = dot(a, tl.trans(b), acc, PRECISION)

        if u is not None:
            _store(u, acc, rows, first_row, num_rows, columns, first_column, num_columns, DTYPE, TMA)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
        distribution, _ = gaussian(acc, tl.bfloat16)
        acc *= distribution
        _store(y, acc, rows, first_row, num_rows, columns, first_column, num_columns, DTYPE, TMA)


@triton.jit(do_not_specialize=["num_rows"])
def _pass_kernel(
    u_ptr,
    bias_ptr,
    dy_ptr,
    out_ptr,
    partials_ptr,
    num_rows,
    num_columns: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """gelu(u + bias), or dy * gelu'(u + bias) where dy is not None, with its column sums to partials unless None."""
    program, num_programs = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside_columns = columns < num_columns
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first_row in tl.range(program * BLOCK_ROWS, num_rows, num_programs * BLOCK_ROWS, num_stages=2):
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        inside = (rows < num_rows)[:, None] & inside_columns[None, :]
        offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        u = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            u += bias
        cdf, density = gaussian(u, out_ptr.dtype.element_ty)
        if dy_ptr is not None:
            result = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * (cdf + u * density)
        else:
            result = u * cdf
        tl.store(out_ptr + offsets, round_to(result, out_ptr.dtype.element_ty), mask=inside)
        if partials_ptr is not None:
            dbias += result
    if partials_ptr is not None:
        line_ptr = partials_ptr + program.to(tl.int64) * num_columns + columns
        tl.store(line_ptr, tl.sum(dbias, 0), mask=inside_columns)


def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep_preactivation: bool) -> tuple[Tensor, Tensor | None]:
    """y = gelu(u + bias) with u = x weight^T, and u itself where it is to be kept for the backward pass (else None).

    x: (rows, in_features), weight: (out_features, in_features), bias: (out_features,) or None; y, u: (rows, out_features).
    """
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    u = torch.empty_like(y) if keep_preactivation else None
    if y.numel() == 0:
        return y, u
    with device_guard(x):
        if _matrix_units_take(x):
            _gemm(x, weight, bias, y, u)
        else:
            u = torch.mm(x, weight.t(), out=torch.empty_like(y))
            _gelu_pass(u, bias, None, y, None)
    return y, u if keep_preactivation else None


def linear_gelu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (dx, dweight, dbias); dbias is None without a bias. Where u is None it is computed again."""
    du = torch.empty_like(dy)
    dbias = None if bias is None else torch.empty_like(bias)
    if dy.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), None if dbias is None else dbias.zero_()
    with device_guard(dy):
        partials = _gelu_pass(x @ weight.t() if u is None else u, bias, dy, du, dbias)
        if dbias is not None:
            sum_partials(partials, dbias)
    return du @ weight, du.t() @ x, dbias


def _matrix_units_take(x: Tensor) -> bool:
    return x.dtype != torch.float32 or dot_precision(x.dtype) == "tf32"


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, u: Tensor | None) -> None:
    rows, out_features = y.shape
    matrices = [matrix for matrix in (x, weight, y, u) if matrix is not None]
    tma = cuda_capability() >= TMA_CAPABILITY and all(
        matrix.shape[1] * matrix.itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0 for matrix in matrices
    )
    config = (TMA_GEMM_CONFIGS if tma else GEMM_CONFIGS)[x.itemsize]

    def operand(matrix: Tensor | None, block_rows: int, block_columns: int) -> Tensor | TensorDescriptor | None:
        if not tma or matrix is None:
            return matrix
        # Not the tensor's own strides: those of a single row may be anything.
        return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [block_rows, block_columns])

    tiles = triton.cdiv(rows, config.block_rows) * triton.cdiv(out_features, config.block_columns)
    _gemm_kernel[(min(tiles, num_processors(x) * config.programs_per_processor),)](
        operand(x, config.block_rows, config.block_depth),
        operand(weight, config.block_columns, config.block_depth),
        bias,
        operand(y, config.block_rows, config.block_columns),
        operand(u, config.block_rows, config.block_columns),
        rows,
        depth=x.shape[1], num_columns=out_features, DTYPE=_TRITON_DTYPES[x.dtype], TMA=tma, PRECISION=dot_precision(x.dtype),
        BLOCK_ROWS=config.block_rows, BLOCK_COLUMNS=config.block_columns, BLOCK_DEPTH=config.block_depth,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _gelu_pass(u: Tensor, bias: Tensor | None, dy: Tensor | None, out: Tensor, dbias: Tensor | None) -> Tensor | None:
    """Launches the pass over u; returns the partial sums of dbias, where that is wanted."""
    rows, columns = u.shape
    config = PASS_CONFIG
    column_programs = triton.cdiv(columns, config.block_columns)
    row_programs = num_row_programs(u, config.block_rows, column_programs, config.programs_per_processor)
    partials = None if dbias is None else empty_partials(u, 1, row_programs)
    _pass_kernel[(column_programs, row_programs)](
        u, bias, dy, out, partials, rows, num_columns=columns,
        BLOCK_ROWS=config.block_rows, BLOCK_COLUMNS=config.block_columns, num_warps=config.num_warps,
    )  # fmt: skip
    return partials


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
