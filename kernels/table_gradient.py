"""The gradient of a table that rows were gathered from: row i is the sum of the rows of dz whose id is i.

Ids are sorted (stably, by torch), and each program then writes some columns of one row of the table, summing in float32 over
the run of its id, rows in order: no atomics, the same input gives the same bits. Every row is written once, absent ids with
zeros, so nothing is set to zero first, and a 16-bit table gets its gradient without a float32 copy.

Why not torch's aten::embedding_dense_backward: on CUDA it sorts too, but newer versions (pytorch#170589) add with atomics where
a table has few rows that repeat often, as those of positions and token types do, unless torch.use_deterministic_algorithms is
on, and for up to 3,072 ids all versions add batches of rows to a sum that is kept in the table's 16 bits. Why not a matmul with
a one-hot matrix: the user's tf32 setting would round the gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard
from .precision import round_to

# Most ids have a run of a few rows; [MASK], [CLS] and [SEP] have long ones, whose tiles must fill a program.
BLOCK_ROWS, BLOCK_COLUMNS, NUM_WARPS = 16, 256, 4


@triton.jit(do_not_specialize=["padding_idx"])
def _sum_runs_kernel(
    dz_ptr, order_ptr, starts_ptr, out_ptr, padding_idx, hidden: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    table_row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside_columns = columns < hidden
    first, end = tl.load(starts_ptr + table_row), tl.load(starts_ptr + table_row + 1)
    if table_row == padding_idx:
        end = first
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for place in tl.range(first, end, BLOCK_ROWS):
        places = place + tl.arange(0, BLOCK_ROWS)
        rows = tl.load(order_ptr + places, mask=places < end, other=0)
        inside = (places < end)[:, None] & inside_columns[None, :]
        total += tl.load(dz_ptr + rows[:, None] * hidden + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    line = out_ptr + table_row.to(tl.int64) * hidden + columns
    tl.store(line, round_to(tl.sum(total, 0), out_ptr.dtype.element_ty), mask=inside_columns)


def table_gradient(dz: Tensor, ids: Tensor, num_ids: int, dtype: torch.dtype, padding_idx: int = -1) -> Tensor:
    """(num_ids, hidden) in ``dtype``: the sums of the rows of dz (rows, hidden), contiguous, that share an id.

    ids: (rows,) int64, each from 0 to num_ids - 1; padding_idx: the row that is 0 whatever dz says, -1 for none.
    """
    hidden = dz.shape[1]
    sorted_ids, order = ids.sort(stable=True)
    starts = torch.searchsorted(sorted_ids, torch.arange(num_ids + 1, device=ids.device))
    out = torch.empty((num_ids, hidden), dtype=dtype, device=dz.device)
    block_columns = min(BLOCK_COLUMNS, triton.next_power_of_2(hidden))
    with device_guard(dz):
        _sum_runs_kernel[(num_ids, triton.cdiv(hidden, block_columns))](
            dz, order, starts, out, padding_idx,
            hidden=hidden, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=block_columns, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out
