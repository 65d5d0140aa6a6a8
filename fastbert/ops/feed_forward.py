"""``feed_forward``: both matmuls of an encoder layer's feed-forward network, gelu(x W^T + b) W'^T, with one wide saved tensor.

``linear_gelu`` keeps its pre-activation and the Linear behind it gelu of that: each four times as wide as the layer. Together
they need one of the two, because the pass that makes the pre-activation's gradient knows gelu, too, and can write it again: one
more store in the backward of a CPU's native backend for a quarter of a layer's saved activations, and for the page faults that
fresh memory costs. Elsewhere it is those two operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .linear import linear, linear_forward
from .linear_gelu import linear_gelu
from .registration import check_shape, contiguous_grad, register, under_autocast


def feed_forward(x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor) -> Tensor:
    """gelu(x weight^T + bias) out_weight^T, with the exact erf-GELU and without the second Linear's bias.

    x: (rows, in_features); weight: (intermediate, in_features); bias: (intermediate,) or None; out_weight: (out_features,
    intermediate). Parameters are converted to x's dtype where they differ, all of them to autocast's where that is on.
    Returns (rows, out_features) in that dtype. Raises ValueError for a bias, RuntimeError for matrices that do not fit.
    """
    check_shape("bias", bias, (weight.shape[0],), "(intermediate,)")
    if not _saves_memory(x, weight, bias, out_weight):
        return linear(linear_gelu(x, weight, bias), out_weight, None)
    dtype = torch.get_autocast_dtype(x.device.type) if under_autocast(x) else x.dtype
    x, weight, out_weight = (t.to(dtype).contiguous() for t in (x, weight, out_weight))
    bias = None if bias is None else bias.to(dtype).contiguous()
    return torch.ops.fastbert.feed_forward(x, weight, bias, out_weight)[0]


def _saves_memory(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether there will be a backward pass, of the native backend."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    dtype = torch.get_autocast_dtype("cpu") if under_autocast(x) else x.dtype
    return backends.select("linear_gelu", "auto", "cpu", dtype) == "native" and any(
        t is not None and t.requires_grad for t in (x, *parameters)
    )


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the pre-activation without its bias."""
    native = backends.implementation("linear_gelu", "native")
    y, u = native.linear_gelu_forward(x, weight, bias, True)
    return linear_forward(y, out_weight, None), u


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], out_weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, out_weight = inputs
    _, u = output
    ctx.save_for_backward(x, weight, bias, u, out_weight)
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dy: Tensor | None, _du: Tensor | None):
    if dy is None:
        return (None,) * 4
    x, weight, bias, u, out_weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad)
    grads = torch.ops.fastbert.feed_forward_backward(contiguous_grad(dy), x, weight, bias, u, out_weight, needs)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, out_weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those that ``needs`` does not ask for come back empty."""
    grads = backends.implementation("linear_gelu", "native").feed_forward_backward(dy, x, weight, bias, u, out_weight, needs)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _fake_backward(dy, x, weight, bias, u, out_weight, needs):
    like = (x, weight, bias, out_weight)
    return tuple(torch.empty_like(t) if needed else dy.new_empty(0) for t, needed in zip(like, needs, strict=True))


register(
    "feed_forward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor out_weight) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _autograd_backward,
)
register(
    "feed_forward_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor u, Tensor out_weight, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
