"""The CUDA C++ kernels (csrc/cuda) under the names and signatures of ``reference.py``: tensors become pointers here.

Inputs are contiguous CUDA tensors of float32, bfloat16 or float16 with a hidden size that is a multiple of 8, at most 4,096.
Work is queued on torch's current stream of the tensors' device. Statistics and sums are float32 and the same in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..build_report import why_not_built
from . import reference

_HIDDEN_MULTIPLE = 8


def _import_extension():
    """The extension module and None, or None and the reason why there is none."""
    try:
        from fastbert import _cuda
    except ImportError as error:
        return None, why_not_built("_cuda") or f"fastbert._cuda was built but does not load: {error}"
    return _cuda, None


_cuda, _import_error = _import_extension()
if _cuda is not None:
    _DTYPES = {
        torch.float32: _cuda.DType.float32,
        torch.bfloat16: _cuda.DType.bfloat16,
        torch.float16: _cuda.DType.float16,
    }


def unavailable_reason() -> str | None:
    """Why these kernels cannot be used in this installation, or None where they can."""
    if _import_error is None and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _import_error


def _check_hidden(hidden: int) -> None:
    if hidden % _HIDDEN_MULTIPLE or hidden > _cuda.MAX_HIDDEN:
        raise RuntimeError(
            f"backend 'cuda' takes rows of a multiple of {_HIDDEN_MULTIPLE} elements up to {_cuda.MAX_HIDDEN}, not {hidden}"
        )


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float32(tensor: Tensor | None) -> Tensor | None:
    """Parameters and their gradients are float32 in the kernels; the tensor must stay alive until the kernel is queued."""
    return None if tensor is None else tensor.float()


def _dropout(dropout_p: float, seed: Tensor | None, stream: int):
    if dropout_p == 0.0:
        return _cuda.Dropout(0, 1.0, 0, 0)
    return _cuda.Dropout(reference.dropout_threshold(dropout_p), reference.dropout_scale(dropout_p), seed.data_ptr(), stream)


def _float32_like(tensor: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=tensor.device)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


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
    """See :func:`reference.add_layer_norm_forward`."""
    rows, hidden = x.shape
    _check_hidden(hidden)
    y, z = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = _float32_like(x, rows), _float32_like(x, rows)
    bias, weight, ln_bias = _float32(bias), _float32(weight), _float32(ln_bias)
    with torch.cuda.device(x.device):
        _cuda.add_layer_norm_forward(
            x.data_ptr(), _pointer(bias), residual.data_ptr(), weight.data_ptr(), ln_bias.data_ptr(),
            y.data_ptr(), z.data_ptr(), mean.data_ptr(), rstd.data_ptr(), rows, hidden, eps,
            _dropout(dropout_p, seed, stream), _DTYPES[x.dtype], _stream(x),
        )  # fmt: skip
    return y, z, mean, rstd


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
    """See :func:`reference.add_layer_norm_backward`."""
    rows, hidden = dy.shape
    dresidual = torch.empty_like(dy)
    dx = torch.empty_like(dy) if dropout_p > 0.0 else None
    dweight, dln_bias = _float32_like(dy, hidden), _float32_like(dy, hidden)
    dbias = _float32_like(dy, hidden) if has_bias else None
    partials = _float32_like(dy, _cuda.row_groups(rows, hidden), 3, hidden)
    weight32 = weight.float()
    with torch.cuda.device(dy.device):
        _cuda.add_layer_norm_backward(
            dy.data_ptr(), z.data_ptr(), mean.data_ptr(), rstd.data_ptr(), weight32.data_ptr(), _pointer(dx),
            dresidual.data_ptr(), dweight.data_ptr(), dln_bias.data_ptr(), _pointer(dbias), partials.data_ptr(),
            rows, hidden, _dropout(dropout_p, seed, stream), _DTYPES[dy.dtype], _stream(dy),
        )  # fmt: skip
    dtype = weight.dtype
    return dx, dresidual, dweight.to(dtype), dln_bias.to(dtype), None if dbias is None else dbias.to(dtype)


def gelu_layer_norm_forward(
    x: Tensor, bias: Tensor | None, weight: Tensor, ln_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.gelu_layer_norm_forward`."""
    rows, hidden = x.shape
    _check_hidden(hidden)
    y, mean, rstd = torch.empty_like(x), _float32_like(x, rows), _float32_like(x, rows)
    bias, weight, ln_bias = _float32(bias), _float32(weight), _float32(ln_bias)
    with torch.cuda.device(x.device):
        _cuda.gelu_layer_norm_forward(
            x.data_ptr(), _pointer(bias), weight.data_ptr(), ln_bias.data_ptr(),
            y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), rows, hidden, eps, _DTYPES[x.dtype], _stream(x),
        )  # fmt: skip
    return y, mean, rstd


def gelu_layer_norm_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :func:`reference.gelu_layer_norm_backward`."""
    rows, hidden = x.shape
    dx = torch.empty_like(dy)
    dweight, dln_bias = _float32_like(dy, hidden), _float32_like(dy, hidden)
    dbias = None if bias is None else _float32_like(dy, hidden)
    partials = _float32_like(dy, _cuda.row_groups(rows, hidden), 3, hidden)
    weight32, bias32 = weight.float(), _float32(bias)
    with torch.cuda.device(dy.device):
        _cuda.gelu_layer_norm_backward(
            dy.data_ptr(), x.data_ptr(), _pointer(bias32), weight32.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            dx.data_ptr(), dweight.data_ptr(), dln_bias.data_ptr(), _pointer(dbias), partials.data_ptr(),
            rows, hidden, _DTYPES[x.dtype], _stream(dy),
        )  # fmt: skip
    return dx, None if dbias is None else dbias.to(bias.dtype), dweight.to(weight.dtype), dln_bias.to(weight.dtype)
