"""The product of two matrices and what rides on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .extension import DTYPES, EXTENSION, as_float32, empty, pointer


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """a b + bias, summed in float32, the same bits on any number of threads.

    a: (rows, depth), b: (depth, columns), both float32 or both bfloat16 where the instruction set :func:`packs` it, as they lie
    where their rows or their columns are contiguous; bias: (columns,); out: (rows, columns) with contiguous rows, which is
    returned, or None for a new tensor of ``dtype``. Either is of the operands' dtype (None) or float32. Nothing may be empty.
    Raises RuntimeError, as torch does, for shapes that do not fit.
    """
    out = _result(a, b, dtype) if out is None else out
    return _matmul(a, b, bias, out, EXTENSION.MatmulEnd.product)


def matmul_gelu(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(u, gelu(u + bias)) of u = a b in float32: see :func:`matmul`."""
    u, y = _result(a, b), _result(a, b)
    return _matmul(a, b, bias, u, EXTENSION.MatmulEnd.gelu, y=y), y


def matmul_gelu_gradient(a: Tensor, b: Tensor, u: Tensor, bias: Tensor | None, gelu_wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Where a b is the gradient of gelu(u + bias), in float32: that of u, and where wanted gelu(u + bias). See :func:`matmul`."""
    du, y = torch.empty_like(u), torch.empty_like(u) if gelu_wanted else None
    return _matmul(a, b, bias, du, EXTENSION.MatmulEnd.gelu_gradient, u=u, y=y), y


def matmul_and_row_sums(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """a b in ``dtype`` and the sums of a's rows, (rows,) in float32. See :func:`matmul`."""
    a = a if a.stride(0) == 1 else a.t().contiguous().t()
    out, sums = _result(a, b, dtype), empty(a.shape[0])
    return _matmul(a, b, None, out, EXTENSION.MatmulEnd.product, row_sums=sums), sums


def _result(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def _matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out: Tensor,
    end: Any,
    *,
    u: Tensor | None = None,
    y: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> Tensor:
    """``out``; u and y lie as it does."""
    (rows, depth), columns = a.shape, b.shape[1]
    if b.shape[0] != depth:
        raise RuntimeError(f"matrices of shapes ({rows}, {depth}) and {tuple(b.shape)} cannot be multiplied")
    if bias is not None and bias.shape != (columns,):
        raise RuntimeError(f"a bias of shape {tuple(bias.shape)} cannot be added to ({rows}, {columns}), expected ({columns},)")
    a, b = (t if 1 in t.stride() else t.contiguous() for t in (a, b))
    if a.dtype == torch.bfloat16:  # elements that follow each other along the depth are read in pairs
        if depth % 2 and (a.stride(1) == 1 or b.stride(0) == 1):
            a = F.pad(a.t(), (0, 0, 0, 1)).t() if a.stride(0) == 1 else F.pad(a, (0, 1))  # as it lies: row_sums need that
            b, depth = F.pad(b, (0, 0, 0, 1)), depth + 1
        if b.stride(0) == 1 and b.stride(1) % 2:
            b = b.contiguous()
    bias = as_float32(None if bias is None else bias.contiguous())
    packed_b = torch.empty(EXTENSION.matmul_workspace_bytes(depth, columns, DTYPES[a.dtype]), dtype=torch.uint8, device="cpu")
    EXTENSION.matmul(
        a.data_ptr(), b.data_ptr(), pointer(bias), out.data_ptr(), pointer(u), pointer(y), pointer(row_sums),
        packed_b.data_ptr(), rows, depth, columns, *a.stride(), *b.stride(), out.stride(0), end, DTYPES[a.dtype],
        DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out
