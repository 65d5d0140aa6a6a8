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
    return _forward(qkv, cu_seqlens, max_seqlen, softmax_scale, None, dropout_p, seed, stream)


def attention_forward_and_bits(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`attention_forward`, and the bits that dropout drew, for :func:`attention_backward`, which otherwise draws them again:
    in place of a quarter of its instructions it then reads a bit for each probability.

    (num_heads, ceil(max_seqlen / 64), total, 2) int32, in the kernels' own order; None where the kernel of this GPU, head_dim and
    max_seqlen draws again, or nothing is dropped.
    """
    total, _, num_heads, head_dim = qkv.shape
    with device_guard(qkv):
        tiles = extension.attention_drawn_tiles(head_dim, max_seqlen) if dropout_p > 0.0 else 0
    bits = torch.empty(num_heads, tiles, total, 2, dtype=torch.int32, device=qkv.device) if tiles else None
    return *_forward(qkv, cu_seqlens, max_seqlen, softmax_scale, bits, dropout_p, seed, stream), bits


def _forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    bits: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """Writes ``bits``, too."""
    total, _, num_heads, head_dim = qkv.shape
    _check_scale(softmax_scale)
    (qkv,) = aligned(qkv)
    out = torch.empty((total, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = float32_like(qkv, num_heads, total)
    with device_guard(qkv):
        extension.attention_forward(
            qkv.data_ptr(), cu_seqlens.data_ptr(), out.data_ptr(), lse.data_ptr(), *_drawn(bits),
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
    bits: Tensor | None = None,
) -> Tensor:
    """See :func:`reference.attention_backward`; bits: of :func:`attention_forward_and_bits` with the same arguments."""
    total, _, num_heads, head_dim = qkv.shape
    _check_scale(softmax_scale)
    dout, qkv, out = aligned(dout, qkv, out)
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    with device_guard(qkv):
        extension.attention_backward(
            dout.data_ptr(), qkv.data_ptr(), out.data_ptr(), lse.data_ptr(), cu_seqlens.data_ptr(), dqkv.data_ptr(),
            delta.data_ptr(), *_drawn(bits), total, cu_seqlens.numel() - 1, num_heads, head_dim, max_seqlen, softmax_scale,
            dropout(dropout_p, seed, stream), DTYPES[qkv.dtype], current_stream(qkv),
        )  # fmt: skip
    return dqkv


def _drawn(bits: Tensor | None) -> tuple[int, int]:
    """Their address, and the number of their tiles."""
    return (0, 0) if bits is None else (bits.data_ptr(), bits.shape[1])


def _check_scale(softmax_scale: float) -> None:
    """The kernels take the largest product for the largest score."""
    if softmax_scale <= 0.0:
        raise ValueError(f"backend 'cuda' takes a positive softmax_scale, got {softmax_scale}")
