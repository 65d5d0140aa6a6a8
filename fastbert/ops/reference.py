"""Every fused operation in plain torch: the specification that all backends are tested against.

One function per direction and op, ``<op>_forward`` and ``<op>_backward``; the Triton kernels (``kernels/<op>.py``) and the
C++ ones (``native.py``) expose the same names and signatures. The forward functions are differentiable, so autograd through
them in float64 is the truth for gradients; the backward functions are the formulas that a kernel has to implement, and run
where no kernel is available.

Shapes: ``total`` is the number of real tokens of a packed batch, ``rows`` any number of rows, ``hidden`` the model width.
Statistics (mean, rstd, lse, row_max, row_sum) are float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .encoder_layer import EncoderLayerWeights, LayerNormWeights, LinearWeights

# --- dropout -------------------------------------------------------------------------------------------------------------

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
DROPOUT_LEVELS = 1 << 16
_MASK32 = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor, rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox 4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the generator of ``tl.philox``.

    ``counter``: four int64 tensors of 32-bit values, broadcastable; ``seed``: one int64, its low and high halves are the key.
    Returns four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        hi0, lo0 = _multiply_32(c0, PHILOX_MULTIPLIERS[0])
        hi1, lo1 = _multiply_32(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + PHILOX_KEY_INCREMENTS[0]) & _MASK32, (k1 + PHILOX_KEY_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply_32(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 arithmetic that never leaves 63 bits."""
    low, high = a * (multiplier & 0xFFFF), a * (multiplier >> 16)
    product_low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (product_low >> 32), product_low & _MASK32


def dropout_threshold(dropout_p: float) -> int:
    """The probability in 1/65536: an element is dropped when its 16 random bits are below this number."""
    return round(dropout_p * DROPOUT_LEVELS)


def dropout_scale(dropout_p: float) -> float:
    """1 / (1 - p) for the probability as it is applied (a multiple of 1/65536); 0 where everything is dropped."""
    kept = DROPOUT_LEVELS - dropout_threshold(dropout_p)
    return DROPOUT_LEVELS / kept if kept else 0.0


def dropout_keep(rows: Tensor, columns: Tensor, plane: Tensor | int, dropout_p: float, seed: Tensor, stream: int) -> Tensor:
    """Which elements survive dropout: bool, broadcast of ``rows``, ``columns`` and ``plane`` (int64 indices below 2**32).

    The counter is (column // 8, row, plane, stream) under the key ``seed``: one Philox call of 128 bits serves eight
    neighbouring columns with 16 bits each (column % 8 counts the 16-bit pieces from the lowest). It depends on nothing but
    these numbers, so every backend draws the same mask and the backward pass recomputes it instead of storing it. Sixteen
    bits set p to within 1/131072 at an eighth of the cost of ``tl.rand``'s one call per element.
    """
    plane = torch.as_tensor(plane, dtype=torch.int64, device=rows.device)
    stream_counter = torch.as_tensor(stream, dtype=torch.int64, device=rows.device)
    words = torch.stack(philox_4x32((columns // 8, rows, plane, stream_counter), seed.reshape(())), dim=-1)
    lane = (columns % 8).expand(words.shape[:-1])
    word = words.gather(-1, (lane // 2).unsqueeze(-1)).squeeze(-1)
    return ((word >> (16 * (lane % 2))) & 0xFFFF) >= dropout_threshold(dropout_p)


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None, stream: int) -> Tensor:
    """Dropout of ``x`` (rows, columns) with the counter-based mask of :func:`dropout_keep`, plane 0."""
    if dropout_p == 0.0:
        return x
    keep = _row_keep(x, dropout_p, seed, stream)
    return torch.where(keep, x * dropout_scale(dropout_p), 0.0)


def _row_keep(x: Tensor, dropout_p: float, seed: Tensor, stream: int) -> Tensor:
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    return dropout_keep(rows[:, None], columns[None, :], 0, dropout_p, seed, stream)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- attention -----------------------------------------------------------------------------------------------------------


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
    lse = q.new_zeros(num_heads, len(q), dtype=_statistics_dtype(q))
    for start, end, first, last in _sequences_of_rows(cu_seqlens, rows):
        scores, _, _, v = _attention_scores(q[first:last], kv[start:end], softmax_scale)
        p = scores.softmax(-1)
        if dropout_p > 0.0:
            keep = _attention_keep(num_heads, rows[first:last], end - start, dropout_p, seed, stream)
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
            keep = _attention_keep(q.shape[1], rows[first:last], end - start, dropout_p, seed, stream)
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
    q = q.to(_statistics_dtype(q)).transpose(0, 1)
    k, v = kv.to(q.dtype).permute(1, 2, 0, 3).unbind(0)
    return q @ k.transpose(1, 2) * softmax_scale, q, k, v


def _attention_keep(num_heads: int, rows: Tensor, length: int, dropout_p: float, seed: Tensor, stream: int) -> Tensor:
    """(num_heads, len(rows), length), of the queries of ``rows`` of the packed batch."""
    heads = torch.arange(num_heads, device=seed.device)[:, None, None]
    keys = torch.arange(length, device=seed.device)[None, None, :]
    return dropout_keep(rows[None, :, None], keys, heads, dropout_p, seed, stream)


# --- bias + dropout + residual + LayerNorm -------------------------------------------------------------------------------


def add_layer_norm_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = dropout(x + bias) + residual; y = LayerNorm(z) * weight + ln_bias (Ba et al., 2016).

    x, residual: (rows, hidden); bias (the preceding Linear's, or None), weight, ln_bias: (hidden,).
    Returns y and z (rows, hidden) in x's dtype, mean and rstd (rows,).
    """
    statistics_dtype = _statistics_dtype(x)
    z = x.to(statistics_dtype)
    if bias is not None:
        z = z + bias
    z = dropout(z, dropout_p, seed, stream) + residual
    y, mean, rstd = _layer_norm(z, weight, ln_bias, eps)
    return y.to(x.dtype), z.to(x.dtype), mean, rstd


def add_layer_norm_backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_bias: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """Returns (dx, dresidual, dweight, dln_bias, dbias).

    dx is None where dropout_p is 0 (it equals dresidual, which is then returned once); dbias is None without a bias.
    dx, dresidual: (rows, hidden) in dy's dtype; the others (hidden,) in weight's dtype.
    """
    dz, dweight, dln_bias = _layer_norm_backward(dy, z, mean, rstd, weight)
    dx = dz
    if dropout_p > 0.0:
        dx = torch.where(_row_keep(dz, dropout_p, seed, stream), dz * dropout_scale(dropout_p), 0.0)
    dbias = dx.sum(0).to(weight.dtype) if has_bias else None
    return (
        dx.to(dy.dtype) if dropout_p > 0.0 else None,
        dz.to(dy.dtype),
        dweight.to(weight.dtype),
        dln_bias.to(weight.dtype),
        dbias,
    )


def add_layer_norm_mixed_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`add_layer_norm_forward` of x in half precision and a float32 residual.

    Returns y (rows, hidden) in x's dtype, y in float32, z in x's dtype, which only the backward pass reads, mean and rstd.
    """
    y, z, mean, rstd = add_layer_norm_forward(x.float(), bias, residual, weight, ln_bias, eps, dropout_p, seed, stream)
    return y.to(x.dtype), y, z.to(x.dtype), mean, rstd


def add_layer_norm_mixed_backward(
    dy: Tensor | None,
    dy_residual: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_bias: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dx in z's dtype, dresidual in float32, dweight, dln_bias, dbias) of both results' gradients, None where there is none."""
    total = sum(gradient.float() for gradient in (dy, dy_residual) if gradient is not None)
    dx, dresidual, *others = add_layer_norm_backward(total, z.float(), mean, rstd, weight, has_bias, dropout_p, seed, stream)
    return (dresidual if dx is None else dx).to(z.dtype), dresidual, *others


def _layer_norm(z: Tensor, weight: Tensor, ln_bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = z.mean(-1)
    centred = z - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    return centred * rstd.unsqueeze(-1) * weight + ln_bias, mean, rstd


def _layer_norm_backward(dy: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy = dy.to(_statistics_dtype(dy))
    x_hat = (z - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dx_hat = dy * weight
    c1 = (dx_hat * x_hat).mean(-1, keepdim=True)
    c2 = dx_hat.mean(-1, keepdim=True)
    dz = (dx_hat - x_hat * c1 - c2) * rstd.unsqueeze(-1)
    return dz, (dy * x_hat).sum(0), dy.sum(0)


# --- embeddings + LayerNorm + dropout -------------------------------------------------------------------------------------


def embedding_layer_norm_forward(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = word[input_ids] + token_type[token_type_ids] + position[position_ids]; y = dropout(LayerNorm(z) * weight + ln_bias).

    The input of BERT (Devlin et al., 2019, figure 2). input_ids, token_type_ids, position_ids: (rows,) int64, inside their
    tables word, token_type, position: (table rows, hidden); weight, ln_bias: (hidden,).
    Returns y (rows, hidden) in word's dtype, mean and rstd (rows,).
    """
    z = _embedding_sum(input_ids, token_type_ids, position_ids, word, position, token_type)
    y, mean, rstd = _layer_norm(z, weight, ln_bias, eps)
    return dropout(y, dropout_p, seed, stream).to(word.dtype), mean, rstd


def embedding_layer_norm_backward(
    dy: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int,
    needs: tuple[bool, bool, bool],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Returns (dword, dposition, dtoken_type, dweight, dln_bias), each in its parameter's dtype; z is gathered again.

    padding_idx: the row of dword that stays 0 whatever its gradient is (nn.Embedding's argument), -1 for none. needs: which of
    the three tables' gradients are wanted; the others are None and cost nothing.
    """
    z = _embedding_sum(input_ids, token_type_ids, position_ids, word, position, token_type)
    dy = dropout(dy.to(z.dtype), dropout_p, seed, stream)
    dz, dweight, dln_bias = _layer_norm_backward(dy, z, mean, rstd, weight)
    dword, dposition, dtoken_type = embedding_table_gradients(
        dz, input_ids, token_type_ids, position_ids, word, position, token_type, padding_idx, needs
    )
    return dword, dposition, dtoken_type, dweight.to(weight.dtype), dln_bias.to(weight.dtype)


def embedding_table_gradients(
    dz: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    padding_idx: int,
    needs: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """Row i of a table's gradient is the sum of the rows of ``dz`` (rows, hidden), float32 or float64, whose id is i.

    torch's own scatter adds in the dtype of what it is given, and in bfloat16 a sum stops growing at 256 times its summands.
    """
    tables = ((input_ids, word, padding_idx), (position_ids, position, -1), (token_type_ids, token_type, -1))
    return [_table_gradient(dz, *arguments) if needed else None for arguments, needed in zip(tables, needs, strict=True)]


def _table_gradient(dz: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    if table.dtype == dz.dtype:
        return torch.ops.aten.embedding_dense_backward(dz, ids, table.shape[0], padding_idx, False)
    # Of a 16-bit table only the rows that occur are summed up in float32: all of them would take twice the gradient's memory.
    distinct, index = ids.unique(return_inverse=True)
    sums = torch.ops.aten.embedding_dense_backward(dz, index, distinct.numel(), -1, False)
    gradient = torch.zeros_like(table).index_copy_(0, distinct, sums.to(table.dtype))
    return gradient if padding_idx < 0 else gradient.index_fill_(0, distinct.new_tensor([padding_idx]), 0)


def _embedding_sum(
    input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor
) -> Tensor:
    dtype = _statistics_dtype(word)
    z = word.index_select(0, input_ids).to(dtype) + token_type.index_select(0, token_type_ids)
    return z + position.index_select(0, position_ids)


# --- bias + GELU + LayerNorm (the masked-LM head's transform) -------------------------------------------------------------


def gelu_layer_norm_forward(
    x: Tensor, bias: Tensor | None, weight: Tensor, ln_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = LayerNorm(gelu(x + bias)) * weight + ln_bias with the exact erf-GELU (Hendrycks and Gimpel, 2016).

    x: (rows, hidden); bias (or None), weight, ln_bias: (hidden,). Returns y in x's dtype, mean and rstd (rows,).
    """
    u = x.to(_statistics_dtype(x))
    y, mean, rstd = _layer_norm(F.gelu(u if bias is None else u + bias), weight, ln_bias, eps)
    return y.to(x.dtype), mean, rstd


def gelu_layer_norm_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns (dx, dbias, dweight, dln_bias); dbias is None without a bias. The GELU is recomputed from x."""
    u = x.to(_statistics_dtype(x))
    u = u if bias is None else u + bias
    dz, dweight, dln_bias = _layer_norm_backward(dy, F.gelu(u), mean, rstd, weight)
    du = dz * gelu_derivative(u)
    dbias = None if bias is None else du.sum(0).to(bias.dtype)
    return du.to(dy.dtype), dbias, dweight.to(weight.dtype), dln_bias.to(weight.dtype)


def gelu_derivative(u: Tensor) -> Tensor:
    """d/du of u * Phi(u): Phi(u) + u * phi(u)."""
    return 0.5 * (1.0 + torch.erf(u * math.sqrt(0.5))) + u * torch.exp(-0.5 * u * u) * (1.0 / math.sqrt(2.0 * math.pi))


# --- Linear + bias + GELU -------------------------------------------------------------------------------------------------


def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep_preactivation: bool) -> tuple[Tensor, Tensor | None]:
    """y = gelu(u + bias) with u = x weight^T, and u itself where it is to be kept for the backward pass (else None).

    x: (rows, in_features), weight: (out_features, in_features), bias: (out_features,) or None; y, u: (rows, out_features).
    """
    u = x @ weight.t()
    y = F.gelu(u if bias is None else u + bias)
    return y, u if keep_preactivation else None


def linear_gelu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (dx, dweight, dbias); dbias is None without a bias. Where u was not kept (None) it is computed again."""
    u = x @ weight.t() if u is None else u
    preactivation = u.to(_statistics_dtype(u))
    preactivation = preactivation if bias is None else preactivation + bias
    du = dy * gelu_derivative(preactivation)
    dbias = None if bias is None else du.sum(0).to(bias.dtype)
    du = du.to(dy.dtype)
    return du @ weight, du.t() @ x, dbias


# --- int8 Linear (inference) ----------------------------------------------------------------------------------------------

INT8_LARGEST = 127  # symmetric: -128 is not used


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights of a Linear, symmetric per output channel (Jacob et al., 2018, with zero points of 0).

    weight: (out_features, in_features), any floating dtype. Returns the weights in steps of their channel, (out_features,
    in_features) int8 from -127 to 127, and the channels' steps max|W[n, :]| / 127, (out_features,) float32; both are 0 in a
    channel of zeros.
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / INT8_LARGEST
    steps = torch.where(scale[:, None] > 0, weight / scale[:, None], 0.0)
    return steps.round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 activations, symmetric per row, from the row's own largest value (dynamic).

    x: (rows, in_features). Returns round(x * (127 / max|x|)), half to even, (rows, in_features) int8, and the rows' steps
    max|x| / 127, (rows,) float32. A row of zeros, or of values so small that 127 / max|x| is infinite (below 3.8e-37), is 0; the
    step of a row that holds inf or NaN is NaN, which makes all its results NaN.
    """
    x = x.float()
    largest = x.abs().amax(1)
    inverse = INT8_LARGEST / largest
    inverse = torch.where(inverse.isinf(), 0.0, inverse)
    step = torch.where(largest.isinf(), torch.nan, largest / INT8_LARGEST)
    return (x * inverse[:, None]).round().to(torch.int8), step  # under a NaN step any integers will do


def int8_linear_forward(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """(int8 x) (int8 weight)^T, summed exactly, times the steps of row and channel, + bias, then erf-GELU if wanted.

    x: (rows, in_features) float32 or half precision; weight, weight_scale: of :func:`quantize_weight`; bias: (out_features,)
    float32 or None; activation: "none" or "gelu". Everything after the integer sum is float32; returns (rows, out_features) in
    x's dtype.
    """
    q, step = quantize_rows(x)
    total = (q.double() @ weight.double().t()).float()  # float64 holds every sum of an int32
    y = total * (step[:, None] * weight_scale)
    if bias is not None:
        y = y + bias
    return (F.gelu(y) if activation == "gelu" else y).to(x.dtype)


# --- masked-LM loss ------------------------------------------------------------------------------------------------------
# The op walks over the vocabulary in blocks (ops/mlm_loss.py): one matmul per block makes logits (rows, block), and a
# backend supplies what happens to that block. Logits are never whole.


def mlm_loss_forward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_class: int,
    row_max: Tensor,
    row_sum: Tensor,
    label_logit: Tensor,
    logit_sum: Tensor | None,
) -> None:
    """Folds one block of logits into the running softmax statistics of each row (Milakov and Gimelshein, 2018), in place.

    logits: (rows, block), the scores of classes first_class .. first_class + block - 1 without their bias (block,) or None;
    labels: (rows,) int64, a label outside the block (ignored ones too) touches nothing.
    row_max (start at -inf), row_sum = sum exp(logit - row_max) (start at 0), label_logit (start at 0) and, for label
    smoothing, logit_sum = sum of logits (start at 0; None where it is not wanted): (rows,) float32 (float64 for float64).
    """
    scores = logits.to(row_max.dtype)
    if bias is not None:
        scores = scores + bias
    new_max = torch.maximum(row_max, scores.amax(-1))
    row_sum.mul_((row_max - new_max).exp()).add_((scores - new_max.unsqueeze(-1)).exp().sum(-1))
    row_max.copy_(new_max)
    inside = (labels >= first_class) & (labels < first_class + logits.shape[-1])
    column = torch.where(inside, labels - first_class, 0)
    label_logit.copy_(torch.where(inside, scores.gather(-1, column.unsqueeze(-1)).squeeze(-1), label_logit))
    if logit_sum is not None:
        logit_sum.add_(scores.sum(-1))


def mlm_loss_backward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_class: int,
    num_classes: int,
    row_max: Tensor,
    row_sum: Tensor,
    dloss: Tensor,
    label_smoothing: float,
    dbias: Tensor | None,
) -> None:
    """Overwrites a block of logits with its gradient: dloss * (softmax - (1 - s) * onehot(label) - s / num_classes).

    row_max, row_sum: (rows,), the final statistics of the forward pass; softmax = exp(logit - row_max) / row_sum, which keeps
    the digits that exp(logit - lse) loses to the rounding of a large lse.
    dloss: (rows,), 0 on ignored rows, whose gradient is exactly 0 whatever their logits are.
    dbias: (block,), overwritten with the column sums of the gradient, or None.
    """
    scores = logits.to(row_max.dtype)
    if bias is not None:
        scores = scores + bias
    grad = (scores - row_max.unsqueeze(-1)).exp() / row_sum.unsqueeze(-1) - label_smoothing / num_classes
    columns = torch.arange(first_class, first_class + logits.shape[-1], device=logits.device)
    grad = grad - (1.0 - label_smoothing) * (labels.unsqueeze(-1) == columns)
    grad = torch.where(dloss.unsqueeze(-1) == 0.0, 0.0, grad * dloss.unsqueeze(-1))
    logits.copy_(grad)
    if dbias is not None:
        dbias.copy_(grad.sum(0))


# --- encoder layer -------------------------------------------------------------------------------------------------------


def encoder_layer_forward(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights: EncoderLayerWeights) -> Tensor:
    """The ops above, one after the other: attention, its output's linear layer and LayerNorm, the feed-forward network.

    x: (total, hidden), cu_seqlens (batch + 1,) int32; weights: see :class:`fastbert.ops.encoder_layer.EncoderLayerWeights`. Returns
    (total, hidden).
    """

    def linear(rows: Tensor, layer: LinearWeights) -> Tensor:
        if layer.scale is not None:
            return int8_linear_forward(rows, layer.weight, layer.scale, layer.bias, "none")
        return F.linear(rows.to(layer.weight.dtype), layer.weight, layer.bias)

    def add_norm(rows: Tensor, residual: Tensor, norm: LayerNormWeights) -> Tensor:
        return add_layer_norm_forward(rows.to(residual.dtype), None, residual, norm.weight, norm.bias, norm.eps)[0]

    qkv = linear(x, weights.qkv).view(-1, 3, weights.num_heads, weights.head_dim)
    context = attention_forward(qkv, cu_seqlens, max_seqlen, weights.softmax_scale)[0].flatten(1)
    h = add_norm(linear(context, weights.attention_output), x, weights.attention_norm)
    return add_norm(linear(F.gelu(linear(h, weights.intermediate)), weights.output), h, weights.output_norm)
