"""Bias, dropout, residual and LayerNorm, of one dtype or of a half-precision input and a float32 residual."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox_dropout import dropout, dropout_scale, row_keep
from .statistics import layer_norm, layer_norm_backward, statistics_dtype


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
    """z = dropout(x + bias) + residual; y = LayerNorm(z) * weight + ln_bias (Ba et al., 2016).

    x, residual: (rows, hidden); bias (the preceding Linear's, or None), weight, ln_bias: (hidden,).
    Returns y and z (rows, hidden) in x's dtype, mean and rstd (rows,).
    """
    z = x.to(statistics_dtype(x))
    if bias is not None:
        z = z + bias
    z = dropout(z, dropout_p, seed, stream) + residual
    y, mean, rstd = layer_norm(z, weight, ln_bias, eps)
    return y.to(x.dtype), z.to(x.dtype), mean, rstd


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
    dz, dweight, dln_bias = layer_norm_backward(dy, z, mean, rstd, weight)
    dx = dz
    if dropout_p > 0.0:
        dx = torch.where(row_keep(dz, dropout_p, seed, stream), dz * dropout_scale(dropout_p), 0.0)
    dbias = dx.sum(0).to(weight.dtype) if has_bias else None
    return (
        dx.to(dy.dtype) if dropout_p > 0.0 else None,
        dz.to(dy.dtype),
        dweight.to(weight.dtype),
        dln_bias.to(weight.dtype),
        dbias,
    )


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
    """:func:`add_layer_norm_forward` of x in half precision and a float32 residual.

    Returns y (rows, hidden) in x's dtype, y in float32, z in x's dtype, which only the backward pass reads, mean and rstd.
    """
    y, z, mean, rstd = add_layer_norm_forward(x.float(), bias, residual, weight, ln_bias, eps, dropout_p, seed, stream)
    return y.to(x.dtype), y, z.to(x.dtype), mean, rstd


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
    """(dx in z's dtype, dresidual in float32, dweight, dln_bias, dbias) of both results' gradients, None where there is none."""
    total = sum(gradient.float() for gradient in (dy, dy_residual) if gradient is not None)
    dx, dresidual, *others = add_layer_norm_backward(total, z.float(), mean, rstd, weight, has_bias, dropout_p, seed, stream)
    return (dresidual if dx is None else dx).to(z.dtype), dresidual, *others
