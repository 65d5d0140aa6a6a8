"""``int8_linear``: x W^T + b on int8 weights and activations, with the GELU in the same pass where it is wanted. Inference only.

Weights have a step per output channel, found once (:func:`quantize_weight`); activations one per row, found in each call: nothing
needs calibration, and a row's result does not depend on the rows beside it. Integer sums are exact, everything after them is
float32; VNNI instructions multiply four pairs of int8 where float32 has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import implementation_for
from .reference import INT8_LARGEST, quantize_weight
from .registration import check_shape, register, under_autocast

__all__ = ["ACTIVATIONS", "int8_linear", "quantize_weight"]

ACTIVATIONS = ("none", "gelu")
MAX_IN_FEATURES = (2**31 - 1) // INT8_LARGEST**2  # of sums that an int32 holds


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """activation(x W^T + bias) of a Linear whose weight is ``weight * weight_scale[:, None]``, with x rounded to int8 row by row.

    x: (rows, in_features) float32, bfloat16 or float16, converted to autocast's dtype where that is on; weight: (out_features,
    in_features) int8 and weight_scale: (out_features,) float32, of :func:`quantize_weight`; bias: (out_features,) float32 or None;
    activation: "none" or "gelu" (the exact erf-GELU).

    Returns (rows, out_features) in x's dtype. A row of x that holds inf or NaN gives a row of NaN. Raises ValueError for what does
    not fit, RuntimeError where a gradient would be needed or an explicitly named backend cannot do it.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected (rows, in_features) and (out_features, in_features)"
        )
    if not 0 < x.shape[1] <= MAX_IN_FEATURES:
        raise ValueError(f"in_features is {x.shape[1]}, expected 1 to {MAX_IN_FEATURES} (sums are int32)")
    for name, tensor, dtype in (
        ("weight", weight, torch.int8),
        ("weight_scale", weight_scale, torch.float32),
        ("bias", bias, torch.float32),
    ):
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    check_shape("weight_scale", weight_scale, (weight.shape[0],), "(out_features,)")
    check_shape("bias", bias, (weight.shape[0],), "(out_features,)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {ACTIVATIONS}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight_scale, bias)):
        raise RuntimeError(
            "int8_linear has no derivative, and its input asks for one: call the model under torch.no_grad(), "
            "and train before fastbert.quantize(model)"
        )
    if under_autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    tensors = (t if t is None else t.contiguous() for t in (x, weight, weight_scale, bias))
    return torch.ops.fastbert.int8_linear(*tensors, activation, backend)


def _forward(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, backend: str) -> Tensor:
    module = implementation_for("int8_linear", backend, x, "forward")
    return module.int8_linear_forward(x, weight, weight_scale, bias, activation)


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


register(
    "int8_linear",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str activation, str backend) -> Tensor",
    _forward,
    _fake,
)
