"""z = dropout(x + bias) + residual; y = LayerNorm(z) * weight + ln_bias: the end of both halves of an encoder layer.

Fused because every part of it waits for memory: apart, bias, dropout, addition and LayerNorm read and write the hidden
states nine times over and store a mask. Here the forward reads x and residual and writes y and z, 8 bytes per element in a
16-bit dtype; the backward reads dy and z and writes dz and, with dropout, dx: 8 bytes, 6 without dropout, with all parameter
gradients. Some 20 FLOPs per element (12 integer operations more for a mask) stay below the time of the bytes.

Rows are whole in registers, so the statistics are exact two-pass ones. The backward keeps a fixed number of programs that
walk over the rows in strides and sum the parameter gradients on the way (reduction.py adds up the programs): bitwise
repeatable on one kind of GPU.

``add_layer_norm_mixed`` is the same for autocast: x in half precision, the residual in float32, and y in both, for the matmul and
for the residual behind it. 14 bytes per element in either direction, and none of the passes that convert one to the other or add
the two gradients of y (36 bytes).

All tensors are contiguous; x, residual and the gradients are float32, bfloat16 or float16, as are the parameters, whose
dtype may differ (autocast).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import dropout_arguments, keep_tile
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


@triton.jit
def _load_gradient(dy_ptr, dy_residual_ptr, offsets, inside):
    """The sum of those that there are, float32."""
    if dy_ptr is not None:
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if dy_residual_ptr is not None:
            dy += tl.load(dy_residual_ptr + offsets, mask=inside, other=0.0)
    else:
        dy = tl.load(dy_residual_ptr + offsets, mask=inside, other=0.0)
    return dy


@triton.jit(do_not_specialize=["rows", "threshold", "stream"])
def _forward_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    ln_bias_ptr,
    y_ptr,
    y_residual_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    rows,
    eps,
    threshold,
    dropout_scale,
    stream,
    hidden: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_HIDDEN)
    inside_rows, inside_columns = row < rows, columns < hidden
    inside = inside_rows[:, None] & inside_columns[None, :]
    offsets = row.to(tl.int64)[:, None] * hidden + columns[None, :]

    z = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += load_columns(bias_ptr, columns, inside_columns)
    if DROPOUT:
        z = tl.where(keep_tile(seed_ptr, row, 0, 0, stream, threshold, BLOCK_HIDDEN), z * dropout_scale, 0.0)
    z += residual
    tl.store(z_ptr + offsets, round_to(z, z_ptr.dtype.element_ty), mask=inside)

    mean, rstd = row_statistics(z, inside_columns, eps, hidden)
    weight = load_columns(weight_ptr, columns, inside_columns)
    ln_bias = load_columns(ln_bias_ptr, columns, inside_columns)
    y = (z - mean) * rstd * weight + ln_bias
    tl.store(y_ptr + offsets, round_to(y, y_ptr.dtype.element_ty), mask=inside)
    if y_residual_ptr is not None:
        tl.store(y_residual_ptr + offsets, y, mask=inside)
    tl.store(mean_ptr + row[:, None], mean, mask=inside_rows[:, None])
    tl.store(rstd_ptr + row[:, None], rstd, mask=inside_rows[:, None])


@triton.jit(do_not_specialize=["rows", "threshold", "stream"])
def _backward_kernel(
    dy_ptr,
    dy_residual_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    seed_ptr,
    dx_ptr,
    dz_ptr,
    partials_ptr,
    rows,
    threshold,
    dropout_scale,
    stream,
    hidden: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
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
        dy = _load_gradient(dy_ptr, dy_residual_ptr, offsets, inside)
        z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=inside_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=inside_rows, other=0.0)[:, None]

        x_hat = tl.where(inside_columns[None, :], (z - mean) * rstd, 0.0)
        dz = layer_norm_gradient(dy, x_hat, weight, rstd, hidden)
        dweight += dy * x_hat
        dln_bias += dy
        tl.store(dz_ptr + offsets, round_to(dz, dz_ptr.dtype.element_ty), mask=inside)
        dx = dz
        if DROPOUT:
            dx = tl.where(keep_tile(seed_ptr, row, 0, 0, stream, threshold, BLOCK_HIDDEN), dz * dropout_scale, 0.0)
        if dx_ptr is not None:
            tl.store(dx_ptr + offsets, round_to(dx, dx_ptr.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            dbias += dx

    line = partials_ptr + program.to(tl.int64) * hidden + columns
    gradient_stride = num_programs.to(tl.int64) * hidden
    tl.store(line, tl.sum(dweight, 0), mask=inside_columns)
    tl.store(line + gradient_stride, tl.sum(dln_bias, 0), mask=inside_columns)
    if HAS_BIAS:
        tl.store(line + 2 * gradient_stride, tl.sum(dbias, 0), mask=inside_columns)


def add_layer_norm_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = dropout(x + bias) + residual; y = LayerNorm(z) * weight + ln_bias.

    x, residual: (rows, hidden), hidden at most 8192; bias (the preceding Linear's, or None), weight, ln_bias: (hidden,);
    seed: one int64 on x's device where dropout_p > 0.
    Returns y and z (rows, hidden) in x's dtype, mean and rstd (rows,) float32.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, *_forward(x, bias, residual, weight, ln_bias, y, None, eps, dropout_p, seed, stream)


def add_layer_norm_mixed_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`add_layer_norm_forward` of x in half precision and a float32 residual: y, y in float32, z, mean and rstd."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y_residual = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return y, y_residual, *_forward(x, bias, residual, weight, ln_bias, y, y_residual, eps, dropout_p, seed, stream)


def _forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    y: Tensor,
    y_residual: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes y and y_residual; returns z, mean and rstd."""
    rows, hidden = x.shape
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return z, mean, rstd
    threshold, scale = dropout_arguments(dropout_p)
    width = block_hidden(hidden)
    config = FORWARD_CONFIGS[width]
    with device_guard(x):
        _forward_kernel[(triton.cdiv(rows, config.block_rows),)](
            x, bias, residual, weight, ln_bias, y, y_residual, z, mean, rstd, seed, rows, eps, threshold, scale, stream,
            hidden=hidden, DROPOUT=dropout_p > 0.0, BLOCK_ROWS=config.block_rows, BLOCK_HIDDEN=width,
            num_warps=config.num_warps,
        )  # fmt: skip
    return z, mean, rstd


def add_layer_norm_backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_bias: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """Returns (dx, dresidual, dweight, dln_bias, dbias).

    dx is None where dropout_p is 0 (it equals dresidual, which is then returned once); dbias is None without a bias.
    dx, dresidual: (rows, hidden) in dy's dtype; the others (hidden,) in weight's dtype.
    """
    dresidual = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) if dropout_p > 0.0 else None
    return dx, dresidual, *_backward(dy, None, z, mean, rstd, weight, dx, dresidual, has_bias, dropout_p, seed, stream)


def add_layer_norm_mixed_backward(
    dy: Tensor | None,
    dy_residual: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_bias: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`add_layer_norm_backward` of both results' gradients, of which one may be None; dx in z's dtype, dresidual float32."""
    dx = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dresidual = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    gradients = _backward(dy, dy_residual, z, mean, rstd, weight, dx, dresidual, has_bias, dropout_p, seed, stream)
    return dx, dresidual, *gradients


def _backward(
    dy: Tensor | None,
    dy_residual: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dresidual: Tensor,
    has_bias: bool,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Writes dx and dresidual; returns dweight, dln_bias and dbias."""
    rows, hidden = z.shape
    gradients = [torch.empty(hidden, dtype=weight.dtype, device=z.device) for _ in range(3 if has_bias else 2)]
    width = block_hidden(hidden)
    config = BACKWARD_CONFIGS[width]
    num_programs = num_backward_programs(z, config)
    partials = empty_partials(z, len(gradients), num_programs)
    if rows > 0:
        threshold, scale = dropout_arguments(dropout_p)
        with device_guard(z):
            _backward_kernel[(num_programs,)](
                dy, dy_residual, z, mean, rstd, weight, seed, dx, dresidual, partials, rows, threshold, scale, stream,
                hidden=hidden, HAS_BIAS=has_bias, DROPOUT=dropout_p > 0.0,
                BLOCK_ROWS=config.block_rows, BLOCK_HIDDEN=width, num_warps=config.num_warps,
            )  # fmt: skip
    sum_partials(partials, *gradients)
    return (*gradients, None)[:3]
