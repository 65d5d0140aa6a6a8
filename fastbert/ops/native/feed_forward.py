"""A linear layer with bias and GELU, and the backward pass of a whole feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear import (
    linear_dweight,
    linear_dx,
    linear_dx_through_gelu,
    linear_forward,
    linear_gelu_without_gradients,
    linear_parameter_gradients,
    linear_then_gelu,
)
from .extension import DTYPES, EXTENSION, as_float32, empty, pointer, row_sum_workspace


def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep_preactivation: bool) -> tuple[Tensor, Tensor | None]:
    """See :func:`reference.linear_gelu_forward`. Where nobody needs u, oneDNN applies bias and GELU as it stores."""
    if not keep_preactivation and (y := linear_gelu_without_gradients(x, weight, bias)) is not None:
        return y, None
    if keep_preactivation and (both := linear_then_gelu(x, weight, bias)) is not None:
        return both[1], both[0]
    u = linear_forward(x, weight, None)
    y = torch.empty_like(u) if keep_preactivation else u
    bias = as_float32(bias)
    EXTENSION.bias_gelu_forward(
        u.data_ptr(), pointer(bias), y.data_ptr(), *u.shape, DTYPES[u.dtype], torch.get_num_threads()
    )  # fmt: skip
    return y, u if keep_preactivation else None


def linear_gelu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`reference.linear_gelu_backward`."""
    du, dbias = bias_gelu_backward(dy, linear_forward(x, weight, None) if u is None else u, bias, x.dtype)
    return linear_dx(du, weight), linear_dweight(du, x), dbias


def bias_gelu_backward(dy: Tensor, u: Tensor, bias: Tensor | None, dbias_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """See :func:`reference.bias_gelu_backward`."""
    du = torch.empty_like(u)
    dbias = _bias_gelu_backward(dy, u, bias, du, None)
    return du, None if bias is None else dbias.to(dbias_dtype)


def _bias_gelu_backward(dy: Tensor, u: Tensor, bias: Tensor | None, du: Tensor, y: Tensor | None) -> Tensor:
    """Writes du, which may be dy, and where y is given gelu(u + bias); returns the sums of du's columns in float32."""
    rows, columns = u.shape
    dbias, partials, bias = empty(columns), row_sum_workspace(rows, columns), as_float32(bias)
    EXTENSION.bias_gelu_backward(
        dy.data_ptr(), u.data_ptr(), pointer(bias), du.data_ptr(), pointer(y), dbias.data_ptr(), partials.data_ptr(),
        rows, columns, DTYPES[u.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dbias


def feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    out_weight: Tensor,
    needs: list[bool],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and out_weight of gelu(x weight^T + bias) out_weight^T; ``needs``: which are wanted;
    dtype: as of ``linear_dweight``, for those of the parameters.

    dy: (rows, out_features); x: (rows, in_features); u = x weight^T (rows, intermediate). What multiplies dy with out_weight, or
    one pass behind it, makes the gradient of u, and gelu(u + bias) again.
    """
    dbias = None
    through = linear_dx_through_gelu(dy, out_weight, u, bias, needs[3])
    if through is not None:
        du, gelu = through
    else:
        du, gelu = linear_dx(dy, out_weight), torch.empty_like(u) if needs[3] else None
        dbias = _bias_gelu_backward(du, u, bias, du, gelu)
    dout_weight = linear_dweight(dy, gelu, dtype) if needs[3] else None
    del through, gelu  # before the next matmuls ask for memory
    dx = linear_dx(du, weight) if needs[0] else None
    dweight, sums = linear_parameter_gradients(du, x, needs[1], needs[2] and dbias is None, dtype)
    dbias = sums if dbias is None else dbias
    return dx, dweight, dbias.to(dtype or bias.dtype) if needs[2] else None, dout_weight
