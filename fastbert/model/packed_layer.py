"""Encoder layers whose weights are packed for inference on a CPU: which can be, and whether they still hold what was packed.

A layer is packed at its first call without gradients and without dropout, for as long as it keeps its weights: the parameters are
the same tensors at the same place with the same version counters, and a few words of each are unchanged (an update through
``.data`` leaves the counters alone). A call that trains the layer drops the copy, so that training never holds weights twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.encoder_layer import EncoderLayerWeights
from ..ops.native_encoder import PackedEncoderLayer, not_supported_reasons
from ..ops.registration import under_autocast

_LINEARS = ("attention.self.query", "attention.self.key", "attention.self.value")
_LINEARS += ("attention.output.dense", "intermediate.dense", "output.dense")
_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")


class _Place(NamedTuple):
    """A tensor that was packed, and the dictionary of a module that has to hold it still."""

    holder: dict[str, Tensor | None]
    name: str
    tensor: Tensor


class _Entry(NamedTuple):
    places: list[_Place]
    versions: list[tuple[int, int]]
    samples: list[tuple[int, int]]
    fingerprint: int
    dtype: torch.dtype
    packed: PackedEncoderLayer | None  # None where this machine cannot run it
    reasons: list[str]


_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
_lock = threading.Lock()


def packed_layer(layer: nn.Module, x: Tensor, weights_of: Callable[[nn.Module], EncoderLayerWeights]) -> PackedEncoderLayer | None:
    """What runs this call of a layer without gradients, or None where it takes the ops one by one.

    The caller has made sure that ``layer``'s modules are plain ones (``layer_notes``); ``weights_of`` reads their weights.
    """
    if x.device.type != "cpu" or type(x) is not Tensor or not native.AVAILABLE or torch.compiler.is_compiling():
        return None
    if _drops(layer) or _learns(layer, x):
        _entries.pop(layer, None)
        return None
    if under_autocast(x):
        return None
    entry = _entries.get(layer)
    if entry is None or not _is_current(entry, x.dtype):
        with _lock:
            entry = _entries[layer] = _pack(layer, x.dtype, weights_of)
    return entry.packed


def packing_reasons(layer: nn.Module, dtype: torch.dtype, weights_of: Callable[[nn.Module], EncoderLayerWeights]) -> list[str]:
    """Why inference on a CPU takes this layer's ops one by one; empty where they are one call."""
    return not_supported_reasons(weights_of(layer), dtype, "cpu")


def _drops(layer: nn.Module) -> bool:
    return any(d.training and d.p > 0 for d in (layer.attention.self.dropout, layer.attention.output.dropout, layer.output.dropout))


def _learns(layer: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters()))


def _is_current(entry: _Entry, dtype: torch.dtype) -> bool:
    return (
        entry.dtype == dtype
        and all(place.holder.get(place.name) is place.tensor for place in entry.places)
        and entry.versions == _versions(entry.places)
        and entry.fingerprint == native.fingerprint(entry.samples)
        and (entry.packed is None or entry.packed.instruction_set == native.instruction_set())
    )


def _pack(layer: nn.Module, dtype: torch.dtype, weights_of: Callable[[nn.Module], EncoderLayerWeights]) -> _Entry:
    places = [
        _Place(holder, name, tensor)
        for path in (*_LINEARS, *_NORMS)
        for holder in _holders(layer.get_submodule(path))
        for name, tensor in holder.items()
        if tensor is not None
    ]
    samples = [(place.tensor.data_ptr(), place.tensor.nbytes) for place in places]
    versions, before = _versions(places), native.fingerprint(samples)
    weights = weights_of(layer)
    reasons = not_supported_reasons(weights, dtype, "cpu")
    packed = None if reasons else PackedEncoderLayer(weights, dtype)
    return _Entry(places, versions, samples, before, dtype, packed, reasons)


def _holders(module: nn.Module) -> tuple[dict[str, Tensor | None], ...]:
    return module._parameters, module._buffers


def _versions(places: list[_Place]) -> list[tuple[int, int]]:
    """Address and version of each tensor; those made in inference mode have no version, and cannot change outside of it."""
    return [(p.tensor.data_ptr(), -1 if p.tensor.is_inference() else p.tensor._version) for p in places]
