"""y = gelu(x W^T + bias) with the exact erf-GELU: the first half of the feed-forward network.

The matmuls are the vendor's; bias and GELU are one pass over the pre-activation u (4 bytes an element in a 16-bit dtype, in the
backward 6, with the bias's gradient). Not taken: the GELU in the epilogue of a matmul of our own, which saves up to 2 bytes an
element, 0.05 ms of 32,768 rows at BERT-base's width on an H200. The matmul that Triton makes of it loses twice as much to the
vendor's (docs/tuning-log.md).

All tensors are contiguous, of one dtype: float32, bfloat16 or float16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gelu import gaussian
from .launch import device_guard
from .precision import round_to
from .reduction import empty_partials, num_row_programs, sum_partials


class PassConfig(NamedTuple):
    """Rows and columns of a tile, warps per program, programs per multiprocessor."""

    block_rows: int
    block_columns: int
    num_warps: int
    programs_per_processor: int


PASS_CONFIG = PassConfig(16, 128, 4, 8)


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
    with device_guard(x):
        u = x @ weight.t()
        y = torch.empty_like(u) if keep_preactivation else u
        if y.numel() > 0:
            _gelu_pass(u, bias, None, y, None)
    return y, u if keep_preactivation else None


def linear_gelu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (dx, dweight, dbias); dbias is None without a bias. Where u is None it is computed again."""
    du, dbias = bias_gelu_backward(dy, x @ weight.t() if u is None else u, bias, x.dtype)
    return du @ weight, du.t() @ x, dbias


def bias_gelu_backward(dy: Tensor, u: Tensor, bias: Tensor | None, dbias_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The gradients of u, (rows, columns), and of bias, (columns,) in dbias_dtype, None without one; dy: that of gelu(u + bias)."""
    du = torch.empty_like(dy)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=dbias_dtype, device=bias.device)
    if dy.numel() == 0:
        return du, None if dbias is None else dbias.zero_()
    with device_guard(dy):
        partials = _gelu_pass(u, bias, dy, du, dbias)
        if dbias is not None:
            sum_partials(partials, dbias)
    return du, dbias


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
