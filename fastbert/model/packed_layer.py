"""Encoder layers whose weights are packed for inference on a CPU: which can be, and whether they still hold what was packed.

A layer is packed at its first call without gradients and without dropout, for as long as it keeps its weights: the parameters are
the same tensors at the same place with the same version counters, and a few words of each are unchanged (an update through
``.data`` leaves the counters alone). A call that trains the layer drops the copy, so that training never holds weights twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..fork_safe import lock
from ..ops import calibration, native
from ..ops.encoder_layer import EncoderLayerWeights, LayerNormWeights, LinearWeights
from ..ops.linear import MEASURED_FLOPS
from ..ops.native.encoder_layer import (
    PackedEncoderLayer,
    PackedEncoderLayers,
    not_supported_reasons,
    run_layers,
    run_layers_if_unchanged,
)
from ..ops.registration import under_autocast
from .adjacent import cat_of_any
from .int8 import Int8Linear, join
from .packing import Packing
from .plain import base_was_changed, has_attributes_for_parameters, is_exact_gelu, is_int8_linear, is_plain_linear, is_watched
from .snapshot import Snapshot
from .swap import is_of_fast_class

_Dtypes = tuple[torch.dtype, torch.dtype | None]  # of rows, and autocast's


@dataclass(frozen=True, eq=False)
class _Entry:
    """A layer that was packed, as it was then, dropout included."""

    layer_type: type
    is_watched: bool
    snapshot: Snapshot
    dtypes: _Dtypes
    instruction_set: str
    packed: PackedEncoderLayers | None  # the one layer; None where this machine cannot run it

    def is_current(self, layer: nn.Module, dtypes: _Dtypes, instruction_set: str) -> bool:
        return (
            self.dtypes == dtypes
            and self.instruction_set == instruction_set
            and self.layer_type is type(layer)
            and not base_was_changed(self.layer_type)
            and self.snapshot.unchanged()
        )


@dataclass(frozen=True, eq=False)
class _Stack:
    """Layers that were called one after the other when all of them were packed and nobody watched them."""

    behind_first: list[ref[nn.Module]]  # one of them may be the first one again, which must not keep itself alive
    types: list[type]
    dtypes: _Dtypes
    instruction_set: str
    snapshots: list[Any]  # of the extension
    packed: PackedEncoderLayers

    def is_of(self, layers: list[nn.Module], dtypes: _Dtypes, instruction_set: str) -> bool:
        """Whether these layers have been packed for such calls, as they are unless one of the snapshots has changed."""
        return (
            self.dtypes == dtypes
            and self.instruction_set == instruction_set
            and [other() for other in self.behind_first] == layers[1:]
            and self.types == list(map(type, layers))
            and not self.is_overruled()
        )

    def is_overruled(self) -> bool:
        """Whether somebody put another ``forward`` on a class that one of the layers' was made of."""
        return any(map(base_was_changed, set(self.types)))


_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
_stacks: WeakKeyDictionary[nn.Module, _Stack] = WeakKeyDictionary()  # by the first layer
_lock = lock()


def packed_again(layer: nn.Module, x: Tensor) -> PackedEncoderLayers | None:
    """:func:`packed_layer` for a layer that was packed before, where nothing has changed since and nothing is trained."""
    if not native.AVAILABLE or torch.is_grad_enabled() or not _takes(x):
        return None
    entry = _current_entry(layer, _dtypes(x), native.instruction_set())
    return None if entry is None else entry.packed


def run_stack(layers: list[nn.Module], x: Tensor, packing: Packing) -> Tensor | None:
    """What the layers make of rows x (total, hidden), one after the other in one call; None where not all of them were packed
    before, or somebody watches one."""
    if not layers or not native.AVAILABLE or torch.is_grad_enabled() or not _takes(x):
        return None
    dtypes, instruction_set = _dtypes(x), native.instruction_set()
    stack = _stacks.get(layers[0])
    if stack is not None and stack.is_of(layers, dtypes, instruction_set):
        rows = run_layers_if_unchanged(stack.packed, x, packing.cu_seqlens, stack.snapshots)
        if rows is not None:
            return rows
    entries = [_current_entry(layer, dtypes, instruction_set) for layer in layers]
    if not all(_runs_in_stack(layer, entry) for layer, entry in zip(layers, entries, strict=True)):
        return None
    stack = _stacks[layers[0]] = _Stack(
        list(map(ref, layers[1:])), list(map(type, layers)), dtypes, instruction_set,
        [entry.snapshot.handle for entry in entries], PackedEncoderLayers.joined(entry.packed for entry in entries),
    )  # fmt: skip
    return run_layers(stack.packed, x, packing.cu_seqlens)


def stack_of(first: nn.Module) -> _Stack | None:
    """What the layers that begin with this one were packed into, whether it is current or not."""
    return _stacks.get(first)


def _runs_in_stack(layer: nn.Module, entry: _Entry | None) -> bool:
    return entry is not None and entry.packed is not None and not entry.is_watched and is_of_fast_class(layer)


def packed_layer(layer: nn.Module, x: Tensor) -> PackedEncoderLayers | None:
    """What runs this call of a layer on rows x (total, hidden), or None where it takes the ops one by one.

    The layer is one that runs fused at all: ``layer_fallback_reasons`` has none. Raises ValueError where its weights do not fit
    together, RuntimeError where they are elsewhere than x.
    """
    if torch.compiler.is_compiling() or not native.AVAILABLE:
        return None
    if not _takes(x) or is_trained(layer, x) or _changed_parts(layer):
        if layer in _entries:
            forget(layer)
        return None
    entry = _current_entry(layer, _dtypes(x), native.instruction_set())
    if entry is None:
        if elsewhere := {str(tensor.device) for tensor in _held(layer) if tensor.device != x.device}:
            raise RuntimeError(f"an encoder layer has weights on {', '.join(sorted(elsewhere))}, its input is on {x.device}")
        with _lock:
            forget(layer)
            entry = _entries[layer] = _pack(layer, _dtypes(x))
    return entry.packed


def _current_entry(layer: nn.Module, dtypes: _Dtypes, instruction_set: str) -> _Entry | None:
    entry = _entries.get(layer)
    return entry if entry is not None and entry.is_current(layer, dtypes, instruction_set) else None


def forget(layer: nn.Module) -> None:
    """Frees what is packed of a layer."""
    known = _entries.pop(layer, None) is not None
    if known or _stacks:  # which another thread may have made since it was forgotten
        for reference in _stacks.keyrefs():  # a copy: other threads may add stacks meanwhile
            first = reference()
            stack = None if first is None else _stacks.get(first)
            if stack is not None and any(layer is other for other in (first, *(other() for other in stack.behind_first))):
                _stacks.pop(first, None)


def drop_if_trained(layer: nn.Module, x: Tensor) -> None:
    """Where a call of this layer on x trains it, or has dropout, there is no packed copy of it from now on."""
    if is_trained(layer, x):
        forget(layer)


def is_trained(layer: nn.Module, x: Tensor) -> bool:
    """Whether a call of this layer on x has gradients or dropout."""
    return _drops(layer) or _learns(layer, x)


def _takes(x: Tensor) -> bool:
    # First: compiled code would guard on what it looks at afterwards, the table of entries above all.
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and type(x) is Tensor


def _dtypes(x: Tensor) -> _Dtypes:
    return x.dtype, torch.get_autocast_dtype("cpu") if under_autocast(x) else None


def packing_reasons(layer: nn.Module, dtype: torch.dtype) -> list[str]:
    """Why inference on a CPU takes this layer's ops one by one, for hidden states of ``dtype`` and under the autocast that is on;
    empty where they are one call."""
    if changed := _changed_parts(layer):
        return changed
    if any(tensor.is_meta for tensor in layer.state_dict().values()):
        return ["its weights are on the meta device"]
    if _drops(layer):
        return ["dropout is on, as in training (model.eval() ends that)"]
    half = dtype != torch.float64 and torch.is_autocast_enabled("cpu")
    autocast = torch.get_autocast_dtype("cpu") if half else None
    weights = _weights_under(autocast, layer)
    if reasons := not_supported_reasons(weights, dtype, "cpu"):
        return reasons
    rates = calibration.known().get(_kind(weights, dtype), {}) if calibration.is_on() else {}
    if rates and next(iter(rates)) != _ONE_CALL:
        return [f"measured here: {', '.join(f'{name} {rate / 1e9:,.0f} GFLOP/s' for name, rate in rates.items())}"]
    return []


# The candidates, the default first, and a batch of about as many tokens as a short request has.
_ONE_CALL, _OP_BY_OP = "one call", "op by op"
_TIMED_LENGTHS = (64,) * 8


def _kind(weights: EncoderLayerWeights, rows: torch.dtype) -> str:
    names = (str(dtype).removeprefix("torch.") for dtype in (weights.dtype, rows))
    return "encoder layer, weights {}, rows {}".format(*names)


def _measured_fastest(layer: nn.Module, packed: PackedEncoderLayers, weights: EncoderLayerWeights, dtypes: _Dtypes) -> str:
    """Which of the candidates is the faster on this machine: oneDNN may multiply with instructions that our kernels lack."""
    total, (rows, autocast) = sum(_TIMED_LENGTHS), dtypes
    flops = 2 * total * sum(linear.weight.numel() for _, linear in weights.linears())
    if flops < 4 * MEASURED_FLOPS or not calibration.is_on():
        return _ONE_CALL
    bounds = torch.tensor([0, *accumulate(_TIMED_LENGTHS)], dtype=torch.int32, device="cpu")
    packing = Packing(bounds, max(_TIMED_LENGTHS), (len(_TIMED_LENGTHS), max(_TIMED_LENGTHS)))

    def op_by_op(x: Tensor) -> Tensor:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return layer.op_by_op(x, packing)

    def operands() -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(0)  # of its own: what the caller draws from torch's depends on no first call
        return (torch.randn(total, weights.hidden, generator=generator, device="cpu").to(rows),)

    kind, candidates = _kind(weights, rows), {_ONE_CALL: lambda x: run_layers(packed, x, bounds), _OP_BY_OP: op_by_op}
    if not calibration.is_known(kind, candidates):
        op_by_op(*operands())  # its matmuls are calibrated first
    return calibration.fastest(kind, candidates, operands, flops)


def _linears(layer: nn.Module) -> list[nn.Module]:
    attention = layer.attention
    projections = attention.self
    return [
        projections.query, projections.key, projections.value,
        attention.output.dense, layer.intermediate.dense, layer.output.dense,
    ]  # fmt: skip


def _norms(layer: nn.Module) -> list[nn.Module]:
    return [layer.attention.output.LayerNorm, layer.output.LayerNorm]


def _held(layer: nn.Module) -> list[Tensor]:
    """The tensors that are packed."""
    modules = (*_linears(layer), *_norms(layer))
    held = chain.from_iterable((*module._parameters.values(), *module._buffers.values()) for module in modules)
    return [tensor for tensor in held if tensor is not None]


def _changed_parts(layer: nn.Module) -> list[str]:
    """What a kernel for the whole layer does not know."""
    linears = _linears(layer)
    if not (all(map(is_plain_linear, linears)) or all(map(is_int8_linear, linears))):
        return ["its Linears are not all plain ones, or all int8"]
    if not is_exact_gelu(layer.intermediate.intermediate_act_fn):
        return ["its activation is not the erf-GELU"]
    if any(map(has_attributes_for_parameters, (*linears, *_norms(layer)))):
        return ["a weight or bias of its is a tensor that is no parameter"]
    width, hidden = linears[0].weight.shape[:2]
    if width != hidden:
        return [f"its queries are {width} wide, where hidden states are {hidden}: heads were pruned"]
    return []


def _weights_of(layer: nn.Module) -> EncoderLayerWeights:
    """Of a layer without :func:`_changed_parts`.

    They are what the parameters hold now, and keep that: another thread that casts or moves the model meanwhile gives these other
    memory, of another size.
    """
    query, key, value, attention_output, intermediate, output = _linears(layer)
    attention = layer.attention.self
    return EncoderLayerWeights(
        _joined([query, key, value]), _linear_weights(attention_output), _norm_weights(layer.attention.output.LayerNorm),
        _linear_weights(intermediate), _linear_weights(output), _norm_weights(layer.output.LayerNorm),
        attention.num_attention_heads, attention.scaling,
    )  # fmt: skip


def _weights_under(autocast: torch.dtype | None, layer: nn.Module) -> EncoderLayerWeights:
    """:func:`_weights_of` as calls under autocast multiply them; None: without."""
    weights = _weights_of(layer)
    return weights if autocast is None or weights.dtype == torch.int8 else weights.with_linears(autocast)


def _joined(projections: list[nn.Module]) -> LinearWeights:
    if isinstance(projections[0], Int8Linear):
        weight, scale, bias = join(projections)
        return LinearWeights(weight, bias, scale)
    linears = [_linear_weights(linear) for linear in projections]
    biases = [weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias, _ in linears]
    return LinearWeights(cat_of_any([weight for weight, *_ in linears]), cat_of_any(biases))


def _linear_weights(linear: nn.Module) -> LinearWeights:
    """Detached: other threads may give a parameter other memory while it is packed."""
    is_int8 = isinstance(linear, Int8Linear)
    tensors = (linear.matrix, linear.bias, linear.weight_scale) if is_int8 else (linear.weight, linear.bias)
    return LinearWeights(*(None if tensor is None else tensor.detach() for tensor in tensors))


def _norm_weights(norm: nn.LayerNorm) -> LayerNormWeights:
    return LayerNormWeights(norm.weight.detach(), norm.bias.detach(), norm.eps)


def _dropouts(layer: nn.Module) -> list[tuple[nn.Dropout, nn.Module]]:
    """And the modules whose mode decides whether they drop: attention takes the probability and its own mode."""
    attention, ends = layer.attention.self, (layer.attention.output.dropout, layer.output.dropout)
    return [(attention.dropout, attention), *((dropout, dropout) for dropout in ends)]


def _drops(layer: nn.Module) -> bool:
    return any(decides.training and dropout.p > 0 for dropout, decides in _dropouts(layer))


def _learns(layer: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters()))


@torch.no_grad()
def _pack(layer: nn.Module, dtypes: _Dtypes) -> _Entry:
    norms = _norms(layer)
    attributes = {
        layer: ("chunk_size_feed_forward",),
        layer.attention.self: ("num_attention_heads", "scaling", "is_causal"),
        layer.intermediate.intermediate_act_fn: ("approximate",),
    }
    attributes |= dict.fromkeys(norms, ("eps",))
    for dropout, decides in _dropouts(layer):
        attributes[dropout] = ("p",)
        if dropout.p > 0:
            attributes[decides] = (*attributes[decides], "training")
    snapshot = Snapshot(layer.modules(), attributes, _held(layer))
    rows, autocast = dtypes
    weights = _weights_under(autocast, layer)
    weights.check()  # the native code would read beyond what is too short
    packed = None if not_supported_reasons(weights, rows, "cpu") else PackedEncoderLayers([PackedEncoderLayer(weights, rows)])
    if packed is not None and _measured_fastest(layer, packed, weights, dtypes) != _ONE_CALL:
        packed = None
    return _Entry(type(layer), is_watched(layer), snapshot, dtypes, native.instruction_set(), packed)
