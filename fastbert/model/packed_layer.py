"""Encoder layers whose weights are packed for inference on a CPU: which can be, and whether they still hold what was packed.

A layer is packed at its first call without gradients and without dropout, for as long as it keeps its weights: the parameters are
the same tensors at the same place with the same version counters, and a few words of each are unchanged (an update through
``.data`` leaves the counters alone). A call that trains the layer drops the copy, so that training never holds weights twice.
"""

from __future__ import annotations

import operator
import threading
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.encoder_layer import EncoderLayerWeights, LayerNormWeights, LinearWeights
from ..ops.native_encoder import PackedEncoderLayer, not_supported_reasons
from ..ops.registration import under_autocast
from .int8 import Int8Linear, join
from .plain import is_exact_gelu, is_int8_linear, is_plain_linear


class _Entry(NamedTuple):
    """modules and tensors: what was packed. versions: address and version counter of each tensor; samples: address and bytes."""

    modules: list[nn.Module]
    tensors: list[Tensor]
    versions: list[tuple[int, int]]
    samples: list[tuple[int, int]]
    fingerprint: int
    dtype: torch.dtype
    packed: PackedEncoderLayer | None  # None where this machine cannot run it


_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
_lock = threading.Lock()


def packed_layer(layer: nn.Module, x: Tensor) -> PackedEncoderLayer | None:
    """What runs this call of a layer on rows x (total, hidden), or None where it takes the ops one by one.

    The layer is one that runs fused at all: ``layer_fallback_reasons`` has none.
    """
    if x.device.type != "cpu" or type(x) is not Tensor or not native.AVAILABLE or torch.compiler.is_compiling():
        return None
    if _drops(layer) or _learns(layer, x):
        _entries.pop(layer, None)
        return None
    linears = _linears(layer)
    if under_autocast(x) or _changed_parts(layer, linears):
        return None
    modules = [*linears, layer.attention.output.LayerNorm, layer.output.LayerNorm]
    entry = _entries.get(layer)
    if entry is None or not _is_current(entry, modules, x.dtype):
        with _lock:
            entry = _entries[layer] = _pack(layer, modules, x.dtype)
    return entry.packed


def packing_reasons(layer: nn.Module, dtype: torch.dtype) -> list[str]:
    """Why inference on a CPU takes this layer's ops one by one, for hidden states of ``dtype``; empty where they are one call."""
    if changed := _changed_parts(layer, _linears(layer)):
        return changed
    if any(tensor.is_meta for tensor in layer.state_dict().values()):
        return ["its weights are on the meta device"]
    return not_supported_reasons(_weights_of(layer), dtype, "cpu")


def _linears(layer: nn.Module) -> list[nn.Module]:
    attention = layer.attention
    projections = attention.self
    return [
        projections.query, projections.key, projections.value,
        attention.output.dense, layer.intermediate.dense, layer.output.dense,
    ]  # fmt: skip


def _changed_parts(layer: nn.Module, linears: list[nn.Module]) -> list[str]:
    """What a kernel for the whole layer does not know."""
    if not (all(map(is_plain_linear, linears)) or all(map(is_int8_linear, linears))):
        return ["its Linears are not all plain ones, or all int8"]
    if not is_exact_gelu(layer.intermediate.intermediate_act_fn):
        return ["its activation is not the erf-GELU"]
    return []


def _weights_of(layer: nn.Module) -> EncoderLayerWeights:
    """Of a layer without :func:`_changed_parts`."""
    query, key, value, attention_output, intermediate, output = _linears(layer)
    attention = layer.attention.self
    return EncoderLayerWeights(
        _joined([query, key, value]), _linear_weights(attention_output), _norm_weights(layer.attention.output.LayerNorm),
        _linear_weights(intermediate), _linear_weights(output), _norm_weights(layer.output.LayerNorm),
        attention.num_attention_heads, attention.scaling,
    )  # fmt: skip


def _joined(projections: list[nn.Module]) -> LinearWeights:
    if isinstance(projections[0], Int8Linear):
        weight, scale, bias = join(projections)
        return LinearWeights(weight, bias, scale)
    biases = [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in projections]
    return LinearWeights(torch.cat([linear.weight for linear in projections]), torch.cat(biases))


def _linear_weights(linear: nn.Module) -> LinearWeights:
    return LinearWeights(linear.weight, linear.bias, getattr(linear, "weight_scale", None))


def _norm_weights(norm: nn.LayerNorm) -> LayerNormWeights:
    return LayerNormWeights(norm.weight, norm.bias, norm.eps)


def _drops(layer: nn.Module) -> bool:
    return any(d.training and d.p > 0 for d in (layer.attention.self.dropout, layer.attention.output.dropout, layer.output.dropout))


def _learns(layer: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters()))


def _is_current(entry: _Entry, modules: list[nn.Module], dtype: torch.dtype) -> bool:
    tensors = _tensors(modules)
    return (
        entry.dtype == dtype
        and all(map(operator.is_, entry.modules, modules))
        and len(entry.tensors) == len(tensors)
        and all(map(operator.is_, entry.tensors, tensors))
        and entry.versions == _versions(tensors)
        and entry.fingerprint == native.fingerprint(entry.samples)
        and (entry.packed is None or entry.packed.instruction_set == native.instruction_set())
    )


@torch.no_grad()
def _pack(layer: nn.Module, modules: list[nn.Module], dtype: torch.dtype) -> _Entry:
    tensors = _tensors(modules)
    samples = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
    versions, fingerprint = _versions(tensors), native.fingerprint(samples)
    weights = _weights_of(layer)
    packed = None if not_supported_reasons(weights, dtype, "cpu") else PackedEncoderLayer(weights, dtype)
    return _Entry(modules, tensors, versions, samples, fingerprint, dtype, packed)


def _tensors(modules: list[nn.Module]) -> list[Tensor]:
    held = chain.from_iterable((*module._parameters.values(), *module._buffers.values()) for module in modules)
    return [tensor for tensor in held if tensor is not None]


def _versions(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Tensors that were made in inference mode have no version counter."""
    return [(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]
