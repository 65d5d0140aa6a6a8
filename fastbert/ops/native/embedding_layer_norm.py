"""Embeddings, LayerNorm and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import huge_pages
from .extension import DTYPES, EXTENSION, as_dropout, as_float32, empty, pointer, row_sum_workspace


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
    """See :func:`reference.embedding_layer_norm_forward`."""
    rows, hidden = input_ids.shape[0], word.shape[1]
    weight, ln_bias = as_float32(weight), as_float32(ln_bias)
    y, mean, rstd = word.new_empty(rows, hidden), empty(rows), empty(rows)
    EXTENSION.embedding_layer_norm_forward(
        input_ids.data_ptr(), token_type_ids.data_ptr(), position_ids.data_ptr(),
        word.data_ptr(), position.data_ptr(), token_type.data_ptr(), weight.data_ptr(), ln_bias.data_ptr(),
        y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        rows, hidden, eps, as_dropout(dropout_p, seed, stream), DTYPES[word.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, rstd


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
    """See :func:`reference.embedding_layer_norm_backward`."""
    rows, hidden = dy.shape
    dtype, weight = weight.dtype, as_float32(weight)
    dz = empty(rows, hidden) if any(needs) else None
    dweight, dln_bias = empty(hidden), empty(hidden)
    partials = row_sum_workspace(rows, 3, hidden)
    EXTENSION.embedding_layer_norm_backward(
        dy.data_ptr(), input_ids.data_ptr(), token_type_ids.data_ptr(), position_ids.data_ptr(),
        word.data_ptr(), position.data_ptr(), token_type.data_ptr(), mean.data_ptr(), rstd.data_ptr(), weight.data_ptr(),
        pointer(dz), dweight.data_ptr(), dln_bias.data_ptr(), partials.data_ptr(),
        rows, hidden, as_dropout(dropout_p, seed, stream), DTYPES[dy.dtype], torch.get_num_threads(),
    )  # fmt: skip
    tables = ((input_ids, word, padding_idx), (position_ids, position, -1), (token_type_ids, token_type, -1))
    dtables = (_table_gradient(dz, *arguments) if needed else None for arguments, needed in zip(tables, needs, strict=True))
    return *dtables, dweight.to(dtype), dln_bias.to(dtype)


def _table_gradient(dz: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    """See :func:`reference.embedding_table_gradients`."""
    num_ids, (rows, hidden) = table.shape[0], dz.shape
    gradient = huge_pages.ask_for(torch.empty_like(table))
    workspace = torch.empty(rows + num_ids + 1, dtype=torch.int64)
    order, starts = workspace[:rows], workspace[rows:]
    EXTENSION.table_gradient(
        dz.data_ptr(), ids.data_ptr(), order.data_ptr(), starts.data_ptr(), gradient.data_ptr(),
        rows, num_ids, hidden, padding_idx, DTYPES[table.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return gradient
