"""LayerNorm and the dtype of statistics, which several ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, which is the truth that tests compare with, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def layer_norm(z: Tensor, weight: Tensor, ln_bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd of z (rows, hidden), in the dtype of its statistics."""
    mean = z.mean(-1)
    centred = z - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    return centred * rstd.unsqueeze(-1) * weight + ln_bias, mean, rstd


def layer_norm_backward(dy: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dweight, dln_bias) in the dtype of statistics."""
    dy = dy.to(statistics_dtype(dy))
    x_hat = (z - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dx_hat = dy * weight
    c1 = (dx_hat * x_hat).mean(-1, keepdim=True)
    c2 = dx_hat.mean(-1, keepdim=True)
    dz = (dx_hat - x_hat * c1 - c2) * rstd.unsqueeze(-1)
    return dz, (dy * x_hat).sum(0), dy.sum(0)
