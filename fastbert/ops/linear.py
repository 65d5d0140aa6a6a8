"""``linear``: x W^T + b by the faster of the matmul libraries that torch carries.

On CPUs torch sends float32 matmuls to MKL, which on AMD reaches 40% of what oneDNN does, and adds the bias in a pass of its own
before the matmul (x W^T + b takes up to 1.5 times the time of x W^T at BERT's small widths). oneDNN's linear, which torch
carries for its compiler, adds the bias as it stores. The backward's two products stay with torch.mm: oneDNN is slower than MKL
on transposed operands. Half precision, GPUs and autocast take torch's own linear.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from .registration import contiguous_grad, register, under_autocast


@functools.cache
def onednn_unavailable_reason() -> str | None:
    """Why oneDNN's linear cannot be used, or None where it can."""
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch does not expose oneDNN's linear (mkldnn::_linear_pointwise)"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, in_features), weight (out_features, in_features), bias (out_features,) or None -> (rows, out_features)."""
    # A compiler chooses its own matmul, autocast its own dtype.
    if torch.compiler.is_compiling() or under_autocast(x) or not takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.fastbert.linear(x, weight, bias)


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear` without autograd, for use inside other operators."""
    if takes_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's linear takes these: float32 on a CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.enabled
        and onednn_unavailable_reason() is None
    )


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    dy = contiguous_grad(dy)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        dy @ weight if needs_x else None,
        dy.t() @ x if needs_weight else None,
        dy.sum(0) if needs_bias and ctx.has_bias else None,
    )


register("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear_forward, _fake, _setup_context, _backward)
