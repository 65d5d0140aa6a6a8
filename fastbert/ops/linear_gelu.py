"""``linear_gelu``: the first half of the feed-forward network, gelu(x W^T + b), one pass after (or inside) the matmul.

With gradients the pre-activation is kept, without its bias, and in the backward one pass makes its gradient and the bias's; or
it is computed again there, which takes a third more FLOPs and saves the layer's widest saved tensor. Without gradients bias and
GELU happen as oneDNN's matmul stores its result, on a CPU that multiplies with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import implementation_for
from .registration import check_shape, contiguous_grad, register, under_autocast


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, recompute: bool = False, backend: str = "auto") -> Tensor:
    """gelu(x weight^T + bias) with the exact erf-GELU (Hendrycks and Gimpel, 2016).

    x: (rows, in_features), float32, bfloat16, float16 or float64; weight: (out_features, in_features); bias: (out_features,)
    or None; both are converted to x's dtype where they differ, and x to autocast's where that is on. recompute: keep only x for
    the backward pass, rows * out_features elements less, and repeat the matmul there.

    Returns (rows, out_features) in x's dtype. Raises ValueError for shapes that do not fit, RuntimeError where an explicitly
    named backend cannot do it.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected (rows, in_features) and (out_features, in_features)"
        )
    check_shape("bias", bias, (weight.shape[0],), "(out_features,)")
    if under_autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight, bias = weight.to(x.dtype).contiguous(), None if bias is None else bias.to(x.dtype).contiguous()
    keep = not recompute and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return torch.ops.fastbert.linear_gelu(x.contiguous(), weight, bias, keep, backend)[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep_preactivation: bool, backend: str) -> tuple[Tensor, Tensor]:
    """An operator returns tensors only: a pre-activation that is not kept comes back empty."""
    module = implementation_for("linear_gelu", backend, x, "forward")
    y, u = module.linear_gelu_forward(x, weight, bias, keep_preactivation)
    return y, x.new_empty(0) if u is None else u


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, keep_preactivation: bool, backend: str) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if keep_preactivation else x.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, keep_preactivation, ctx.backend = inputs
    _, u = output
    ctx.save_for_backward(x, weight, bias, u if keep_preactivation else None)
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dy: Tensor | None, _du: Tensor | None):
    if dy is None:
        return (None,) * 5
    x, weight, bias, u = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.fastbert.linear_gelu_backward(contiguous_grad(dy), x, weight, bias, u, ctx.backend)
    return dx, dweight, None if bias is None else dbias, None, None


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Without a bias its gradient comes back empty."""
    dx, dweight, dbias = implementation_for("linear_gelu", backend, x, "backward").linear_gelu_backward(dy, x, weight, bias, u)
    return dx, dweight, weight.new_empty(0) if dbias is None else dbias


def _fake_backward(dy, x, weight, bias, u, backend):
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(0) if bias is None else torch.empty_like(bias)


register(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor? bias, bool keep_preactivation, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _autograd_backward,
)
register(
    "linear_gelu_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? u, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
