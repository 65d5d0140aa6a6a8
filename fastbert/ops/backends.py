"""Which implementation of an op runs where, and why the others do not.

Four backends share the function names and signatures of ``reference``: ``reference`` (plain torch, any device), ``native`` (C++ for
CPUs), ``triton`` (GPUs, the folder ``kernels/``; CPUs under ``TRITON_INTERPRET=1``) and ``cuda`` (CUDA C++). ``"auto"`` takes the
first of the device's list that can do the work, or another one where committed measurements of the GPU's architecture, the op and
its sizes say that it is faster (``measured_backends.py``); a backend asked for by name is used or refused with its reasons, never
replaced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

from . import cuda, measured_backends

OPS = ("embedding_layer_norm", "attention", "add_layer_norm", "linear_gelu", "gelu_layer_norm", "mlm_loss")
INFERENCE_OPS = ("int8_linear",)  # without a derivative
CPU_OPS = ("attention_of_rows",)  # GPUs compute all rows
MIXED_OPS = ("add_layer_norm_mixed",)  # one pass where a GPU's kernel does it, elsewhere the op of its first name and conversions
BACKENDS = ("reference", "native", "triton", "cuda")
AUTO_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {
    "reference": (*_FLOATS, torch.float64),
    "native": (torch.float32, torch.bfloat16),
    "triton": _FLOATS,
    "cuda": _FLOATS,
}
_DEVICES = {"native": "cpu", "cuda": cuda.DEVICE_TYPE}
_OPS_OF = {
    "reference": (*OPS, *INFERENCE_OPS, *MIXED_OPS, *CPU_OPS),
    "native": (*OPS, *INFERENCE_OPS, *CPU_OPS),
    "triton": (*OPS, *MIXED_OPS),
    "cuda": cuda.OPS,
}
_HALVES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM, TRITON_MAX_FLOAT32_HEAD_DIM = 256, 128
CUDA_MAX_HEAD_DIM, CUDA_HEAD_DIM_MULTIPLE = 128, 8


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` cannot be used in this installation at all, or None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return None if importlib.util.find_spec("triton") else "the package triton is not installed (pip install triton)"
    return importlib.import_module(f"fastbert.ops.{backend}").unavailable_reason()


def not_supported_reasons(backend: str, op: str, device_type: str, dtype: torch.dtype, head_dim: int | None = None) -> list[str]:
    """Every reason why ``backend`` cannot run ``op`` on this kind of input; empty where it can."""
    reason = unavailable_reason(backend)
    reasons = [reason] if reason else []
    if op not in _OPS_OF.get(backend, OPS):
        reasons.append(f"it has no kernel for {op}")
    elif (backend, op, reason) == ("native", "int8_linear", None):
        reasons += implementation(op, backend).int8_unavailable_reasons()
    if device_type != _DEVICES.get(backend, device_type):
        reasons.append(f"it runs on {_DEVICES[backend]} tensors, these are on {device_type}")
    if backend == "triton" and device_type == "cpu" and not _triton_interprets():
        reasons.append("Triton compiles for GPUs only (TRITON_INTERPRET=1 interprets its kernels on a CPU, for tests)")
    multiplied_by_matrix_units = (backend, op) == ("cuda", "attention")
    dtypes = _HALVES if op in MIXED_OPS or multiplied_by_matrix_units else _DTYPES[backend]
    if dtype not in dtypes:
        reasons.append(f"it has no kernels for {str(dtype).removeprefix('torch.')}")
    if head_dim is not None and (reason := _head_dim_reason(backend, dtype, head_dim)):
        reasons.append(reason)
    return reasons


def _head_dim_reason(backend: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if backend == "reference":
        return None
    if backend == "cuda":
        suits = head_dim <= CUDA_MAX_HEAD_DIM and head_dim % CUDA_HEAD_DIM_MULTIPLE == 0
        kernels = f"take multiples of {CUDA_HEAD_DIM_MULTIPLE} up to {CUDA_MAX_HEAD_DIM}"
    else:
        limit = TRITON_MAX_FLOAT32_HEAD_DIM if (backend, dtype) == ("triton", torch.float32) else MAX_HEAD_DIM
        suits, kernels = head_dim <= limit, f"go up to {limit} in {str(dtype).removeprefix('torch.')}"
    return None if suits else f"head_dim is {head_dim}, its kernels {kernels}"


@functools.cache
def select(op: str, backend: str, device_type: str, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """The backend that runs ``op``: ``backend`` itself, or the first able one of the device's order for ``"auto"``, which it is
    wherever :func:`choose` knows of no measurement.

    Raises ValueError for an unknown name and RuntimeError, with the reasons, where a backend asked for cannot do it.
    """
    if backend == "auto":
        order = AUTO_ORDER.get(device_type, ("reference",))
        return next(name for name in order if not not_supported_reasons(name, op, device_type, dtype, head_dim))
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are 'auto', {', '.join(map(repr, BACKENDS))}")
    reasons = not_supported_reasons(backend, op, device_type, dtype, head_dim)
    if reasons:
        raise RuntimeError(f"backend {backend!r} cannot run {op}: {'; '.join(reasons)}")
    return backend


def measured_choice(
    op: str, device: torch.device, dtype: torch.dtype, direction: str, sizes: dict[str, int]
) -> measured_backends.Entry | None:
    """The measurement that decides about a call, or None where the device's order does."""
    for entry in measured_backends.entries_for(measured_backends.architecture(device), op, direction, dtype):
        if entry.holds(sizes) and _can(entry.backend, op, device.type, dtype, sizes):
            return entry
    return None


def _can(backend: str, op: str, device_type: str, dtype: torch.dtype, sizes: dict[str, int]) -> bool:
    if _reasons(backend, op, device_type, dtype, sizes.get("head_dim")):
        return False
    return backend != "cuda" or "hidden" not in sizes or cuda.extension.takes_hidden(sizes["hidden"])


_reasons = functools.cache(not_supported_reasons)


def choose(op: str, backend: str, device: torch.device, dtype: torch.dtype, direction: str, **sizes: int) -> str:
    """:func:`select` for one call: ``"auto"`` heeds what was measured for its direction and sizes.

    The sizes are those of ``measured_backends.SIZES``; they may change with every call, which costs a few comparisons.
    """
    if backend == "auto" and measured_backends.ENTRIES and op in measured_backends.SIZES:
        measured = measured_choice(op, device, dtype, direction, sizes)
        if measured is not None:
            return measured.backend
    return select(op, backend, device.type, dtype, sizes.get("head_dim"))


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module that holds ``<op>_forward`` and ``<op>_backward`` of ``backend``."""
    module = f"fastbert_kernels.{op}" if backend == "triton" else f"fastbert.ops.{backend}"
    return importlib.import_module(module)


def implementation_for(op: str, backend: str, x: torch.Tensor, direction: str, **sizes: int) -> ModuleType:
    """:func:`choose` and :func:`implementation` in one step, for the tensor that decides device and dtype."""
    return implementation(op, choose(op, backend, x.device, x.dtype, direction, **sizes))


def report() -> dict[str, Any]:
    """What ``fastbert doctor`` prints: backends with their state, what ``"auto"`` picks per op, device and dtype, and where it has
    measurements that say otherwise."""
    ops: dict[str, Any] = {}
    for op in (*OPS, *INFERENCE_OPS):
        ops[op] = {}
        for device_type in AUTO_ORDER:
            picked = {
                str(dtype).removeprefix("torch."): select(op, "auto", device_type, dtype)
                for dtype in (torch.float32, torch.bfloat16, torch.float16)
            }
            others = {
                name: not_supported_reasons(name, op, device_type, torch.float32)
                or ["usable on request (backend=...), not picked by 'auto'"]
                for name in BACKENDS
                if name != picked["float32"]
            }
            ops[op][device_type] = {"auto": picked, "not_picked": others}
    backends = {name: {"available": unavailable_reason(name) is None, "reason": unavailable_reason(name)} for name in BACKENDS}
    return {"ops": ops, "backends": backends, "measured": [str(entry) for entry in measured_backends.ENTRIES]}
