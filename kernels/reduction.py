"""The second stage of a column sum over rows: partial sums of many programs -> parameter gradients.

A kernel that also computes parameter gradients lets each of its programs sum over its own rows into one line of a float32
buffer (gradients, programs, columns); this kernel then adds the lines in a fixed order. No atomics: the same input gives the
same bits. The buffer is a few MB whatever the number of rows is, so the second stage costs a few microseconds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard, num_processors
from .precision import round_to

BLOCK_PROGRAMS, BLOCK_COLUMNS, NUM_WARPS = 64, 32, 4


@triton.jit(do_not_specialize=["num_programs", "columns"])
def _sum_partials_kernel(
    partials_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    num_programs,
    columns,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    gradient = tl.program_id(1)
    offsets = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = offsets < columns
    lines_ptr = partials_ptr + gradient.to(tl.int64) * num_programs * columns
    total = tl.zeros((BLOCK_PROGRAMS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, num_programs, BLOCK_PROGRAMS):
        programs = first + tl.arange(0, BLOCK_PROGRAMS)
        mask = (programs < num_programs)[:, None] & inside[None, :]
        total += tl.load(lines_ptr + programs.to(tl.int64)[:, None] * columns + offsets[None, :], mask=mask, other=0.0)
    column_sum = tl.sum(total, 0)
    if gradient == 0:
        tl.store(out0_ptr + offsets, round_to(column_sum, out0_ptr.dtype.element_ty), mask=inside)
    if out1_ptr is not None:
        if gradient == 1:
            tl.store(out1_ptr + offsets, round_to(column_sum, out1_ptr.dtype.element_ty), mask=inside)
    if out2_ptr is not None:
        if gradient == 2:
            tl.store(out2_ptr + offsets, round_to(column_sum, out2_ptr.dtype.element_ty), mask=inside)


def num_row_programs(x: Tensor, block_rows: int, column_programs: int, programs_per_processor: int) -> int:
    """Programs along the rows of ``x`` (rows, columns), beside those along its columns: enough to fill the GPU, one tile each at
    the least."""
    wanted_programs = num_processors(x) * programs_per_processor
    return min(triton.cdiv(x.shape[0], block_rows), triton.cdiv(wanted_programs, column_programs))


def empty_partials(x: Tensor, num_gradients: int, num_programs: int) -> Tensor:
    """The buffer for :func:`sum_partials`: (num_gradients, num_programs, columns of x) float32, not initialised."""
    return torch.empty((num_gradients, num_programs, x.shape[1]), dtype=torch.float32, device=x.device)


def sum_partials(partials: Tensor, *outputs: Tensor) -> None:
    """Writes the sums over programs of ``partials`` (gradients, programs, columns), float32 and contiguous.

    outputs: one (columns,) per gradient, at most three, contiguous and of any floating dtype; overwritten.
    """
    num_gradients, num_programs, columns = partials.shape
    grid = (triton.cdiv(columns, BLOCK_COLUMNS), num_gradients)
    out0, out1, out2 = (*outputs, None, None)[:3]
    with device_guard(partials):
        _sum_partials_kernel[grid](
            partials, out0, out1, out2, num_programs, columns, BLOCK_PROGRAMS, BLOCK_COLUMNS, num_warps=NUM_WARPS
        )
