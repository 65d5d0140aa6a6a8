"""``attention`` by CUDA C++ (csrc/cuda) in bfloat16 and float16, head_dim a multiple of 8 up to 128. The same bits in every run."""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import DTYPES, aligned, current_stream, device_guard, dropout, extension, float32_like


def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.attention_forward`. max_seqlen: at least the longest sequence, or rows of out are not written."""
    total, _, num_heads, head_dim = qkv.shape
    _check_scale(softmax_scale)
    (qkv,) = aligned(qkv)
    out = torch.empty((total, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = float32_like(qkv, num_heads, total)
    with device_guard(qkv):
        extension.attention_forward(
            qkv.data_ptr(), cu_seqlens.data_ptr(), out.data_ptr(), lse.data_ptr(),
            total, cu_seqlens.numel() - 1, num_heads, head_dim, max_seqlen, softmax_scale,
            dropout(dropout_p, seed, stream), DTYPES[qkv.dtype], current_stream(qkv),
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """See :func:`reference.attention_backward`."""
    total, _, num_heads, head_dim = qkv.shape
    _check_scale(softmax_scale)
    dout, qkv, out = aligned(dout, qkv, out)
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    with device_guard(qkv):
        extension.attention_backward(
            dout.data_ptr(), qkv.data_ptr(), out.data_ptr(), lse.data_ptr(), cu_seqlens.data_ptr(), dqkv.data_ptr(),
            delta.data_ptr(), total, cu_seqlens.numel() - 1, num_heads, head_dim, max_seqlen, softmax_scale,
            dropout(dropout_p, seed, stream), DTYPES[qkv.dtype], current_stream(qkv),
        )  # fmt: skip
    return dqkv


def _check_scale(softmax_scale: float) -> None:
    """The kernels take the largest product for the largest score."""
    if softmax_scale <= 0.0:
        raise ValueError(f"backend 'cuda' takes a positive softmax_scale, got {softmax_scale}")
