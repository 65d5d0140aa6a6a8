"""A linear layer with bias and GELU."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .statistics import statistics_dtype


def gelu_derivative(u: Tensor) -> Tensor:
    """d/du of u * Phi(u): Phi(u) + u * phi(u)."""
    return 0.5 * (1.0 + torch.erf(u * math.sqrt(0.5))) + u * torch.exp(-0.5 * u * u) * (1.0 / math.sqrt(2.0 * math.pi))


def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep_preactivation: bool) -> tuple[Tensor, Tensor | None]:
    """y = gelu(u + bias) with u = x weight^T, and u itself where it is to be kept for the backward pass (else None).

    x: (rows, in_features), weight: (out_features, in_features), bias: (out_features,) or None; y, u: (rows, out_features).
    """
    u = x @ weight.t()
    y = F.gelu(u if bias is None else u + bias)
    return y, u if keep_preactivation else None


def linear_gelu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (dx, dweight, dbias); dbias is None without a bias. Where u was not kept (None) it is computed again."""
    du, dbias = bias_gelu_backward(dy, x @ weight.t() if u is None else u, bias, x.dtype)
    return du @ weight, du.t() @ x, dbias


def bias_gelu_backward(dy: Tensor, u: Tensor, bias: Tensor | None, dbias_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The gradients of u, (rows, columns), and of bias, (columns,) in dbias_dtype, None without one; dy: that of gelu(u + bias)."""
    preactivation = u.to(statistics_dtype(u))
    preactivation = preactivation if bias is None else preactivation + bias
    du = dy * gelu_derivative(preactivation)
    return du.to(dy.dtype), None if bias is None else du.sum(0).to(dbias_dtype)
