"""``gelu_layer_norm``: the masked-LM head's transform after its Linear, LayerNorm(gelu(x + bias)), in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import implementation_for
from .registration import check_shape, contiguous_grad, register


def gelu_layer_norm(
    x: Tensor, bias: Tensor | None, weight: Tensor, ln_bias: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm(gelu(x + bias)) * weight + ln_bias, with the exact erf-GELU (Hendrycks and Gimpel, 2016).

    x: (rows, hidden), float32, bfloat16, float16 or float64; bias: that of the Linear that made x, (hidden,) or None; weight,
    ln_bias: (hidden,); all are computed in x's dtype (others are converted), statistics in float32.

    Returns (rows, hidden) in x's dtype. Raises ValueError for shapes that do not fit, RuntimeError where an explicitly named
    backend cannot do it.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (rows, hidden)")
    for name, parameter in (("bias", bias), ("weight", weight), ("ln_bias", ln_bias)):
        check_shape(name, parameter, (x.shape[1],), "(hidden,)")
    bias, weight, ln_bias = (None if t is None else t.to(x.dtype).contiguous() for t in (bias, weight, ln_bias))
    return torch.ops.fastbert.gelu_layer_norm(x.contiguous(), bias, weight, ln_bias, eps, backend)[0]


def _forward(
    x: Tensor, bias: Tensor | None, weight: Tensor, ln_bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    module = implementation_for("gelu_layer_norm", backend, x, "forward", rows=len(x), hidden=x.shape[1])
    return module.gelu_layer_norm_forward(x, bias, weight, ln_bias, eps)


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _setup_context(ctx, inputs, output) -> None:
    x, bias, weight, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, bias, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dy: Tensor | None, *_unused: Tensor | None):
    if dy is None:
        return (None,) * 6
    x, bias, weight, mean, rstd = ctx.saved_tensors
    dx, dbias, dweight, dln_bias = torch.ops.fastbert.gelu_layer_norm_backward(
        contiguous_grad(dy), x, bias, weight, mean, rstd, ctx.backend
    )
    return dx, None if bias is None else dbias, dweight, dln_bias, None, None


def _backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operator returns tensors only: without a bias its gradient comes back empty."""
    module = implementation_for("gelu_layer_norm", backend, x, "backward", rows=len(x), hidden=x.shape[1])
    dx, dbias, dweight, dln_bias = module.gelu_layer_norm_backward(dy, x, bias, weight, mean, rstd)
    return dx, weight.new_empty(0) if dbias is None else dbias, dweight, dln_bias


def _fake_backward(dy, x, bias, weight, *_):
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(dy), dbias, torch.empty_like(weight), torch.empty_like(weight)


register(
    "gelu_layer_norm",
    "(Tensor x, Tensor? bias, Tensor weight, Tensor ln_bias, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _autograd_backward,
)
register(
    "gelu_layer_norm_backward",
    "(Tensor dy, Tensor x, Tensor? bias, Tensor weight, Tensor mean, Tensor rstd, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
