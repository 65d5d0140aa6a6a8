"""A linear layer of int8 weights and activations through torch's int8 matmul, for inference."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference


@functools.cache
def int8_unavailable_reasons() -> tuple[str, ...]:
    """Why int8_linear cannot run here, empty where it can: torch's int8 matmul has to be there, and exact.

    CPUs without VNNI add products in pairs of 16 bits, which saturate at the largest values.
    """
    if not hasattr(torch, "_int_mm"):
        return ("this torch does not expose an int8 matmul (torch._int_mm)",)
    largest = torch.full((32, 64), reference.INT8_LARGEST, dtype=torch.int8, device="cpu")
    expected = 64 * reference.INT8_LARGEST**2
    if not all((torch._int_mm(sign * largest, largest.t()) == sign * expected).all() for sign in (1, -1)):
        return ("torch's int8 matmul saturates on this CPU (it has no VNNI)",)
    return ()


# Rows of a block: its int32 sums stay in the cache until they are scaled.
_INT8_ROWS = 128


def int8_linear_forward(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """See :func:`reference.int8_linear_forward`."""
    if x.shape[1] == 1:  # torch's product of a single column reads what lies behind it
        return reference.int8_linear_forward(x, weight, weight_scale, bias, activation)
    rows, out_features = x.shape[0], weight.shape[0]
    y = x.new_empty(rows, out_features)
    sums = torch.empty(min(rows, _INT8_ROWS), out_features, dtype=torch.int32, device="cpu")
    bias = torch.zeros_like(weight_scale) if bias is None else bias
    for x_block, y_block in zip(x.split(_INT8_ROWS), y.split(_INT8_ROWS), strict=True):
        q, step = reference.quantize_rows(x_block)
        total = torch._int_mm(q, weight.t(), out=sums[: q.shape[0]]).float()
        u = torch.addcmul(bias, total, step[:, None] * weight_scale)
        y_block.copy_(F.gelu(u) if activation == "gelu" else u)
    return y
