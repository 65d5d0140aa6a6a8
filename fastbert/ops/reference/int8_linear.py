"""A linear layer of int8 weights and activations, for inference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

INT8_LARGEST = 127  # symmetric: -128 is not used


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights of a Linear, symmetric per output channel (Jacob et al., 2018, with zero points of 0).

    weight: (out_features, in_features), any floating dtype. Returns the weights in steps of their channel, (out_features,
    in_features) int8 from -127 to 127, and the channels' steps max|W[n, :]| / 127, (out_features,) float32; both are 0 in a
    channel of zeros.
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / INT8_LARGEST
    steps = torch.where(scale[:, None] > 0, weight / scale[:, None], 0.0)
    return steps.round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 activations, symmetric per row, from the row's own largest value (dynamic).

    x: (rows, in_features). Returns round(x * (127 / max|x|)), half to even, (rows, in_features) int8, and the rows' steps
    max|x| / 127, (rows,) float32. A row of zeros, or of values so small that 127 / max|x| is infinite (below 3.8e-37), is 0; the
    step of a row that holds inf or NaN is NaN, which makes all its results NaN.
    """
    x = x.float()
    largest = x.abs().amax(1)
    inverse = INT8_LARGEST / largest
    inverse = torch.where(inverse.isinf(), 0.0, inverse)
    step = torch.where(largest.isinf(), torch.nan, largest / INT8_LARGEST)
    return (x * inverse[:, None]).round().to(torch.int8), step  # under a NaN step any integers will do


def int8_linear_forward(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """(int8 x) (int8 weight)^T, summed exactly, times the steps of row and channel, + bias, then erf-GELU if wanted.

    x: (rows, in_features) float32 or half precision; weight, weight_scale: of :func:`quantize_weight`; bias: (out_features,)
    float32 or None; activation: "none" or "gelu". Everything after the integer sum is float32; returns (rows, out_features) in
    x's dtype.
    """
    q, step = quantize_rows(x)
    total = (q.double() @ weight.double().t()).float()  # float64 holds every sum of an int32
    y = total * (step[:, None] * weight_scale)
    if bias is not None:
        y = y + bias
    return (F.gelu(y) if activation == "gelu" else y).to(x.dtype)
