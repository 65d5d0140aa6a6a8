"""``embedding_layer_norm`` by CUDA C++ (csrc/cuda), and the gradients of its three tables."""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import DTYPES, aligned, check_hidden, current_stream, device_guard, dropout, extension, float32_like, pointer


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
    check_hidden(hidden)
    word, position, token_type, weight, ln_bias = aligned(word, position, token_type, weight, ln_bias)
    y = torch.empty((rows, hidden), dtype=word.dtype, device=word.device)
    mean, rstd = float32_like(word, rows), float32_like(word, rows)
    with device_guard(word):
        extension.embedding_layer_norm_forward(
            input_ids.data_ptr(), token_type_ids.data_ptr(), position_ids.data_ptr(),
            word.data_ptr(), position.data_ptr(), token_type.data_ptr(), weight.data_ptr(), ln_bias.data_ptr(),
            y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            rows, hidden, word.shape[0], position.shape[0], token_type.shape[0],
            eps, dropout(dropout_p, seed, stream), DTYPES[word.dtype], current_stream(word),
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
    """See :func:`reference.embedding_layer_norm_backward`.

    Positions and token types are one table here, with a row for each pair of them: one sort and one pass over dz serve both.
    """
    rows, hidden = dy.shape
    dy, word, position, token_type, weight = aligned(dy, word, position, token_type, weight)
    dz = torch.empty_like(dy) if any(needs) else None
    dweight, dln_bias = torch.empty_like(weight), torch.empty_like(weight)
    with device_guard(dy):
        partials = float32_like(dy, extension.row_lines(rows, hidden, DTYPES[dy.dtype]), 2, hidden)
        extension.embedding_layer_norm_backward(
            dy.data_ptr(), input_ids.data_ptr(), token_type_ids.data_ptr(), position_ids.data_ptr(),
            word.data_ptr(), position.data_ptr(), token_type.data_ptr(), mean.data_ptr(), rstd.data_ptr(), weight.data_ptr(),
            pointer(dz), dweight.data_ptr(), dln_bias.data_ptr(), partials.data_ptr(),
            rows, hidden, dropout(dropout_p, seed, stream), DTYPES[dy.dtype], current_stream(dy),
        )  # fmt: skip
    needs_word, needs_position, needs_token_type = needs
    dword = _table_gradient(dz, input_ids, word.shape[0], word.dtype, padding_idx) if needs_word else None
    dposition = dtoken_type = None
    if needs_position or needs_token_type:
        num_positions, num_token_types = position.shape[0], token_type.shape[0]
        pair_ids = token_type_ids * num_positions + position_ids
        pairs = _table_gradient(dz, pair_ids, num_token_types * num_positions, torch.float32, -1)
        pairs = pairs.view(num_token_types, num_positions, hidden)
        dposition = pairs.sum(0).to(position.dtype) if needs_position else None
        dtoken_type = pairs.sum(1).to(token_type.dtype) if needs_token_type else None
    return dword, dposition, dtoken_type, dweight, dln_bias


def _table_gradient(dz: Tensor, ids: Tensor, num_ids: int, dtype: torch.dtype, padding_idx: int) -> Tensor:
    """(num_ids, hidden) in ``dtype``: the sums of the rows of dz that share an id, 0 for ids that do not occur and padding_idx."""
    rows, hidden = dz.shape
    # A radix sort passes over its keys once per byte of theirs.
    key_dtype = torch.int16 if num_ids <= torch.iinfo(torch.int16).max else torch.int32
    sorted_ids, order = ids.to(key_dtype).sort(stable=True)
    starts = torch.searchsorted(sorted_ids, torch.arange(num_ids + 1, dtype=key_dtype, device=ids.device))
    out = torch.empty((num_ids, hidden), dtype=dtype, device=dz.device)
    pieces = float32_like(dz, extension.table_gradient_pieces(rows), hidden)
    with device_guard(dz):
        extension.table_gradient(
            dz.data_ptr(), ids.data_ptr(), order.data_ptr(), starts.data_ptr(), out.data_ptr(), pieces.data_ptr(),
            rows, num_ids, hidden, padding_idx, DTYPES[dz.dtype], DTYPES[dtype], current_stream(dz),
        )  # fmt: skip
    return out
