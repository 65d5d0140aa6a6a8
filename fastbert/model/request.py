"""A call like one before, of a model that nobody has changed since: what such a call asks part by part, it asks at once.

Of a short request to a small model Python is a quarter. :func:`keep` remembers, at the end of a call that ran natively from end to
end, what it ran; :func:`answer` runs that again, after comparing with snapshots all that the call had looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops import native
from ..ops.native.encoder_layer import run_layers_if_unchanged
from ..ops.native.inference import are_readable_ids
from ..ops.registration import transform_reasons
from .attention_interface import is_known_attention
from .fallback import hidden_states_wanted, model_fallback_reasons
from .packed_ends import embed_at_once, entry_of, takes
from .packed_layer import stack_of
from .packing import Packing, begins_with_padding
from .plain import base_was_changed
from .row_selection import few_are_worth_it, reads_first_rows
from .snapshot import AttributesSnapshot, Snapshot, all_unchanged

# What a call asks a configuration for, under the names that transformers keeps it by; it may not have it yet.
_SETTINGS = (
    "_attn_implementation_internal", "_output_attentions", "is_causal", "is_decoder", "max_position_embeddings",
    "output_attentions", "output_hidden_states", "return_dict",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Request:
    """What a call ran, by references alone: it is freed where it would be without this."""

    attention: str
    embeddings: ref[Any]
    stack: ref[Any]
    pooler: ref[Any] | None  # of a model that has one
    read_first: list[Any]  # handles of the snapshots of configuration, model and embeddings, whose memory is read at once
    read_later: list[Any]  # of layers and pooler


_requests: WeakKeyDictionary[nn.Module, _Request] = WeakKeyDictionary()


def keep(model: nn.Module) -> None:
    """Remembers what a call of ``model`` without gradients ran, where all of it ran natively and nothing else was asked for."""
    if model in _requests or getattr(model, "embeddings_project", None) is not None:
        return
    config, layers, pooler = model.config, model.encoder.layer, getattr(model, "pooler", None)
    embeddings, stack = entry_of(model.embeddings), stack_of(layers[0])
    pooled = None if pooler is None else entry_of(pooler)
    if embeddings is None or stack is None or (pooler is not None and pooled is None):
        return
    if not stack.is_of(list(layers), stack.dtypes, native.instruction_set()):  # but of a model that shares the first one
        return
    rows, autocast = stack.dtypes
    if rows != embeddings.native_form.dtype or autocast is not None or (pooled is not None and pooled.native_form.dtype != rows):
        return
    if _asks_for_more(model):
        return
    request = _Request(
        config._attn_implementation, ref(embeddings), ref(stack), None if pooled is None else ref(pooled),
        [
            AttributesSnapshot(config, _SETTINGS).handle,
            Snapshot([model, model.encoder, layers], {model: ("config",)}, may_grow=False).handle,
            embeddings.snapshot.handle,
        ],
        [*stack.snapshots, *([] if pooled is None else [pooled.snapshot.handle])],
    )  # fmt: skip
    if model.config is config and not _asks_for_more(model):  # again: a change since the snapshots will be seen
        _requests[model] = request


def _asks_for_more(model: nn.Module) -> bool:
    """Whether settings or modules have a call do what :func:`answer` does not."""
    config = model.config
    more = hidden_states_wanted(config, {}) or getattr(config, "return_dict", True) is False
    return bool(more or model_fallback_reasons(model) or not reads_first_rows(model))


def answer(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    first_only: bool,
) -> tuple[Packing, Tensor, Tensor | None] | None:
    """The rows (total, hidden) of the last layer, how they are packed, and the pooler's output (batch, hidden); None where the call
    has to look at everything itself. ``first_only``: nobody will read other rows than the first of each sequence."""
    if not _is_ordinary(input_ids, attention_mask):
        return None
    request = _requests.get(model)
    if request is None:
        return None
    embeddings, stack = request.embeddings(), request.stack()
    pooler = None if request.pooler is None else request.pooler()
    gone = embeddings is None or stack is None or (request.pooler is not None and pooler is None)
    if gone or stack.instruction_set != native.instruction_set() or not all_unchanged(request.read_first):
        _requests.pop(model, None)
        return None
    if base_was_changed(type(model)) or stack.is_overruled() or not is_known_attention(request.attention):
        return None
    packing = Packing.from_mask(attention_mask, tuple(input_ids.shape), input_ids.device)
    if packing.indices is not None and begins_with_padding(attention_mask):
        return None
    total = (input_ids if packing.indices is None else packing.indices).numel()
    if total == 0 or (first_only and few_are_worth_it(packing.num_sequences, total, False)):
        return None
    x = embed_at_once(embeddings.native_form, model, packing, input_ids, token_type_ids, None)
    if x is None:
        return None
    rows = run_layers_if_unchanged(stack.packed, x, packing.cu_seqlens, request.read_later)
    if rows is None:
        _requests.pop(model, None)
        return None
    if pooler is None:
        return packing, rows, None
    dense = pooler.native_form
    pooled = dense(rows, packing.shape[1]) if packing.indices is None else dense(packing.first_positions(rows))
    return packing, rows, pooled.tanh_()


def _is_ordinary(input_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether torch's modes and the inputs make no call run otherwise than :func:`answer` does."""
    return (
        takes(input_ids)
        and input_ids.dim() == 2
        and (attention_mask is None or attention_mask.shape == input_ids.shape)
        and are_readable_ids(input_ids, attention_mask)  # token types are looked at where they are read
        and not (torch.is_autocast_enabled("cpu") or torch._C._is_tracing() or torch_module._has_any_global_hook())
        and not transform_reasons()
    )
