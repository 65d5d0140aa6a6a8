"""Which Linears int8 would hurt, found on batches of real inputs; :func:`fastbert.quantize` leaves those as they are.

A row's largest value sets its step, so a channel that is far larger than the others (BERT-sized models have such outliers) takes
the others' bits. SmoothQuant (Xiao et al., 2023) evens channels out with factors that LayerNorm takes along for nothing; after
BERT's LayerNorms the residual branches off, so its factors would cost a pass over the activations in every call. With them
``benchmarks.quantize`` sees outputs a third closer and scores no better. Leaving a Linear in float costs speed only where it is
needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .int8 import Int8Linear

# Of the norm of a Linear's output on all calibration rows. Rounding alone is 1 to 2% where no channel stands out.
LARGEST_ERROR = 0.05
_INPUTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip


def hurt_by_int8(
    module: nn.Module, encoders: Iterable[nn.Module], rounded: Mapping[str, Int8Linear], calibration: Iterable[Mapping[str, Any]]
) -> set[str]:
    """Names of the Linears whose output int8 changes by more than ``LARGEST_ERROR`` of its norm.

    rounded: for the name in ``module`` of each Linear in question what would take its place. calibration: batches of the arguments
    of an encoder (others are passed over), which each of ``encoders`` is called with. Raises TypeError and ValueError for
    batches that are none, and none at all.
    """
    linears = {name: module.get_submodule(name) for name in rounded}
    compared = {name: _Compared(linear, rounded[name]) for name, linear in linears.items()}
    count = 0
    try:
        for name, both in compared.items():
            module.set_submodule(name, both)
        with torch.no_grad():
            for batch in calibration:
                inputs = _encoder_inputs(batch, count)
                for encoder in encoders:
                    encoder(**inputs)
                count += 1
    finally:
        for name, linear in linears.items():
            module.set_submodule(name, linear)
    if not count:
        raise ValueError("calibration holds no batches")
    return {name for name, both in compared.items() if not both.relative_error() <= LARGEST_ERROR}


def _encoder_inputs(batch: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch {index} of calibration is a {type(batch).__qualname__}, expected a mapping with input_ids "
            "(calibration is an iterable of batches)"
        )
    if batch.get("input_ids") is None and batch.get("inputs_embeds") is None:
        raise ValueError(f"batch {index} of calibration has no input_ids; it has {', '.join(map(str, batch)) or 'nothing'}")
    inputs = {key: value for key, value in batch.items() if key in _INPUTS}
    for key in ("input_ids", "inputs_embeds"):
        if inputs.get(key) is not None and not isinstance(inputs[key], Tensor):
            raise TypeError(
                f"batch {index} of calibration has {key} as a {type(inputs[key]).__qualname__}, expected a torch.Tensor "
                '(of a tokenizer: padding=True, return_tensors="pt")'
            )
    return inputs


class _Compared(nn.Module):
    """A Linear that adds up how far its int8 form is away from it."""

    def __init__(self, linear: nn.Linear, rounded: Int8Linear) -> None:
        super().__init__()
        self.linear, self.rounded = linear, rounded
        self.error = self.size = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.error += (self.rounded(x).double() - y).square().sum().item()
        self.size += y.double().square().sum().item()
        return y

    def relative_error(self) -> float:
        return (self.error / self.size) ** 0.5 if self.size else 0.0
