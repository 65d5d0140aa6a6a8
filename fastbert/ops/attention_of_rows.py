"""``attention_of_rows``: attention for the queries of some rows of a packed batch alone, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import check_cu_seqlens, check_sequences
from .backends import implementation_for
from .registration import check_dropout, check_shape, contiguous_grad, register


def attention_of_rows(
    q: Tensor,
    kv: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    backend: str = "auto",
) -> Tensor:
    """What :func:`attention` computes for some rows, from their queries and the keys and values of all rows.

    q: (n, num_heads, head_dim); kv: (total, 2, num_heads, head_dim) of the same dtype; rows: (n,) int64, the rows of the packed
    batch that q is of, in rising order; a row may be there twice. The others as in :func:`attention`, whose dropout masks these
    rows have, too. On a CPU, where reading ``rows`` costs nothing.

    Returns (n, num_heads, head_dim) in q's dtype. Raises ValueError for shapes, dtypes and rows that do not fit, RuntimeError
    where an explicitly named backend cannot do it.
    """
    if q.dim() != 3 or kv.dim() != 4:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and kv {tuple(kv.shape)}, expected (n, num_heads, head_dim) and "
            "(total, 2, num_heads, head_dim)"
        )
    check_shape("kv", kv, (kv.shape[0], 2, *q.shape[1:]), "(total, 2, num_heads, head_dim), with q's heads")
    check_shape("rows", rows, (q.shape[0],), "a row of the packed batch for each query")
    if kv.dtype != q.dtype or rows.dtype != torch.int64:
        raise ValueError(f"q is {q.dtype}, kv {kv.dtype} and rows {rows.dtype}, expected one dtype of q and kv, and int64 rows")
    check_cu_seqlens(cu_seqlens)
    check_dropout(dropout_p, seed)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    seed = seed if dropout_p > 0.0 else None
    q, kv, rows, cu_seqlens = (x.contiguous() for x in (q, kv, rows, cu_seqlens))
    return torch.ops.fastbert.attention_of_rows(
        q, kv, rows, cu_seqlens, max_seqlen, softmax_scale, dropout_p, seed, stream, backend
    )[0]


def _forward(
    q: Tensor,
    kv: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_sequences(cu_seqlens, max_seqlen, kv.shape[0])
    _check_rows(rows, kv.shape[0])
    module = implementation_for("attention_of_rows", backend, q, "forward", head_dim=q.shape[-1])
    return module.attention_of_rows_forward(q, kv, rows, cu_seqlens, max_seqlen, softmax_scale, dropout_p, seed, stream)


def _check_rows(rows: Tensor, total: int) -> None:
    """A kernel that trusted wrong ones would leave queries out, or read what is no key of theirs."""
    if len(rows) and (rows[0] < 0 or rows[-1] >= total or (rows.diff() < 0).any()):
        raise ValueError(f"rows are {rows.tolist()[:8]}..., expected rows from 0 to total - 1 = {total - 1}, in rising order")


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    statistics_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=statistics_dtype)


def _setup_context(ctx, inputs, output) -> None:
    q, kv, rows, cu_seqlens, *ctx.arguments = inputs
    ctx.arguments[3] = None
    ctx.save_for_backward(q, kv, rows, *output, cu_seqlens, inputs[7])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dout: Tensor | None, _dlse: Tensor | None):
    if dout is None:
        return (None,) * 10
    q, kv, rows, out, lse, cu_seqlens, seed = ctx.saved_tensors
    max_seqlen, softmax_scale, dropout_p, _, stream, backend = ctx.arguments
    dq, dkv = torch.ops.fastbert.attention_of_rows_backward(
        contiguous_grad(dout), q, kv, rows, out, lse, cu_seqlens, max_seqlen, softmax_scale, dropout_p, seed, stream, backend
    )
    return dq, dkv, *(None,) * 8


def _backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    rows: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_shape("dout", dout, tuple(out.shape), "the shape of attention_of_rows' output")
    module = implementation_for("attention_of_rows", backend, q, "backward", head_dim=q.shape[-1])
    return module.attention_of_rows_backward(
        dout, q, kv, rows, out, lse, cu_seqlens, max_seqlen, softmax_scale, dropout_p, seed, stream
    )


_DROPOUT = "float dropout_p, Tensor? seed, int stream, str backend"
register(
    "attention_of_rows",
    "(Tensor q, Tensor kv, Tensor rows, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, "
    f"{_DROPOUT}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _autograd_backward,
)
register(
    "attention_of_rows_backward",
    "(Tensor dout, Tensor q, Tensor kv, Tensor rows, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, "
    f"float softmax_scale, {_DROPOUT}) -> (Tensor, Tensor)",
    _backward,
    lambda dout, q, kv, *_: (torch.empty_like(q), torch.empty_like(kv)),
)
