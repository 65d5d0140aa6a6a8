"""The extension module ``fastbert._cuda``, and what all its callers need."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ...build_report import built_architectures, import_built
from .. import reference

_HIDDEN_MULTIPLE = 8
# What the module offers.
NAMES = (
    "DEVICE_TYPE", "DType", "Dropout", "MAX_HIDDEN", "MAX_OPTIMIZER_GROUPS", "OPTIMIZER_CHUNK", "OPTIMIZER_COEFFICIENTS",
    "OptimizerGroup", "OptimizerParams", "RUNTIME_VERSION", "adamw", "add_layer_norm_backward", "add_layer_norm_forward",
    "assign_chunks", "attention_backward", "attention_drawn_tiles", "attention_forward", "driver_version",
    "embedding_layer_norm_backward", "embedding_layer_norm_forward", "gelu_layer_norm_backward", "gelu_layer_norm_forward",
    "gradient_norm", "lamb", "mlm_loss_backward", "mlm_loss_forward", "mlm_loss_lines", "row_lines", "table_gradient",
    "table_gradient_pieces", "write_words",
)  # fmt: skip

extension, _import_error = import_built("_cuda", NAMES)
# "cuda", or "cpu" where tests have put the kernels as a C++ compiler makes them in the module's place.
DEVICE_TYPE: str = "cuda" if extension is None else extension.DEVICE_TYPE
DTYPES: dict[torch.dtype, Any] = {}  # the module's names of them
if extension is not None:
    DTYPES = {
        torch.float32: extension.DType.float32,
        torch.bfloat16: extension.DType.bfloat16,
        torch.float16: extension.DType.float16,
    }


def unavailable_reason() -> str | None:
    """Why these kernels cannot be used in this installation, or None where they can: on one GPU of it at least."""
    if _import_error is not None or DEVICE_TYPE != "cuda":
        return _import_error
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if reason := driver_reason(extension.RUNTIME_VERSION, extension.driver_version()):
        return reason
    capabilities = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    return architecture_reason(built_architectures(), capabilities)


def driver_reason(runtime: int, driver: int) -> str | None:
    """Why a driver for CUDA version ``driver`` (12040: 12.4) runs nothing that ``runtime`` made; torch may bring an older runtime,
    with which it finds a GPU all the same."""
    if driver // 1000 >= runtime // 1000:
        return None
    had, needed = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
    return (
        f"it was built with CUDA {needed}, the GPU's driver is for {had}: install a newer driver, or build with an nvcc of CUDA "
        f"{driver // 1000} (CUDA_HOME=... pip install -e .)"
    )


def architecture_reason(built: Sequence[str], capabilities: Collection[tuple[int, int]]) -> str | None:
    """Why kernels for the architectures ``built`` (sm_90a, ...; none: nobody knows) run on no GPU of these compute capabilities.

    One for sm_80 runs on 8.x from 8.0 on, and the lowest of all is there as PTX, which newer GPUs compile for themselves; sm_90a is
    for 9.0 alone.
    """

    def number(architecture: str) -> int:
        return int(architecture.removeprefix("sm_").rstrip("af"))

    def runs(architecture: str, capability: tuple[int, int]) -> bool:
        least = divmod(number(architecture), 10)
        if architecture.endswith("a"):
            return capability == least
        return capability >= least and (architecture == ordered[0] or capability[0] == least[0])

    ordered = sorted(built, key=number)
    if not built or any(runs(architecture, capability) for architecture in built for capability in capabilities):
        return None
    there = ", ".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
    return (
        f"it was built for {', '.join(ordered)}, the GPUs here have compute capability {there}: pip install -e . without "
        "FASTBERT_CUDA_ARCHS, or with theirs"
    )


def takes_hidden(hidden: int) -> bool:
    """Whether rows of this width suit accesses of 16 bytes, and a group of threads' registers."""
    return hidden % _HIDDEN_MULTIPLE == 0 and hidden <= extension.MAX_HIDDEN


def check_hidden(hidden: int) -> None:
    """RuntimeError where there are no kernels for rows of this width."""
    if not takes_hidden(hidden):
        raise RuntimeError(
            f"backend 'cuda' takes rows of a multiple of {_HIDDEN_MULTIPLE} elements up to {extension.MAX_HIDDEN}, not {hidden}"
        )


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def aligned(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, where accesses of 16 bytes do not fit one (a slice of a flat parameter) its copy.

    The results must stay alive until the kernel is queued.
    """
    return tuple(t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in tensors)


def float32_like(tensor: Tensor, *shape: int) -> Tensor:
    """A tensor of float32 of this shape on ``tensor``'s device, with whatever is in its memory."""
    return torch.empty(shape, dtype=torch.float32, device=tensor.device)


def dropout(dropout_p: float, seed: Tensor | None, stream: int):
    if dropout_p == 0.0:
        return extension.Dropout(0, 1.0, 0, 0)
    return extension.Dropout(reference.dropout_threshold(dropout_p), reference.dropout_scale(dropout_p), seed.data_ptr(), stream)


def device_guard(tensor: Tensor) -> AbstractContextManager:
    """Makes ``tensor``'s GPU the current one."""
    return torch.cuda.device_of(tensor)


def current_stream(tensor: Tensor) -> int:
    """torch's current stream of ``tensor``'s device, as an integer."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
