"""y = LayerNorm(gelu(x + bias)) * weight + ln_bias with the exact erf-GELU: the transform of the masked-LM head.

Fused because GELU and LayerNorm wait for memory: apart they read and write the rows four times in the forward and keep two
intermediates for the backward. Here the forward reads x and writes y (4 bytes per element in a 16-bit dtype) and keeps
nothing but x and two numbers per row; the backward reads dy and x and writes dx (6 bytes), recomputing the GELU: some 40
FLOPs per element forward and 70 backward, erf and exp included, below the time of the bytes.

The structure is that of add_layer_norm.py: whole rows in registers, parameter gradients in two stages without atomics.
All tensors are contiguous, float32, bfloat16 or float16; the parameters' dtype may differ from x's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gelu import gaussian
from .launch import device_guard
from .layer_norm import (
    BACKWARD_CONFIGS,
    BACKWARD_STAGES,
    FORWARD_CONFIGS,
    block_hidden,
    layer_norm_gradient,
    load_columns,
    num_backward_programs,
    row_statistics,
)
from .precision import round_to
from .reduction import empty_partials, sum_partials


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    bias_ptr,
    weight_ptr,
    ln_bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    eps,
    hidden: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_HIDDEN)
    inside_rows, inside_columns = row < rows, columns < hidden
    inside = inside_rows[:, None] & inside_columns[None, :]
    offsets = row.to(tl.int64)[:, None] * hidden + columns[None, :]

    u = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        u += load_columns(bias_ptr, columns, inside_columns)
    cdf, _ = gaussian(u, y_ptr.dtype.element_ty)
    z = u * cdf
    mean, rstd = row_statistics(z, inside_columns, eps, hidden)
    weight = load_columns(weight_ptr, columns, inside_columns)
    ln_bias = load_columns(ln_bias_ptr, columns, inside_columns)
    y = (z - mean) * rstd * weight + ln_bias
    tl.store(y_ptr + offsets, round_to(y, y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row[:, None], mean, mask=inside_rows[:, None])
    tl.store(rstd_ptr + row[:, None], rstd, mask=inside_rows[:, None])


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    rows,
    hidden: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_HIDDEN)
    inside_columns = columns < hidden
    weight = load_columns(weight_ptr, columns, inside_columns)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    dln_bias = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)

    for first_row in tl.range(program * BLOCK_ROWS, rows, num_programs * BLOCK_ROWS, num_stages=BACKWARD_STAGES):
        row = first_row + tl.arange(0, BLOCK_ROWS)
        inside_rows = row < rows
        inside = inside_rows[:, None] & inside_columns[None, :]
        offsets = row.to(tl.int64)[:, None] * hidden + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            u += load_columns(bias_ptr, columns, inside_columns)
        mean = tl.load(mean_ptr + row, mask=inside_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=inside_rows, other=0.0)[:, None]

        cdf, density = gaussian(u, dx_ptr.dtype.element_ty)
        x_hat = tl.where(inside_columns[None, :], (u * cdf - mean) * rstd, 0.0)
        dz = layer_norm_gradient(dy, x_hat, weight, rstd, hidden)
        dweight += dy * x_hat
        dln_bias += dy
        dx = dz * (cdf + u * density)
        tl.store(dx_ptr + offsets, round_to(dx, dx_ptr.dtype.element_ty), mask=inside)
        if bias_ptr is not None:
            dbias += dx

    line = partials_ptr + program.to(tl.int64) * hidden + columns
    gradient_stride = num_programs.to(tl.int64) * hidden
    tl.store(line, tl.sum(dweight, 0), mask=inside_columns)
    tl.store(line + gradient_stride, tl.sum(dln_bias, 0), mask=inside_columns)
    if bias_ptr is not None:
        tl.store(line + 2 * gradient_stride, tl.sum(dbias, 0), mask=inside_columns)


def gelu_layer_norm_forward(
    x: Tensor, bias: Tensor | None, weight: Tensor, ln_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = LayerNorm(gelu(x + bias)) * weight + ln_bias.

    x: (rows, hidden), hidden at most 8192; bias (or None), weight, ln_bias: (hidden,).
    Returns y (rows, hidden) in x's dtype, mean and rstd (rows,) float32.
    """
    rows, hidden = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return y, mean, rstd
    width = block_hidden(hidden)
    config = FORWARD_CONFIGS[width]
    with device_guard(x):
        _forward_kernel[(triton.cdiv(rows, config.block_rows),)](
            x, bias, weight, ln_bias, y, mean, rstd, rows, eps,
            hidden=hidden, BLOCK_ROWS=config.block_rows, BLOCK_HIDDEN=width, num_warps=config.num_warps,
        )  # fmt: skip
    return y, mean, rstd


def gelu_layer_norm_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns (dx, dbias, dweight, dln_bias).

    dx: (rows, hidden) in dy's dtype; dbias: (hidden,) in bias's dtype, None without a bias; dweight, dln_bias: (hidden,)
    in weight's dtype.
    """
    rows, hidden = dy.shape
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    dweight = torch.empty(hidden, dtype=weight.dtype, device=dy.device)
    dln_bias = torch.empty(hidden, dtype=weight.dtype, device=dy.device)
    dbias = None if bias is None else torch.empty(hidden, dtype=bias.dtype, device=dy.device)
    gradients = [dweight, dln_bias] if dbias is None else [dweight, dln_bias, dbias]
    width = block_hidden(hidden)
    config = BACKWARD_CONFIGS[width]
    num_programs = num_backward_programs(dy, config)
    partials = empty_partials(dy, len(gradients), num_programs)
    if rows > 0:
        with device_guard(dy):
            _backward_kernel[(num_programs,)](
                dy, x, bias, weight, mean, rstd, dx, partials, rows,
                hidden=hidden, BLOCK_ROWS=config.block_rows, BLOCK_HIDDEN=width, num_warps=config.num_warps,
            )  # fmt: skip
    sum_partials(partials, *gradients)
    return dx, dbias, dweight, dln_bias
