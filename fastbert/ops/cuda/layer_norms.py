"""``add_layer_norm`` and ``gelu_layer_norm`` by CUDA C++ (csrc/cuda). Parameters and their gradients have the dtype of x."""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import DTYPES, aligned, check_hidden, current_stream, device_guard, dropout, extension, float32_like, pointer


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
    check_hidden(hidden)
    x, bias, residual, weight, ln_bias = aligned(x, bias, residual, weight, ln_bias)
    y, z = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = float32_like(x, rows), float32_like(x, rows)
    with device_guard(x):
        extension.add_layer_norm_forward(
            x.data_ptr(), pointer(bias), residual.data_ptr(), weight.data_ptr(), ln_bias.data_ptr(),
            y.data_ptr(), z.data_ptr(), mean.data_ptr(), rstd.data_ptr(), rows, hidden, eps,
            dropout(dropout_p, seed, stream), DTYPES[x.dtype], current_stream(x),
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
    dy, z, weight = aligned(dy, z, weight)
    dresidual = torch.empty_like(dy)
    dx = torch.empty_like(dy) if dropout_p > 0.0 else None
    dweight, dln_bias = torch.empty_like(weight), torch.empty_like(weight)
    dbias = torch.empty_like(weight) if has_bias else None
    with device_guard(dy):
        partials = float32_like(dy, extension.row_lines(rows, hidden, DTYPES[dy.dtype]), 3, hidden)
        extension.add_layer_norm_backward(
            dy.data_ptr(), z.data_ptr(), mean.data_ptr(), rstd.data_ptr(), weight.data_ptr(), pointer(dx),
            dresidual.data_ptr(), dweight.data_ptr(), dln_bias.data_ptr(), pointer(dbias), partials.data_ptr(),
            rows, hidden, dropout(dropout_p, seed, stream), DTYPES[dy.dtype], current_stream(dy),
        )  # fmt: skip
    return dx, dresidual, dweight, dln_bias, dbias


def gelu_layer_norm_forward(
    x: Tensor, bias: Tensor | None, weight: Tensor, ln_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.gelu_layer_norm_forward`."""
    rows, hidden = x.shape
    check_hidden(hidden)
    x, bias, weight, ln_bias = aligned(x, bias, weight, ln_bias)
    y, mean, rstd = torch.empty_like(x), float32_like(x, rows), float32_like(x, rows)
    with device_guard(x):
        extension.gelu_layer_norm_forward(
            x.data_ptr(), pointer(bias), weight.data_ptr(), ln_bias.data_ptr(),
            y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), rows, hidden, eps, DTYPES[x.dtype], current_stream(x),
        )  # fmt: skip
    return y, mean, rstd


def gelu_layer_norm_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :func:`reference.gelu_layer_norm_backward`."""
    rows, hidden = x.shape
    dy, x, bias, weight = aligned(dy, x, bias, weight)
    dx = torch.empty_like(dy)
    dweight, dln_bias = torch.empty_like(weight), torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    with device_guard(dy):
        partials = float32_like(dy, extension.row_lines(rows, hidden, DTYPES[dy.dtype]), 3, hidden)
        extension.gelu_layer_norm_backward(
            dy.data_ptr(), x.data_ptr(), pointer(bias), weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            dx.data_ptr(), dweight.data_ptr(), dln_bias.data_ptr(), pointer(dbias), partials.data_ptr(),
            rows, hidden, DTYPES[x.dtype], current_stream(dy),
        )  # fmt: skip
    return dx, dbias, dweight, dln_bias
