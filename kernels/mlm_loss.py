"""What happens to one block of the masked-LM head's logits between its two matmuls, forward and backward.

The op walks over the vocabulary in blocks, so that the logits are never whole; a matmul makes the block, and these kernels
pass over it once. The forward reads it (2 bytes per logit in a 16-bit dtype, one exponential and 4 FLOPs) and folds it into
each row's running maximum and sum (Milakov and Gimelshein, 2018); the backward reads it and writes the gradient in its place
(4 bytes, one exponential and 5 FLOPs), summing the bias's gradient on the way. Apart, in torch, cast, bias, maximum,
exponential, sums and label would pass over it ten times.

logits: float32, bfloat16 or float16, the last dimension contiguous, any row stride; statistics float32. The number of classes in
a block follows the number of labelled rows, another one in every step: the kernels are compiled for none in particular.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard
from .precision import round_to
from .reduction import empty_partials, num_row_programs, sum_partials


class TileConfig(NamedTuple):
    """Rows and classes per tile, warps per program."""

    block_rows: int
    block_classes: int
    num_warps: int


# Forward: one row per program, which loops over the classes. Backward: a tile that moves down the rows.
FORWARD_CONFIG = TileConfig(1, 4096, 8)
BACKWARD_CONFIG = TileConfig(4, 1024, 8)
BACKWARD_PROGRAMS_PER_PROCESSOR = 4


@triton.jit(do_not_specialize=["first_class"])
def _forward_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    row_max_ptr,
    row_sum_ptr,
    label_logit_ptr,
    logit_sum_ptr,
    row_stride,
    first_class,
    num_classes,
    BLOCK_CLASSES: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    row_max = tl.load(row_max_ptr + row)
    row_sum = tl.load(row_sum_ptr + row)
    logit_sum = 0.0
    for first in range(0, num_classes, BLOCK_CLASSES):
        columns = first + tl.arange(0, BLOCK_CLASSES)
        inside = columns < num_classes
        scores = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            scores += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if logit_sum_ptr is not None:
            logit_sum += tl.sum(scores, 0)
        scores = tl.where(inside, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # all classes so far may be ruled out
        row_sum = row_sum * tl.exp(row_max - base) + tl.sum(tl.exp(scores - base), 0)
        row_max = new_max
    tl.store(row_max_ptr + row, row_max)
    tl.store(row_sum_ptr + row, row_sum)
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + row, tl.load(logit_sum_ptr + row) + logit_sum)

    label = tl.load(labels_ptr + row) - first_class
    if (label >= 0) & (label < num_classes):
        label_logit = tl.load(row_ptr + label).to(tl.float32)
        if bias_ptr is not None:
            label_logit += tl.load(bias_ptr + label).to(tl.float32)
        tl.store(label_logit_ptr + row, label_logit)


@triton.jit(do_not_specialize=["rows", "first_class"])
def _backward_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    row_max_ptr,
    row_sum_ptr,
    dloss_ptr,
    partials_ptr,
    row_stride,
    rows,
    first_class,
    label_smoothing,
    smoothing_share,
    num_classes,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    program, num_programs = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    inside_columns = columns < num_classes
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), tl.float32)

    for first_row in range(program * BLOCK_ROWS, rows, num_programs * BLOCK_ROWS):
        row = first_row + tl.arange(0, BLOCK_ROWS)
        inside_rows = row < rows
        inside = inside_rows[:, None] & inside_columns[None, :]
        tile_ptr = logits_ptr + row.to(tl.int64)[:, None] * row_stride + columns[None, :]
        label = tl.load(labels_ptr + row, mask=inside_rows, other=-1) - first_class
        row_max = tl.load(row_max_ptr + row, mask=inside_rows, other=0.0)[:, None]
        normalizer = 1.0 / tl.load(row_sum_ptr + row, mask=inside_rows, other=1.0)[:, None]
        dloss = tl.load(dloss_ptr + row, mask=inside_rows, other=0.0)[:, None]

        scores = tl.load(tile_ptr, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            scores += bias
        grad = tl.exp(scores - row_max) * normalizer - smoothing_share
        grad -= tl.where(columns[None, :] == label[:, None], 1.0 - label_smoothing, 0.0)
        grad = tl.where(dloss == 0.0, 0.0, grad * dloss)
        tl.store(tile_ptr, round_to(grad, logits_ptr.dtype.element_ty), mask=inside)
        if partials_ptr is not None:
            dbias += grad

    if partials_ptr is not None:
        line_ptr = partials_ptr + program.to(tl.int64) * num_classes + columns
        tl.store(line_ptr, tl.sum(dbias, 0), mask=inside_columns)


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
    """Folds one block of logits into the running softmax statistics of each row, in place.

    logits: (rows, block), the scores of classes first_class .. first_class + block - 1 without their bias (block,) or None;
    labels: (rows,) int64, a label outside the block (ignored ones too) touches nothing.
    row_max (start at -inf), row_sum = sum exp(logit - row_max) (start at 0), label_logit (start at 0) and, for label
    smoothing, logit_sum = sum of logits (start at 0; None where it is not wanted): (rows,) float32.
    """
    rows, num_classes = logits.shape
    if rows == 0:
        return
    with device_guard(logits):
        _forward_kernel[(rows,)](
            logits, bias, labels, row_max, row_sum, label_logit, logit_sum, logits.stride(0), first_class,
            num_classes, BLOCK_CLASSES=FORWARD_CONFIG.block_classes, num_warps=FORWARD_CONFIG.num_warps,
        )  # fmt: skip


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

    row_max, row_sum: (rows,), the final statistics of the forward pass; softmax = exp(logit - row_max) / row_sum.
    dloss: (rows,), 0 on ignored rows, whose gradient is exactly 0 whatever their logits are.
    dbias: (block,), overwritten with the column sums of the gradient (those of the float32 values), or None.
    """
    rows, block = logits.shape
    config = BACKWARD_CONFIG
    column_programs = triton.cdiv(block, config.block_classes)
    row_programs = num_row_programs(logits, config.block_rows, column_programs, BACKWARD_PROGRAMS_PER_PROCESSOR)
    partials = None if dbias is None else empty_partials(logits, 1, row_programs)
    if rows > 0:
        with device_guard(logits):
            _backward_kernel[(column_programs, row_programs)](
                logits, bias, labels, row_max, row_sum, dloss, partials, logits.stride(0), rows, first_class,
                label_smoothing, label_smoothing / num_classes, block,
                BLOCK_ROWS=config.block_rows, BLOCK_CLASSES=config.block_classes,
                num_warps=config.num_warps,
            )  # fmt: skip
    if dbias is not None:
        sum_partials(partials, dbias)
