"""The encoder layer of ``csrc/cpu/encoder_layer.cpp``: weights packed once, then one call per layer. Inference only.

Weights of float32, bfloat16 and int8 run with every instruction set. One that does not multiply bfloat16 makes float32 of it in its
registers; without a product of 8-bit integers those of 16 bits take their place: the same sums in half the rate or less.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import huge_pages
from ..backends import MAX_HEAD_DIM
from .extension import AVAILABLE, DTYPES, EXTENSION, WEIGHT_DTYPES, unavailable_reason

if TYPE_CHECKING:
    from ..encoder_layer import EncoderLayerWeights, LinearWeights

_GROUP_BYTES = 4  # of neighbours in a row of a weight, which one instruction multiplies
_WORK = ("linear", "attention", "rest")
_counters: Tensor | None = None  # (3,) int64, nanoseconds, where somebody counts


def not_supported_reasons(weights: EncoderLayerWeights, dtype: torch.dtype, device_type: str) -> list[str]:
    """Every reason why this layer cannot run here on rows of ``dtype``; empty where it can."""
    if not AVAILABLE:
        return [unavailable_reason()]
    reasons = []
    if device_type != "cpu":
        reasons.append(f"it runs on cpu tensors, these are on {device_type}")
    if weights.dtype == torch.float32 and dtype != torch.float32:
        reasons.append(f"the weights are {weights.dtype}, x is {dtype}")
    if dtype not in DTYPES or weights.dtype not in WEIGHT_DTYPES:
        reasons.append(f"it has no kernels for {dtype} with weights of {weights.dtype}")
    if weights.head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim is {weights.head_dim}, its attention goes up to {MAX_HEAD_DIM}")
    bytes_of_element = weights.qkv.weight.element_size()
    for name, linear in weights.linears():
        if linear.weight.shape[1] * bytes_of_element % _GROUP_BYTES:
            multiple = _GROUP_BYTES // bytes_of_element
            reasons.append(f"{name}'s in_features {linear.weight.shape[1]} are no multiple of {multiple}")
    return reasons


@contextlib.contextmanager
def work_counted() -> Iterator[dict[str, float]]:
    """Counts the seconds that all threads together spend in the layers' ``linear`` layers, ``attention`` and the ``rest``.

    The dictionary has them at the end. Calls take longer meanwhile, which read a clock before and after each piece of work (a
    request of 32 tokens by 3%); of several who count at once, the last to begin gets all.
    """
    global _counters
    before, nanoseconds, seconds = _counters, torch.zeros(len(_WORK), dtype=torch.int64, device="cpu"), dict.fromkeys(_WORK, 0.0)
    _counters = nanoseconds
    try:
        yield seconds
    finally:
        _counters = before
        seconds.update(zip(_WORK, (nanoseconds / 1e9).tolist(), strict=True))


def run_layers(layers: PackedEncoderLayers, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The layers on x (total, hidden); cu_seqlens: (batch + 1,) int32 from 0 to total.

    Returns (total, hidden).
    """
    return run_layers_if_unchanged(layers, x, cu_seqlens, [])


def run_layers_if_unchanged(layers: PackedEncoderLayers, x: Tensor, cu_seqlens: Tensor, snapshots: list[Any]) -> Tensor | None:
    """:func:`run_layers`, or None where one of the extension's ``snapshots`` has changed. Both raise ValueError for rows that are
    not as wide as the layers, or not as many as cu_seqlens says.

    The calling thread compares them while the others are at work, and they stop where it finds a change: of a short request the
    comparison is a thirtieth, most of it waiting for memory.
    """
    if x.shape[1:] != (layers.hidden,):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (total, {layers.hidden}) for the layers")
    x, cu_seqlens = x.contiguous(), cu_seqlens.contiguous()
    y = torch.empty_like(x)
    threads, rows, batch, bounds = torch.get_num_threads(), x.shape[0], cu_seqlens.shape[0] - 1, cu_seqlens.data_ptr()
    size = layers.handle.workspace_bytes(bounds, rows, batch, threads)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    counters = _counters  # which lives until the call ends, whoever stops counting meanwhile
    unchanged = layers.handle.forward(
        x.data_ptr(), bounds, y.data_ptr(), workspace.data_ptr(), rows, batch, threads, snapshots,
        0 if counters is None else counters.data_ptr(),
    )  # fmt: skip
    return y if unchanged else None


class PackedEncoderLayers:
    """Layers of the same hidden size and dtype of rows, at least one, that one call runs one after the other (:func:`run_layers`).

    Their weights may differ in dtype, and their feed-forward networks in width.
    """

    def __init__(self, layers: Iterable[PackedEncoderLayer]) -> None:
        self._layers = list(layers)
        self.hidden = self._layers[0].hidden
        if any(layer.hidden != self.hidden for layer in self._layers):
            raise ValueError(f"layers have hidden sizes of {[layer.hidden for layer in self._layers]}, expected one for all")
        self.handle = EXTENSION.EncoderLayers([layer.handle for layer in self._layers])

    def __len__(self) -> int:
        return len(self._layers)

    @classmethod
    def joined(cls, parts: Iterable[PackedEncoderLayers]) -> PackedEncoderLayers:
        return cls(layer for part in parts for layer in part._layers)


class PackedWeights:
    """Linear layers' weights as this machine's kernels read them; later changes of them do not reach it.

    linears: a handle for each, which works for as long as this object lives.
    """

    def __init__(self, linears: Sequence[LinearWeights]) -> None:
        self._kept: list[Tensor] = []
        sizes = [EXTENSION.packed_weight_bytes(*linear.weight.shape, WEIGHT_DTYPES[linear.weight.dtype]) for linear in linears]
        places = huge_pages.empty(sum(sizes)).split(sizes)
        self.linears = [self._packed(linear, place) for linear, place in zip(linears, places, strict=True)]

    def _packed(self, linear: LinearWeights, packed: Tensor):
        out_features, in_features = linear.weight.shape
        weight = linear.weight.detach().contiguous()
        EXTENSION.pack_weight(
            weight.data_ptr(), packed.data_ptr(), out_features, in_features,
            WEIGHT_DTYPES[weight.dtype], torch.get_num_threads(),
        )  # fmt: skip
        sums = None
        if weight.dtype == torch.int8:
            # With VNNI the kernel multiplies unsigned activations, 128 too large.
            sums = (weight.sum(1, dtype=torch.int32) * 128).contiguous()
            self._kept.append(sums)
        self._kept.append(packed)
        return EXTENSION.PackedLinear(
            packed.data_ptr(), self.float32(linear.bias), self.float32(linear.scale), 0 if sums is None else sums.data_ptr(),
            out_features, in_features,
        )  # fmt: skip

    def float32(self, tensor: Tensor | None) -> int:
        """The address of a copy, which lives as long as this object; 0 for None."""
        if tensor is None:
            return 0
        copy = tensor.detach().to(torch.float32, copy=True).contiguous()
        self._kept.append(copy)
        return copy.data_ptr()


class PackedEncoderLayer:
    """A layer's weights, packed.

    dtype: of the rows that it is called with. The layer must be supported (:func:`not_supported_reasons`).
    """

    def __init__(self, weights: EncoderLayerWeights, dtype: torch.dtype) -> None:
        self.hidden = weights.hidden
        self._packed = packed = PackedWeights([linear for _, linear in weights.linears()])
        norms = [packed.float32(t) for _, norm in weights.norms() for t in (norm.weight, norm.bias)]
        self.handle = EXTENSION.EncoderLayer(
            *packed.linears, *norms, weights.attention_norm.eps, weights.output_norm.eps, weights.num_heads, weights.head_dim,
            weights.softmax_scale, DTYPES[dtype], WEIGHT_DTYPES[weights.dtype],
        )  # fmt: skip
