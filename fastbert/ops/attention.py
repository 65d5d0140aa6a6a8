"""``attention``: bidirectional attention within each sequence of a packed batch, with dropout on the probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import implementation_for
from .registration import check_dropout, check_shape, contiguous_grad, register


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T * softmax_scale) v for every head of every sequence (Vaswani et al., 2017).

    qkv: (total, 3, num_heads, head_dim), float32, bfloat16, float16 or float64; ``total`` counts the tokens of all sequences,
    one after the other. cu_seqlens: (batch + 1,) int32, where sequence i holds the tokens cu_seqlens[i] to
    cu_seqlens[i + 1] - 1; it starts at 0 and ends at ``total``. max_seqlen: length of the longest one, or more; nobody
    checks either on a GPU, which would have to be waited for. softmax_scale: default
    head_dim ** -0.5. dropout_p, seed (int64, one element), stream: see ``reference.dropout_keep``.

    Returns (total, num_heads, head_dim) in qkv's dtype. Raises ValueError for shapes and dtypes that do not fit, RuntimeError
    where an explicitly named backend cannot do it.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, expected (total, 3, num_heads, head_dim)")
    check_cu_seqlens(cu_seqlens)
    check_dropout(dropout_p, seed)
    if softmax_scale is None:
        softmax_scale = qkv.shape[-1] ** -0.5
    seed = seed if dropout_p > 0.0 else None
    return torch.ops.fastbert.attention(
        qkv.contiguous(), cu_seqlens.contiguous(), max_seqlen, softmax_scale, dropout_p, seed, stream, backend
    )[0]


def _forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens.device.type == "cpu":
        check_sequences(cu_seqlens, max_seqlen, qkv.shape[0])
    module = implementation_for("attention", backend, qkv, "forward", rows=len(qkv), head_dim=qkv.shape[-1], max_seqlen=max_seqlen)
    return module.attention_forward(qkv, cu_seqlens, max_seqlen, softmax_scale, dropout_p, seed, stream)


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected int32 (batch + 1,): "
            "0 and the running sum of the sequence lengths"
        )


def check_sequences(cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
    """On a CPU reading the bounds costs nothing; a kernel that trusted wrong ones would read foreign memory."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens goes from {bounds[0]} to {bounds[-1]}, expected steps that never fall from 0 to total = {total}"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but the longest sequence has {max(lengths)} tokens")


def _fake(qkv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    total, _three, num_heads, head_dim = qkv.shape
    statistics_dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(total, num_heads, head_dim), qkv.new_empty(num_heads, total, dtype=statistics_dtype)


def _setup_context(ctx, inputs, output) -> None:
    qkv, cu_seqlens, *ctx.arguments = inputs
    ctx.arguments[3] = None
    ctx.save_for_backward(qkv, *output, cu_seqlens, inputs[5])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dout: Tensor | None, _dlse: Tensor | None):
    if dout is None:
        return (None,) * 8
    qkv, out, lse, cu_seqlens, seed = ctx.saved_tensors
    max_seqlen, softmax_scale, dropout_p, _, stream, backend = ctx.arguments
    dqkv = torch.ops.fastbert.attention_backward(
        contiguous_grad(dout), qkv, out, lse, cu_seqlens, max_seqlen, softmax_scale, dropout_p, seed, stream, backend
    )
    return (dqkv, *(None,) * 7)


def _backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    backend: str,
) -> Tensor:
    check_shape("dout", dout, tuple(out.shape), "the shape of attention's output")
    module = implementation_for("attention", backend, qkv, "backward", rows=len(qkv), head_dim=qkv.shape[-1], max_seqlen=max_seqlen)
    return module.attention_backward(dout, qkv, out, lse, cu_seqlens, max_seqlen, softmax_scale, dropout_p, seed, stream)


_DROPOUT = "float dropout_p, Tensor? seed, int stream, str backend"
register(
    "attention",
    f"(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, {_DROPOUT}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _autograd_backward,
)
register(
    "attention_backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, "
    f"{_DROPOUT}) -> Tensor",
    _backward,
    lambda dout, qkv, *_: torch.empty_like(qkv),
)
