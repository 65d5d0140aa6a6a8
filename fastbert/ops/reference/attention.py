"""Attention within the sequences of a packed batch, of all rows or of some."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox_dropout import dropout_keep, dropout_scale
from .statistics import statistics_dtype


def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """Bidirectional attention within each sequence of a packed batch (Vaswani et al., 2017, section 3.2).

    qkv: (total, 3, num_heads, head_dim), any floating dtype; cu_seqlens: (batch + 1,) int32, from 0 to total, not
    decreasing; max_seqlen: the longest sequence. Dropout acts on the probabilities: row = the query's row in the packed
    batch, column = the key's position within its sequence, plane = the head.

    Returns out (total, num_heads, head_dim) and lse (num_heads, total), the log-sum-exp of each query's scaled scores.
    """
    rows = torch.arange(len(qkv), device=qkv.device)
    return attention_of_rows_forward(qkv[:, 0], qkv[:, 1:], rows, cu_seqlens, max_seqlen, softmax_scale, dropout_p, seed, stream)


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
    """dqkv (total, 3, num_heads, head_dim); the probabilities are recomputed from lse (Dao et al., 2022, algorithm 4)."""
    rows = torch.arange(len(qkv), device=qkv.device)
    dq, dkv = attention_of_rows_backward(
        dout, qkv[:, 0], qkv[:, 1:], rows, out, lse, cu_seqlens, max_seqlen, softmax_scale, dropout_p, seed, stream
    )
    return torch.cat([dq.unsqueeze(1), dkv], dim=1)


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
    """:func:`attention_forward` of some rows' queries, with the dropout masks that they have among all.

    q: (n, num_heads, head_dim), of the rows (n,) int64 of the packed batch, in rising order, of which one may be there twice; kv:
    (total, 2, num_heads, head_dim). Returns out (n, num_heads, head_dim) and lse (num_heads, n).
    """
    num_heads = q.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(num_heads, len(q), dtype=statistics_dtype(q))
    for start, end, first, last in _sequences_of_rows(cu_seqlens, rows):
        scores, _, _, v = _attention_scores(q[first:last], kv[start:end], softmax_scale)
        p = scores.softmax(-1)
        if dropout_p > 0.0:
            keep = attention_keep(num_heads, rows[first:last], end - start, dropout_p, seed, stream)
            p = torch.where(keep, p * dropout_scale(dropout_p), 0.0)
        out[first:last] = (p @ v).transpose(0, 1).to(out.dtype)
        lse[:, first:last] = scores.logsumexp(-1)
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
    """dq (n, num_heads, head_dim) and dkv (total, 2, num_heads, head_dim); see :func:`attention_backward`."""
    dq, dkv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, kv))
    for start, end, first, last in _sequences_of_rows(cu_seqlens, rows):
        scores, q_heads, k, v = _attention_scores(q[first:last], kv[start:end], softmax_scale)
        p = (scores - lse[:, first:last].unsqueeze(-1)).exp()
        do = dout[first:last].transpose(0, 1).to(p.dtype)
        delta = (do * out[first:last].transpose(0, 1)).sum(-1, keepdim=True)
        dp = do @ v.transpose(1, 2)
        p_dropped = p
        if dropout_p > 0.0:
            keep = attention_keep(q.shape[1], rows[first:last], end - start, dropout_p, seed, stream)
            scale = dropout_scale(dropout_p)
            p_dropped, dp = torch.where(keep, p * scale, 0.0), torch.where(keep, dp * scale, 0.0)
        ds = p * (dp - delta) * softmax_scale
        dq[first:last] = (ds @ k).transpose(0, 1).to(dq.dtype)
        dkv[start:end] = (
            torch.stack([ds.transpose(1, 2) @ q_heads, p_dropped.transpose(1, 2) @ do]).permute(2, 0, 1, 3).to(dkv.dtype)
        )
    return dq, dkv


def _sequences_of_rows(cu_seqlens: Tensor, rows: Tensor) -> list[tuple[int, int, int, int]]:
    """Of each sequence that has queries: where its rows start and end, and where its queries do, among ``rows``."""
    bounds, firsts = cu_seqlens.tolist(), torch.searchsorted(rows, cu_seqlens.long()).tolist()
    sequences = zip(bounds[:-1], bounds[1:], firsts[:-1], firsts[1:], strict=True)
    return [sequence for sequence in sequences if sequence[3] > sequence[2]]


def _attention_scores(q: Tensor, kv: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scaled scores of one sequence and its q, k and v, all with the heads first."""
    q = q.to(statistics_dtype(q)).transpose(0, 1)
    k, v = kv.to(q.dtype).permute(1, 2, 0, 3).unbind(0)
    return q @ k.transpose(1, 2) * softmax_scale, q, k, v


def attention_keep(num_heads: int, rows: Tensor, length: int, dropout_p: float, seed: Tensor, stream: int) -> Tensor:
    """(num_heads, len(rows), length), of the queries of ``rows`` of the packed batch."""
    heads = torch.arange(num_heads, device=seed.device)[:, None, None]
    keys = torch.arange(length, device=seed.device)[None, None, :]
    return dropout_keep(rows[None, :, None], keys, heads, dropout_p, seed, stream)
