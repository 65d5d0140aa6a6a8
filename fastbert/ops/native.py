"""The C++ CPU kernels (csrc/cpu) under the names and signatures of ``reference.py``: tensors become pointers here.

Inputs are contiguous CPU tensors of float32 or bfloat16 (``backends.py`` refuses others); a block of logits may have a row
stride. Arithmetic, statistics and sums are float32, except that attention and matmuls multiply bfloat16 as it is, and add the
products in float32, with avx512_bf16. Results do not depend on the number of threads, which is torch's.

The extension links no OpenMP runtime: it is handed the entry point of the one that torch uses, so the process has one.
FASTBERT_CPU_ISA=baseline|avx2|avx2_vnni|avx512|avx512_vnni|avx512_bf16 forces an instruction set; the default is the widest that
the CPU supports.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..build_report import import_built
from . import huge_pages, reference
from .linear import (
    linear_dweight,
    linear_dx,
    linear_dx_through_gelu,
    linear_forward,
    linear_gelu_without_gradients,
    linear_parameter_gradients,
    linear_then_gelu,
)

# What the module offers.
NAMES = (
    "DType", "Dropout", "EmbeddingTables", "EncoderLayer", "EncoderLayers", "MatmulEnd", "PackedLinear", "Snapshot",
    "add_layer_norm_backward", "add_layer_norm_forward", "all_unchanged", "attention_backward", "attention_forward",
    "attention_of_rows_backward", "attention_of_rows_forward", "bias_gelu_backward", "bias_gelu_forward", "embed_tokens",
    "embedding_layer_norm_backward", "embedding_layer_norm_forward", "gelu_layer_norm_backward", "gelu_layer_norm_forward",
    "instruction_set", "matmul", "matmul_workspace_bytes", "mlm_loss_backward", "mlm_loss_forward", "multiplies",
    "pack_weight", "packed_dense", "packed_weight_bytes", "read_mask", "row_chunks", "set_instruction_set",
    "set_openmp_parallel", "supported_instruction_sets", "table_gradient",
)  # fmt: skip
_TORCH_LIBRARY = re.compile(r"/libtorch_cpu\.so[.\d]*$")


def _import_extension():
    """The extension module and None, or None and the reason why there is none."""
    _cpu, reason = import_built("_cpu", NAMES)
    if _cpu is None:
        return None, reason
    _cpu.set_openmp_parallel(_openmp_entry_point())
    forced = os.environ.get("FASTBERT_CPU_ISA")
    if forced:
        try:
            _cpu.set_instruction_set(forced)
        except ValueError as error:
            raise ValueError(f"FASTBERT_CPU_ISA={forced}: {error}") from error
    return _cpu, None


def _openmp_entry_point() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch was linked with; 0, one thread, where it has none."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.split(maxsplit=5)[5] if line.count("/") else ""
        if _TORCH_LIBRARY.search(path):
            # A lookup through a library's handle goes through what it was linked with, too.
            symbol = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            return 0 if symbol is None else ctypes.cast(symbol, ctypes.c_void_p).value or 0
    return 0


_cpu, _unavailable_reason = _import_extension()
EXTENSION = _cpu
AVAILABLE: bool = _cpu is not None
if AVAILABLE:
    DTYPES = {torch.float32: _cpu.DType.float32, torch.bfloat16: _cpu.DType.bfloat16}
    WEIGHT_DTYPES = {**DTYPES, torch.int8: _cpu.DType.int8}
    _NO_DROPOUT = _cpu.Dropout(0, 1.0, 0, 0)


def unavailable_reason() -> str | None:
    """Why these kernels cannot be used in this installation, or None where they can."""
    return _unavailable_reason


def instruction_set() -> str:
    """The one in use: "baseline" (SSE2 or NEON), "avx2", "avx2_vnni", "avx512", "avx512_vnni" or "avx512_bf16" (with VNNI).

    The extension must be available.
    """
    return _cpu.instruction_set()


def supported_instruction_sets() -> list[str]:
    """Those that this CPU supports, from the narrowest vectors to the widest. The extension must be available."""
    return _cpu.supported_instruction_sets()


def set_instruction_set(name: str) -> None:
    """Switches all kernels, for tests and measurements; raises ValueError where the CPU does not support ``name``."""
    _cpu.set_instruction_set(name)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the instruction set in use has an instruction that multiplies this dtype and adds the products.

    Matmul needs one; the encoder layer takes another way where there is none.
    """
    return _cpu.multiplies(WEIGHT_DTYPES[dtype])


def cpu_features() -> list[str]:
    """The CPU's features as Linux names them ("avx2", "avx512f", ...); empty where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return match.group(1).split() if match else []


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float32(tensor: Tensor | None) -> Tensor | None:
    """Parameters and their gradients are float32 in the kernels; the tensor must stay alive until the call returns."""
    return None if tensor is None else tensor.float()


def _dropout(dropout_p: float, seed: Tensor | None, stream: int):
    if dropout_p == 0.0:
        return _NO_DROPOUT
    return _cpu.Dropout(reference.dropout_threshold(dropout_p), reference.dropout_scale(dropout_p), seed.data_ptr(), stream)


def _empty(*shape: int) -> Tensor:
    """An uninitialised float32 tensor, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _row_sums(rows: int, *shape: int) -> Tensor:
    """Workspace for sums over chunks of rows, (chunks, *shape) float32."""
    return _empty(_cpu.row_chunks(rows), *shape)


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
    weight, ln_bias = _float32(weight), _float32(ln_bias)
    y, mean, rstd = word.new_empty(rows, hidden), _empty(rows), _empty(rows)
    _cpu.embedding_layer_norm_forward(
        input_ids.data_ptr(), token_type_ids.data_ptr(), position_ids.data_ptr(),
        word.data_ptr(), position.data_ptr(), token_type.data_ptr(), weight.data_ptr(), ln_bias.data_ptr(),
        y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        rows, hidden, eps, _dropout(dropout_p, seed, stream), DTYPES[word.dtype], torch.get_num_threads(),
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
    dtype, weight = weight.dtype, _float32(weight)
    dz = _empty(rows, hidden) if any(needs) else None
    dweight, dln_bias = _empty(hidden), _empty(hidden)
    partials = _row_sums(rows, 3, hidden)
    _cpu.embedding_layer_norm_backward(
        dy.data_ptr(), input_ids.data_ptr(), token_type_ids.data_ptr(), position_ids.data_ptr(),
        word.data_ptr(), position.data_ptr(), token_type.data_ptr(), mean.data_ptr(), rstd.data_ptr(), weight.data_ptr(),
        _pointer(dz), dweight.data_ptr(), dln_bias.data_ptr(), partials.data_ptr(),
        rows, hidden, _dropout(dropout_p, seed, stream), DTYPES[dy.dtype], torch.get_num_threads(),
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
    _cpu.table_gradient(
        dz.data_ptr(), ids.data_ptr(), order.data_ptr(), starts.data_ptr(), gradient.data_ptr(),
        rows, num_ids, hidden, padding_idx, DTYPES[table.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return gradient


def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.attention_forward`."""
    total, _, num_heads, head_dim = qkv.shape
    out = qkv.new_empty(total, num_heads, head_dim)
    lse = _empty(num_heads, total)
    _cpu.attention_forward(
        qkv.data_ptr(), cu_seqlens.data_ptr(), out.data_ptr(), lse.data_ptr(),
        total, cu_seqlens.numel() - 1, num_heads, head_dim,
        softmax_scale, _dropout(dropout_p, seed, stream), DTYPES[qkv.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """See :func:`reference.attention_backward`."""
    total, _, num_heads, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv)
    _cpu.attention_backward(
        dout.data_ptr(), qkv.data_ptr(), out.data_ptr(), lse.data_ptr(), cu_seqlens.data_ptr(), dqkv.data_ptr(),
        total, cu_seqlens.numel() - 1, num_heads, head_dim,
        softmax_scale, _dropout(dropout_p, seed, stream), DTYPES[qkv.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dqkv


def attention_of_rows_forward(
    q: Tensor,
    kv: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.attention_of_rows_forward`."""
    out, lse = torch.empty_like(q), _empty(q.shape[1], q.shape[0])
    if len(q) == 0:  # rows without memory would mean all of them
        return out, lse
    _cpu.attention_of_rows_forward(
        q.data_ptr(), kv.data_ptr(), rows.data_ptr(), cu_seqlens.data_ptr(), out.data_ptr(), lse.data_ptr(),
        len(q), len(kv), cu_seqlens.numel() - 1, *q.shape[1:],
        softmax_scale, _dropout(dropout_p, seed, stream), DTYPES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def attention_of_rows_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    rows: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.attention_of_rows_backward`."""
    if len(q) == 0:
        return torch.empty_like(q), torch.zeros_like(kv)
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    _cpu.attention_of_rows_backward(
        dout.data_ptr(), q.data_ptr(), kv.data_ptr(), rows.data_ptr(), out.data_ptr(), lse.data_ptr(), cu_seqlens.data_ptr(),
        dq.data_ptr(), dkv.data_ptr(), len(q), len(kv), cu_seqlens.numel() - 1, *q.shape[1:],
        softmax_scale, _dropout(dropout_p, seed, stream), DTYPES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dq, dkv


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
    bias, weight, ln_bias = _float32(bias), _float32(weight), _float32(ln_bias)
    y, z = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = _empty(rows), _empty(rows)
    _cpu.add_layer_norm_forward(
        x.data_ptr(), _pointer(bias), residual.data_ptr(), weight.data_ptr(), ln_bias.data_ptr(),
        y.data_ptr(), z.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        rows, hidden, eps, _dropout(dropout_p, seed, stream), DTYPES[x.dtype], torch.get_num_threads(),
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
    dtype, weight = weight.dtype, _float32(weight)
    dresidual = torch.empty_like(dy)
    dx = torch.empty_like(dy) if dropout_p > 0.0 else None
    dweight, dln_bias = _empty(hidden), _empty(hidden)
    dbias = _empty(hidden) if has_bias else None
    partials = _row_sums(rows, 3, hidden)
    _cpu.add_layer_norm_backward(
        dy.data_ptr(), z.data_ptr(), mean.data_ptr(), rstd.data_ptr(), weight.data_ptr(),
        _pointer(dx), dresidual.data_ptr(), dweight.data_ptr(), dln_bias.data_ptr(), _pointer(dbias), partials.data_ptr(),
        rows, hidden, _dropout(dropout_p, seed, stream), DTYPES[dy.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, dresidual, dweight.to(dtype), dln_bias.to(dtype), None if dbias is None else dbias.to(dtype)


def gelu_layer_norm_forward(
    x: Tensor, bias: Tensor | None, weight: Tensor, ln_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.gelu_layer_norm_forward`."""
    rows, hidden = x.shape
    bias, weight, ln_bias = _float32(bias), _float32(weight), _float32(ln_bias)
    y, mean, rstd = torch.empty_like(x), _empty(rows), _empty(rows)
    _cpu.gelu_layer_norm_forward(
        x.data_ptr(), _pointer(bias), weight.data_ptr(), ln_bias.data_ptr(),
        y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        rows, hidden, eps, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, rstd


def gelu_layer_norm_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :func:`reference.gelu_layer_norm_backward`."""
    rows, hidden = dy.shape
    dtype, bias_dtype = weight.dtype, None if bias is None else bias.dtype
    bias, weight = _float32(bias), _float32(weight)
    dx = torch.empty_like(dy)
    dweight, dln_bias = _empty(hidden), _empty(hidden)
    dbias = None if bias is None else _empty(hidden)
    partials = _row_sums(rows, 3, hidden)
    _cpu.gelu_layer_norm_backward(
        dy.data_ptr(), x.data_ptr(), _pointer(bias), weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        dx.data_ptr(), dweight.data_ptr(), dln_bias.data_ptr(), _pointer(dbias), partials.data_ptr(),
        rows, hidden, DTYPES[dy.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, None if dbias is None else dbias.to(bias_dtype), dweight.to(dtype), dln_bias.to(dtype)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a b + bias, summed in float32, the same bits on any number of threads.

    a: (rows, depth), b: (depth, columns), both float32 or both bfloat16 where the instruction set :func:`packs` it, as they lie
    where their rows or their columns are contiguous; bias: (columns,); out: (rows, columns) of their dtype with contiguous rows,
    which is returned, or None for a new tensor. Nothing may be empty.
    """
    return _matmul(a, b, bias, out, _cpu.MatmulEnd.product)


def matmul_gelu(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(u, gelu(u + bias)) of u = a b in float32: see :func:`matmul`."""
    u, y = (a.new_empty(a.shape[0], b.shape[1]) for _ in range(2))
    return _matmul(a, b, bias, u, _cpu.MatmulEnd.gelu, y=y), y


def matmul_gelu_gradient(a: Tensor, b: Tensor, u: Tensor, bias: Tensor | None, gelu_wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Where a b is the gradient of gelu(u + bias), in float32: that of u, and where wanted gelu(u + bias). See :func:`matmul`."""
    du, y = torch.empty_like(u), torch.empty_like(u) if gelu_wanted else None
    return _matmul(a, b, bias, du, _cpu.MatmulEnd.gelu_gradient, u=u, y=y), y


def matmul_and_row_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a b and the sums of a's rows, (rows,) in float32. See :func:`matmul`."""
    a = a if a.stride(0) == 1 else a.t().contiguous().t()
    out, sums = a.new_empty(a.shape[0], b.shape[1]), _empty(a.shape[0])
    return _matmul(a, b, None, out, _cpu.MatmulEnd.product, row_sums=sums), sums


def _matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    end: Any,
    *,
    u: Tensor | None = None,
    y: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> Tensor:
    """``out``, or a new tensor; u and y lie as it does."""
    (rows, depth), columns = a.shape, b.shape[1]
    a, b = (t if 1 in t.stride() else t.contiguous() for t in (a, b))
    if a.dtype == torch.bfloat16:  # elements that follow each other along the depth are read in pairs
        if depth % 2 and (a.stride(1) == 1 or b.stride(0) == 1):
            a, b, depth = F.pad(a, (0, 1)), F.pad(b, (0, 0, 0, 1)), depth + 1
        if b.stride(0) == 1 and b.stride(1) % 2:
            b = b.contiguous()
    bias = _float32(None if bias is None else bias.contiguous())
    out = a.new_empty(rows, columns) if out is None else out
    packed_b = torch.empty(_cpu.matmul_workspace_bytes(depth, columns, DTYPES[a.dtype]), dtype=torch.uint8, device="cpu")
    _cpu.matmul(
        a.data_ptr(), b.data_ptr(), _pointer(bias), out.data_ptr(), _pointer(u), _pointer(y), _pointer(row_sums),
        packed_b.data_ptr(), rows, depth, columns, *a.stride(), *b.stride(), out.stride(0), end, DTYPES[a.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep_preactivation: bool) -> tuple[Tensor, Tensor | None]:
    """See :func:`reference.linear_gelu_forward`. Where nobody needs u, oneDNN applies bias and GELU as it stores."""
    if not keep_preactivation and (y := linear_gelu_without_gradients(x, weight, bias)) is not None:
        return y, None
    if keep_preactivation and (both := linear_then_gelu(x, weight, bias)) is not None:
        return both[1], both[0]
    u = linear_forward(x, weight, None)
    y = torch.empty_like(u) if keep_preactivation else u
    bias = _float32(bias)
    _cpu.bias_gelu_forward(
        u.data_ptr(), _pointer(bias), y.data_ptr(), *u.shape, DTYPES[u.dtype], torch.get_num_threads()
    )  # fmt: skip
    return y, u if keep_preactivation else None


def linear_gelu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`reference.linear_gelu_backward`."""
    u = linear_forward(x, weight, None) if u is None else u
    du = torch.empty_like(u)
    dbias = _bias_gelu_backward(dy, u, bias, du, None)
    return linear_dx(du, weight), linear_dweight(du, x), None if bias is None else dbias.to(bias.dtype)


def _bias_gelu_backward(dy: Tensor, u: Tensor, bias: Tensor | None, du: Tensor, y: Tensor | None) -> Tensor:
    """Writes du, which may be dy, and where y is given gelu(u + bias); returns the sums of du's columns in float32."""
    rows, columns = u.shape
    dbias, partials, bias = _empty(columns), _row_sums(rows, columns), _float32(bias)
    _cpu.bias_gelu_backward(
        dy.data_ptr(), u.data_ptr(), _pointer(bias), du.data_ptr(), _pointer(y), dbias.data_ptr(), partials.data_ptr(),
        rows, columns, DTYPES[u.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dbias


def feed_forward_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, out_weight: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and out_weight of gelu(x weight^T + bias) out_weight^T; ``needs``: which are wanted.

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
    dout_weight = linear_dweight(dy, gelu) if needs[3] else None
    del through, gelu  # before the next matmuls ask for memory
    dx = linear_dx(du, weight) if needs[0] else None
    dweight, sums = linear_parameter_gradients(du, x, needs[1], needs[2] and dbias is None)
    dbias = sums if dbias is None else dbias
    return dx, dweight, dbias.to(bias.dtype) if needs[2] else None, dout_weight


@functools.cache
def int8_unavailable_reasons() -> tuple[str, ...]:
    """Why int8_linear cannot run here, empty where it can: torch's int8 matmul has to be there, and exact.

    CPUs without VNNI add products in pairs of 16 bits, which saturate at the largest values.
    """
    if not hasattr(torch, "_int_mm"):
        return ("this torch does not expose an int8 matmul (torch._int_mm)",)
    largest = torch.full((32, 64), reference.INT8_LARGEST, dtype=torch.int8, device="cpu")
    expected = 64 * reference.INT8_LARGEST**2
    if not all((torch._int_mm(sign * largest, largest.t()) == sign * expected).all() for sign in (1, -1)):
        return ("torch's int8 matmul saturates on this CPU (it has no VNNI)",)
    return ()


# Rows of a block: its int32 sums stay in the cache until they are scaled.
_INT8_ROWS = 128


def int8_linear_forward(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """See :func:`reference.int8_linear_forward`."""
    if x.shape[1] == 1:  # torch's product of a single column reads what lies behind it
        return reference.int8_linear_forward(x, weight, weight_scale, bias, activation)
    rows, out_features = x.shape[0], weight.shape[0]
    y = x.new_empty(rows, out_features)
    sums = torch.empty(min(rows, _INT8_ROWS), out_features, dtype=torch.int32, device="cpu")
    bias = torch.zeros_like(weight_scale) if bias is None else bias
    for x_block, y_block in zip(x.split(_INT8_ROWS), y.split(_INT8_ROWS), strict=True):
        q, step = reference.quantize_rows(x_block)
        total = torch._int_mm(q, weight.t(), out=sums[: q.shape[0]]).float()
        u = torch.addcmul(bias, total, step[:, None] * weight_scale)
        y_block.copy_(F.gelu(u) if activation == "gelu" else u)
    return y


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
    """See :func:`reference.mlm_loss_forward`."""
    rows, block = logits.shape
    bias = _float32(bias)
    _cpu.mlm_loss_forward(
        logits.data_ptr(), _pointer(bias), labels.data_ptr(),
        row_max.data_ptr(), row_sum.data_ptr(), label_logit.data_ptr(), _pointer(logit_sum),
        rows, block, logits.stride(0), first_class, DTYPES[logits.dtype], torch.get_num_threads(),
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
    """See :func:`reference.mlm_loss_backward`."""
    rows, block = logits.shape
    bias = _float32(bias)
    sums = None if dbias is None else _empty(block)
    partials = None if dbias is None else _row_sums(rows, block)
    _cpu.mlm_loss_backward(
        logits.data_ptr(), _pointer(bias), labels.data_ptr(),
        row_max.data_ptr(), row_sum.data_ptr(), dloss.data_ptr(), _pointer(sums), _pointer(partials),
        rows, block, logits.stride(0), first_class, num_classes, label_smoothing,
        DTYPES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if dbias is not None:
        dbias.copy_(sums)
