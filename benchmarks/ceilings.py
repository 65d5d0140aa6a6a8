"""The ceilings that figures are set beside, measured in the same run: the machine's matmul rate and copy bandwidth, and for one
workload the time of its matmuls alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import BertConfig

from fastbert.ops.matmul_rate import matmul_rates, matmuls, random_matrix

from .harness import kernel_seconds

SECONDS = 3.0  # of the matmuls


def ceilings(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """FLOP/s at a BERT-sized shape and copy bandwidth in B/s (read + write), each the best of several runs.

    ``matmul_flops``: of the fastest library; ``matmul_flops_by_library``: of each, as ``matmul_rates`` measures it.
    """
    rates = matmul_rates(device, dtype, SECONDS)
    return {"matmul_flops": max(rates.values()), "matmul_flops_by_library": rates, "copy_bytes": copy_bytes(device)}


def copy_bytes(device: str) -> float:
    """Copy bandwidth in B/s (read + write), the best of 20 runs."""
    source = torch.randn(1 << (25 if device == "cpu" else 28), device=device)
    target = torch.empty_like(source)
    copy = kernel_seconds(lambda: target.copy_(source), device, rounds=20)
    return 2 * source.numel() * source.element_size() / min(copy)


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
