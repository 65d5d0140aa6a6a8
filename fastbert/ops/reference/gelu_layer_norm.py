"""Bias, GELU and LayerNorm: the masked-LM head's transform."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .linear_gelu import gelu_derivative
from .statistics import layer_norm, layer_norm_backward, statistics_dtype


def gelu_layer_norm_forward(
    x: Tensor, bias: Tensor | None, weight: Tensor, ln_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = LayerNorm(gelu(x + bias)) * weight + ln_bias with the exact erf-GELU (Hendrycks and Gimpel, 2016).

    x: (rows, hidden); bias (or None), weight, ln_bias: (hidden,). Returns y in x's dtype, mean and rstd (rows,).
    """
    u = x.to(statistics_dtype(x))
    y, mean, rstd = layer_norm(F.gelu(u if bias is None else u + bias), weight, ln_bias, eps)
    return y.to(x.dtype), mean, rstd


def gelu_layer_norm_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns (dx, dbias, dweight, dln_bias); dbias is None without a bias. The GELU is recomputed from x."""
    u = x.to(statistics_dtype(x))
    u = u if bias is None else u + bias
    dz, dweight, dln_bias = layer_norm_backward(dy, F.gelu(u), mean, rstd, weight)
    du = dz * gelu_derivative(u)
    dbias = None if bias is None else du.sum(0).to(bias.dtype)
    return du.to(dy.dtype), dbias, dweight.to(weight.dtype), dln_bias.to(weight.dtype)
