"""z = word[input_ids] + token_type[token_type_ids] + position[position_ids]; y = dropout(LayerNorm(z) * weight + ln_bias).

Fused because every part of it waits for memory: apart, three gathers, two additions, LayerNorm and dropout read and write the
hidden states fourteen times over and store a mask. Here the forward reads three table rows and writes y, 4 bytes per element in
a 16-bit dtype, as tables of positions and token types stay in the cache. z is not kept: the backward reads dy, gathers the
rows again and writes dz, which :mod:`.table_gradient` then sums into the tables.

Rows are whole in registers, as in ``add_layer_norm``. The backward keeps a fixed number of programs that walk over the rows
in strides and sum dweight and dln_bias on the way (reduction.py adds up the programs).

Positions and token types are one table to the backward, with a row for each pair of them: alone, the two token types would
put half of all rows into one sum, which nothing runs beside; of pairs there are a thousand. Their sums are added up after.

All tensors are contiguous; the tables, y and the gradients are float32, bfloat16 or float16, as are the parameters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import dropout_arguments, keep_tile
from .launch import device_guard
from .layer_norm import (
    BACKWARD_CONFIGS,
    BACKWARD_STAGES,
    FORWARD_CONFIGS,
    block_hidden,
    layer_norm_gradient,
    load_columns,
    num_backward_programs,
    row_statistics,
)
from .precision import round_to
from .reduction import empty_partials, sum_partials
from .table_gradient import table_gradient


@triton.jit
def _load_table_rows(table_ptr, ids, columns, inside, hidden: tl.constexpr):
    """The rows of a table (BLOCK_ROWS, BLOCK_HIDDEN) that int64 ``ids`` (BLOCK_ROWS,) name, as float32."""
    return tl.load(table_ptr + ids[:, None] * hidden + columns[None, :], mask=inside, other=0.0).to(tl.float32)


# debug: an id outside of its table ends the launch in an assertion, as in torch, instead of reading what lies there.
@triton.jit(do_not_specialize=["rows", "num_words", "num_positions", "num_token_types", "threshold", "stream"], debug=True)
def _forward_kernel(
    input_ids_ptr,
    token_type_ids_ptr,
    position_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    weight_ptr,
    ln_bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    rows,
    num_words,
    num_positions,
    num_token_types,
    eps,
    threshold,
    dropout_scale,
    stream,
    hidden: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_HIDDEN)
    inside_rows, inside_columns = row < rows, columns < hidden
    inside = inside_rows[:, None] & inside_columns[None, :]
    input_ids = tl.load(input_ids_ptr + row, mask=inside_rows, other=0)
    token_type_ids = tl.load(token_type_ids_ptr + row, mask=inside_rows, other=0)
    position_ids = tl.load(position_ids_ptr + row, mask=inside_rows, other=0)
    tl.device_assert((input_ids >= 0) & (input_ids < num_words), "input_ids hold a number that is no row of word")
    tl.device_assert((token_type_ids >= 0) & (token_type_ids < num_token_types), "token_type_ids hold no row of token_type")
    tl.device_assert((position_ids >= 0) & (position_ids < num_positions), "position_ids hold a number that is no row of position")

    z = _load_table_rows(word_ptr, input_ids, columns, inside, hidden)
    z += _load_table_rows(token_type_ptr, token_type_ids, columns, inside, hidden)
    z += _load_table_rows(position_ptr, position_ids, columns, inside, hidden)
    mean, rstd = row_statistics(z, inside_columns, eps, hidden)
    weight = load_columns(weight_ptr, columns, inside_columns)
    ln_bias = load_columns(ln_bias_ptr, columns, inside_columns)
    y = (z - mean) * rstd * weight + ln_bias
    if DROPOUT:
        y = tl.where(keep_tile(seed_ptr, row, 0, 0, stream, threshold, BLOCK_HIDDEN), y * dropout_scale, 0.0)
    offsets = row.to(tl.int64)[:, None] * hidden + columns[None, :]
    tl.store(y_ptr + offsets, round_to(y, y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row[:, None], mean, mask=inside_rows[:, None])
    tl.store(rstd_ptr + row[:, None], rstd, mask=inside_rows[:, None])


@triton.jit(do_not_specialize=["rows", "threshold", "stream"])
def _backward_kernel(
    dy_ptr,
    input_ids_ptr,
    token_type_ids_ptr,
    position_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    dz_ptr,
    partials_ptr,
    rows,
    threshold,
    dropout_scale,
    stream,
    hidden: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_HIDDEN)
    inside_columns = columns < hidden
    weight = load_columns(weight_ptr, columns, inside_columns)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    dln_bias = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)

    for first_row in tl.range(program * BLOCK_ROWS, rows, num_programs * BLOCK_ROWS, num_stages=BACKWARD_STAGES):
        row = first_row + tl.arange(0, BLOCK_ROWS)
        inside_rows = row < rows
        inside = inside_rows[:, None] & inside_columns[None, :]
        offsets = row.to(tl.int64)[:, None] * hidden + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        input_ids = tl.load(input_ids_ptr + row, mask=inside_rows, other=0)
        token_type_ids = tl.load(token_type_ids_ptr + row, mask=inside_rows, other=0)
        position_ids = tl.load(position_ids_ptr + row, mask=inside_rows, other=0)
        mean = tl.load(mean_ptr + row, mask=inside_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=inside_rows, other=0.0)[:, None]
        z = _load_table_rows(word_ptr, input_ids, columns, inside, hidden)
        z += _load_table_rows(token_type_ptr, token_type_ids, columns, inside, hidden)
        z += _load_table_rows(position_ptr, position_ids, columns, inside, hidden)

        if DROPOUT:
            dy = tl.where(keep_tile(seed_ptr, row, 0, 0, stream, threshold, BLOCK_HIDDEN), dy * dropout_scale, 0.0)
        x_hat = tl.where(inside_columns[None, :], (z - mean) * rstd, 0.0)
        dweight += dy * x_hat
        dln_bias += dy
        if dz_ptr is not None:
            dz = layer_norm_gradient(dy, x_hat, weight, rstd, hidden)
            tl.store(dz_ptr + offsets, round_to(dz, dz_ptr.dtype.element_ty), mask=inside)

    line = partials_ptr + program.to(tl.int64) * hidden + columns
    tl.store(line, tl.sum(dweight, 0), mask=inside_columns)
    tl.store(line + num_programs.to(tl.int64) * hidden, tl.sum(dln_bias, 0), mask=inside_columns)


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
    """See ``reference.embedding_layer_norm_forward``; hidden is at most 8192.

    input_ids, token_type_ids, position_ids: (rows,) int64; word, position, token_type: (number of ids, hidden); weight, ln_bias:
    (hidden,); seed: one int64 on the same device where dropout_p > 0.
    Returns y (rows, hidden) in word's dtype, mean and rstd (rows,) float32.
    """
    rows, hidden = input_ids.shape[0], word.shape[1]
    y = torch.empty((rows, hidden), dtype=word.dtype, device=word.device)
    mean = torch.empty(rows, dtype=torch.float32, device=word.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=word.device)
    if rows == 0:
        return y, mean, rstd
    threshold, scale = dropout_arguments(dropout_p)
    width = block_hidden(hidden)
    config = FORWARD_CONFIGS[width]
    with device_guard(word):
        _forward_kernel[(triton.cdiv(rows, config.block_rows),)](
            input_ids, token_type_ids, position_ids, word, position, token_type, weight, ln_bias, y, mean, rstd, seed,
            rows, word.shape[0], position.shape[0], token_type.shape[0], eps, threshold, scale, stream,
            hidden=hidden, DROPOUT=dropout_p > 0.0, BLOCK_ROWS=config.block_rows, BLOCK_HIDDEN=width,
            num_warps=config.num_warps, sanitize_overflow=False,
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
    """Returns (dword, dposition, dtoken_type, dweight, dln_bias), as ``reference.embedding_layer_norm_backward`` does."""
    rows, hidden = dy.shape
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) if any(needs) else None
    dweight, dln_bias = (torch.empty(hidden, dtype=weight.dtype, device=dy.device) for _ in range(2))
    width = block_hidden(hidden)
    config = BACKWARD_CONFIGS[width]
    num_programs = num_backward_programs(dy, config)
    partials = empty_partials(dy, 2, num_programs)
    if rows > 0:
        threshold, scale = dropout_arguments(dropout_p)
        with device_guard(dy):
            _backward_kernel[(num_programs,)](
                dy, input_ids, token_type_ids, position_ids, word, position, token_type, weight, mean, rstd, seed, dz, partials,
                rows, threshold, scale, stream,
                hidden=hidden, DROPOUT=dropout_p > 0.0,
                BLOCK_ROWS=config.block_rows, BLOCK_HIDDEN=width, num_warps=config.num_warps,
            )  # fmt: skip
    sum_partials(partials, dweight, dln_bias)
    needs_word, needs_position, needs_token_type = needs
    dword = table_gradient(dz, input_ids, word.shape[0], word.dtype, padding_idx) if needs_word else None
    dposition = dtoken_type = None
    if needs_position or needs_token_type:
        num_positions, num_token_types = position.shape[0], token_type.shape[0]
        pairs = table_gradient(
            dz, token_type_ids * num_positions + position_ids, num_token_types * num_positions, torch.float32
        ).view(num_token_types, num_positions, hidden)
        dposition = pairs.sum(0).to(position.dtype) if needs_position else None
        dtoken_type = pairs.sum(1).to(token_type.dtype) if needs_token_type else None
    return dword, dposition, dtoken_type, dweight, dln_bias
