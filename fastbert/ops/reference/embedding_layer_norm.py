"""Embeddings, LayerNorm and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox_dropout import dropout
from .statistics import layer_norm, layer_norm_backward, statistics_dtype


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
    y, mean, rstd = layer_norm(z, weight, ln_bias, eps)
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
    dz, dweight, dln_bias = layer_norm_backward(dy, z, mean, rstd, weight)
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
    dtype = statistics_dtype(word)
    z = word.index_select(0, input_ids).to(dtype) + token_type.index_select(0, token_type_ids)
    return z + position.index_select(0, position_ids)
