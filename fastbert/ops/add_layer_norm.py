"""``add_layer_norm``: the end of both halves of an encoder layer, LayerNorm(dropout(x + bias) + residual), in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .backends import implementation_for
from .registration import check_dropout, check_shape, contiguous_grad, register


def add_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm(dropout(x + bias) + residual) * weight + ln_bias (Ba et al., 2016), with all gradients in one pass.

    x, residual: (rows, hidden); bias: that of the Linear that made x, (hidden,) or None; weight, ln_bias: (hidden,). All are
    computed in x's dtype (float32, bfloat16, float16 or float64; others are converted), statistics in float32. dropout_p,
    seed (int64, one element), stream: see ``reference.dropout_keep``.

    Returns (rows, hidden) in x's dtype. Raises ValueError for shapes that do not fit, RuntimeError where an explicitly named
    backend cannot do it.
    """
    _check(x, bias, residual, weight, ln_bias, dropout_p, seed)
    seed = seed if dropout_p > 0.0 else None
    bias, residual, weight, ln_bias = (None if t is None else t.to(x.dtype).contiguous() for t in (bias, residual, weight, ln_bias))
    return torch.ops.fastbert.add_layer_norm(
        x.contiguous(), bias, residual, weight, ln_bias, eps, dropout_p, seed, stream, backend
    )[0]


def add_layer_norm_mixed(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`add_layer_norm` as autocast has it: x in half precision, from a matmul, beside a float32 residual.

    x: (rows, hidden) bfloat16 or float16; residual: (rows, hidden), float32 as the parameters (others are converted).

    Returns y (rows, hidden) in x's dtype, for the next matmul, and the same in float32, for the next residual. One pass by
    Triton's kernels; elsewhere, and where torch.compile fuses such passes, "auto" converts x to float32 for
    :func:`add_layer_norm`, and its result to x's dtype. Raises as that one does.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x has dtype {x.dtype}, expected torch.bfloat16 or torch.float16 beside a float32 residual")
    dropout = {"dropout_p": dropout_p, "seed": seed, "stream": stream}
    if backend == "auto" and not has_mixed_kernel(x):
        y = add_layer_norm(x.float(), bias, residual, weight, ln_bias, eps, **dropout)
        return y.to(x.dtype), y
    _check(x, bias, residual, weight, ln_bias, dropout_p, seed)
    bias, residual, weight, ln_bias = (None if t is None else t.float().contiguous() for t in (bias, residual, weight, ln_bias))
    return torch.ops.fastbert.add_layer_norm_mixed(
        x.contiguous(), bias, residual, weight, ln_bias, eps, dropout_p, seed if dropout_p > 0.0 else None, stream, backend
    )[:2]


def has_mixed_kernel(x: Tensor) -> bool:
    """Whether "auto" has one pass for rows in half precision beside a float32 residual."""
    if torch.compiler.is_compiling():
        return False
    return backends.select("add_layer_norm_mixed", "auto", x.device.type, x.dtype) != "reference"


def _check(
    x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, ln_bias: Tensor, dropout_p: float, seed: Tensor | None
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (rows, hidden)")
    check_shape("residual", residual, tuple(x.shape), "the shape of x")
    for name, parameter in (("bias", bias), ("weight", weight), ("ln_bias", ln_bias)):
        check_shape(name, parameter, (x.shape[1],), "(hidden,)")
    check_dropout(dropout_p, seed)


def _forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = implementation_for("add_layer_norm", backend, x, "forward", rows=len(x), hidden=x.shape[1])
    return module.add_layer_norm_forward(x, bias, residual, weight, ln_bias, eps, dropout_p, seed, stream)


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.empty_like(x), torch.empty_like(x), statistics, torch.empty_like(statistics)


def _setup_context(ctx, inputs, output) -> None:
    _, bias, _, weight, _, _, ctx.dropout_p, seed, ctx.stream, ctx.backend = inputs
    _, z, mean, rstd = output
    ctx.has_bias = bias is not None
    ctx.save_for_backward(z, mean, rstd, weight, seed)
    ctx.mark_non_differentiable(z, mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dy: Tensor | None, *_unused: Tensor | None):
    if dy is None:
        return (None,) * 10
    z, mean, rstd, weight, seed = ctx.saved_tensors
    dx, dresidual, dweight, dln_bias, dbias = torch.ops.fastbert.add_layer_norm_backward(
        contiguous_grad(dy), z, mean, rstd, weight, ctx.has_bias, ctx.dropout_p, seed, ctx.stream, ctx.backend
    )
    dx = dx if ctx.dropout_p > 0.0 else dresidual
    return dx, dbias if ctx.has_bias else None, dresidual, dweight, dln_bias, *(None,) * 5


def _backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_bias: bool,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An operator returns tensors only: what a backend leaves out (None) comes back empty."""
    module = implementation_for("add_layer_norm", backend, z, "backward", rows=len(z), hidden=z.shape[1])
    dx, dresidual, dweight, dln_bias, dbias = module.add_layer_norm_backward(
        dy, z, mean, rstd, weight, has_bias, dropout_p, seed, stream
    )
    dx = dy.new_empty(0) if dx is None else dx
    return dx, dresidual, dweight, dln_bias, weight.new_empty(0) if dbias is None else dbias


def _fake_backward(dy, z, mean, rstd, weight, has_bias, dropout_p, *_):
    dx = torch.empty_like(dy) if dropout_p > 0.0 else dy.new_empty(0)
    dbias = torch.empty_like(weight) if has_bias else weight.new_empty(0)
    return dx, torch.empty_like(dy), torch.empty_like(weight), torch.empty_like(weight), dbias


_DROPOUT = "float dropout_p, Tensor? seed, int stream, str backend"
register(
    "add_layer_norm",
    f"(Tensor x, Tensor? bias, Tensor residual, Tensor weight, Tensor ln_bias, float eps, {_DROPOUT})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _autograd_backward,
)
register(
    "add_layer_norm_backward",
    f"(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor weight, bool has_bias, {_DROPOUT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


# --- with a float32 residual ---------------------------------------------------------------------------------------------


def _mixed_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = implementation_for("add_layer_norm_mixed", backend, x, "forward")
    return module.add_layer_norm_mixed_forward(x, bias, residual, weight, ln_bias, eps, dropout_p, seed, stream)


def _mixed_fake(x: Tensor, bias: Tensor | None, residual: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    statistics = residual.new_empty(x.shape[0])
    return torch.empty_like(x), torch.empty_like(residual), torch.empty_like(x), statistics, torch.empty_like(statistics)


def _mixed_setup_context(ctx, inputs, output) -> None:
    _, bias, _, weight, _, _, ctx.dropout_p, seed, ctx.stream, ctx.backend = inputs
    _, _, z, mean, rstd = output
    ctx.has_bias = bias is not None
    ctx.save_for_backward(z, mean, rstd, weight, seed)
    ctx.mark_non_differentiable(z, mean, rstd)
    ctx.set_materialize_grads(False)


def _mixed_autograd_backward(ctx, dy: Tensor | None, dy_residual: Tensor | None, *_unused: Tensor | None):
    if dy is None and dy_residual is None:
        return (None,) * 10
    z, mean, rstd, weight, seed = ctx.saved_tensors
    dy, dy_residual = (None if gradient is None else contiguous_grad(gradient) for gradient in (dy, dy_residual))
    dx, dresidual, dweight, dln_bias, dbias = torch.ops.fastbert.add_layer_norm_mixed_backward(
        dy, dy_residual, z, mean, rstd, weight, ctx.has_bias, ctx.dropout_p, seed, ctx.stream, ctx.backend
    )
    return dx, dbias if ctx.has_bias else None, dresidual, dweight, dln_bias, *(None,) * 5


def _mixed_backward(
    dy: Tensor | None,
    dy_residual: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_bias: bool,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Without a bias its gradient comes back empty."""
    module = implementation_for("add_layer_norm_mixed", backend, z, "backward")
    *gradients, dbias = module.add_layer_norm_mixed_backward(
        dy, dy_residual, z, mean, rstd, weight, has_bias, dropout_p, seed, stream
    )
    return *gradients, weight.new_empty(0) if dbias is None else dbias


def _mixed_fake_backward(dy, dy_residual, z, mean, rstd, weight, has_bias, *_):
    dbias = torch.empty_like(weight) if has_bias else weight.new_empty(0)
    return torch.empty_like(z), torch.empty_like(z, dtype=torch.float32), torch.empty_like(weight), torch.empty_like(weight), dbias


register(
    "add_layer_norm_mixed",
    f"(Tensor x, Tensor? bias, Tensor residual, Tensor weight, Tensor ln_bias, float eps, {_DROPOUT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mixed_forward,
    _mixed_fake,
    _mixed_setup_context,
    _mixed_autograd_backward,
)
register(
    "add_layer_norm_mixed_backward",
    "(Tensor? dy, Tensor? dy_residual, Tensor z, Tensor mean, Tensor rstd, Tensor weight, bool has_bias,"
    f" {_DROPOUT}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mixed_backward,
    _mixed_fake_backward,
)
