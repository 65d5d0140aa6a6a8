"""What ends with a LayerNorm: bias, dropout and residual, or bias and GELU."""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import DTYPES, EXTENSION, as_dropout, as_float32, empty, pointer, row_sum_workspace


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
    """See :func:`reference.add_layer_norm_forward`."""
    rows, hidden = x.shape
    bias, weight, ln_bias = as_float32(bias), as_float32(weight), as_float32(ln_bias)
    y, z = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = empty(rows), empty(rows)
    EXTENSION.add_layer_norm_forward(
        x.data_ptr(), pointer(bias), residual.data_ptr(), weight.data_ptr(), ln_bias.data_ptr(),
        y.data_ptr(), z.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        rows, hidden, eps, as_dropout(dropout_p, seed, stream), DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y, z, mean, rstd


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
    """See :func:`reference.add_layer_norm_backward`."""
    rows, hidden = dy.shape
    dtype, weight = weight.dtype, as_float32(weight)
    dresidual = torch.empty_like(dy)
    dx = torch.empty_like(dy) if dropout_p > 0.0 else None
    dweight, dln_bias = empty(hidden), empty(hidden)
    dbias = empty(hidden) if has_bias else None
    partials = row_sum_workspace(rows, 3, hidden)
    EXTENSION.add_layer_norm_backward(
        dy.data_ptr(), z.data_ptr(), mean.data_ptr(), rstd.data_ptr(), weight.data_ptr(),
        pointer(dx), dresidual.data_ptr(), dweight.data_ptr(), dln_bias.data_ptr(), pointer(dbias), partials.data_ptr(),
        rows, hidden, as_dropout(dropout_p, seed, stream), DTYPES[dy.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, dresidual, dweight.to(dtype), dln_bias.to(dtype), None if dbias is None else dbias.to(dtype)


def gelu_layer_norm_forward(
    x: Tensor, bias: Tensor | None, weight: Tensor, ln_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.gelu_layer_norm_forward`."""
    rows, hidden = x.shape
    bias, weight, ln_bias = as_float32(bias), as_float32(weight), as_float32(ln_bias)
    y, mean, rstd = torch.empty_like(x), empty(rows), empty(rows)
    EXTENSION.gelu_layer_norm_forward(
        x.data_ptr(), pointer(bias), weight.data_ptr(), ln_bias.data_ptr(),
        y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        rows, hidden, eps, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, rstd


def gelu_layer_norm_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :func:`reference.gelu_layer_norm_backward`."""
    rows, hidden = dy.shape
    dtype, bias_dtype = weight.dtype, None if bias is None else bias.dtype
    bias, weight = as_float32(bias), as_float32(weight)
    dx = torch.empty_like(dy)
    dweight, dln_bias = empty(hidden), empty(hidden)
    dbias = None if bias is None else empty(hidden)
    partials = row_sum_workspace(rows, 3, hidden)
    EXTENSION.gelu_layer_norm_backward(
        dy.data_ptr(), x.data_ptr(), pointer(bias), weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        dx.data_ptr(), dweight.data_ptr(), dln_bias.data_ptr(), pointer(dbias), partials.data_ptr(),
        rows, hidden, DTYPES[dy.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, None if dbias is None else dbias.to(bias_dtype), dweight.to(dtype), dln_bias.to(dtype)
