"""Attention, of all rows or of some."""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import DTYPES, EXTENSION, as_dropout, empty


def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.attention_forward`."""
    total, _, num_heads, head_dim = qkv.shape
    out = qkv.new_empty(total, num_heads, head_dim)
    lse = empty(num_heads, total)
    EXTENSION.attention_forward(
        qkv.data_ptr(), cu_seqlens.data_ptr(), out.data_ptr(), lse.data_ptr(),
        total, cu_seqlens.numel() - 1, num_heads, head_dim,
        softmax_scale, as_dropout(dropout_p, seed, stream), DTYPES[qkv.dtype], torch.get_num_threads(),
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
    dqkv = torch.empty_like(qkv)
    EXTENSION.attention_backward(
        dout.data_ptr(), qkv.data_ptr(), out.data_ptr(), lse.data_ptr(), cu_seqlens.data_ptr(), dqkv.data_ptr(),
        total, cu_seqlens.numel() - 1, num_heads, head_dim,
        softmax_scale, as_dropout(dropout_p, seed, stream), DTYPES[qkv.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dqkv


def attention_of_rows_forward(
    q: Tensor,
    kv: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.attention_of_rows_forward`."""
    out, lse = torch.empty_like(q), empty(q.shape[1], q.shape[0])
    EXTENSION.attention_of_rows_forward(
        q.data_ptr(), kv.data_ptr(), rows.data_ptr(), cu_seqlens.data_ptr(), out.data_ptr(), lse.data_ptr(),
        len(q), len(kv), cu_seqlens.numel() - 1, *q.shape[1:],
        softmax_scale, as_dropout(dropout_p, seed, stream), DTYPES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def attention_of_rows_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    rows: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.attention_of_rows_backward`."""
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    EXTENSION.attention_of_rows_backward(
        dout.data_ptr(), q.data_ptr(), kv.data_ptr(), rows.data_ptr(), out.data_ptr(), lse.data_ptr(), cu_seqlens.data_ptr(),
        dq.data_ptr(), dkv.data_ptr(), len(q), len(kv), cu_seqlens.numel() - 1, *q.shape[1:],
        softmax_scale, as_dropout(dropout_p, seed, stream), DTYPES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dq, dkv
