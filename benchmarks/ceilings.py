"""The ceilings that figures are set beside, measured in the same run: the machine's matmul rate and copy bandwidth, and for one
workload the time of its matmuls alone.

The matmul rate is that of the fastest library which torch carries: float32 goes to MKL, which on AMD reaches 40% of oneDNN's
rate, and oneDNN is faster again with weights in its own blocked layout. A share of MKL's rate alone could be 200%.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig

from fastbert.ops.linear import onednn_unavailable_reason

from .harness import kernel_seconds

Matmul = Callable[[], Tensor]


def ceilings(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """FLOP/s at a BERT-sized shape and copy bandwidth in B/s (read + write), each the best of several runs.

    ``matmul_flops``: of the fastest library; ``matmul_flops_by_library``: of each. dtype: of the operands; int8 counts
    multiply-adds of int8 into int32, times two.
    """
    rows, width = (2048, 768) if device == "cpu" else (16384, 4096)
    x, weight = random_matrix(rows, width, device, dtype), random_matrix(4 * width, width, device, dtype)
    rates = {
        library: 2 * rows * width * 4 * width / min(kernel_seconds(matmul, device, rounds=20))
        for library, matmul in matmuls(x, weight).items()
    }
    source = torch.randn(1 << (25 if device == "cpu" else 28), device=device)
    target = torch.empty_like(source)
    copy = kernel_seconds(lambda: target.copy_(source), device, rounds=20)
    return {
        "matmul_flops": max(rates.values()),
        "matmul_flops_by_library": rates,
        "copy_bytes": 2 * source.numel() * source.element_size() / min(copy),
    }


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
    if onednn_unavailable_reason() is not None:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def random_matrix(rows: int, columns: int, device: str, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), device=device, dtype=dtype)
    return torch.randn(rows, columns, device=device).to(dtype)


class GemmsAlone:
    """The matmuls of an encoder's forward pass and nothing else: the floor of an implementation that computes no padding.

    Four per layer: query, key and value together, attention's output, and the feed-forward network's two; attention's own
    products are not among them. Every layer has weights of its own, so that they come from memory as a model's do, packed for
    oneDNN where that is there. On a few rows, where reading the weights is all that counts, an engine with a matmul of its own can
    be faster than that.
    """

    def __init__(self, config: BertConfig, device: str, dtype: torch.dtype) -> None:
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.device, self.dtype = device, dtype
        shapes = ((3 * hidden, hidden), (hidden, hidden), (intermediate, hidden), (hidden, intermediate))
        self.weights = [random_matrix(*shape, device, dtype) for _ in range(config.num_hidden_layers) for shape in shapes]

    def for_tokens(self, tokens: int) -> Callable[[], None]:
        """What runs them once, on ``tokens`` rows: prepacked, by the last and best library of :func:`matmuls`."""
        inputs = {w.shape[1]: random_matrix(tokens, w.shape[1], self.device, self.dtype) for w in self.weights}
        calls = [list(matmuls(inputs[w.shape[1]], w).values())[-1] for w in self.weights]

        def run() -> None:
            for call in calls:
                call()

        return run
