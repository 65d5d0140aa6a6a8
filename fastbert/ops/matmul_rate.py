"""The matmul rate of this machine: FLOP/s at a BERT-sized shape, by each library that torch carries.

It is the ceiling that the speed of a model is set beside. float32 goes to MKL, which on AMD reaches 40% of oneDNN's rate, and
oneDNN is faster again with weights in its own blocked layout: a share of MKL's rate alone could be 200%.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import calibration
from .linear import onednn_multiplies, onednn_unavailable_reason

Matmul = Callable[[], Tensor]

LEAST_ROUNDS = 2


def matmul_rates(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.3) -> dict[str, float]:
    """FLOP/s by library, each the best of at least two runs, which take turns for about ``seconds``.

    dtype: of the operands; int8 counts multiply-adds of int8 into int32, times two. torch's random state stays as it is.
    """
    device = torch.device(device)
    rows, width = (2048, 768) if device.type == "cpu" else (16384, 4096)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        products = matmuls(random_matrix(rows, width, device, dtype), random_matrix(4 * width, width, device, dtype))
        best = _best_seconds(products, device, seconds)
    return {library: 2 * rows * width * 4 * width / taken for library, taken in best.items()}


def unmeasured_reason() -> str | None:
    """Why nothing may be measured now, or None where it may."""
    if calibration.is_on():
        return None
    if torch.are_deterministic_algorithms_enabled():
        return "torch's deterministic algorithms are on"
    return "FASTBERT_CALIBRATION is off"


def matmuls(x: Tensor, weight: Tensor) -> dict[str, Matmul]:
    """x (rows, in) weight^T (in, out) by each library that torch carries for this dtype and device, by its name."""
    if x.dtype == torch.int8:
        columns = weight.t().contiguous()
        return {"oneDNN" if x.device.type == "cpu" else "torch": lambda: torch._int_mm(x, columns)}
    mkl = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkl.is_available()
    found = {"MKL" if mkl else "torch": lambda: F.linear(x, weight)}
    if x.device.type == "cpu" and takes_onednn(x.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        for library, operand in (("oneDNN", weight), ("oneDNN prepacked", packed)):
            found[library] = lambda operand=operand: torch.ops.mkldnn._linear_pointwise(x, operand, None, "none", [], "")
    return found


def takes_onednn(dtype: torch.dtype) -> bool:
    """Whether this CPU's oneDNN multiplies in ``dtype``."""
    return dtype in (torch.float32, torch.bfloat16) and onednn_unavailable_reason() is None and onednn_multiplies(dtype)


def random_matrix(rows: int, columns: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Drawn without touching torch's random state."""
    generator = torch.Generator(device).manual_seed(rows)
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), generator=generator, device=device, dtype=dtype)
    return torch.randn(rows, columns, generator=generator, device=device).to(dtype)


def _best_seconds(products: dict[str, Matmul], device: torch.device, seconds: float) -> dict[str, float]:
    """Seconds of each product's fastest run: whatever else the machine does only adds to it."""
    best = {}
    for name, product in products.items():
        product()  # compiles, and brings a GPU to its clock
        best[name] = _seconds(product, device)
    started, rounds = time.perf_counter(), 1
    while rounds < LEAST_ROUNDS or time.perf_counter() - started < seconds:
        for name, product in products.items():
            if best[name] < calibration.HOPELESS * min(best.values()):
                best[name] = min(best[name], _seconds(product, device))
        rounds += 1
    return best


def _seconds(product: Matmul, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    product()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
