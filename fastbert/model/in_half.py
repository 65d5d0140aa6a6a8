"""Under autocast in training: all layers' weights in half precision by a few launches, instead of six for each layer.

On a GPU a launch costs its host up to 0.1 ms, and converts a small matrix in less. ``torch._foreach_copy_`` converts many tensors
in one. What is made here goes to ``trained_layer`` with the forward pass's ``Packing``, once: a layer that is recomputed in the
backward pass converts its own again, as does one whose parameters somebody changes in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.registration import dispatch_mode_is_on, transform_reasons, under_autocast
from .adjacent import are_adjacent, joined
from .layer import FusedLayer
from .packing import InHalf, Packing
from .plain import is_plain_linear

_ALIGNMENT = 128  # elements: 256 bytes, where an allocation of its own would begin


def convert_for(layers: Sequence[nn.Module], x: Tensor, packing: Packing) -> None:
    """Leaves with ``packing`` what the ``layers`` that are trained on ``x`` will read under autocast. CPUs convert as they go: a
    launch costs nothing there, and what was converted long ago has left the caches."""
    if x.device.type != "cpu":
        convert_if_wanted(layers, x, packing)


def convert_if_wanted(layers: Sequence[nn.Module], x: Tensor, packing: Packing) -> None:
    """:func:`convert_for` on any device."""
    if is_wanted(x):
        packing.in_half.update(converted(layers, x))  # not rebound: the packings of copied layers have the same dict


def is_wanted(x: Tensor) -> bool:
    """Whether a forward pass of rows ``x`` is one of training, under autocast, that nothing watches or compiles."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.dtype != torch.float32 or not under_autocast(x):
        return False
    return not (dispatch_mode_is_on() or transform_reasons())


def converted(layers: Sequence[nn.Module], x: Tensor) -> dict[nn.Module, InHalf]:
    """By layer; without those that are frozen, or that multiply something else than their parameters."""
    sources = {layer: found for layer in layers if (found := _sources(layer, x))}
    originals = {layer: [joined(group) for group in groups] for layer, groups in sources.items()}
    flat = [original for group in originals.values() for original in group]
    parts = iter(_in_one_buffer(flat, torch.get_autocast_dtype(x.device.type)))
    return {
        layer: InHalf.of([next(parts) for _ in originals[layer]], [p for group in groups for p in group])
        for layer, groups in sources.items()
    }


def _in_one_buffer(originals: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in ``dtype``, each at a multiple of :data:`_ALIGNMENT` elements."""
    if not originals:
        return []
    sizes = [-(-original.numel() // _ALIGNMENT) * _ALIGNMENT for original in originals]
    buffer = torch.empty(sum(sizes), dtype=dtype, device=originals[0].device)
    copies = [part[: o.numel()].view(o.shape) for part, o in zip(buffer.split(sizes), originals, strict=True)]
    with torch.no_grad():
        torch._foreach_copy_(copies, originals)
    return copies


def _sources(layer: nn.Module, x: Tensor) -> list[tuple[Tensor, ...]]:
    """The parameters of what ``_TrainedLayer.forward`` multiplies, in its order; none where they are not what it would take.

    What else may keep a layer from it is not asked, for the time that it takes: then they are made for nothing.
    """
    if not isinstance(layer, FusedLayer):
        return []
    attention = layer.attention.self
    projections = attention.query, attention.key, attention.value
    project, first, second = layer.attention.output.dense, layer.intermediate.dense, layer.output.dense
    if not all(is_plain_linear(linear) and linear.bias is not None for linear in (*projections, project, first, second)):
        return []
    weights, biases = [p.weight for p in projections], [p.bias for p in projections]
    groups = [tuple(weights), tuple(biases), (project.weight,), (first.weight,), (first.bias,), (second.weight,)]
    parameters = [p for group in groups for p in group]
    if any(p.dtype != x.dtype or p.device != x.device or not p.is_contiguous() for p in parameters):
        return []
    return groups if any(p.requires_grad for p in parameters) and are_adjacent(weights, biases) else []
