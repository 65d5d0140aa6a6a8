"""The extension module ``fastbert._cpu`` with torch's threads, and what every call of it needs."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from ...build_report import import_built
from .. import reference

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


EXTENSION, _unavailable_reason = _import_extension()
AVAILABLE: bool = EXTENSION is not None
DTYPES, WEIGHT_DTYPES, NO_DROPOUT = {}, {}, None
if AVAILABLE:
    DTYPES = {torch.float32: EXTENSION.DType.float32, torch.bfloat16: EXTENSION.DType.bfloat16}
    WEIGHT_DTYPES = {**DTYPES, torch.int8: EXTENSION.DType.int8}
    NO_DROPOUT = EXTENSION.Dropout(0, 1.0, 0, 0)


def unavailable_reason() -> str | None:
    """Why these kernels cannot be used in this installation, or None where they can."""
    return _unavailable_reason


def instruction_set() -> str:
    """The one in use: "baseline" (SSE2 or NEON), "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16" (with VNNI) or
    "avx512_amx".

    The extension must be available.
    """
    return EXTENSION.instruction_set()


def supported_instruction_sets() -> list[str]:
    """Those that this CPU supports, from the narrowest vectors to the widest. The extension must be available."""
    return EXTENSION.supported_instruction_sets()


def set_instruction_set(name: str) -> None:
    """Switches all kernels, for tests and measurements; raises ValueError where the CPU does not support ``name``."""
    EXTENSION.set_instruction_set(name)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the instruction set in use has an instruction that multiplies this dtype and adds the products.

    Matmul needs one; the encoder layer takes another way where there is none.
    """
    return EXTENSION.multiplies(WEIGHT_DTYPES[dtype])


def pointer(tensor: Tensor | None) -> int:
    """The tensor's address; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def as_float32(tensor: Tensor | None) -> Tensor | None:
    """Parameters and their gradients are float32 in the kernels; the tensor must stay alive until the call returns."""
    return None if tensor is None else tensor.float()


def as_dropout(dropout_p: float, seed: Tensor | None, stream: int):
    """The extension's Dropout, which reads the seed where it is: that has to stay alive until the call returns."""
    if dropout_p == 0.0:
        return NO_DROPOUT
    return EXTENSION.Dropout(reference.dropout_threshold(dropout_p), reference.dropout_scale(dropout_p), seed.data_ptr(), stream)


def empty(*shape: int) -> Tensor:
    """An uninitialised float32 tensor, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def row_sum_workspace(rows: int, *shape: int) -> Tensor:
    """Workspace for sums over chunks of rows, (chunks, *shape) float32."""
    return empty(EXTENSION.row_chunks(rows), *shape)
